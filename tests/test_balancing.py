"""Balanced compression: any size, exact weights, every transformation, and the paper's rate."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import coreset_jax as cj
from coreset_jax.geometry import standardize
from tests import brute_force
from tests.compressors import heads_of, sampled

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


@pytest.fixture(scope="module")
def coreset(compressor, cache):
    return jax.device_get(compressor(RNG, *cache, size=SIZE))


def check_subset(coreset, keys, values, lengths):
    """A weighted subset of each head, in order, whose weights add up to its length."""
    keys, values, coreset = jax.device_get((keys, values, coreset))
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


@pytest.mark.parametrize(
    "size", [7, 64, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 299))]
)
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


@pytest.mark.parametrize(("count", "size"), [(2, 1), (17, 5), (300, 298)])
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


@pytest.mark.slow
def test_half_precision_is_kept_bit_by_bit(compressor, cache):
    halves = [array.astype(np.float16) for array in cache]
    coreset = compressor(RNG, *halves, size=SIZE)
    assert coreset.keys.dtype == coreset.values.dtype == jnp.float16
    assert coreset.log_weights.dtype == jnp.float32
    check_subset(coreset, *halves, np.full(LEADING, COUNT))


@pytest.mark.slow
def test_double_precision(cache, x64):
    doubles = brute_force.double(*cache)
    lengths = np.resize([COUNT, 17, SIZE, 1], LEADING)
    coreset = cj.balanced(rho=2.0, **SMALL)(RNG, *doubles, size=SIZE, lengths=lengths)
    assert coreset.keys.dtype == coreset.log_weights.dtype == jnp.float64
    check_subset(coreset, *doubles, lengths)
    np.testing.assert_allclose(np.exp(coreset.log_weights).sum(axis=-1), lengths, rtol=1e-14)


def test_a_head_knows_nothing_of_the_others(compressor, cache, coreset):
    changed = [array.copy() for array in cache]
    for array in changed:
        array[1, 2] = np.random.default_rng(9).standard_normal(array[1, 2].shape)
    other = compressor(RNG, *changed, size=SIZE)
    same = np.ones(LEADING, bool)
    same[1, 2] = False
    for before, after in zip(coreset[:4], other[:4], strict=True):
        np.testing.assert_array_equal(before[same], after[same])
    assert np.any(coreset.indices[1, 2] != other.indices[1, 2])


def test_a_call_is_one_program_and_the_rng_decides(compressor, cache, coreset, programs):
    before = programs()
    chex.assert_trees_all_equal(jax.device_get(compressor(RNG, *cache, size=SIZE)), coreset)
    assert programs() == before
    other = compressor(jax.random.key(1), *cache, size=SIZE)
    assert np.any(other.indices != coreset.indices)
    before = programs()
    alone = compressor(RNG, *(array[0, 0] for array in cache), size=SIZE)
    assert programs() == before + 1
    # Leading axes are only a layout.
    for nested, single in zip(coreset[:4], alone[:4], strict=True):
        np.testing.assert_allclose(nested[0, 0], single, rtol=1e-6)


@pytest.mark.slow
def test_every_head_has_its_own_radius(cache):
    radii = np.array([[0.5, 1.0, 2.0, 4.0], [8.0, 1.0, 0.1, 3.0]], np.float32)
    options = {**SMALL, "walk": cj.walks.greedy_pairs, "landmarks": None}
    for name in ("rho", "kernel_radius"):
        together = cj.balanced(**{name: radii}, **options)(RNG, *cache, size=SIZE)
        for radius in (1.0, 8.0):
            given = {name: np.full(LEADING, radius)}
            alone = cj.balanced(**given, **options)(RNG, *cache, size=SIZE)
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


def test_sick_heads_answer_nan_and_the_others_as_ever(compressor, cache, coreset):
    keys, values = (array.copy() for array in cache)
    keys[0, 1, 3, 0], keys[0, 2, 39, 1], values[1, 3, 0, 0] = np.nan, -np.inf, np.inf
    sick = np.zeros(LEADING, bool)
    sick[0, 1] = sick[0, 2] = sick[1, 3] = True
    mixed = compressor(RNG, keys, values, size=SIZE)
    np.testing.assert_array_equal(
        np.isnan(mixed.log_weights), np.broadcast_to(sick[..., None], mixed.log_weights.shape)
    )
    for before, after in zip(coreset[:4], mixed[:4], strict=True):
        np.testing.assert_array_equal(before[~sick], after[~sick])


@pytest.mark.slow
def test_a_traced_radius_that_is_nan_answers_nan(cache):
    @jax.jit
    def log_weights(rho):
        return cj.balanced(rho=rho, **SMALL)(RNG, *cache, size=SIZE).log_weights

    assert np.all(np.isfinite(log_weights(2.0)))
    assert np.all(np.isnan(log_weights(np.nan)))


def test_sizes_of_values_and_keys_beyond_all_squares(compressor, cache, coreset):
    """The squares of values under- or overflow, and nothing changes; those of keys say so."""
    keys, values = cache
    for factor in (2.0**-90, 2.0**90):
        scaled = compressor(RNG, keys, np.float32(factor) * values, size=SIZE)
        np.testing.assert_array_equal(scaled.indices, coreset.indices)
        np.testing.assert_array_equal(scaled.log_weights, coreset.log_weights)
    keys = keys.copy()
    keys[0, 1] *= 1e25
    log_weights = np.asarray(compressor(RNG, keys, values, size=SIZE).log_weights)
    assert not np.any(np.isnan(np.delete(log_weights.reshape(-1, SIZE), 1, axis=0)))
    sick = log_weights[0, 1]
    assert np.all(np.isnan(sick)) or np.all(np.isfinite(sick))


@pytest.mark.parametrize("name", ["greedy_pairs", "gram_schmidt"])
@pytest.mark.slow
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


@pytest.mark.slow
def test_four_devices_give_what_one_gives(compressor, cache, coreset):
    devices = min(jax.device_count(), LEADING[1])
    mesh = jax.make_mesh((devices,), ("heads",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "heads"))
    compress = jax.jit(compressor, static_argnames="size")
    found = compress(RNG, *jax.device_put(cache, sharding), size=SIZE)
    chex.assert_trees_all_close(jax.device_get(found), coreset, rtol=1e-6)
    assert found.keys.sharding.is_equivalent_to(sharding, 4)


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


def discrepancy_energy(coreset, gram):
    """Squared norm of what the coreset gets wrong, numerator and denominator, per source pair."""
    coefficients = np.full(len(gram), -1 / len(gram))
    weights = np.exp(np.asarray(coreset.log_weights, np.float64))
    coefficients[np.asarray(coreset.indices)] += weights / weights.sum()
    return coefficients @ gram @ coefficients


@pytest.mark.slow
def test_nearly_dependent_landmarks_balance_or_say_that_they_do_not():
    """In the plane a Gram matrix of float32 is singular but for its ridge."""
    # Two heads in a plane, two in six dimensions.
    keys, values = sphere(3, 2, 4, 512, 6)
    keys[:2, :, 2:] = 0
    keys[:2] /= np.linalg.norm(keys[:2], axis=-1, keepdims=True)
    grams = [balance_gram(*pair, 1.0) for pair in zip(keys, values, strict=True)]
    sample = sampled()(RNG, keys, values, size=64)
    coreset = cj.balanced(rho=1.0, landmarks=64, block_size=32, ridge=1e-12)(
        RNG, keys, values, size=64
    )
    sick = np.isnan(coreset.log_weights)
    np.testing.assert_array_equal(sick.any(axis=-1), sick.all(axis=-1))
    for gram, (ours, uniforms, bad) in zip(
        grams, heads_of(coreset, sample, sick[:, 0]), strict=True
    ):
        gain = discrepancy_energy(uniforms, gram) / discrepancy_energy(ours, gram)
        assert bad or gain > 2, gain


@pytest.mark.parametrize(
    ("walk", "landmarks"),
    [
        ("greedy_pairs", None),
        ("greedy_pairs", 32),
        ("gram_schmidt", 32),
        pytest.param("self_balancing", 32, marks=pytest.mark.slow),
    ],
)
def test_discrepancy_is_far_below_that_of_a_sample(walk, landmarks):
    # In the plane few directions matter, and balance has signs for all of them.
    keys, values = sphere(1, 2, 512, 2)
    gram = balance_gram(keys, values, 1.0)
    options = {"block_size": 32, "landmarks": landmarks, "walk": getattr(cj.walks, walk)}
    # Four draws are four heads.
    four = [np.broadcast_to(array, (4, *array.shape)) for array in (keys, values)]
    balanced, uniform = (
        np.mean(
            [
                discrepancy_energy(each, gram)
                for (each,) in heads_of(compressor(RNG, *four, size=64))
            ]
        )
        for compressor in (cj.balanced(rho=1.0, **options), sampled())
    )
    print(f"{walk}, {landmarks} landmarks: energy {uniform / balanced:.1f} times below uniform's")
    assert balanced < uniform / 3


def worst_error(coreset, keys, values, rho):
    """The largest error over random queries, and over some that climbed from there."""
    standardization = standardize(keys, values, rho=rho)
    source, kept = (standardization.unit_keys(side) for side in (keys, coreset.keys))

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
    for name, compressor in {"balanced": cj.balanced(rho=1.0), "uniform": sampled()}.items():
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
