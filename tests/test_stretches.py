"""Stretches: what a compressor makes of each, side by side, for any length and size."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax.stretches import stretch_count

RNG = jax.random.key(0)
# The package has a function of that name.
fitted = sys.modules["coreset_jax.fitted"]


@pytest.mark.parametrize(
    ("size", "most", "count"),
    [(10, 10, 1), (11, 10, 2), (20, 10, 2), (21, 10, 3), (22, 10, 3), (28, 10, 4), (50, 10, 5)],
)
def test_count(size, most, count):
    found = stretch_count(size, most)
    assert found == count
    assert size // found <= most


@pytest.mark.parametrize("size", [12, 16, 20, 23, 40])
@pytest.mark.parametrize("count", [64, 65, 101])
def test_each_stretch_keeps_its_share(count, size):
    keys, values = jax.random.normal(RNG, (2, 3, count, 4))
    lengths = jnp.array([count, count // 2, 9])
    compressor = cj.stretched(cj.baselines.uniform(), most=10)
    stretches = stretch_count(size, 10)
    for given in (None, lengths):
        coreset = compressor(RNG, keys, values, size=size, lengths=given)
        assert coreset.indices.shape == (3, size)
        for head in range(3):
            length = count if given is None else int(given[head])
            indices = np.asarray(coreset.indices[head])
            held = indices[indices >= 0]
            assert len(held) <= size
            assert len(held) >= min(size, length) - stretches
            np.testing.assert_array_equal(indices[len(held) :], -1)
            assert np.all(np.diff(held) > 0)
            assert held[-1] < length
            np.testing.assert_array_equal(coreset.keys[head][: len(held)], keys[head][held])
            np.testing.assert_array_equal(coreset.values[head][: len(held)], values[head][held])
            weights = np.exp(coreset.log_weights[head])
            np.testing.assert_allclose(weights.sum(), length, rtol=1e-5)
            assert np.all(weights[len(held) :] == 0)
            edges = np.arange(stretches + 1) * length // stretches
            counts = np.histogram(held, edges)[0]
            assert counts.max() - counts.min() <= max(1, np.diff(edges).max() - 1)


def test_small_sizes_are_left_alone():
    keys, values = jax.random.normal(RNG, (2, 3, 64, 4))
    plain = cj.balanced()
    found = cj.stretched(plain, most=10)(RNG, keys, values, size=10)
    np.testing.assert_array_equal(found.indices, plain(RNG, keys, values, size=10).indices)
    whole = cj.stretched(plain, most=10)(RNG, keys, values, size=64)
    np.testing.assert_array_equal(whole.keys, keys)


def test_normalizers_go_along():
    keys, values = jax.random.normal(RNG, (2, 64, 4))
    coreset = cj.stretched(cj.baselines.wildcat(), most=8)(RNG, keys, values, size=16)
    assert coreset.normalizers.shape == (16,)
    exact = cj.attention(keys[:3], keys, values)
    whole = cj.baselines.wildcat()(RNG, keys, values, size=16)
    misses = [
        float(jnp.mean(jnp.abs(cj.attend(keys[:3], each) - exact))) for each in (coreset, whole)
    ]
    assert misses[0] < 2 * misses[1]


def test_a_nan_is_one_of_the_head():
    keys, values = jax.random.normal(RNG, (2, 2, 64, 4))
    coreset = cj.stretched(cj.balanced(), most=8)(
        RNG, keys.at[1, 50, 0].set(jnp.nan), values, size=16
    )
    assert bool(jnp.all(jnp.isfinite(coreset.log_weights[0])))
    assert bool(jnp.all(jnp.isnan(coreset.log_weights[1])))


def test_sample_queries_are_those_of_every_stretch():
    keys, values = jax.random.normal(RNG, (2, 2, 64, 4))
    queries = jax.random.normal(jax.random.key(1), (2, 5, 4))
    compressor = cj.stretched(cj.baselines.top_attention(), most=8)
    coreset = compressor(RNG, keys, values, size=16, queries=queries)
    first = cj.baselines.top_attention()(RNG, keys[:, :32], values[:, :32], size=8, queries=queries)
    np.testing.assert_array_equal(coreset.indices[:, :8], first.indices)


@pytest.mark.slow
def test_fitted_takes_a_radius_a_head_and_any_length():
    keys, values = jax.random.normal(RNG, (2, 2, 3, 130, 4))
    radius = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    lengths = jnp.array([[130, 100, 50], [20, 7, 1]])
    coreset = cj.fitted(rho=radius, most=10)(RNG, keys, values, size=20, lengths=lengths)
    assert coreset.keys.shape == (2, 3, 20, 4)
    sums = np.exp(coreset.log_weights).sum(axis=-1)
    np.testing.assert_allclose(sums, lengths, rtol=1e-5)


@pytest.mark.slow
def test_matched_groups_keep_their_balance(monkeypatch):
    """Two halves of a cache that differ in all they can, matched apart, answer as one."""
    monkeypatch.setattr(fitted, "_MOST_MATCHED", 64)
    keys, values = jax.random.normal(RNG, (2, 1, 1025, 16))
    half = (jnp.arange(1025) < 512)[:, None]
    keys, values = jnp.where(half, 0.3, 2.0) * keys, values + jnp.where(half, 0.0, 3.0)
    queries = jax.random.normal(jax.random.key(1), (1, 600, 16))
    sample, fresh = queries[:, :512], queries[:, 512:]
    exact = cj.attention(fresh, keys, values)

    def miss(**informed):
        compressor = cj.fitted(query_norm=jnp.full((1,), 4.0))
        coreset = compressor(RNG, keys, values, size=128, **informed)
        return float(jnp.mean(jnp.linalg.norm(cj.attend(fresh, coreset) - exact, axis=-1)))

    assert miss(queries=sample) < 0.95 * miss()


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="most"):
        cj.stretched(cj.balanced(), most=0)
    with pytest.raises(ValueError, match="compressor"):
        cj.stretched(None)
