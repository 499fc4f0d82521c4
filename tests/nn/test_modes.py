"""Caches and modules under the stricter modes of JAX: nothing is refused, nothing is different."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coreset_jax.nn import CoresetCache
from coreset_jax.nn import linen as our_linen
from coreset_jax.nn.nnx import CoresetAttention
from tests.stream import compressors


@contextlib.contextmanager
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


MODES = {
    "strict": strict,
    "no infinities": lambda: jax.debug_infs(True),
    "no NaN": lambda: jax.debug_nans(True),
    "double precision": lambda: jax.enable_x64(True),
    "no leaks": jax.checking_leaks,
}
MODULE = {"size": 40, "sinks": 4, "window": 12, "block_size": 8}
MODULE |= {"num_kv_heads": 2, "rope_base": 100.0}


def inputs():
    return np.random.default_rng(0).standard_normal((2, 50, 24)).astype(np.float32)


def cached(config, sequences):
    """Every method of a cache, with prompts, single tokens and many of them."""
    config = config.replace(compressor=compressors.sampled(skew=np.array([1.0, 2.0])))
    lengths = np.array([3, 150, 57, 90], np.int32)
    cache = CoresetCache.init(config, jax.random.key(1), *sequences[1:])
    prompt, cache = cache.read_and_extend(*sequences, lengths)
    token = sequences.cut(0, 1)
    answer, cache = cache.read_and_extend(*token)
    cache = cache.append(*token[1:]).append(*sequences[1:], lengths)
    answers = cache.attend(*token), cache.attend(token.queries)
    cache = cache.reset(np.array([True, False, True, False]))
    queries, keys, values = sequences
    prefilled = cache.prefill(keys, values, lengths, queries)
    return prompt, answer, answers, cache.positions, prefilled.positions


def nnx_module(config, sequences):
    """With the default compressor, and halvings with feedback."""
    module = CoresetAttention(4, 24, rngs=nnx.Rngs(0), **MODULE)
    module.init_cache((2, 50, 24))
    prompt, token = module(inputs(), decode=True), module(inputs()[:, :1], decode=True)
    return prompt, token, module(inputs(), is_causal=True)


def linen_module(config, sequences):
    module = our_linen.CoresetAttention(4, decode=True, **MODULE)
    variables = module.init(jax.random.key(0), inputs())
    prompt, changed = module.apply(variables, inputs(), mutable=["cache"])
    token, _ = module.apply({**variables, **changed}, inputs()[:, :1], mutable=["cache"])
    plain = our_linen.CoresetAttention(4, **MODULE)
    return prompt, token, plain.apply({"params": variables["params"]}, inputs())


USES = [cached, nnx_module, linen_module]


def test_a_step_is_traced_under_strict_promotion(config, sequences, empty_cache):
    token, empty = sequences.cut(0, 1), empty_cache()
    with strict():
        outputs, cache = jax.eval_shape(CoresetCache.read_and_extend, empty, *token)
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, empty)
    assert outputs.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("mode", MODES)
def test_modes_change_nothing(mode, use, config, sequences):
    expected = use(config, sequences)
    with MODES[mode]():
        found = use(config, sequences)
    # Double precision sums some things more exactly, which may change what is drawn.
    if mode == "double precision":
        chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
    else:
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
