"""Coresets in attention of other libraries, by a bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax.baselines import SignedCoreset
from tests.compressors import sampled

BATCH, HEADS, COUNT, WIDTH, SIZE = 2, 8, 40, 16, 12


def problem(kv_heads, dtype=jnp.float32):
    """Queries by length, and a coreset whose first sequence leaves slots empty."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((BATCH, 5, HEADS, WIDTH))
    keys, values = rng.standard_normal((2, BATCH, kv_heads, COUNT, WIDTH))
    queries, keys, values = (jnp.asarray(each, dtype) for each in (queries, keys, values))
    lengths = np.array([[7] * kv_heads, [COUNT] * kv_heads])
    coreset = sampled()(jax.random.key(0), keys, values, size=SIZE, lengths=lengths)
    # Weights that differ between heads and pairs.
    noise = rng.standard_normal(coreset.log_weights.shape).astype(np.float32)
    coreset = coreset._replace(log_weights=coreset.log_weights + noise)
    assert np.all(np.isneginf(coreset.log_weights[0, :, 7:]))
    return queries, coreset


def biased(queries, coreset, **options):
    return jax.nn.dot_product_attention(
        queries,
        coreset.keys.swapaxes(-2, -3),
        coreset.values.swapaxes(-2, -3),
        bias=cj.attention_bias(coreset, **options),
    )


def expected(queries, coreset):
    """Query heads of one key-value head behind each other."""
    kv_heads = coreset.keys.shape[-3]
    rows = queries.swapaxes(-2, -3).reshape(*queries.shape[:-3], kv_heads, -1, WIDTH)
    by_head = cj.attend(rows, coreset).reshape(*queries.shape[:-3], HEADS, -1, WIDTH)
    return by_head.swapaxes(-2, -3)


@pytest.mark.parametrize("query_length", [1, 5])
@pytest.mark.parametrize("kv_heads", [8, 4, 1])
def test_biased_attention_is_attention_over_the_coreset(kv_heads, query_length):
    queries, coreset = problem(kv_heads)
    options = {"num_query_heads": HEADS, "query_length": query_length}
    bias = jax.jit(functools.partial(cj.attention_bias, **options))(coreset)
    assert bias.shape == (BATCH, HEADS, query_length, SIZE)
    found = biased(queries, coreset, **options)
    np.testing.assert_allclose(found, expected(queries, coreset), rtol=1e-5, atol=1e-5)
    # Without a batch.
    queries, coreset = queries[0], jax.tree.map(lambda leaf: leaf[0], coreset)
    found = biased(queries, coreset, **options)
    np.testing.assert_allclose(found, expected(queries, coreset), rtol=1e-5, atol=1e-5)


def test_empty_slots_make_no_nan():
    queries, coreset = problem(4)

    def total(queries, coreset):
        return jnp.sum(jnp.sin(biased(queries, coreset, num_query_heads=HEADS)))

    gradients = jax.grad(total, argnums=(0, 1), allow_int=True)(queries, coreset)
    for gradient in (gradients[0], *gradients[1][:3]):
        assert np.all(np.isfinite(gradient))


def test_half_precision_keeps_its_weights():
    queries, coreset = problem(2, jnp.bfloat16)
    assert cj.attention_bias(coreset, num_query_heads=HEADS).dtype == jnp.float32
    found = biased(queries, coreset, num_query_heads=HEADS)
    assert found.dtype == jnp.bfloat16
    exact = expected(queries.astype(jnp.float32), coreset)
    np.testing.assert_allclose(found.astype(np.float32), exact, rtol=2**-6, atol=2**-6)


def test_wrong_use_is_refused():
    _, coreset = problem(4)
    for options, named in (
        ({"num_query_heads": 6}, "num_query_heads must be a multiple .* 4 heads, got 6"),
        ({"num_query_heads": 2}, "num_query_heads must be a multiple"),
        ({"num_query_heads": 8.0}, "num_query_heads must be a static"),
        ({"query_length": 0}, "query_length"),
    ):
        with pytest.raises(ValueError, match=named):
            cj.attention_bias(coreset, **options)
    with pytest.raises(ValueError, match="without heads"):
        cj.attention_bias(jax.tree.map(lambda leaf: leaf[0, 0], coreset))
    signed = SignedCoreset(*coreset[:4], normalizers=jnp.ones_like(coreset.log_weights))
    with pytest.raises(ValueError, match="signed"):
        cj.attention_bias(signed)
