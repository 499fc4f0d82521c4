"""Quantised caches: how far a number moves, what stays, and what it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coreset_jax.coreset import Coreset, whole_cache

from coreset_jax import baselines

LENGTHS = np.array([50, 23])


@pytest.fixture(scope="module")
def cache():
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 2, 50, 6)) * rng.uniform(0.1, 30, (2, 1, 1, 6)) + 2.0
    return keys.astype(np.float32), values[..., :5].astype(np.float32)


def by_hand(rows, bits):
    """One range a row, in float64: codes, lowest values and steps."""
    rows = np.asarray(rows, np.float64)
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    return np.rint((rows - low) / step), low, step


@pytest.mark.parametrize("bits", [4, 8])
def test_reads_back_the_nearest_levels(cache, bits):
    keys, values = cache
    padding = np.arange(50)[:, None] >= LENGTHS[:, None, None]
    keys, values = (np.where(padding, np.nan, array) for array in (keys, values))
    compressor = baselines.quantised(bits=bits)
    coreset = compressor(jax.random.key(0), keys, values, size=50, lengths=LENGTHS)
    for head, length in enumerate(LENGTHS):
        # Keys by channel, values by token, and both over the valid pairs alone.
        for read, source in [
            (coreset.keys[head].T[:, :length], keys[head].T[:, :length]),
            (coreset.values[head, :length], values[head, :length]),
        ]:
            codes, low, step = by_hand(source, bits)
            assert codes.max() == 2**bits - 1
            np.testing.assert_allclose(read, low + codes * step, rtol=1e-5, atol=1e-5)
            assert np.all(np.abs(read - source) <= step * (0.5 + 1e-4))
        assert not np.any(coreset.keys[head, length:])
        assert not np.any(coreset.values[head, length:])
    np.testing.assert_array_equal(coreset.indices, whole_cache(*cache, LENGTHS).indices)
    np.testing.assert_array_equal(coreset.log_weights, whole_cache(*cache, LENGTHS).log_weights)


def test_wraps_any_compressor(cache):
    for compressor in (baselines.uniform(), baselines.wildcat()):
        plain = compressor(jax.random.key(0), *cache, size=16)
        wrapped = baselines.quantised(compressor, bits=4)(jax.random.key(0), *cache, size=16)
        np.testing.assert_array_equal(wrapped.indices, plain.indices)
        np.testing.assert_array_equal(wrapped.log_weights, plain.log_weights)
        assert (wrapped.normalizers is None) == (plain.normalizers is None)
        assert np.all(np.any(plain.values != 0, axis=-1))
        codes, low, step = by_hand(plain.values[0], 4)
        np.testing.assert_allclose(wrapped.values[0], low + codes * step, rtol=1e-4, atol=1e-4)


def test_eight_bits_cost_next_to_nothing(instances):
    instance = instances["smooth"]
    errors = {}
    for bits in (4, 8):
        compressor = baselines.quantised(bits=bits)
        coreset = compressor(jax.random.key(0), *instance[:2], size=4096)
        errors[bits] = instance.error(*coreset[:3])
    assert errors[8] < 2e-3
    # A code of four bits more has a step seventeen times shorter.
    assert 8 < errors[4] / errors[8] < 30


def test_what_never_varies_is_kept_exactly():
    keys = jnp.broadcast_to(jnp.array([3.7, -1.1]), (9, 2))
    values = jnp.broadcast_to(jnp.linspace(-3e38, 3e38, 9)[:, None], (9, 4))
    coreset = baselines.quantised(bits=4)(jax.random.key(0), keys, values, size=9)
    np.testing.assert_array_equal(coreset.keys, keys)
    np.testing.assert_array_equal(coreset.values, values)


def test_half_precision_and_nan(cache):
    keys, values = (jnp.asarray(array, jnp.bfloat16) for array in cache)
    coreset = baselines.quantised()(jax.random.key(0), keys, values, size=50)
    assert coreset.keys.dtype == coreset.values.dtype == jnp.bfloat16
    # Eight bits of a channel's range are finer than those of bfloat16 near its ends.
    np.testing.assert_allclose(
        coreset.keys.astype(float), keys.astype(float), atol=float(jnp.max(jnp.abs(keys))) / 100
    )
    sick = baselines.quantised()(
        jax.random.key(0), keys.at[1, 30, 2].set(jnp.inf), values, size=50
    ).log_weights
    np.testing.assert_array_equal(np.isnan(sick), np.array([[False], [True]]) & np.ones(50, bool))


def test_bytes():
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    coreset = Coreset(shape(2, 3, 5, 7), shape(2, 3, 5, 4), shape(2, 3, 5), shape(2, 3, 5))
    # 35 and 20 codes of four bits, and 7 and 5 pairs of float32.
    assert baselines.quantised_bytes(coreset, bits=4) == 6 * (18 + 10 + 8 * 12)
    assert baselines.quantised_bytes(coreset, bits=8) == 6 * (35 + 20 + 8 * 12)
    wide = Coreset(shape(4096, 128), shape(4096, 128), shape(4096), shape(4096))
    assert baselines.quantised_bytes(wide, bits=4) < 0.3 * 2 * 2 * 4096 * 128


def test_bad_arguments_are_refused(cache):
    for options, message in [
        ({"bits": 1}, "bits must be at least 2"),
        ({"bits": 9}, "bits must be at most 8"),
        ({"bits": 4.0}, "bits must be a static Python int"),
        ({"compressor": 3}, "compressor must be callable"),
    ]:
        with pytest.raises(ValueError, match=message):
            baselines.quantised(**options)
    with pytest.raises(ValueError, match="size must be at least n"):
        baselines.quantised()(jax.random.key(0), *cache, size=49)
    with pytest.raises(ValueError, match="bits must be at most 8"):
        baselines.quantised_bytes(whole_cache(*cache), bits=16)
