"""Both ends of a cache: kept bit by bit, whatever compresses what lies between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj

RNG = jax.random.key(0)


@pytest.mark.parametrize("size", [1, 7, 8, 20, 63])
@pytest.mark.parametrize("ragged", [False, True])
def test_ends_are_kept(size, ragged):
    keys, values = jax.random.normal(RNG, (2, 5, 64, 4))
    lengths = jnp.array([64, 41, 20, 3, 1]) if ragged else None
    compressor = cj.with_ends(cj.baselines.uniform(), sinks=3, recent=0.3)
    coreset = compressor(RNG, keys, values, size=size, lengths=lengths)
    assert coreset.indices.shape == (5, size)
    sinks = min(3, size // 8)
    recent = min(int(0.3 * size), size - sinks - 1)
    for head in range(5):
        length = int(lengths[head]) if ragged else 64
        indices = np.asarray(coreset.indices[head])
        held = indices[indices >= 0]
        assert len(held) == min(size, length)
        np.testing.assert_array_equal(indices[len(held) :], -1)
        assert np.all(np.diff(held) > 0)
        weights = np.exp(coreset.log_weights[head])
        np.testing.assert_allclose(weights.sum(), length, rtol=1e-5)
        for place in [*range(min(sinks, length)), *range(max(length - recent, 0), length)]:
            (slot,) = np.flatnonzero(indices == place)
            assert weights[slot] == 1
        np.testing.assert_array_equal(coreset.keys[head][: len(held)], keys[head][held])
        np.testing.assert_array_equal(coreset.values[head][: len(held)], values[head][held])
        assert np.all(weights[len(held) :] == 0)


def test_what_lies_between_is_the_compressors():
    keys, values = jax.random.normal(RNG, (2, 3, 64, 4))
    compressor = cj.baselines.uniform()
    found = cj.with_ends(compressor, sinks=2, recent=0.25)(RNG, keys, values, size=16)
    between = compressor(RNG, keys[:, 2:60], values[:, 2:60], size=10)
    np.testing.assert_array_equal(found.indices[:, 2:12], between.indices + 2)
    np.testing.assert_array_equal(found.log_weights[:, 2:12], between.log_weights)


def test_no_ends_change_nothing():
    keys, values = jax.random.normal(RNG, (2, 3, 64, 4))
    plain = cj.balanced()
    found = cj.with_ends(plain, sinks=0, recent=0)(RNG, keys, values, size=16)
    jax.tree.map(np.testing.assert_array_equal, found, plain(RNG, keys, values, size=16))


def test_a_query_that_hears_the_ends_alone_is_answered_exactly():
    """Whatever is between, and whatever it is compressed to."""
    keys, values = jax.random.normal(RNG, (2, 64, 4))
    keys = keys.at[:2].add(40.0).at[-4:].add(40.0)
    queries = jnp.ones((3, 4)) + 0.01 * jax.random.normal(RNG, (3, 4))
    for compressor in (cj.balanced(), cj.baselines.wildcat()):
        coreset = cj.with_ends(compressor, sinks=2, recent=0.25)(RNG, keys, values, size=16)
        np.testing.assert_allclose(
            cj.attend(queries, coreset), cj.attention(queries, keys, values), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("place", [0, 30, 63])
def test_a_nan_anywhere_is_one_of_the_head(place):
    keys, values = jax.random.normal(RNG, (2, 2, 64, 4))
    for broken in (
        (keys.at[1, place, 2].set(jnp.nan), values),
        (keys, values.at[1, place].set(jnp.inf)),
    ):
        coreset = cj.with_ends(cj.balanced())(RNG, *broken, size=32)
        assert bool(jnp.all(jnp.isnan(coreset.log_weights[1])))
        assert bool(jnp.all(jnp.isfinite(coreset.log_weights[0])))


def test_padding_may_hold_anything():
    keys, values = jax.random.normal(RNG, (2, 2, 64, 4))
    lengths = jnp.array([40, 64])
    compressor = cj.with_ends(cj.balanced())
    clean = compressor(RNG, keys, values, size=16, lengths=lengths)
    dirty = compressor(
        RNG, keys.at[0, 40:].set(jnp.nan), values.at[0, 40:].set(1e30), size=16, lengths=lengths
    )
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_bad_options_are_refused():
    for options in ({"sinks": -1}, {"recent": 1.0}, {"recent": -0.1}, {"recent": None}):
        (name,) = options
        with pytest.raises(ValueError, match=name):
            cj.with_ends(cj.balanced(), **options)
        with pytest.raises(ValueError, match=name):
            cj.fitted(**options)
    with pytest.raises(ValueError, match="compressor"):
        cj.with_ends(3)
