"""Keys that attention rests on are told from the others without a query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import baselines
from coreset_jax._src.geometry.sinks import likely_sinks
from tests.brute_force import attention
from tests.wide_pairs import turned

COUNT, WIDTH = 600, 16
SINKS = np.array([0, 100, 101, 350, 599])
find = jax.jit(likely_sinks)


def planted(seed=0, dtype=np.float32):
    """Keys about a mean that is as long as they are far from it, and a few on its other side."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal(WIDTH)
    keys = mean + rng.standard_normal((COUNT, WIDTH))
    keys[SINKS] = -0.5 * mean + 0.05 * rng.standard_normal((len(SINKS), WIDTH))
    return mean, keys.astype(dtype)


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_those_that_point_away_are_found_at_any_scale(factor):
    _, keys = planted()
    found = find(jnp.asarray(factor * keys, jnp.float32), jnp.ones(COUNT, bool))
    np.testing.assert_array_equal(np.flatnonzero(found), SINKS)


def test_padding_has_no_part():
    _, keys = planted()
    inside = np.arange(COUNT + 40) < COUNT
    padded = np.concatenate([keys, np.zeros((40, WIDTH), np.float32)])
    found = find(jnp.asarray(padded), jnp.asarray(inside))
    np.testing.assert_array_equal(np.flatnonzero(found), SINKS)


def test_other_caches_have_hardly_any():
    rng = np.random.default_rng(1)
    keys = rng.standard_normal((8, 2048, WIDTH))
    normalized = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    off_center = keys + 5
    everyone = jnp.ones(2048, bool)
    for heads in (keys, normalized, off_center):
        found = [int(find(jnp.asarray(head, jnp.float32), everyone).sum()) for head in heads]
        # Cosines near one have a long tail on the other side.
        assert np.mean(found) < 0.003 * 2048
    for same in (np.zeros((2048, WIDTH)), np.ones((2048, WIDTH))):
        assert not np.any(find(jnp.asarray(same, jnp.float32), everyone))


def test_the_default_keeps_them_as_they_are():
    mean, keys = planted()
    rng = np.random.default_rng(2)
    values = rng.standard_normal((COUNT, 8)).astype(np.float32)
    values[SINKS] *= 0.1
    # They ask for nothing, and so for the sinks.
    queries = (-4 * mean + rng.standard_normal((50, WIDTH))).astype(np.float32)
    exact = attention(queries, keys, values)
    errors = []
    for method in (cj.fitted(), cj.keep_ends(baselines.uniform())):
        coreset = method(jax.random.key(0), jnp.asarray(keys), jnp.asarray(values), size=64)
        errors.append(np.linalg.norm(attention(queries, *coreset[:3]) - exact, axis=-1).mean())
        if len(errors) == 1:
            held = np.isin(SINKS, np.asarray(coreset.indices))
            assert np.all(held)
            rows = np.isin(np.asarray(coreset.indices), SINKS)
            np.testing.assert_array_equal(coreset.log_weights[rows], 0)
            np.testing.assert_array_equal(coreset.keys[rows], keys[SINKS])
    assert errors[0] < 0.3 * errors[1]


@pytest.mark.parametrize("base", [10.0, 1e9])
def test_a_long_bias_in_two_channels_hides_none(base):
    _, keys = planted()
    bias = np.zeros(WIDTH)
    bias[[7, 15]] = 200.0
    keys = keys + turned(np.tile(bias, (COUNT, 1)), np.arange(COUNT), base)
    found = find(jnp.asarray(keys, jnp.float32), jnp.ones(COUNT, bool))
    np.testing.assert_array_equal(np.flatnonzero(found), SINKS)
