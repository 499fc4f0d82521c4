"""Quantized caches: how far a number moves, what stays, and what it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import baselines
from coreset_jax._src.core.coreset import Coreset, SignedCoreset

RNG = jax.random.key(0)
COUNT, SIZE = 50, 16
LENGTHS = np.array([COUNT, 23])


class signed(cj.Compressor):  # noqa: N801
    """The first pairs, with normalizers of their own."""

    signed = True

    def compress_head(self, head, size):
        pairs = head.pairs(jnp.arange(size), jnp.zeros(size, head.dtype))
        return SignedCoreset(*pairs, jnp.arange(size) - 3.0), cj.Info()


@pytest.fixture(scope="module")
def cache():
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 2, COUNT, 6)) * rng.uniform(0.1, 30, (2, 1, 1, 6)) + 2.0
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
    padding = np.arange(COUNT)[:, None] >= LENGTHS[:, None, None]
    keys, values = (np.where(padding, np.nan, array) for array in (keys, values))
    compressor = baselines.quantized(bits=bits)
    coreset = jax.device_get(compressor(RNG, keys, values, size=COUNT, lengths=LENGTHS))
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
    inside = ~padding[..., 0]
    np.testing.assert_array_equal(coreset.indices, np.where(inside, np.arange(COUNT), -1))
    np.testing.assert_array_equal(coreset.log_weights, np.where(inside, 0, -np.inf))


@pytest.mark.slow
def test_wraps_any_compressor(cache):
    for compressor in (baselines.uniform(), signed()):
        plain = jax.device_get(compressor(RNG, *cache, size=SIZE))
        quantized = baselines.quantized(compressor, bits=4)
        wrapped = jax.device_get(quantized(RNG, *cache, size=SIZE))
        assert type(wrapped) is type(plain)
        # Log-weights, indices and normalizers.
        jax.tree.map(np.testing.assert_array_equal, wrapped[2:], plain[2:])
        for head in range(2):
            codes, low, step = by_hand(plain.values[head], 4)
            np.testing.assert_allclose(wrapped.values[head], low + codes * step, rtol=1e-4)
            codes, low, step = by_hand(plain.keys[head].T, 4)
            np.testing.assert_allclose(wrapped.keys[head].T, low + codes * step, rtol=1e-4)


def test_traits_are_those_of_the_inner_compressor():
    for inner in (
        baselines.uniform(),
        baselines.wildcat(scale=0.5),
        baselines.h2o(),
        cj.fitted(query_norm=2.0),
    ):
        quantized = baselines.quantized(inner)
        for name in ("needs_queries", "reads_queries", "signed", "query_ball"):
            assert getattr(quantized, name) == getattr(inner, name)
        assert not quantized.keeps_pairs
    with pytest.raises(ValueError, match="compressor must return positive weights"):
        cj.refit.weights(baselines.quantized(baselines.wildcat()))
    assert baselines.quantized(None, bits=4) == baselines.quantized(bits=np.int64(4))
    assert baselines.quantized() != baselines.quantized(baselines.uniform())


def test_eight_bits_cost_next_to_nothing(instances):
    instance = instances["smooth"]
    errors = {}
    for bits in (4, 8):
        compressor = baselines.quantized(bits=bits)
        coreset = compressor(RNG, *instance[:2], size=4096)
        errors[bits] = instance.error(*coreset[:3])
    assert errors[8] < 2e-3
    # A code of four bits more has a step seventeen times shorter.
    assert 8 < errors[4] / errors[8] < 30


def test_what_never_varies_is_kept_exactly():
    keys = np.broadcast_to(np.float32([3.7, -1.1]), (9, 2))
    values = np.broadcast_to(np.linspace(-3e38, 3e38, 9, dtype=np.float32)[:, None], (9, 4))
    coreset = baselines.quantized(bits=4)(RNG, keys, values, size=9)
    np.testing.assert_array_equal(coreset.keys, keys)
    np.testing.assert_array_equal(coreset.values, values)


def test_half_precision_and_infinities(cache):
    keys, values = (array.astype(jnp.bfloat16) for array in cache)
    coreset = jax.device_get(baselines.quantized()(RNG, keys, values, size=COUNT))
    assert coreset.keys.dtype == coreset.values.dtype == jnp.bfloat16
    # Eight bits of a channel's range are finer than those of bfloat16 near its ends.
    atol = float(np.max(np.abs(keys))) / 100
    np.testing.assert_allclose(np.float32(coreset.keys), np.float32(keys), atol=atol)
    keys = keys.copy()
    keys[1, 30, 2] = np.inf
    sick = np.isnan(baselines.quantized()(RNG, keys, values, size=COUNT).log_weights)
    np.testing.assert_array_equal(sick, np.array([[False], [True]]) & np.ones(COUNT, bool))


def test_bytes():
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    coreset = Coreset(shape(2, 3, 5, 7), shape(2, 3, 5, 4), shape(2, 3, 5), shape(2, 3, 5))
    # 35 and 20 codes of four bits, and 7 and 5 pairs of float32.
    assert baselines.quantized_bytes(coreset, bits=4) == 6 * (18 + 10 + 8 * 12)
    assert baselines.quantized_bytes(coreset, bits=8) == 6 * (35 + 20 + 8 * 12)
    wide = Coreset(shape(4096, 128), shape(4096, 128), shape(4096), shape(4096))
    assert baselines.quantized_bytes(wide, bits=4) < 0.3 * 2 * 2 * 4096 * 128
    with pytest.raises(ValueError, match="bits must be at most 8"):
        baselines.quantized_bytes(wide, bits=16)


def test_bad_arguments_are_refused(cache):
    for options, message in [
        ({"bits": 1}, "bits must be at least 2"),
        ({"bits": 9}, "bits must be at most 8"),
        ({"bits": 4.0}, "bits must be a static Python int"),
        ({"compressor": 3}, "compressor must be a Compressor"),
    ]:
        with pytest.raises(ValueError, match=message):
            baselines.quantized(**options)
    # Before anything is traced, and wherever it stands.
    for compressor in (baselines.quantized(), cj.keep_ends(baselines.quantized())):
        with pytest.raises(ValueError, match=r"size must be at least n.*got size 49 and keys"):
            compressor(RNG, *cache, size=COUNT - 1)
