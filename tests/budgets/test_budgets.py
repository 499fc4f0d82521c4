"""Budgets: what is kept adds up, heads have what the compressor makes of them, and who has more.

Nearly all of the time goes into compilation, so that tests share a program of each budget.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike

import coreset_jax as cj
from coreset_jax import baselines, budgets
from coreset_jax._src.core import driver
from coreset_jax._src.core.compressor import Compressor, QueryBall, leaf
from coreset_jax._src.core.coreset import Coreset, SignedCoreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax.budgets.pyramid import layer_budgets
from tests.budgets.conftest import COUNT, HEADS, LAYERS, WIDTH

RNG = jax.random.key(0)
SIZE = 16
FULL = np.full((LAYERS, HEADS), COUNT)
UNIFORM = baselines.uniform()
NAMES = ["pyramid", "adaptive", "by_energy"]


class first(Compressor):  # noqa: N801
    """Keeps the first pairs, each with a weight that is an option of its head."""

    weight: ArrayLike = leaf(default=1.0)

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        log_weights = jnp.zeros(size, head.dtype) + jnp.log(self.weight)
        rounds = jnp.asarray(size, jnp.int32) + 0 * head.length
        return head.pairs(jnp.arange(size), log_weights), Info(rounds=rounds)


class signed(first):  # noqa: N801
    """The same with normalizers."""

    signed = True

    def on_head(self, head: Head, size: int) -> tuple[SignedCoreset, Info]:
        coreset, info = super().on_head(head, size)
        return SignedCoreset(*coreset[:4], 2 * jnp.ones_like(coreset.log_weights)), info


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def make(name, compressor, num_sizes=1, **options):
    """A budget with few sizes to compile."""
    options = options if name == "pyramid" else {"num_sizes": num_sizes, **options}
    return getattr(budgets, name)(compressor, **options)


def shared(name):
    """The one that most tests share."""
    return make(name, UNIFORM, num_sizes=2)


def call(compressor, cache, size=SIZE, lengths=FULL, rng=RNG):
    keys, values, queries = cache
    return compressor(rng, keys, values, size=size, lengths=lengths, queries=queries)


def compress(*arguments, **options):
    # What is looked at head by head would be a program each.
    return jax.tree.map(np.asarray, call(*arguments, **options))


def kept_pairs(coreset):
    return np.sum(np.asarray(coreset.indices) >= 0, axis=-1)


def test_pairs_add_up_and_heads_have_what_the_compressor_makes_of_them(name, cache):
    coreset = compress(shared(name), cache)
    kept = kept_pairs(coreset)
    assert coreset.indices.shape == (LAYERS, HEADS, 2 * SIZE - 1 if name == "pyramid" else 2 * SIZE)
    # pyramid splits over layers, the others within each.
    totals = kept.sum() / LAYERS if name == "pyramid" else kept.sum(axis=-1)
    assert np.all(totals <= HEADS * SIZE)
    # And the next step would have been too much for any head.
    assert np.all(totals > 0.8 * HEADS * SIZE)
    assert len(np.unique(kept)) > 2
    for size in np.unique(kept):
        if name == "pyramid":
            (layer,) = np.unique(np.argwhere(kept == size)[:, 0])
            rng = jax.random.fold_in(RNG, layer)
            part = [array[layer : layer + 1] for array in cache]
            plain = compress(UNIFORM, part, int(size), FULL[:1], rng)
            plain = jax.tree.map(lambda a: np.repeat(a, LAYERS, axis=0), plain)
        else:
            plain = compress(UNIFORM, cache, int(size))
        for head in np.argwhere(kept == size):
            here = tuple(head)
            slots = np.arange(coreset.indices.shape[-1]) < size
            for found, expected in zip(coreset[:4], plain[:4], strict=True):
                np.testing.assert_array_equal(found[here][slots], expected[here])
            assert np.all(coreset.indices[here][~slots] == -1)
            assert np.all(np.isneginf(coreset.log_weights[here][~slots]))
            assert not np.any(coreset.keys[here][~slots])


def test_lengths_are_respected_and_short_heads_yield(name, cache):
    lengths = np.random.default_rng(2).integers(3, COUNT + 1, (LAYERS, HEADS))
    lengths[:, 0] = 2
    inside = (np.arange(COUNT) < lengths[..., None])[..., None]
    zeros, garbage = (
        [np.where(inside, array, np.float32(filling)) for array in cache[:2]]
        for filling in (0, np.nan)
    )
    compressor = shared(name)
    coreset, again = (
        compress(compressor, (*arrays, cache[2]), lengths=lengths) for arrays in (zeros, garbage)
    )
    chex.assert_trees_all_equal(coreset, again)
    kept = kept_pairs(coreset)
    assert np.all(kept <= lengths)
    assert np.all(coreset.indices < lengths[..., None])
    assert kept.sum() <= LAYERS * HEADS * SIZE
    np.testing.assert_allclose(np.exp(coreset.log_weights).sum(axis=-1), lengths, rtol=1e-5)


def test_heads_that_are_not_finite_say_so_and_harm_no_other(name, cache):
    keys = cache[0].copy()
    keys[1, 2, 5, 3] = np.nan
    coreset = compress(shared(name), (keys, *cache[1:]))
    sick = np.isnan(np.asarray(coreset.log_weights))
    assert np.all(sick[1, 2])
    assert sick.sum() == sick.shape[-1]
    # The others share among themselves what it leaves.
    assert kept_pairs(coreset).sum() <= LAYERS * HEADS * SIZE


def test_adaptive_keeps_more_of_the_attention(cache):
    kept = kept_pairs(compress(shared("adaptive"), cache))
    logits = np.einsum("...qd,...nd->...qn", cache[2], cache[0]) / np.sqrt(WIDTH)
    scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores = (scores / scores.sum(axis=-1, keepdims=True)).mean(axis=-2)
    falling = np.cumsum(-np.sort(-scores), axis=-1)
    # If every head keeps its largest scores, as many as it has pairs.
    uneven = np.take_along_axis(falling, kept[..., None] - 1, axis=-1)[..., 0]
    assert uneven.sum() > falling[..., SIZE - 1].sum()


def test_second_call_does_not_compile(name, cache):
    compressor = shared(name)
    compress(compressor, cache)
    compiled = driver._compress._cache_size()
    for seed in (1, 2):
        arrays = [array + np.float32(seed) for array in cache]
        compress(shared(name), arrays, rng=jax.random.key(seed))
    assert driver._compress._cache_size() == compiled
    assert hash(shared(name)) == hash(compressor)
    assert shared(name) == compressor


@pytest.mark.slow
def test_layers_have_options_and_information_of_their_own(cache):
    weight = 1 + np.arange(LAYERS * HEADS, dtype=np.float32).reshape(LAYERS, HEADS)
    compressor = budgets.pyramid(first(weight=weight))
    keys, values, _ = cache
    for size in (SIZE, 60):
        coreset, info = compressor.with_info(RNG, keys, values, size=size)
        expected = layer_budgets(LAYERS, size, COUNT, beta=20.0)
        np.testing.assert_array_equal(kept_pairs(coreset), np.tile(expected, (HEADS, 1)).T)
        for layer, budget in enumerate(expected):
            # A layer that is kept whole has weights of one, and no rounds.
            whole = budget == COUNT
            marks = np.ones(HEADS) if whole else weight[layer]
            found = np.exp(coreset.log_weights[layer, :, :budget])
            np.testing.assert_allclose(found, np.repeat(marks[:, None], budget, axis=1), rtol=1e-6)
            np.testing.assert_array_equal(info.rounds[layer], 0 if whole else budget)
    assert expected[0] == COUNT
    # The layers may be any axis.
    moved = [np.moveaxis(array, 0, 1) for array in (keys, values)]
    again = budgets.pyramid(first(weight=weight.T), axis=-1)(RNG, *moved, size=60)
    chex.assert_trees_all_equal(jax.tree.map(lambda a: np.moveaxis(a, 1, 0), again), coreset)


def test_equal_heads_and_equal_budgets_are_treated_alike(name, cache):
    # Where nothing is to be split, whatever the heads; and where heads are equal.
    equal = [np.broadcast_to(array[:1, :1], array.shape) for array in cache]
    options = {"pyramid": {"beta": 1.0}, "adaptive": {"safeguard": 1.0}, "by_energy": {}}[name]
    arrays = equal if name == "by_energy" else cache
    plain = compress(first(), arrays)
    found = compress(make(name, first(), **options), arrays)
    assert np.all(kept_pairs(found) == SIZE)
    for ours, theirs in zip(found[:4], plain[:4], strict=True):
        np.testing.assert_array_equal(np.take(ours, np.arange(SIZE), axis=2), theirs)
    if name == "adaptive":
        assert np.all(kept_pairs(compress(make(name, first()), equal)) == SIZE)


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
    compressor = baselines.wildcat()
    exact = cj.attention(queries, keys, values)
    even, uneven = (
        float(jnp.mean(jnp.linalg.norm(cj.attend(queries, coreset) - exact, axis=-1)))
        for coreset in (
            each(RNG, keys, values, size=20) for each in (compressor, budgets.by_energy(compressor))
        )
    )
    assert uneven < 0.9 * even


def test_normalizers_pass_through(name, cache):
    # At the larger size some heads are kept whole.
    coreset = compress(make(name, signed()), cache, 60)
    assert isinstance(coreset, SignedCoreset)
    np.testing.assert_array_equal(coreset.normalizers, np.where(coreset.indices < 0, 0, 2))
    wildcat = make(name, baselines.wildcat())
    traced = jax.eval_shape(functools.partial(call, wildcat, size=60), cache)
    assert isinstance(traced, SignedCoreset)


def test_whole_cache_where_nothing_has_to_go(name, cache):
    size = {"pyramid": COUNT + 5}.get(name, COUNT)
    found = compress(make(name, UNIFORM), cache, size)
    chex.assert_trees_all_equal(found, compress(UNIFORM, cache, COUNT))


def test_radii_are_those_of_the_compressor_unless_there_are_others():
    inner = cj.balanced(rho=3.0, scale=0.5)
    assert budgets.by_energy(inner).query_ball == QueryBall(3.0, None, 0.5)
    assert not budgets.by_energy(inner).reads_queries
    assert budgets.by_energy(inner, query_norm=2.0).query_ball == QueryBall(None, 2.0, 0.5)
    assert budgets.by_energy(UNIFORM, rho=np.ones(HEADS), scale=0.1).query_ball.scale == 0.1
    assert budgets.by_energy(UNIFORM).reads_queries
    assert not budgets.by_energy(UNIFORM, rho=np.ones(HEADS)).reads_queries
    assert not budgets.pyramid(UNIFORM).reads_queries
    assert budgets.adaptive(UNIFORM).reads_queries
    assert budgets.pyramid(budgets.adaptive(UNIFORM)).needs_queries


def test_transformations_and_types(name, cache):
    compressor = shared(name)
    expected = compress(compressor, cache)
    rngs = jnp.stack([jax.random.key(1), RNG])
    arrays = [jnp.stack([array, array]) for array in cache]
    mapped = jax.vmap(lambda rng, *each: call(compressor, each, rng=rng))
    found = jax.jit(mapped)(rngs, *arrays)
    np.testing.assert_array_equal(found.indices[1], expected.indices)
    assert np.any(found.indices[0] != expected.indices)

    def traced(dtype, lengths):
        arrays = [jnp.asarray(array, dtype) for array in cache]
        return jax.eval_shape(functools.partial(call, make(name, UNIFORM), lengths=lengths), arrays)

    # What strict promotion refuses is refused where a program is traced.
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        traced(jnp.float32, np.full((LAYERS, HEADS), COUNT, np.uint8))
    half = traced(jnp.bfloat16, FULL)
    assert half.keys.dtype == half.values.dtype == jnp.bfloat16
    assert half.log_weights.dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (budgets.pyramid, {"beta": 0.5}, "beta must be at least 1"),
        (budgets.pyramid, {"axis": 1.0}, "axis must be one or more static Python ints"),
        (budgets.adaptive, {"safeguard": 1.5}, "safeguard must be at most 1"),
        (budgets.adaptive, {"safeguard": 0.0}, "safeguard must be positive"),
        (budgets.adaptive, {"max_multiple": 0.9}, "max_multiple must be at least 1"),
        (budgets.adaptive, {"axes": ()}, "axes must be one or more"),
        (budgets.adaptive, {"axes": "heads"}, "axes must be one or more"),
        (budgets.adaptive, {"scale": -1.0}, "scale must be positive"),
        (budgets.by_energy, {"least": None}, "least must be a number"),
        (budgets.by_energy, {"num_sizes": 0}, "num_sizes must be at least 1"),
        (budgets.by_energy, {"probes": 2.0}, "probes must be a static Python int"),
        (budgets.by_energy, {"order": 0.0}, "order must be positive"),
        (budgets.by_energy, {"rho": 1.0, "query_norm": 1.0}, "give one of them"),
    ],
)
def test_bad_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(UNIFORM, **options)


def test_bad_arguments_are_refused(name, cache):
    budget = getattr(budgets, name)
    with pytest.raises(ValueError, match="compressor must be a Compressor"):
        budget(None)
    keys, values, queries = cache
    for change, message in [
        ({"size": 0}, "size must be at least 1"),
        ({"values": values[..., 1:, :]}, "as many pairs"),
        ({"lengths": np.full(HEADS, 3)}, "leading axes"),
        ({"queries": queries[..., 1:]}, r"queries \(3, 4, 20, 7\) and keys \(3, 4, 80, 8\)"),
    ]:
        arguments = {"keys": keys, "values": values, "size": SIZE, "queries": queries, **change}
        with pytest.raises(ValueError, match=message):
            budget(UNIFORM)(RNG, **arguments)
    one_head = {"keys": keys[0, 0], "values": values[0, 0], "queries": queries[0, 0]}
    with pytest.raises(ValueError, match=r"leading axes of keys, here 0 of them; got ax.* \(\)"):
        budget(UNIFORM)(RNG, **one_head, size=SIZE)
    # What looks at one head at a time cannot stand around what needs them all.
    with pytest.raises(ValueError, match=f"{name} divides a budget .* put it outermost"):
        cj.chunked(budget(UNIFORM), chunk_size=4)(RNG, keys, values, size=8, queries=queries)


def test_other_bad_arguments_are_refused(cache):
    keys, values, queries = cache
    for given in (None, queries[..., :0, :]):
        with pytest.raises(ValueError, match="queries must be given to adaptive"):
            budgets.adaptive(UNIFORM)(RNG, keys, values, size=SIZE, queries=given)
    # Every size must be one that the compressor can keep.
    binned = budgets.pyramid(baselines.wildcat(bins=2))
    with pytest.raises(ValueError, match="multiple of bins; got size 1 "):
        binned(RNG, keys, values, size=SIZE)
    with pytest.raises(ValueError, match="axes must not repeat"):
        budgets.by_energy(UNIFORM, axes=(1, -1))(RNG, keys, values, size=SIZE)
