"""Programs for accelerators are built here, where there is none, but not run."""

import functools

import jax
import jax.numpy as jnp
import pytest

import coreset_jax as cj

COMPRESSORS = {
    "landmarks": cj.balanced(block_size=64, landmarks=32),
    "exact field": cj.balanced(block_size=64, landmarks=None),
    "Gram-Schmidt": cj.balanced(block_size=64, landmarks=32, walk=cj.walks.gram_schmidt),
}


def arrays(*shapes):
    return [jax.ShapeDtypeStruct((2, 4, *shape), jnp.bfloat16) for shape in shapes]


def compress_keys(queries, keys, values):
    return cj.compress(jax.random.key(0), keys, values, size=10, queries=queries)


def lower(function, platform, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_compression_lowers(name, platform):
    rng = jax.eval_shape(lambda: jax.random.key(0))
    compress = functools.partial(COMPRESSORS[name], size=40)
    lowered = lower(compress, platform, rng, *arrays((256, 16), (256, 8)))
    # The walk is sequential: a loop that was unrolled would be a megabyte of text.
    assert len(lowered.as_text()) < 400_000


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("block_size", [None, 16])
def test_attention_lowers(platform, block_size):
    coreset = jax.eval_shape(
        functools.partial(cj.compress, size=40), jax.random.key(0), *arrays((256, 16), (256, 8))
    )
    attend = functools.partial(cj.attend, block_size=block_size)
    assert lower(attend, platform, *arrays((3, 16)), coreset).as_text()


@pytest.mark.parametrize("function", [cj.attention, compress_keys])
def test_one_exported_program_serves_all_platforms(function):
    """An exported program is kept: it may call nothing that a later release could change."""
    platforms = ("cpu", "cuda", "tpu")
    inputs = arrays((40, 16), (40, 16), (40, 8))
    exported = jax.export.export(jax.jit(function), platforms=platforms)(*inputs)
    assert exported.platforms == platforms
