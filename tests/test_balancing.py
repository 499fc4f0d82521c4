"""Balanced compression: any size, exact weights, every transformation, and the paper's rate."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import coreset_jax as cj
from coreset_jax import compression, problem
from coreset_jax.coreset import whole_cache
from tests import brute_force

LEADING, COUNT, SIZE, WIDTH, VALUE_WIDTH = (2, 4), 40, 11, 6, 5
RNG = jax.random.key(0)
# Several blocks, landmarks that are few, and randomness, at a size that compiles in a moment.
SMALL = {"block_size": 8, "landmarks": 8, "max_swaps": 4, "walk": cj.walks.self_balancing}


@pytest.fixture(scope="module")
def cache():
    rng = np.random.default_rng(0)
    shapes = [(*LEADING, COUNT, width) for width in (WIDTH, VALUE_WIDTH)]
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


@pytest.fixture(scope="module")
def compressor():
    return cj.balanced(**SMALL)


def check_subset(coreset, keys, values, lengths):
    """A weighted subset of each head, in order, whose weights add up to its length."""
    size = coreset.indices.shape[-1]
    log_weights = np.asarray(coreset.log_weights, np.float64)
    np.testing.assert_allclose(np.exp(log_weights).sum(axis=-1), lengths, rtol=1e-6)
    for head in np.ndindex(*keys.shape[:-2]):
        kept = min(size, lengths[head])
        indices = np.asarray(coreset.indices[head])
        assert np.all(indices[kept:] == -1)
        indices = indices[:kept]
        assert indices[0] >= 0
        assert np.all(np.diff(indices) > 0)
        assert indices[-1] < lengths[head]
        np.testing.assert_array_equal(coreset.keys[head][:kept], keys[head][indices])
        np.testing.assert_array_equal(coreset.values[head][:kept], values[head][indices])


@pytest.mark.parametrize("size", [1, 7, 64, pytest.param(299, marks=pytest.mark.slow)])
def test_weights_add_up_for_every_length(size):
    most = 300
    lengths = np.arange(1, most + 1)
    keys, values = np.random.default_rng(1).standard_normal((2, most, most, 2)).astype(np.float32)
    coreset = cj.balanced(block_size=32, landmarks=8, max_swaps=2)(
        RNG, keys, values, size=size, lengths=lengths
    )
    check_subset(coreset, keys, values, lengths)


def check_one(count, size):
    keys, values = np.random.default_rng(count).standard_normal((2, count, 2)).astype(np.float32)
    coreset = cj.balanced(block_size=32, landmarks=8, max_swaps=2)(RNG, keys, values, size=size)
    check_subset(coreset, keys, values, np.asarray(count))
    if count == size << (count // size).bit_length() - 1:
        np.testing.assert_allclose(coreset.log_weights, np.log(count / size), rtol=1e-6)


@pytest.mark.parametrize(("count", "size"), [(2, 1), (17, 5), (64, 16), (255, 1), (300, 298)])
def test_weights_add_up(count, size):
    check_one(count, size)


# In shares: every one is a program, and takes memory mappings.
@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2, 3])
def test_weights_add_up_for_every_size(first):
    for size in range(first, 47, 3):
        check_one(47, size)


@pytest.mark.slow
@pytest.mark.parametrize("first", [3, 9, 15])
def test_weights_add_up_for_many_counts(first):
    for count in range(first, 301, 18):
        spread = (1, 2, count // 3, count // 2, 2 * count // 3, count - 1)
        check_one(count, max(spread[count // 6 % len(spread)], 1))


def test_half_precision_is_kept_bit_by_bit(compressor, cache):
    halves = [jnp.asarray(array, jnp.float16) for array in cache]
    coreset = compressor(RNG, *halves, size=SIZE)
    assert coreset.keys.dtype == coreset.values.dtype == jnp.float16
    assert coreset.log_weights.dtype == jnp.float32
    check_subset(coreset, *halves, np.full(LEADING, COUNT))


def test_double_precision(cache, x64):
    doubles = brute_force.double(*cache)
    lengths = np.resize([COUNT, 17, SIZE, 1], LEADING)
    coreset = cj.balanced(rho=2.0, **SMALL)(RNG, *doubles, size=SIZE, lengths=lengths)
    assert coreset.keys.dtype == coreset.log_weights.dtype == jnp.float64
    check_subset(coreset, *doubles, lengths)
    np.testing.assert_allclose(np.exp(coreset.log_weights).sum(axis=-1), lengths, rtol=1e-14)


@pytest.mark.parametrize("lengths", [None, np.resize([COUNT, 17, 1], LEADING)])
def test_nothing_is_lost_where_nothing_has_to_go(cache, lengths):
    for size in (COUNT, COUNT + 1):
        coreset = cj.compress(RNG, *cache, size=size, lengths=lengths)
        chex.assert_trees_all_equal(coreset, whole_cache(*cache, lengths))


def test_a_head_knows_nothing_of_the_others(compressor, cache):
    coreset = compressor(RNG, *cache, size=SIZE)
    changed = [array.copy() for array in cache]
    for array in changed:
        array[1, 2] = np.random.default_rng(9).standard_normal(array[1, 2].shape)
    other = compressor(RNG, *changed, size=SIZE)
    same = np.ones(LEADING, bool)
    same[1, 2] = False
    for before, after in zip(coreset[:4], other[:4], strict=True):
        np.testing.assert_array_equal(before[same], after[same])
    assert np.any(coreset.indices[1, 2] != other.indices[1, 2])


def test_leading_axes_are_only_a_layout(compressor, cache):
    coreset = compressor(RNG, *cache, size=SIZE)
    alone = compressor(RNG, *(array[0, 0] for array in cache), size=SIZE)
    for nested, single in zip(coreset[:4], alone[:4], strict=True):
        np.testing.assert_allclose(nested[0, 0], single, rtol=1e-6)


def test_rng_decides(compressor, cache):
    coreset = compressor(RNG, *cache, size=SIZE)
    chex.assert_trees_all_equal(compressor(RNG, *cache, size=SIZE), coreset)
    other = compressor(jax.random.key(1), *cache, size=SIZE)
    assert np.any(other.indices != coreset.indices)


def test_radii_and_rng_do_not_retrace(cache):
    keys, values = (array[0] for array in cache)
    before = compression._compress._cache_size()
    for seed, rho in enumerate((1.0, 2, np.float64(3.0), jnp.float32(4.0), np.full(4, 5.0))):
        cj.balanced(rho=rho, **SMALL)(jax.random.key(seed), keys, values, size=SIZE)
    # Scalars, and one radius for each head.
    assert compression._compress._cache_size() <= before + 2


@pytest.mark.parametrize("name", ["rho", "query_norm", "kernel_radius"])
def test_every_head_has_its_own_radius(cache, name):
    radii = np.array([[0.5, 1.0, 2.0, 4.0], [8.0, 1.0, 0.1, 3.0]], np.float32)
    options = {**SMALL, "walk": cj.walks.greedy_pairs, "landmarks": None}
    together = cj.balanced(**{name: radii}, **options)(RNG, *cache, size=SIZE)
    for radius in (1.0, 8.0):
        alone = cj.balanced(**{name: np.full(LEADING, radius)}, **options)(RNG, *cache, size=SIZE)
        mine = radii == radius
        np.testing.assert_array_equal(together.indices[mine], alone.indices[mine])
    drawn = {tuple(np.asarray(head)) for head in together.indices.reshape(-1, SIZE)}
    assert len(drawn) == radii.size


@pytest.mark.slow
def test_sample_queries_stand_for_their_largest_norm(cache):
    queries = np.random.default_rng(4).standard_normal((*LEADING, 3, WIDTH)).astype(np.float32)
    norms = np.linalg.norm(queries, axis=-1).max(axis=-1)
    expected = cj.balanced(query_norm=norms, **SMALL)(RNG, *cache, size=SIZE)
    sampled = cj.balanced(**SMALL)(RNG, *cache, size=SIZE, queries=queries)
    np.testing.assert_array_equal(sampled.indices, expected.indices)
    # A radius that is given wins.
    given = cj.balanced(query_norm=norms, **SMALL)(RNG, *cache, size=SIZE, queries=100 * queries)
    chex.assert_trees_all_equal(given, expected)


def test_sick_heads_answer_nan_and_the_others_as_ever(compressor, cache):
    coreset = compressor(RNG, *cache, size=SIZE)
    keys, values = (array.copy() for array in cache)
    keys[0, 1, 3, 0], keys[0, 2, 39, 1], values[1, 3, 0, 0] = np.nan, -np.inf, np.inf
    sick = np.zeros(LEADING, bool)
    sick[0, 1] = sick[0, 2] = sick[1, 3] = True
    mixed = compressor(RNG, keys, values, size=SIZE)
    np.testing.assert_array_equal(
        np.isnan(mixed.log_weights), np.broadcast_to(sick[..., None], mixed.log_weights.shape)
    )
    outputs = cj.attend(cache[0], mixed)
    assert np.all(np.isnan(outputs[sick]))
    for before, after in zip(coreset[:4], mixed[:4], strict=True):
        np.testing.assert_array_equal(before[~sick], after[~sick])


def test_sick_sample_queries_answer_nan_in_their_head(compressor, cache):
    queries = np.ones((*LEADING, 3, WIDTH), np.float32)
    queries[1, 2, 1, 0] = np.nan
    sick = np.isnan(compressor(RNG, *cache, size=SIZE, queries=queries).log_weights)
    assert np.all(sick[1, 2])
    assert sick.sum() == SIZE


def test_a_traced_radius_that_is_nan_answers_nan(cache):
    @jax.jit
    def log_weights(rho):
        return cj.balanced(rho=rho, **SMALL)(RNG, *cache, size=SIZE).log_weights

    assert np.all(np.isfinite(log_weights(2.0)))
    assert np.all(np.isnan(log_weights(np.nan)))


@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90])
def test_the_size_of_values_does_not_matter(compressor, cache, factor):
    """Their squares under- or overflow, and nothing changes."""
    keys, values = cache
    plain = compressor(RNG, keys, values, size=SIZE)
    scaled = compressor(RNG, keys, np.float32(factor) * values, size=SIZE)
    np.testing.assert_array_equal(scaled.indices, plain.indices)
    np.testing.assert_array_equal(scaled.log_weights, plain.log_weights)


def test_keys_whose_squares_overflow_answer_nan_or_balance(compressor, cache):
    keys, values = (array.copy() for array in cache)
    keys[0, 1] *= 1e25
    log_weights = np.asarray(compressor(RNG, keys, values, size=SIZE).log_weights)
    assert not np.any(np.isnan(np.delete(log_weights.reshape(-1, SIZE), 1, axis=0)))
    sick = log_weights[0, 1]
    assert np.all(np.isnan(sick)) or np.all(np.isfinite(sick))


@pytest.mark.parametrize(("width", "ridge"), [(2, 1e-12), (2, 1e-6), (6, 1e-12)])
def test_nearly_dependent_landmarks_balance_or_say_that_they_do_not(width, ridge):
    """In the plane a Gram matrix of float32 is singular but for its ridge."""
    keys, values = sphere(3, 2, 4, 512, width)
    coreset = cj.balanced(rho=1.0, landmarks=64, block_size=32, ridge=ridge)(
        RNG, keys, values, size=64
    )
    sample = cj.baselines.uniform()(RNG, keys, values, size=64)
    sick = np.isnan(coreset.log_weights)
    np.testing.assert_array_equal(sick.any(axis=-1), sick.all(axis=-1))
    for head in np.flatnonzero(~sick[:, 0]):
        ours, uniforms = (
            discrepancy_energy(each, keys[head], values[head], 1.0)
            for each in (one_head(coreset, head), one_head(sample, head))
        )
        print(f"head {head}: energy {uniforms / ours:.1f} times below uniform's")
        assert ours < uniforms / 2


@pytest.mark.parametrize(
    ("key_dtype", "value_dtype", "dtype"),
    [
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float64, jnp.float64),
    ],
)
def test_keys_and_values_keep_dtypes_of_their_own(cache, key_dtype, value_dtype, dtype, x64):
    keys, values = jnp.asarray(cache[0], key_dtype), jnp.asarray(cache[1], value_dtype)
    coreset = cj.balanced(rho=2.0, **SMALL)(RNG, keys, values, size=SIZE)
    assert (coreset.keys.dtype, coreset.values.dtype) == (key_dtype, value_dtype)
    assert coreset.log_weights.dtype == dtype
    check_subset(coreset, keys, values, np.full(LEADING, COUNT))


def test_the_scale_may_be_any_kind_of_number(cache):
    coreset = cj.balanced(scale=0.125, **SMALL)(RNG, *cache, size=SIZE)
    before = compression._compress._cache_size()
    for scale in (jnp.float32(0.125), np.float64(0.125), np.array(0.125)):
        again = cj.balanced(scale=scale, **SMALL)(RNG, *cache, size=SIZE)
        chex.assert_trees_all_equal(again, coreset)
    assert compression._compress._cache_size() == before


@pytest.mark.parametrize("name", ["greedy_pairs", "gram_schmidt"])
def test_degenerate_heads_are_halved_like_any_other(name, cache):
    keys, values = (array.copy() for array in cache)
    keys[0, 0], values[0, 1] = 0.1, 0.3
    keys[0, 2], values[0, 2] = 0, 0
    keys[0, 3, 1:], values[0, 3, 1:] = keys[0, 3, :1], values[0, 3, :1]
    keys[1, 0] *= 1e15
    values[1, 1] *= 1e-15
    keys[1, 2, 7] = 1e6
    keys[1, 3, ::2] = keys[1, 3, 1::2]
    coreset = cj.balanced(**{**SMALL, "walk": getattr(cj.walks, name)})(
        RNG, keys, values, size=SIZE
    )
    check_subset(coreset, keys, values, np.full(LEADING, COUNT))


def test_four_devices_give_what_one_gives(compressor, cache):
    devices = min(jax.device_count(), LEADING[1])
    mesh = jax.make_mesh((devices,), ("heads",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "heads"))
    compress = jax.jit(compressor, static_argnames="size")
    coreset = compress(RNG, *jax.device_put(cache, sharding), size=SIZE)
    chex.assert_trees_all_close(coreset, compressor(RNG, *cache, size=SIZE), rtol=1e-6)
    assert coreset.keys.sharding.is_equivalent_to(sharding, 4)


@pytest.mark.slow
def test_explicit_shard_map_and_scan_give_what_single_calls_give(compressor, cache):
    keys, values = (array.reshape(-1, 2, *array.shape[2:]) for array in cache)
    rngs = jax.random.split(RNG, len(keys))
    compress = functools.partial(compressor, size=SIZE)
    each = [compress(*inputs) for inputs in zip(rngs, keys, values, strict=True)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *each)

    def step(total, inputs):
        coreset = compress(*inputs)
        return total + jnp.exp(coreset.log_weights).sum(), coreset

    total, scanned = jax.lax.scan(step, 0.0, (rngs, keys, values))
    np.testing.assert_allclose(total, np.prod(LEADING) * COUNT, rtol=1e-5)
    chex.assert_trees_all_close(scanned, expected, rtol=1e-6)

    devices = min(jax.device_count(), len(keys))
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=(AxisType.Explicit,))
    batch = PartitionSpec("batch")
    mapped = jax.shard_map(jax.vmap(compress), mesh=mesh, in_specs=batch, out_specs=batch)
    inputs = jax.device_put((rngs, keys, values), NamedSharding(mesh, batch))
    chex.assert_trees_all_close(jax.jit(mapped)(*inputs), expected, rtol=1e-6)


def sphere(seed, *shape):
    points = np.random.default_rng(seed).standard_normal(shape)
    return (points / np.linalg.norm(points, axis=-1, keepdims=True)).astype(np.float32)


def balance_gram(keys, values, radius):
    """The Gram matrix in which a balance works: the numerator counts eight times."""
    unit_keys, unit_values = brute_force.unit_problem(keys, values)
    gain = np.sqrt(8 / np.mean(np.sum(np.square(unit_values), axis=1)))
    return brute_force.gram(unit_keys, gain * unit_values, radius)


def replay_greedy_halvings(gram, size):
    """Pairs in order, the sign that shortens the error so far, the error halved at each level."""
    error, left = np.zeros(len(gram)), np.arange(len(gram))
    while len(left) > size:
        kept = []
        if len(left) % 2:
            error[left[-1]] += 1
            kept.append(left[-1])
        for first, second in zip(left[:-1:2], left[1::2], strict=True):
            pull = (gram[first] - gram[second]) @ error
            plus, minus = (second, first) if pull > 0 else (first, second)
            error[plus] += 1
            error[minus] -= 1
            kept.append(plus)
        left = np.sort(kept)
        error /= 2
    return left


@pytest.mark.parametrize(("count", "block_size"), [(64, 8), (63, 64)])
def test_exact_field_is_greedy_halving_of_the_whole(count, block_size):
    keys, values = sphere(0, 2, count, 6)
    options = {"landmarks": None, "passes": 1, "max_swaps": 0, "block_size": block_size}
    coreset = cj.balanced(rho=2.0, kernel_radius=1.5, **options)(RNG, keys, values, size=16)
    gram = balance_gram(keys, values, 1.5)
    np.testing.assert_array_equal(coreset.indices, replay_greedy_halvings(gram, 16))


def one_head(coreset, head):
    return jax.tree.map(lambda leaf: leaf[head], coreset)


def discrepancy_energy(coreset, keys, values, radius):
    """Squared norm of what the coreset gets wrong, numerator and denominator, per source pair."""
    gram = balance_gram(keys, values, radius)
    coefficients = np.full(len(gram), -1 / len(gram))
    weights = np.exp(np.asarray(coreset.log_weights, np.float64))
    coefficients[np.asarray(coreset.indices)] += weights / weights.sum()
    return coefficients @ gram @ coefficients


@pytest.mark.parametrize(
    ("walk", "landmarks"),
    [("greedy_pairs", None), ("greedy_pairs", 32), ("self_balancing", 32), ("gram_schmidt", 32)],
)
def test_discrepancy_is_far_below_that_of_a_sample(walk, landmarks):
    # In the plane few directions matter, and balance has signs for all of them.
    keys, values = sphere(1, 2, 512, 2)
    options = {"block_size": 32, "landmarks": landmarks, "walk": getattr(cj.walks, walk)}
    compressors = [cj.balanced(rho=1.0, **options), cj.baselines.uniform()]
    balanced, uniform = (
        np.mean(
            [
                discrepancy_energy(compressor(rng, keys, values, size=64), keys, values, 1.0)
                for rng in jax.random.split(RNG, 4)
            ]
        )
        for compressor in compressors
    )
    print(f"{walk}, {landmarks} landmarks: energy {uniform / balanced:.1f} times below uniform's")
    assert balanced < uniform / 3


def worst_error(coreset, keys, values, rho):
    """The largest error over random queries, and over some that climbed from there."""
    reduction = problem.reduce(keys, values, rho=rho)
    source, kept = (problem.unit_keys(reduction, side) for side in (keys, coreset.keys))

    @jax.jit
    def errors(queries):
        exact = cj.attention(queries, source, values, scale=1.0)
        ours = cj.attention(queries, kept, coreset.values, coreset.log_weights, scale=1.0)
        return jnp.linalg.norm(exact - ours, axis=-1)

    @jax.jit
    def climb(queries):
        gradients = jax.grad(lambda queries: jnp.sum(errors(queries)))(queries)
        gradients /= jnp.linalg.norm(gradients, axis=-1, keepdims=True)
        queries = queries + 0.2 * rho * gradients
        norms = jnp.linalg.norm(queries, axis=-1, keepdims=True)
        return queries * jnp.minimum(1, rho / norms)

    queries = jnp.asarray(rho * sphere(5, 512, keys.shape[-1]))
    climbed = queries[:64]
    for _ in range(20):
        climbed = climb(climbed)
    return max(errors(queries).max(), errors(climbed).max())


@pytest.mark.slow
def test_error_falls_like_one_over_the_size():
    """The rate of the paper, where sampling has one over the root."""
    keys, values = sphere(2, 2, 4096, 16)
    sizes = [64, 256, 1024]
    slopes = {}
    for name, compressor in {
        "balanced": cj.balanced(rho=1.0),
        "uniform": cj.baselines.uniform(),
    }.items():
        errors = [
            np.mean(
                [
                    worst_error(compressor(rng, keys, values, size=size), keys, values, 1.0)
                    for rng in jax.random.split(RNG, 3)
                ]
            )
            for size in sizes
        ]
        slopes[name] = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
        print(f"{name}: errors {np.round(errors, 5)} at {sizes}, slope {slopes[name]:.2f}")
    assert slopes["balanced"] < -0.8
    assert -0.65 < slopes["uniform"] < -0.4
