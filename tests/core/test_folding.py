"""Weights as channels of the keys: the attention of a coreset, by kernels that take no bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax._src.core.coreset import SignedCoreset, emptied

RNG = np.random.default_rng(0)
WIDTH, SLOTS = 64, 40


def drawn(dtype, scale=None):
    """A coreset of two heads with weights up to 4000 and some empty slots."""
    keys, values = RNG.normal(size=(2, 2, SLOTS, WIDTH))
    log_weights = jnp.asarray(RNG.uniform(0, np.log(4000), (2, SLOTS)), jnp.float32)
    places = jnp.broadcast_to(jnp.arange(SLOTS, dtype=jnp.int32), (2, SLOTS))
    scale = None if scale is None else jnp.full(2, scale)
    coreset = cj.Coreset(
        jnp.asarray(keys, dtype), jnp.asarray(values, dtype), log_weights, places, scale
    )
    return emptied(coreset, jnp.arange(SLOTS) >= jnp.array([SLOTS, 17])[:, None])


@pytest.mark.parametrize("scale", [None, 0.3])
def test_nothing_is_lost_in_float32(scale):
    coreset = drawn(jnp.float32, scale)
    queries = jnp.asarray(RNG.normal(size=(2, 9, WIDTH)), jnp.float32)
    expected = cj.attend(queries, coreset)
    for width in (65, 128):
        keys, values = cj.fold_weights(coreset, width=width)
        assert keys.shape == (2, SLOTS, width)
        found = cj.attention(
            cj.fold_queries(queries, width=width), keys, values, scale=scale or WIDTH**-0.5
        )
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_two_channels_are_worth_their_room_in_half_precision(dtype):
    """With one, weights are rounded as keys are; with two, they are as good as a bias."""
    coreset = drawn(dtype)
    queries = jnp.asarray(RNG.normal(size=(2, 200, WIDTH)), dtype)
    exact = cj.attend(
        queries.astype(jnp.float32),
        coreset._replace(
            keys=coreset.keys.astype(jnp.float32), values=coreset.values.astype(jnp.float32)
        ),
    )
    errors = []
    for width in (65, 128):
        keys, values = cj.fold_weights(coreset, width=width)
        found = cj.attention(
            cj.fold_queries(queries, width=width),
            keys,
            values.astype(jnp.float32),
            scale=WIDTH**-0.5,
        )
        errors.append(float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)))
    assert errors[1] < 1e-4
    assert errors[0] > 10 * errors[1]
    assert errors[0] < 0.05


def test_grouped_attention_of_jax_takes_it():
    coreset = drawn(jnp.float32)
    queries = jnp.asarray(RNG.normal(size=(1, 3, 4, WIDTH)), jnp.float32)
    keys, values = (each.swapaxes(0, 1)[None] for each in cj.fold_weights(coreset, width=128))
    found = jax.nn.dot_product_attention(
        cj.fold_queries(queries, width=128),
        keys,
        jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, 64))),
        scale=WIDTH**-0.5,
    )
    rows = queries[0].reshape(3, 2, 2, WIDTH).transpose(1, 0, 2, 3).reshape(2, 6, WIDTH)
    expected = cj.attend(rows, coreset).reshape(2, 3, 2, WIDTH).transpose(1, 0, 2, 3)
    np.testing.assert_allclose(found[0, ..., :WIDTH].reshape(3, 2, 2, WIDTH), expected, atol=2e-5)


def test_bad_input_is_refused():
    coreset = drawn(jnp.float32, 0.3)
    with pytest.raises(ValueError, match="width must be more than the 64"):
        cj.fold_weights(coreset, width=64)
    with pytest.raises(ValueError, match="width must be more than the 64"):
        cj.fold_queries(coreset.keys, width=8)
    with pytest.raises(ValueError, match="scale must be that"):
        cj.fold_weights(coreset, width=128, scale=1.0)
    signed = SignedCoreset(*coreset[:4], jnp.ones_like(coreset.log_weights))
    with pytest.raises(ValueError, match="signed"):
        cj.fold_weights(signed, width=128)
