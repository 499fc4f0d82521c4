"""Streams: exact while they fit, the same however they are cut, and nearly as good as at once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import streaming
from coreset_jax.guarantees import adversary
from tests import brute_force

LEADING, COUNT, SIZE, WIDTH, VALUE_WIDTH = (2, 3), 200, 48, 6, 5
RNG = jax.random.key(0)
SMALL = streaming.merge_and_reduce(size=SIZE, block_size=16, landmarks=16)


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    shapes = [(*LEADING, COUNT, width) for width in (WIDTH, VALUE_WIDTH)]
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def run(stream, keys, values, piece=None, rng=RNG):
    """The state after all pairs have come, so many at a time."""
    state = stream.init(rng, keys, values)
    count = keys.shape[-2]
    for start in range(0, count, piece or count):
        part = slice(start, start + (piece or count))
        state = stream.append(state, keys[..., part, :], values[..., part, :])
    return state


def check_subset(coreset, keys, values, lengths):
    """Pairs of the stream, bit by bit and in order, whose weights add up to its length."""
    lengths = np.broadcast_to(lengths, coreset.indices.shape[:-1])
    weights = np.exp(np.asarray(coreset.log_weights, np.float64))
    np.testing.assert_allclose(weights.sum(axis=-1), lengths, rtol=1e-6)
    for head in np.ndindex(*lengths.shape):
        indices = np.asarray(coreset.indices[head])
        held = indices >= 0
        np.testing.assert_array_equal(held, weights[head] > 0)
        assert np.all(np.diff(indices[held]) > 0)
        assert np.max(indices[held], initial=-1) < lengths[head]
        for kept, source in ((coreset.keys, keys), (coreset.values, values)):
            np.testing.assert_array_equal(kept[head][held], source[head][indices[held]])


def unit_sphere(seed, count, width=32):
    pairs = jax.random.normal(jax.random.key(seed), (2, count, width))
    return pairs / jnp.linalg.norm(pairs, axis=-1, keepdims=True)


def worst(keys, values, coreset, rho):
    return float(
        adversary(RNG, keys, values, coreset, query_norm=rho, scale=1.0, starts=32, steps=30).error
    )


@pytest.mark.slow
def test_nothing_is_lost_while_it_fits(pairs):
    keys, values = (array[..., :SIZE, :] for array in pairs)
    for piece in (1, SIZE):
        coreset = SMALL.coreset(run(SMALL, keys, values, piece))
        check_subset(coreset, keys, values, SIZE)
        assert np.all(np.asarray(coreset.log_weights) == 0)


def test_weights_add_up_at_any_time(pairs):
    state = SMALL.init(RNG, *pairs)
    for count in range(1, COUNT + 1):
        part = slice(count - 1, count)
        state = SMALL.append(state, *(array[..., part, :] for array in pairs))
        if count % 13 == 0 or count > COUNT - 3:
            check_subset(SMALL.coreset(state), *pairs, count)


@pytest.mark.slow
def test_pairs_may_come_one_by_one_or_many_at_once(pairs):
    expected = SMALL.coreset(run(SMALL, *pairs))
    for piece in (1, 16, 23):
        chex.assert_trees_all_equal(SMALL.coreset(run(SMALL, *pairs, piece)), expected)


def test_a_state_of_fixed_shapes_in_a_scan(pairs):
    @jax.jit
    @chex.assert_max_traces(1)
    def step(state, pair):
        return SMALL.append(state, *pair), None

    def scan(state, keys, values):
        moved = [jnp.moveaxis(array, -2, 0)[..., None, :] for array in (keys, values)]
        return jax.lax.scan(step, state, moved)[0]

    start = SMALL.init(RNG, *pairs)
    end = jax.jit(scan, donate_argnums=0)(start, *pairs)
    chex.assert_trees_all_equal(SMALL.coreset(end), SMALL.coreset(run(SMALL, *pairs, 1)))


@pytest.mark.slow
def test_ragged_streams_are_streams_of_their_own(pairs):
    keys, values = pairs
    lengths = np.array([[200, 0, 150], [1, 33, 64]])
    state = SMALL.init(RNG, keys, values)
    for start in range(0, COUNT, 40):
        part = slice(start, start + 40)
        # Padding may hold anything.
        inside = (start + np.arange(40) < lengths[..., None])[..., None]
        state = SMALL.append(
            state,
            *(jnp.where(inside, array[..., part, :], jnp.nan) for array in pairs),
            lengths=np.clip(lengths - start, 0, 40),
        )
    coreset = SMALL.coreset(state)
    check_subset(coreset, keys, values, lengths)
    for head in np.ndindex(*LEADING):
        if lengths[head] == 0:
            continue
        part = slice(lengths[head])
        alone = SMALL.coreset(run(SMALL, keys[head][part], values[head][part]))
        together = jax.tree.map(lambda array, head=head: array[head], coreset)
        np.testing.assert_array_equal(alone.indices, together.indices)


@pytest.mark.slow
def test_worst_error_is_near_that_of_compression_at_once():
    rho, size = 1.0, 512
    ratios, shares = [], []
    for seed in range(3):
        keys, values = unit_sphere(seed, 8192)
        stream = streaming.merge_and_reduce(size=size, query_norm=rho, scale=1.0)
        once = cj.balanced(query_norm=rho, scale=1.0)(RNG, keys, values, size=size)
        sample = cj.baselines.uniform()(RNG, keys, values, size=size)
        error = worst(keys, values, stream.coreset(run(stream, keys, values)), rho)
        ratios.append(error / worst(keys, values, once, rho))
        shares.append(error / worst(keys, values, sample, rho))
    assert np.median(ratios) < 2.2
    assert np.median(shares) < 0.4


@pytest.mark.slow
def test_figures_of_the_unit_sphere():
    """The figures of docs/streaming.md: run with ``-s`` to read them."""
    rho, size, rows = 1.0, 1024, []
    for seed in range(3):
        keys, values = unit_sphere(seed, 16384)
        stream = streaming.merge_and_reduce(size=size, query_norm=rho, scale=1.0)
        once = cj.balanced(query_norm=rho, scale=1.0)(RNG, keys, values, size=size)
        sample = cj.baselines.uniform()(RNG, keys, values, size=size)
        streamed = stream.coreset(run(stream, keys, values))
        rows.append([worst(keys, values, each, rho) for each in (streamed, once, sample)])
    streamed, once, sample = np.mean(rows, axis=0)
    print(f"streamed {streamed:.4f}, at once {once:.4f}, uniform {sample:.4f}")
    assert streamed <= 3 * once
    assert streamed <= sample / 2


@pytest.mark.slow
def test_feedback_is_what_keeps_the_error_small():
    keys, values = unit_sphere(0, 8192)
    settings = {"size": 512, "query_norm": 1.0, "scale": 1.0}
    errors = {}
    for name, compressor in (
        ("feedback", None),
        ("balanced", cj.balanced(query_norm=1.0, scale=1.0)),
        ("uniform", cj.baselines.uniform()),
    ):
        stream = streaming.merge_and_reduce(compressor=compressor, **settings)
        coreset = stream.coreset(run(stream, keys, values))
        check_subset(coreset, keys, values, 8192)
        errors[name] = worst(keys, values, coreset, 1.0)
    assert errors["feedback"] < 0.5 * errors["balanced"] < 0.5 * errors["uniform"]


@pytest.mark.slow
def test_merged_streams_stand_for_both(pairs):
    keys, values = pairs
    for cut in (10, 64, 137):
        left, right = (
            run(SMALL, *(array[..., part, :] for array in pairs))
            for part in (slice(None, cut), slice(cut, None))
        )
        merged = SMALL.merge(left, right)
        check_subset(SMALL.coreset(merged), keys, values, COUNT)
        # And it goes on as a stream does.
        more = SMALL.append(merged, keys, values)
        doubled = [jnp.concatenate([array, array], axis=-2) for array in pairs]
        check_subset(SMALL.coreset(more), *doubled, 2 * COUNT)


@pytest.mark.slow
def test_short_streams_merge_exactly(pairs):
    keys, values = pairs
    left, right = (
        run(SMALL, keys[..., part, :], values[..., part, :]) for part in (slice(0, 9), slice(9, 30))
    )
    coreset = SMALL.coreset(SMALL.merge(left, right))
    check_subset(coreset, keys, values, 30)
    assert np.all(np.asarray(coreset.log_weights)[..., :30] == 0)


@pytest.mark.slow
def test_merging_keeps_the_error_small():
    keys, values = unit_sphere(3, 8192)
    stream = streaming.merge_and_reduce(size=512, query_norm=1.0, scale=1.0)
    parts = [run(stream, keys[i : i + 2048], values[i : i + 2048]) for i in range(0, 8192, 2048)]
    merged = stream.merge(stream.merge(*parts[:2]), stream.merge(*parts[2:]))
    error = worst(keys, values, stream.coreset(merged), 1.0)
    assert error < 2 * worst(keys, values, stream.coreset(run(stream, keys, values)), 1.0)


@pytest.mark.slow
def test_bound_holds_and_estimate_is_nearer():
    rng = np.random.default_rng(5)
    keys = jnp.asarray(rng.standard_normal((4, 1500, 4)) * [1.0, 1.0, 0.3, 2.0], jnp.float32)
    values = jnp.asarray(rng.standard_normal((4, 1500, 3)) + 2.0, jnp.float32)
    stream = streaming.merge_and_reduce(
        size=300, block_size=50, landmarks=64, query_norm=0.7, scale=1.0
    )
    state = run(stream, keys, values)
    error = stream.error(state)
    found = adversary(
        RNG, keys, values, stream.coreset(state), query_norm=0.7, scale=1.0, starts=16, steps=20
    ).error
    assert np.all(np.asarray(found) <= np.asarray(error.bound))
    assert np.all(np.asarray(error.estimate) <= np.asarray(error.bound))
    merged = stream.merge(
        run(stream, keys[:, :700], values[:, :700]), run(stream, keys[:, 700:], values[:, 700:])
    )
    found = adversary(
        RNG, keys, values, stream.coreset(merged), query_norm=0.7, scale=1.0, starts=16, steps=20
    ).error
    assert np.all(np.asarray(found) <= np.asarray(stream.error(merged).bound))


def test_nothing_halved_is_no_error(pairs):
    keys, values = (array[..., : SIZE - 1, :] for array in pairs)
    error = SMALL.error(run(SMALL, keys, values))
    assert np.all(np.asarray(error.bound) == 0)
    assert np.all(np.asarray(error.estimate) == 0)


@pytest.mark.slow
@pytest.mark.parametrize("outlier", [False, True])
def test_keys_that_drift_and_outliers(outlier):
    """The geometry of the first pairs is not that of the last."""
    rng = np.random.default_rng(1)
    keys = rng.standard_normal((4000, 8)) + np.linspace(0, 6, 4000)[:, None]
    keys[3000] *= 50 if outlier else 1
    values = rng.standard_normal((4000, 4))
    keys, values = jnp.asarray(keys, jnp.float32), jnp.asarray(values, jnp.float32)
    queries = jnp.asarray(rng.standard_normal((64, 8)) / 2, jnp.float32)
    exact = brute_force.attention(queries, keys, values)

    def mean_error(compressor):
        stream = streaming.merge_and_reduce(size=512, compressor=compressor)
        coreset = stream.coreset(run(stream, keys, values))
        check_subset(coreset, keys, values, 4000)
        return np.linalg.norm(cj.attend(queries, coreset) - exact, axis=-1).mean()

    # Whether the one key far out survives is luck, for any method: it only must not spoil the rest.
    assert mean_error(None) < (1.5 if outlier else 0.6) * mean_error(cj.baselines.uniform())


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [3, 199])
def test_non_finite_pairs_are_not_hidden(pairs, name, bad, place):
    keys, values = pairs
    spoiled = {"keys": keys, "values": values}
    spoiled[name] = spoiled[name].at[1, 2, place, 0].set(bad)
    coreset = SMALL.coreset(run(SMALL, **spoiled))
    expected = np.zeros(LEADING, bool)
    expected[1, 2] = True
    np.testing.assert_array_equal(np.all(np.isnan(coreset.log_weights), axis=-1), expected)
    clean = np.asarray(SMALL.coreset(run(SMALL, *pairs)).log_weights)
    np.testing.assert_array_equal(np.asarray(coreset.log_weights)[0], clean[0])


@pytest.mark.slow
def test_half_and_double_precision(pairs, x64):
    for dtype, sums in ((jnp.bfloat16, jnp.float32), (jnp.float64, jnp.float64)):
        keys, values = (array.astype(dtype) for array in pairs)
        coreset = SMALL.coreset(run(SMALL, keys, values))
        assert coreset.keys.dtype == coreset.values.dtype == dtype
        assert coreset.log_weights.dtype == sums
        check_subset(coreset, keys, values, COUNT)


@pytest.mark.slow
def test_any_walk(pairs):
    for walk in (cj.walks.self_balancing, cj.walks.gram_schmidt):
        stream = streaming.merge_and_reduce(size=SIZE, block_size=16, landmarks=8, walk=walk)
        check_subset(stream.coreset(run(stream, *pairs)), *pairs, COUNT)


def test_repeated_and_constant_pairs():
    keys = jnp.ones((150, 3))
    values = jnp.ones((150, 2))
    stream = streaming.merge_and_reduce(size=32, block_size=8, landmarks=4)
    coreset = stream.coreset(run(stream, keys, values))
    check_subset(coreset, keys, values, 150)
    np.testing.assert_allclose(cj.attend(keys[:2], coreset), values[:2], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"size": 0}, "size"),
        ({"size": 255}, "size"),
        ({"size": 256.0}, "size"),
        ({"size": 256, "block_size": 7}, "block_size"),
        ({"size": 256, "block_size": 0}, "block_size"),
        ({"size": 256, "landmarks": 0}, "landmarks"),
        ({"size": 256, "max_swaps": -1}, "max_swaps"),
        ({"size": 256, "query_norm": 0.0}, "query_norm"),
        ({"size": 256, "scale": -1.0}, "scale"),
        ({"size": 256, "ridge": 0.0}, "ridge"),
        ({"size": 256, "walk": None}, "walk"),
        ({"size": 256, "compressor": 3}, "compressor"),
    ],
)
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=name):
        streaming.merge_and_reduce(**options)


def test_bad_calls(pairs):
    keys, values = pairs
    state = SMALL.init(RNG, keys, values)
    with pytest.raises(ValueError, match="values"):
        SMALL.init(RNG, keys, values[:1])
    for bad_keys, bad_values in (
        (keys[..., :3], values),
        (keys[:1], values[:1]),
        (keys.astype(jnp.bfloat16), values),
        (keys, values[..., :2]),
    ):
        with pytest.raises(ValueError, match=r"keys|values"):
            SMALL.append(state, bad_keys, bad_values)
    with pytest.raises(ValueError, match="lengths"):
        SMALL.append(state, keys, values, lengths=np.array([1, 2]))
    other = streaming.merge_and_reduce(size=64, block_size=16, landmarks=16)
    with pytest.raises(ValueError, match="left and right"):
        SMALL.merge(state, other.init(RNG, keys, values))


def test_bound_counts_values_that_are_still_exact():
    keys, values = (array[0, 0] for array in unit_sphere(0, 400, 4)[:, None, None])
    stream = streaming.merge_and_reduce(size=64, block_size=16, landmarks=16)
    state = run(stream, keys, values)
    grown = stream.append(state, keys[:1], 1000 * values[:1])
    assert stream.error(grown).bound > 50 * stream.error(state).bound


@pytest.mark.slow
def test_a_short_second_half_moves_no_bound():
    keys, values = unit_sphere(1, 400, 4)
    stream = streaming.merge_and_reduce(size=64, block_size=16, landmarks=16, query_norm=1.0)
    left = run(stream, keys + 300, values + 100)
    merged = stream.merge(left, run(stream, keys[:10] + 300, values[:10] + 100))
    before, after = stream.error(left).bound, stream.error(merged).bound
    assert np.isfinite(after)
    assert after < 3 * before
