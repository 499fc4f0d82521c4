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


def lowered(function, *shapes):
    """The text of the program for each accelerator; it is traced once."""
    traced = jax.jit(function).trace(*shapes)
    return [traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "tpu")]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_compression_lowers(name):
    rng = jax.eval_shape(lambda: jax.random.key(0))
    compress = functools.partial(COMPRESSORS[name], size=40)
    for text in lowered(compress, rng, *arrays((256, 16), (256, 8))):
        # The walk is sequential: a loop that was unrolled would be a megabyte of text.
        assert len(text) < 400_000


def test_attention_lowers():
    coreset = jax.eval_shape(
        functools.partial(cj.balanced(), size=40), jax.random.key(0), *arrays((256, 16), (256, 8))
    )
    for block_size in (None, 16):
        attend = functools.partial(cj.attend, block_size=block_size)
        assert all(lowered(attend, *arrays((3, 16)), coreset))


@pytest.mark.parametrize("function", [cj.attention, compress_keys])
def test_one_exported_program_serves_all_platforms(function):
    """An exported program is kept: it may call nothing that a later release could change."""
    platforms = ("cpu", "cuda", "tpu")
    inputs = arrays((40, 16), (40, 16), (40, 8))
    exported = jax.export.export(jax.jit(function), platforms=platforms)(*inputs)
    assert exported.platforms == platforms
