"""Compressions and what they return, in programs that were exported, serialized and read again."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import coreset_jax as cj
from tests.compressors import sampled, scaled

KEYS, VALUES = np.random.default_rng(0).standard_normal((2, 3, 24, 4)).astype(np.float32)


def through_bytes(function, *arguments):
    """What the program returns that is read from the bytes of a function."""
    exported = export.export(jax.jit(function))(*arguments)
    return export.deserialize(exported.serialize()).call(*arguments)


def numbers(leaf):
    """Random keys as what they are made of."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def check(function, *arguments):
    found, expected = through_bytes(function, *arguments), function(*arguments)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    found, expected = jax.tree.map(numbers, (found, expected))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_coresets_and_info_are_serialized():
    def compress(keys, values):
        return sampled().with_info(jax.random.key(0), keys, values, size=5)

    check(compress, KEYS, VALUES)
    coreset = sampled()(jax.random.key(0), KEYS, VALUES, size=5)
    check(cj.attend, KEYS[:, :2], coreset)


def test_a_scale_is_serialized_with_its_coreset():
    scale = np.array([0.2, 0.5, 2.0], np.float32)
    coreset = scaled(scale=scale)(jax.random.key(0), KEYS, VALUES, size=5)
    check(cj.attend, KEYS[:, :2], coreset)
    check(lambda scale: scaled(scale=scale)(jax.random.key(0), KEYS, VALUES, size=5), scale)


@pytest.mark.slow
def test_the_default_is_serialized():
    check(lambda keys, values: cj.compress(jax.random.key(0), keys, values, size=5), KEYS, VALUES)


@pytest.mark.slow
def test_streams_are_serialized():
    stream = cj.streaming.merge_and_reduce(size=8, block_size=4, landmarks=4)
    state = stream.init(jax.random.key(0), KEYS, VALUES)
    check(stream.append, state, KEYS, VALUES)
    check(stream.error, stream.append(state, KEYS, VALUES))
