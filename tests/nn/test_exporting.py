"""Steps of a cache in programs that were exported, serialized and read again."""

import chex
import jax
import numpy as np
import pytest
from jax import export

from coreset_jax.nn import CoresetCache
from tests.stream import compressors


def through_bytes(cache, *arguments):
    """What the program returns that is read from the bytes of a step."""
    exported = export.export(jax.jit(CoresetCache.read_and_extend))(cache, *arguments)
    return export.deserialize(exported.serialize()).call(cache, *arguments)


@pytest.mark.parametrize("middle", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_take_and_return_caches(sequences, empty_cache, config, middle):
    config = config.replace(scale=0.3, max_length=np.int64(9))
    config = config if middle else config.replace(size=24)
    token = sequences.cut(0, 1)
    outputs, cache = through_bytes(empty_cache(config), *token)
    assert cache.config == config
    chex.assert_trees_all_equal(
        (outputs, cache), empty_cache(config).read_and_extend(*token), strict=True
    )


def test_compressors_are_refused_with_a_way_out(sequences, empty_cache, config):
    config = config.replace(size=24, compressor=compressors.sampled())
    cache, token = empty_cache(config), sequences.cut(0, 1)
    with pytest.raises(ValueError, match="compressor cannot be serialized"):
        through_bytes(cache, *token)
    leaves, structure = jax.tree.flatten(cache)

    @jax.jit
    def step(leaves, *token):
        outputs, cache = jax.tree.unflatten(structure, leaves).read_and_extend(*token)
        return outputs, jax.tree.leaves(cache)

    program = export.deserialize(export.export(step)(leaves, *token).serialize())
    outputs, leaves = program.call(leaves, *token)
    found = outputs, jax.tree.unflatten(structure, leaves)
    chex.assert_trees_all_equal(found, cache.read_and_extend(*token))
