"""The coreset itself: gathered from a source, read by attention, NaN where its source was."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax.coreset import gather, over_heads, whole_cache
from tests import brute_force

LEADING, COUNT, SIZE, WIDTH, VALUE_WIDTH = (2, 3), 11, 6, 4, 5


@pytest.fixture(scope="module")
def cache():
    rng = np.random.default_rng(0)
    shapes = [(*LEADING, COUNT, width) for width in (WIDTH, VALUE_WIDTH)]
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).standard_normal((*LEADING, 7, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def coreset(cache):
    """Some pairs, some empty slots, and weights of their own."""
    rng = np.random.default_rng(2)
    indices = np.sort(np.argsort(rng.random((*LEADING, COUNT)), axis=-1)[..., :SIZE], axis=-1)
    indices[0, 1, 4:] = -1
    log_weights = rng.standard_normal((*LEADING, SIZE)).astype(np.float32)
    return gather(*cache, jnp.asarray(indices), jnp.asarray(log_weights))


def test_gather_copies_the_pairs_bit_by_bit(cache, coreset):
    for head in np.ndindex(*LEADING):
        kept = np.flatnonzero(coreset.indices[head] >= 0)
        rows = np.asarray(coreset.indices[head])[kept]
        for taken, source in zip(coreset[:2], cache, strict=True):
            np.testing.assert_array_equal(taken[head][kept], source[head][rows])
    assert coreset.indices.dtype == jnp.int32


def test_empty_slots_hold_zeros_of_weight_zero(coreset):
    empty = np.asarray(coreset.indices) < 0
    assert empty.sum() == 2
    assert not np.any(np.asarray(coreset.keys)[empty])
    assert not np.any(np.asarray(coreset.values)[empty])
    np.testing.assert_array_equal(np.isneginf(coreset.log_weights), empty)


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("scale", [None, 1.5])
def test_attend_is_weighted_attention(coreset, queries, scale, block_size):
    outputs = cj.attend(queries, coreset, scale=scale, block_size=block_size)
    expected = brute_force.attention(queries, *coreset[:3], scale=scale)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_size", [None, 4])
def test_attend_divides_by_the_normalizers(coreset, queries, block_size):
    rng = np.random.default_rng(3)
    # Some of them negative, the denominator not.
    normalizers = rng.uniform(-0.2, 2, (*LEADING, SIZE)).astype(np.float32)
    normalizers[..., 0] = 3.0
    refitted = coreset._replace(normalizers=jnp.asarray(normalizers))
    outputs = cj.attend(queries, refitted, block_size=block_size)
    expected = brute_force.attention(queries, *coreset[:3], normalizers=normalizers)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    ones = coreset._replace(normalizers=jnp.ones_like(coreset.log_weights))
    chex.assert_trees_all_close(
        cj.attend(queries, ones), cj.attend(queries, coreset), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("normalized", [False, True])
def test_attend_keeps_half_precision(coreset, queries, normalized):
    halves = coreset._replace(
        keys=coreset.keys.astype(jnp.bfloat16), values=coreset.values.astype(jnp.bfloat16)
    )
    if normalized:
        halves = halves._replace(normalizers=jnp.ones_like(halves.log_weights))
    outputs = cj.attend(jnp.asarray(queries, jnp.bfloat16), halves)
    assert outputs.dtype == jnp.bfloat16
    expected = brute_force.attention(queries.astype(jnp.bfloat16), *halves[:3])
    np.testing.assert_allclose(outputs.astype(np.float32), expected, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("lengths", [None, np.array([[1, 5, COUNT], [2, 10, 4]])])
def test_the_whole_cache_answers_exactly(cache, queries, lengths):
    whole = whole_cache(*cache, lengths)
    counts = np.full(LEADING, COUNT) if lengths is None else lengths
    inside = np.arange(COUNT) < counts[..., None]
    np.testing.assert_array_equal(whole.indices, np.where(inside, np.arange(COUNT), -1))
    np.testing.assert_array_equal(whole.log_weights, np.where(inside, 0.0, -np.inf))
    np.testing.assert_allclose(
        cj.attend(queries, whole),
        brute_force.attention(queries, *cache, np.where(inside, 0.0, -np.inf)),
        rtol=1e-5,
        atol=1e-5,
    )


def first_pairs(rng, keys, values, length, *more):
    """Keeps the first pairs, and notes in the weights which valid pairs it was handed."""
    indices = jnp.where(jnp.arange(SIZE) < length, jnp.arange(SIZE), -1)
    inside = (jnp.arange(COUNT) < length)[:, None]
    seen = sum(jnp.sum(jnp.where(inside, array, 0)) for array in (keys, values)) + sum(more)
    log_weights = jnp.full(SIZE, seen) + jax.random.uniform(rng)
    return gather(keys, values, indices, log_weights)


@pytest.mark.parametrize("leading", [(), (6,), (2, 3)])
def test_every_head_gets_its_own_fold_of_the_rng(leading):
    heads = math.prod(leading)
    keys, values = (
        np.zeros((*leading, COUNT, width), np.float32) for width in (WIDTH, VALUE_WIDTH)
    )
    rng = jax.random.key(5)
    coreset = over_heads(first_pairs, rng, keys, values, None)
    expected = [jax.random.uniform(jax.random.fold_in(rng, head)) for head in range(heads)]
    np.testing.assert_array_equal(
        coreset.log_weights[..., 0], np.reshape(np.stack(expected), leading)
    )


def test_padding_is_not_sick_and_heads_see_their_own_arguments(cache):
    lengths = np.array([[1, 5, COUNT], [2, 10, 4]], np.uint8)
    inside = (np.arange(COUNT) < lengths[..., None])[..., None]
    poisoned = (np.where(inside, array, np.nan) for array in cache)
    more = np.arange(6.0, dtype=np.float32).reshape(LEADING)
    coreset = over_heads(first_pairs, jax.random.key(0), *poisoned, lengths, more)
    clean = over_heads(
        first_pairs, jax.random.key(0), *(np.where(inside, a, 0) for a in cache), lengths, more
    )
    chex.assert_trees_all_equal(coreset, clean)
    assert np.all(np.isfinite(coreset.log_weights[..., 0]))
    without = over_heads(first_pairs, jax.random.key(0), *cache, lengths, 0 * more)
    np.testing.assert_allclose(
        coreset.log_weights[..., 0] - without.log_weights[..., 0], more, atol=1e-4
    )


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("filling", [np.nan, np.inf, -np.inf])
def test_a_sick_source_answers_nan_and_its_neighbours_do_not(cache, queries, which, filling):
    arrays = [array.copy() for array in cache]
    # Not even among the pairs that are kept.
    arrays[which][1, 2, COUNT - 1, 0] = filling
    coreset = over_heads(first_pairs, jax.random.key(0), *arrays, None)
    sick = np.isnan(cj.attend(queries, coreset))
    assert np.all(sick[1, 2])
    assert sick.sum() == sick[1, 2].size
