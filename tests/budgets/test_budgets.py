"""Budgets: what is kept adds up, heads have what the compressor makes of them, and who has more."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import baselines, budgets
from coreset_jax.budgets.adaptive import _shares
from coreset_jax.budgets.energy import energies
from coreset_jax.budgets.pyramid import layer_budgets
from coreset_jax.budgets.split import _split_all, grid, select, split

RNG = jax.random.key(0)
LAYERS, HEADS, COUNT, WIDTH, SIZE = 3, 4, 80, 8, 16
UNIFORM = baselines.uniform()
WRAPPERS = {
    "pyramid": budgets.pyramid,
    "adaptive": budgets.adaptive,
    "by_energy": budgets.by_energy,
}


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    return WRAPPERS[request.param]


# The same with fewer sizes to compile.
COARSE = {
    "pyramid": budgets.pyramid,
    "adaptive": functools.partial(budgets.adaptive, steps=1),
    "by_energy": functools.partial(budgets.by_energy, steps=1),
}


@pytest.fixture(params=COARSE)
def wrap_coarsely(request):
    return COARSE[request.param]


@pytest.fixture(scope="module")
def cache():
    """Keys, values and queries of heads with ever more dimensions and ever sharper attention."""
    keys, queries = np.random.default_rng(0).standard_normal((2, LAYERS, HEADS, COUNT, WIDTH))
    keys *= np.arange(WIDTH) < np.array([1, 2, 4, 8])[:, None, None]
    values = np.tanh(keys + keys[..., ::-1])
    keys *= np.array([0.1, 1.0, 3.0, 6.0])[:, None, None]
    return tuple(array.astype(np.float32) for array in (keys, values, queries[..., :20, :]))


def compress(compressor, cache, size=SIZE, **options):
    keys, values, queries = cache
    coreset = compressor(RNG, keys, values, size=size, queries=queries, **options)
    # What is looked at head by head would be a program each.
    return jax.tree.map(np.asarray, coreset)


def kept_pairs(coreset):
    return np.sum(np.asarray(coreset.indices) >= 0, axis=-1)


def test_pairs_add_up_to_no_more_than_the_budget(wrap, cache):
    for size in (1, 5, 79):
        coreset = compress(wrap(UNIFORM), cache, size)
        kept = kept_pairs(coreset)
        assert coreset.indices.shape[:-1] == (LAYERS, HEADS)
        assert kept.max() <= coreset.indices.shape[-1] <= min(2 * size, COUNT)
        assert kept.min() >= 1
        # pyramid splits over layers, the others within each.
        totals = kept.sum() / LAYERS if wrap is budgets.pyramid else kept.sum(axis=-1)
        assert np.all(totals <= HEADS * size)
        # And the next step would have been too much for any head.
        assert np.all(totals > 0.6 * HEADS * size)


@pytest.mark.slow
def test_heads_have_what_the_compressor_makes_of_them(cache):
    compressor = baselines.kmeans(iterations=1)
    for wrap in (budgets.adaptive, budgets.by_energy):
        coreset = compress(wrap(compressor), cache)
        kept = kept_pairs(coreset)
        assert len(np.unique(kept)) > 1
        for size in np.unique(kept):
            plain = compress(compressor, cache, int(size))
            for head in np.argwhere(kept == size):
                here = tuple(head)
                slots = np.arange(coreset.indices.shape[-1]) < size
                for found, expected in zip(coreset[:4], plain[:4], strict=True):
                    np.testing.assert_array_equal(found[here][slots], expected[here])
                assert np.all(coreset.indices[here][~slots] == -1)
                assert np.all(np.isneginf(coreset.log_weights[here][~slots]))
                assert not np.any(coreset.keys[here][~slots])


def test_layers_have_what_the_compressor_makes_of_them(cache):
    compressor = budgets.pyramid(baselines.top_attention())
    coreset = compress(compressor, cache)
    expected = layer_budgets(LAYERS, SIZE, COUNT, beta=20.0)
    np.testing.assert_array_equal(kept_pairs(coreset), np.tile(expected, (HEADS, 1)).T)
    for layer, size in enumerate(expected):
        plain = compress(baselines.top_attention(), [array[layer] for array in cache], size)
        np.testing.assert_array_equal(coreset.indices[layer, :, :size], plain.indices)
    # The layers may be any axis.
    moved = [np.moveaxis(array, 0, 1) for array in cache]
    again = compress(budgets.pyramid(baselines.top_attention(), axis=1), moved)
    np.testing.assert_array_equal(np.moveaxis(again.indices, 1, 0), coreset.indices)


@pytest.mark.parametrize("beta", [1.0, 2.0, 20.0])
def test_pyramids_fall_in_a_line(beta):
    for layers in (1, 2, 5, 32):
        for count in (70, 1000):
            for size in (1, 2, 16, 64, 69):
                found = layer_budgets(layers, size, count, beta)
                assert sum(found) <= layers * size
                assert sum(found) > layers * size - layers
                assert 1 <= min(found) <= max(found) <= count
                steps = -np.diff(found)
                assert np.all(steps >= 0)
                # A line, but for rounding.
                assert np.ptp(steps) <= 2 if len(steps) else found == (size,)
                if beta == 1.0:
                    assert set(found) == {size}
    assert layer_budgets(5, 64, 1000, 20.0)[-1] == int(64 / 20)


@pytest.mark.slow
def test_equal_heads_are_treated_alike(cache):
    equal = [np.broadcast_to(array[:1, :1], array.shape) for array in cache]
    # Where nothing is to be split, whatever the heads; and where a method draws nothing.
    plain = compress(baselines.kmeans(iterations=1), equal)
    for compressor in (
        budgets.pyramid(baselines.kmeans(iterations=1), beta=1.0),
        budgets.adaptive(baselines.kmeans(iterations=1), safeguard=1.0),
    ):
        chex.assert_trees_all_equal(strip(compress(compressor, equal)), plain)
    plain = compress(baselines.top_attention(), equal)
    for wrap in (budgets.adaptive, budgets.by_energy):
        chex.assert_trees_all_equal(strip(compress(wrap(baselines.top_attention()), equal)), plain)


def strip(coreset):
    """Without the slots that are empty in all heads."""
    most = int(kept_pairs(coreset).max())
    return cj.Coreset(
        coreset.keys[..., :most, :],
        coreset.values[..., :most, :],
        coreset.log_weights[..., :most],
        coreset.indices[..., :most],
        None if coreset.normalizers is None else coreset.normalizers[..., :most],
    )


def split_by_hand(shares, lengths, sizes, size):
    """Every head goes up, the one that is furthest behind its share first, while pairs last."""
    heads = len(shares)
    levels = [0] * heads
    shares = [share if np.isfinite(share) and share > 0 else 0.0 for share in shares]

    def pairs(levels):
        return sum(min(sizes[level], length) for level, length in zip(levels, lengths, strict=True))

    steps = [(head, step) for head in range(heads) for step in range(len(sizes) - 1)]
    steps.sort(key=lambda s: (-shares[s[0]] / math.sqrt(sizes[s[1]] * sizes[s[1] + 1]), s[1], s[0]))
    for head, step in steps:
        if levels[head] == step:
            higher = [level + (other == head) for other, level in enumerate(levels)]
            if pairs(higher) <= heads * size:
                levels = higher
    return levels


def test_split_agrees_with_the_rule_written_out():
    rng = np.random.default_rng(0)
    sizes = grid(20, 50, 0.3, 2.0, 3)
    for _ in range(30):
        shares = np.exp(rng.standard_normal((2, 3, 4))).astype(np.float32)
        shares[0, 0, 1] = rng.choice([np.nan, 0.0, np.inf])
        lengths = rng.integers(1, 51, shares.shape)
        together = split(shares, lengths, 50, (2,), sizes=sizes, size=20)
        for row in np.ndindex(2, 3):
            expected = split_by_hand(shares[row], lengths[row], sizes, 20)
            np.testing.assert_array_equal(together[row], expected)
        # One budget for two axes, which need not be the last.
        together = split(shares, lengths, 50, (0, 2), sizes=sizes, size=20)
        for row in range(3):
            expected = split_by_hand(shares[:, row].ravel(), lengths[:, row].ravel(), sizes, 20)
            np.testing.assert_array_equal(np.ravel(together[:, row]), expected)


def test_adaptive_counts_the_largest_scores(cache):
    keys, _, queries = cache
    lengths = np.random.default_rng(1).integers(30, COUNT + 1, (LAYERS, HEADS))
    options = {"size": SIZE, "safeguard": 0.2, "scale": 0.3}
    found = _shares(keys, lengths, queries, axes=(1,), **options)
    scores = 0.3 * np.einsum("...qd,...nd->...qn", np.float64(queries), np.float64(keys))
    inside = np.arange(COUNT) < lengths[..., None, None]
    masses = np.where(inside, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    scores = (masses / masses.sum(axis=-1, keepdims=True)).mean(axis=-2)
    for layer in range(LAYERS):
        largest = np.argsort(-scores[layer], axis=None)[: HEADS * SIZE] // COUNT
        counts = np.bincount(largest, minlength=HEADS)
        np.testing.assert_allclose(found[layer], 0.2 * SIZE + 0.8 * counts, rtol=1e-6)
    together = _shares(keys, lengths, queries, axes=(0, 1), **options)
    largest = np.argsort(-scores, axis=None)[: LAYERS * HEADS * SIZE] // COUNT
    counts = np.bincount(largest, minlength=LAYERS * HEADS)
    np.testing.assert_allclose(np.ravel(together), 0.2 * SIZE + 0.8 * counts, rtol=1e-6)


def test_adaptive_keeps_more_of_the_attention(cache):
    keys, _, queries = cache
    scores = np.einsum("...qd,...nd->...qn", queries, keys) / np.sqrt(WIDTH)
    scores = np.asarray(jax.nn.softmax(scores, axis=-1)).mean(axis=-2)
    even, uneven = (
        np.sum(np.take_along_axis(scores, coreset.indices, axis=-1), where=coreset.indices >= 0)
        for coreset in (
            compress(each, cache, 8)
            for each in (baselines.top_attention(), budgets.adaptive(baselines.top_attention()))
        )
    )
    assert uneven > even


def test_energy_is_that_of_attention_in_the_kernel_of_the_balance(cache):
    keys, values, _ = (array[0, 2] for array in cache)
    coreset = cj.refit.log_weights(UNIFORM)(RNG, keys, values, size=SIZE)
    coreset = coreset._replace(normalizers=jnp.linspace(0.5, 1.5, SIZE))
    found = energies(keys, values, None, coreset, None, None, None, probes=40, scale=None)
    geometry = cj.geometry.balancing_geometry(cj.problem.reduce(keys, values))
    unit, kept = (
        np.asarray(geometry.keys(jnp.asarray(a)), np.float64) for a in (keys, coreset.keys)
    )
    marks, radius = unit[1::2], float(geometry.radius)
    source, others = (
        np.asarray(geometry.values(jnp.asarray(a)), np.float64) for a in (values, coreset.values)
    )
    exact = np.exp(radius * marks @ unit.T)
    weighed = np.exp(radius * marks @ kept.T + np.asarray(coreset.log_weights, np.float64))
    total = weighed @ np.asarray(coreset.normalizers, np.float64)
    wrong = exact @ source / exact.sum(axis=1)[:, None] - weighed @ others / total[:, None]
    np.testing.assert_allclose(found, np.sum(wrong**2, axis=1).mean(), rtol=1e-4)


@pytest.mark.slow
def test_energy_helps_where_heads_differ():
    """Half of the heads are covered by a few pairs; the others can use what those leave."""
    rng = np.random.default_rng(3)
    keys = rng.standard_normal((6, 256, 12))
    keys[:3, :, 1:] = 0
    keys[3:] *= 1.5
    values = np.tanh(keys @ rng.standard_normal((12, 12)) / 2)
    keys, values = keys.astype(np.float32), values.astype(np.float32)
    queries = rng.standard_normal((6, 200, 12)).astype(np.float32)
    compressor = cj.baselines.wildcat()
    exact = cj.attention(queries, keys, values)
    even, uneven = (
        float(jnp.mean(jnp.linalg.norm(cj.attend(queries, coreset) - exact, axis=-1)))
        for coreset in (
            each(RNG, keys, values, size=20) for each in (compressor, budgets.by_energy(compressor))
        )
    )
    assert uneven < 0.9 * even


def test_lengths_are_respected_and_short_heads_yield(wrap, cache):
    lengths = np.random.default_rng(2).integers(3, COUNT + 1, (LAYERS, HEADS))
    lengths[:, 0] = 2
    inside = (np.arange(COUNT) < lengths[..., None])[..., None]
    zeros, garbage = (
        [np.where(inside, array, np.float32(filling)) for array in cache[:2]]
        for filling in (0, np.nan)
    )
    compressor = wrap(UNIFORM)
    coreset, again = (
        compress(compressor, (*arrays, cache[2]), lengths=lengths) for arrays in (zeros, garbage)
    )
    chex.assert_trees_all_equal(coreset, again)
    kept = kept_pairs(coreset)
    assert np.all(kept <= lengths)
    assert np.all(coreset.indices < lengths[..., None])
    assert kept.sum() <= LAYERS * HEADS * SIZE
    np.testing.assert_allclose(np.exp(coreset.log_weights).sum(axis=-1), lengths, rtol=1e-5)


@pytest.mark.slow
def test_normalizers_pass_through(wrap_coarsely, cache):
    compressor = wrap_coarsely(baselines.wildcat())
    # At the larger size some heads are kept whole, and those have none of their own.
    for size in (SIZE, 60):
        coreset = compress(compressor, cache, size)
        assert coreset.normalizers.shape == coreset.log_weights.shape
        outputs = cj.attend(cache[2], coreset)
        exact = cj.attention(*(cache[which] for which in (2, 0, 1)))
        assert np.all(np.isfinite(outputs))
        if size == 60:
            assert np.linalg.norm(outputs - exact) < 0.5 * np.linalg.norm(exact)


def test_whole_cache_where_nothing_has_to_go(wrap_coarsely, cache):
    for size in (COUNT, COUNT + 5):
        chex.assert_trees_all_equal(
            compress(wrap_coarsely(UNIFORM), cache, size), compress(UNIFORM, cache, size)
        )


def test_heads_that_are_not_finite_say_so_and_harm_no_other(wrap_coarsely, cache):
    keys = cache[0].copy()
    keys[1, 2, 5, 3] = np.nan
    coreset = compress(wrap_coarsely(UNIFORM), (keys, *cache[1:]))
    sick = np.isnan(np.asarray(coreset.log_weights))
    assert np.all(sick[1, 2])
    assert sick.sum() == sick.shape[-1]
    # The others share among themselves what it leaves.
    kept = kept_pairs(coreset)
    assert kept.sum() <= LAYERS * HEADS * SIZE


def test_second_call_does_not_retrace(wrap, cache):
    keys, values, queries = (array[..., :31, :] for array in cache)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def jitted(rng, keys, values, queries):
        return wrap(UNIFORM)(rng, keys, values, size=9, queries=queries)

    sizes = [module._cache_size() for module in jits()]
    for seed in range(3):
        arrays = (keys + np.float32(seed), values, queries)
        plain = wrap(UNIFORM)(jax.random.key(seed), *arrays[:2], size=9, queries=queries)
        if seed == 0:
            sizes = [module._cache_size() for module in jits()]
        found = jitted(jax.random.key(seed), *arrays)
        np.testing.assert_array_equal(found.indices, plain.indices)
    assert [module._cache_size() for module in jits()] == sizes


def jits():
    return (
        _shares,
        energies,
        _split_all,
        select,
    )


@pytest.mark.slow
def test_transformations_and_types(wrap_coarsely, cache):
    compressor = wrap_coarsely(UNIFORM)
    expected = compress(compressor, cache)
    rngs = jnp.stack([RNG, RNG])
    arrays = [jnp.stack([array, array]) for array in cache]
    mapped = jax.vmap(lambda rng, *each: compressor(rng, *each[:2], size=SIZE, queries=each[2]))
    found = mapped(rngs, *arrays)
    np.testing.assert_array_equal(found.indices[1], expected.indices)
    half = compress(compressor, [array.astype(jnp.bfloat16) for array in cache])
    assert half.keys.dtype == half.values.dtype == jnp.bfloat16
    assert half.log_weights.dtype == jnp.float32
    lengths = np.full((LAYERS, HEADS), COUNT, np.uint8)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        strict = compress(compressor, cache, lengths=lengths)
    np.testing.assert_array_equal(strict.indices, expected.indices)
    assert hash(wrap_coarsely(UNIFORM)) == hash(compressor)
    assert wrap_coarsely(UNIFORM) == compressor


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (budgets.pyramid, {"beta": 0.5}, "beta must be at least 1"),
        (budgets.pyramid, {"axis": 1.0}, "axis must be a static Python int"),
        (budgets.adaptive, {"safeguard": 1.5}, "safeguard must be at most 1"),
        (budgets.adaptive, {"safeguard": 0.0}, "safeguard must be positive"),
        (budgets.adaptive, {"most": 0.9}, "most must be at least 1"),
        (budgets.adaptive, {"axes": ()}, "axes must be one or more"),
        (budgets.adaptive, {"axes": "heads"}, "axes must be one or more"),
        (budgets.adaptive, {"scale": -1.0}, "scale must be positive"),
        (budgets.by_energy, {"least": None}, "least must be a number"),
        (budgets.by_energy, {"steps": 0}, "steps must be at least 1"),
        (budgets.by_energy, {"probes": 2.0}, "probes must be a static Python int"),
        (budgets.by_energy, {"order": 0.0}, "order must be positive"),
    ],
)
def test_bad_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(UNIFORM, **options)


def test_bad_arguments_are_refused(wrap, cache):
    with pytest.raises(ValueError, match="compressor must be callable"):
        wrap(None)
    keys, values, queries = cache
    for change, message in [
        ({"size": 0}, "size must be at least 1"),
        ({"values": values[..., 1:, :]}, "as many pairs"),
        ({"lengths": np.full(HEADS, 3)}, "leading axes"),
        ({"queries": queries[..., 1:]}, r"queries \(3, 4, 20, 7\) and keys \(3, 4, 80, 8\)"),
    ]:
        arguments = {"keys": keys, "values": values, "size": SIZE, "queries": queries, **change}
        with pytest.raises(ValueError, match=message):
            wrap(UNIFORM)(RNG, **arguments)
    one_head = {"keys": keys[0, 0], "values": values[0, 0], "queries": queries[0, 0]}
    with pytest.raises(ValueError, match=r"of which there are 0; got .* keys \(80, 8\)"):
        wrap(UNIFORM)(RNG, **one_head, size=SIZE)


def test_other_bad_arguments_are_refused(cache):
    keys, values, queries = cache
    with pytest.raises(ValueError, match="queries must be given"):
        budgets.adaptive(UNIFORM)(RNG, keys, values, size=SIZE)
    with pytest.raises(ValueError, match="queries must not be empty"):
        budgets.adaptive(UNIFORM)(RNG, keys, values, size=SIZE, queries=queries[..., :0, :])
    with pytest.raises(ValueError, match="axes must not repeat"):
        budgets.by_energy(UNIFORM, axes=(1, -1))(RNG, keys, values, size=SIZE)
    with pytest.raises(ValueError, match="give one of them"):
        budgets.by_energy(UNIFORM, rho=1.0, query_norm=1.0)(RNG, keys, values, size=SIZE)
    assert layer_budgets(1, 7, 9, 20.0) == (7,)
