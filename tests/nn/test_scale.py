"""The softmax scale of a cache: that of its configuration, or of its compressor, and never two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import coreset_jax as cj
from coreset_jax.nn import CacheConfig, linen
from coreset_jax.nn.nnx import CoresetAttention
from tests.stream import compressors

SCALE = 0.7


def test_a_scale_may_come_from_the_compressor_and_another_is_refused(config):
    width = 16
    balanced = cj.balanced(scale=SCALE)
    for options, expected in (
        ({}, 0.25),
        ({"scale": SCALE}, SCALE),
        ({"compressor": balanced}, SCALE),
        ({"scale": SCALE, "compressor": balanced}, SCALE),
        ({"compressor": cj.balanced()}, 0.25),
    ):
        assert config.replace(**options).settings(width).scale == expected
    with pytest.raises(ValueError, match=r"must have one softmax scale, got 0\.5 and 0\.7"):
        CacheConfig(size=256, scale=0.5, compressor=balanced)
    with pytest.raises(ValueError, match="scale must be one number for all heads"):
        CacheConfig(size=256, compressor=cj.balanced(scale=np.array([0.5, 0.7])))


@pytest.mark.parametrize("by_compressor", [False, True])
def test_a_cache_is_read_with_it(sequences, empty_cache, config, by_compressor):
    compressor = compressors.looking(scale=SCALE)
    options = {"compressor": compressor} if by_compressor else {"scale": SCALE}
    part = sequences.cut(0, 10)
    found = empty_cache(config.replace(**options)).attend(*part)
    # Exact attention has the default scale.
    longer = part._replace(queries=part.queries * SCALE * np.sqrt(part.queries.shape[-1]))
    np.testing.assert_allclose(found, longer.causal(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("by_compressor", [False, True])
def test_a_cache_is_compressed_with_it(sequences, empty_cache, config, by_compressor):
    seen = []
    compressor = compressors.looking(
        scale=SCALE if by_compressor else None, note=lambda scale: seen.append(float(scale))
    )
    scale = None if by_compressor else SCALE
    cache = empty_cache(config.replace(scale=scale, compressor=compressor))
    cache = cache.prefill(sequences.keys, sequences.values)
    jax.effects_barrier()
    prompts = len(seen)
    assert prompts
    jax.block_until_ready(cache.append(sequences.keys, sequences.values))
    jax.effects_barrier()
    assert len(seen) > prompts
    np.testing.assert_allclose(seen, SCALE, rtol=1e-6)


def test_modules_refuse_a_compressor_of_another_scale():
    compressor = cj.balanced(scale=SCALE)
    with pytest.raises(ValueError, match="other than that of the module"):
        CoresetAttention(4, 32, size=512, compressor=compressor, rngs=nnx.Rngs(0))
    module = linen.CoresetAttention(num_heads=4, size=512, compressor=compressor, decode=True)
    with pytest.raises(ValueError, match="other than that of the module"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 5, 32)))
    same = cj.balanced(scale=8**-0.5)
    CoresetAttention(4, 32, size=512, compressor=same, rngs=nnx.Rngs(0))
