"""The driver: what every compressor's call shares, seen through one that is quick to compile."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import coreset_jax as cj
from coreset_jax._src.core.compressor import leaf
from coreset_jax._src.core.coreset import whole_cache
from tests.compressors import asking, newest, sampled

LEADING, COUNT, SIZE, WIDTH, VALUE_WIDTH = (2, 3), 11, 6, 4, 5
LENGTHS = np.array([[1, 5, COUNT], [2, 10, 4]])
RNG = jax.random.key(5)


class noting(cj.Compressor):  # noqa: N801
    """Keeps the first pairs; weights note a random number and what a head is made of."""

    noted: float = leaf(default=1.0)

    def compress_head(self, head, size):
        seen = jnp.sum(head.keys) + jnp.sum(head.values) + self.noted + head.query_norm
        drawn = jax.random.uniform(head.key)
        weights = jnp.where(jnp.arange(size) == 0, drawn, seen).astype(head.dtype)
        places = jnp.where(jnp.arange(size) < head.length, jnp.arange(size), head.count)
        return head.pairs(places, weights), cj.Info(heavy=head.length)


@pytest.fixture(scope="module")
def cache():
    rng = np.random.default_rng(0)
    shapes = [(*LEADING, COUNT, width) for width in (WIDTH, VALUE_WIDTH)]
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).standard_normal((*LEADING, 7, WIDTH)).astype(np.float32)


@pytest.mark.slow
def test_every_head_gets_its_own_fold_of_the_rng():
    draws = jax.vmap(lambda head: jax.random.uniform(jax.random.fold_in(RNG, head)))(jnp.arange(6))
    for leading in ((), (6,), (2, 3)):
        pairs = [np.zeros((*leading, COUNT, width), np.float32) for width in (WIDTH, VALUE_WIDTH)]
        coreset = noting()(RNG, *pairs, size=SIZE)
        expected = draws[: math.prod(leading)].reshape(leading)
        np.testing.assert_array_equal(coreset.log_weights[..., 0], expected)


def test_heads_see_their_own_pairs_lengths_and_options(cache, queries):
    inside = (np.arange(COUNT) < LENGTHS[..., None])[..., None]
    poisoned, clean = (
        [np.where(inside, array, np.float32(filling)) for array in cache] for filling in (np.nan, 0)
    )
    noted = np.arange(1.0, 7.0, dtype=np.float32).reshape(LEADING)
    norms = np.arange(11.0, 17.0, dtype=np.float32).reshape(LEADING)
    # Any integer dtype.
    for lengths in (LENGTHS.astype(np.uint8), jnp.asarray(LENGTHS)):
        coreset, info = noting(noted=noted).with_info(RNG, *poisoned, size=SIZE, lengths=lengths)
        np.testing.assert_array_equal(info.heavy, LENGTHS)
        held = np.arange(SIZE) < LENGTHS[..., None]
        np.testing.assert_array_equal(coreset.indices, np.where(held, np.arange(SIZE), -1))
        assert np.all(np.isfinite(coreset.log_weights[held]))
        assert np.all(np.isneginf(coreset.log_weights[~held]))
        seen = sum(array.sum(axis=(-2, -1)) for array in clean) + noted + WIDTH**0.5
        several = LENGTHS > 1
        np.testing.assert_allclose(coreset.log_weights[several][:, 1], seen[several], rtol=1e-5)

    class bounded(noting):  # noqa: N801
        query_norm: float = leaf(default=None)

    first = bounded(query_norm=norms)(RNG, *cache, size=SIZE).log_weights[..., 1]
    sampled_norms = bounded()(RNG, *cache, size=SIZE, queries=queries).log_weights[..., 1]
    expected = np.linalg.norm(queries, axis=-1).max(axis=-1)
    np.testing.assert_allclose(first - sampled_norms, norms - expected, rtol=1e-4)
    # A radius that is given wins over the samples.
    both = bounded(query_norm=norms)(RNG, *cache, size=SIZE, queries=100 * queries)
    np.testing.assert_array_equal(both.log_weights[..., 1], first)


def test_a_sick_source_answers_nan_and_its_neighbors_do_not(cache, queries):
    well = newest()(RNG, *cache, size=SIZE)
    for which in (0, 1):
        for filling in (np.nan, np.inf, -np.inf):
            arrays = [array.copy() for array in cache]
            # Not even among the pairs that are kept.
            arrays[which][1, 2, 0, 0] = filling
            coreset = newest()(RNG, *arrays, size=SIZE)
            sick = np.isnan(cj.attend(queries, coreset))
            assert np.all(sick[1, 2])
            assert sick.sum() == sick[1, 2].size
            for before, after in zip(well[:4], coreset[:4], strict=True):
                np.testing.assert_array_equal(before[0], after[0])


def test_sick_samples_answer_nan_in_their_head_where_they_are_used(cache, queries):
    sick = queries.copy()
    sick[1, 2, 1, 0] = np.inf
    found = np.isnan(asking()(RNG, *cache, size=SIZE, queries=sick).log_weights)
    assert np.all(found[1, 2])
    assert found.sum() == SIZE
    assert not np.any(np.isnan(newest()(RNG, *cache, size=SIZE, queries=sick).log_weights))


def test_nothing_is_lost_where_nothing_has_to_go(cache):
    for lengths in (None, LENGTHS):
        expected = whole_cache(*cache, lengths)
        for size in (COUNT, COUNT + 1):
            coreset = sampled()(RNG, *cache, size=size, lengths=lengths)
            chex.assert_trees_all_equal(coreset, expected)


@pytest.mark.slow
def test_the_rng_decides_and_leading_axes_are_only_a_layout(cache):
    coreset = sampled()(RNG, *cache, size=SIZE)
    chex.assert_trees_all_equal(sampled()(RNG, *cache, size=SIZE), coreset)
    other = sampled()(jax.random.key(1), *cache, size=SIZE)
    assert np.any(other.indices != coreset.indices)
    flat = sampled()(RNG, *(array.reshape(6, *array.shape[2:]) for array in cache), size=SIZE)
    chex.assert_trees_all_equal(flat, jax.tree.map(lambda a: a.reshape(6, *a.shape[2:]), coreset))
    # Another head changes nothing of the others.
    changed = [array.copy() for array in cache]
    for array in changed:
        array[1, 2] = np.random.default_rng(9).standard_normal(array[1, 2].shape)
    other = sampled()(RNG, *changed, size=SIZE)
    for before, after in zip(coreset[:4], other[:4], strict=True):
        np.testing.assert_array_equal(before[0], after[0])
        np.testing.assert_array_equal(before[1, :2], after[1, :2])


def test_keys_and_values_keep_dtypes_of_their_own(cache, x64):
    for key_dtype, value_dtype, dtype in (
        (jnp.float16, jnp.float16, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float64, jnp.float64),
    ):
        keys, values = cache[0].astype(key_dtype), cache[1].astype(value_dtype)
        coreset = newest()(RNG, keys, values, size=SIZE)
        assert (coreset.keys.dtype, coreset.values.dtype) == (key_dtype, value_dtype)
        assert coreset.log_weights.dtype == dtype
        np.testing.assert_array_equal(coreset.keys, keys[..., -SIZE:, :])
        np.testing.assert_array_equal(coreset.values, values[..., -SIZE:, :])


def test_a_call_is_one_program_and_none_at_equal_shapes(cache, programs):
    """Nor for other numbers, other random keys, or other kinds of arrays."""

    class once(noting):  # noqa: N801
        """Of a class that nobody else has compiled."""

        rho: float = leaf(default=None)

    def cost(*given, compressor=once(rho=2.0), method="__call__", **more):  # noqa: B008
        before = programs()
        getattr(compressor, method)(RNG, *given, size=SIZE, **more)
        return programs() - before

    assert cost(*cache) == 1
    assert cost(*map(jnp.asarray, cache)) == 0
    kinds = (1, 3.0, np.float64(4.0), np.array(5.0), jnp.float32(6.0))
    for rho in kinds:
        assert cost(*cache, compressor=once(rho=rho)) == 0
    # One number a head is another shape, and so are lengths.
    assert cost(*cache, compressor=once(rho=np.full(LEADING, 2.0))) == 1
    assert cost(*cache, compressor=once(rho=np.full(LEADING, 3.0, np.float32))) == 0
    assert cost(*cache, lengths=LENGTHS) == 1
    assert cost(*cache, lengths=1 + 0 * LENGTHS) == 0
    # Samples that would change nothing are not looked at.
    assert cost(*cache, queries=cache[0]) == 0
    # What is measured is another program.
    assert cost(*cache, method="with_info") == 1
    assert cost(*cache, method="with_info") == 0


@pytest.mark.slow
def test_equal_shapes_are_traced_once(cache):
    class traced(sampled):  # noqa: N801
        """Of a class that nobody else has traced."""

    def once(rng, keys, values):
        return traced()(rng, keys, values, size=SIZE)

    compress = jax.jit(chex.assert_max_traces(once, n=1))
    coreset = traced()(RNG, *cache, size=SIZE)
    for seed in (5, 6):
        found = compress(jax.random.key(seed), *cache)
    chex.assert_trees_all_equal(compress(RNG, *cache), coreset)
    assert np.any(found.indices != coreset.indices)
    rngs = jax.random.split(RNG, 2)
    mapped = jax.jit(jax.vmap(functools.partial(traced(), size=SIZE)))(rngs, *cache)
    for axis in range(2):
        single = traced()(rngs[axis], *(array[axis] for array in cache), size=SIZE)
        chex.assert_trees_all_equal(jax.tree.map(lambda a, i=axis: a[i], mapped), single)


def test_sharded_heads_stay_where_they_are():
    keys, values = np.random.default_rng(2).standard_normal((2, 2, 4, COUNT, WIDTH))
    pairs = np.float32(keys), np.float32(values)
    expected = sampled()(RNG, *pairs, size=SIZE)
    devices = min(jax.device_count(), 4)
    mesh = jax.make_mesh((devices,), ("heads",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "heads"))
    compress = jax.jit(sampled(), static_argnames="size")
    coreset = compress(RNG, *jax.device_put(pairs, sharding), size=SIZE)
    chex.assert_trees_all_equal(coreset, expected)
    assert coreset.keys.sharding.is_equivalent_to(sharding, 4)
