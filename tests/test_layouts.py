"""Arrays whose heads stand behind their places are refused where shapes tell."""

import jax
import jax.numpy as jnp
import pytest

import coreset_jax as cj
from coreset_jax._src.core.coreset import Coreset
from tests.compressors import sampled

COMPRESSORS = {"compress": cj.compress, "sampled": sampled(), "chunked": cj.chunked(sampled())}


def shapes(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def traced(compress, keys, queries=None, lengths=None, **options):
    def call(keys, queries, lengths):
        rng = jax.random.key(0)
        return compress(rng, keys, keys, queries=queries, lengths=lengths, **options)

    return jax.eval_shape(call, keys, queries, lengths)


@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS)
@pytest.mark.parametrize("shape", [(2, 4096, 8, 4), (3, 2, 1000, 32, 4), (1, 300, 1, 4)])
def test_lengths_before_heads_are_refused(compress, shape):
    with pytest.raises(ValueError, match=r"keys must be .*heads, n, d.* Transpose .* swapaxes"):
        traced(compress, shapes(*shape), size=128)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 8, 4096, 4), 512),  # As it should be.
        ((2, 64, 3, 4), 16),  # A short prompt of many heads.
        ((2, 256, 8, 4), 128),
        ((1000, 8, 4), 64),  # Heads and sequences in one axis.
        ((2, 1000, 300, 4), 400),
        ((2, 1000, 8, 4), 4),  # Something is left out of the heads.
    ],
)
def test_plausible_shapes_pass(shape, size):
    assert traced(sampled(), shapes(*shape), size=size).indices.shape[:-1] == shape[:-2]


def test_whoever_gives_lengths_knows_the_heads():
    lengths = jax.ShapeDtypeStruct((2, 1000), jnp.int32)
    coreset = traced(sampled(), shapes(2, 1000, 8, 4), lengths=lengths, size=128)
    assert coreset.indices.shape == (2, 1000, 8)


def test_queries_that_do_not_fit_say_what_to_transpose():
    keys = shapes(2, 8, 300, 4)
    coreset = Coreset(keys, keys, shapes(2, 8, 300), jax.ShapeDtypeStruct((2, 8, 300), jnp.int32))
    for queries in (shapes(2, 16, 8, 4), shapes(2, 300, 8, 4)):
        for call in (lambda q: traced(sampled(), keys, q, size=9), lambda q: cj.attend(q, coreset)):
            with pytest.raises(ValueError, match=r"leading axes .* The queries seem to be"):
                call(queries)
    # The keys are wrong, too; of grouped queries, nothing is transposed.
    with pytest.raises(ValueError, match="The queries, keys and values seem to be"):
        traced(sampled(), shapes(2, 200, 8, 4), shapes(2, 16, 8, 4), size=4)
    with pytest.raises(ValueError, match=r"and keys \(2, 8, 300, 4\)\.(\n|$)"):
        traced(sampled(), keys, shapes(2, 16, 300, 4), size=9)
