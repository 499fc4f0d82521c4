"""Rotary positions: rotations by the angle of the position."""

import functools
import inspect

import jax.numpy as jnp
import numpy as np
from flax import linen

from coreset_jax.nn.rotary import Rotating, rotate, rotate_behind

BASE = 100.0


def turned(array, positions):
    """Pairs of features as complex numbers, in float64."""
    first, second = np.split(np.asarray(array, np.float64), 2, axis=-1)
    half = first.shape[-1]
    angles = np.asarray(positions)[..., None, None] * BASE ** (-np.arange(half) / half)
    both = (first + 1j * second) * np.exp(1j * angles)
    return np.concatenate([both.real, both.imag], axis=-1)


def arrays(*heads):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((3, 5, count, 8)), jnp.float32) for count in heads]


def test_features_turn_by_the_angle_of_their_position():
    (array,) = arrays(4)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [500, 1, 30, 2, 0]])
    found = rotate(array, positions, BASE)
    np.testing.assert_allclose(found, turned(array, positions), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found[0, 0], array[0, 0])


def test_scores_depend_on_distances_alone():
    query, key = arrays(1, 1)
    near, far = (
        np.einsum(
            "bqhd,bnhd->bqn", *(rotate(each, at + jnp.arange(5)[None], BASE) for each in both)
        )
        for both, at in (((query, key), 0), ((query, key), 40))
    )
    np.testing.assert_allclose(near, far, atol=1e-4)


def test_half_precision_is_kept():
    (array,) = arrays(2)
    found = rotate(jnp.asarray(array, jnp.bfloat16), jnp.arange(5)[None], BASE)
    assert found.dtype == jnp.bfloat16


def test_next_tokens_stand_behind_the_sequence():
    query, key = arrays(4, 2)
    lengths = np.array([0, 7, 100])
    found = rotate_behind(jnp.asarray(lengths), query, key, BASE)
    for each, array in zip(found, (query, key), strict=True):
        expected = turned(array, lengths[:, None] + np.arange(5))
        np.testing.assert_allclose(each, expected, rtol=1e-4, atol=1e-4)
    assert rotate_behind(jnp.asarray(lengths), query, key, None) == (query, key)


def test_an_attention_function_keeps_its_options():
    query, key = arrays(4, 4)
    mask = np.tri(5, dtype=bool)
    attend = Rotating(linen.dot_product_attention, BASE)
    assert inspect.signature(attend) == inspect.signature(linen.dot_product_attention)
    exact = functools.partial(turned, positions=np.arange(5)[None])
    np.testing.assert_allclose(
        attend(query, key, key, mask=mask),
        linen.dot_product_attention(exact(query), exact(key), key, mask=mask),
        rtol=1e-4,
        atol=1e-5,
    )
