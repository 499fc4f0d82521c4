"""The Linen module: the plain one, with a cache that does not grow."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, serialization

from coreset_jax.nn import CacheConfig
from coreset_jax.nn.linen import CoresetAttention
from coreset_jax.nn.rotary import rotate
from tests.stream import compressors

BATCH, LENGTH, FEATURES, HEADS = 2, 40, 24, 4
# Room for everything, and nothing to compress: quick to compile.
CACHE = {"size": 64, "sinks": 4, "window": 52, "block_size": 8}
NARROW = {"qkv_features": 16, "out_features": 10}
OPTIONS = {
    "default": {},
    "narrow and normalized": {"normalize_qk": True, "use_bias": False, **NARROW},
}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((BATCH, LENGTH, FEATURES)), jnp.float32)


def plain(**options):
    return linen.MultiHeadDotProductAttention(
        num_heads=HEADS, bias_init=linen.initializers.normal(), **options
    )


def ours(**options):
    return CoresetAttention(
        num_heads=HEADS, bias_init=linen.initializers.normal(), **{**CACHE, **options}
    )


@functools.partial(jax.jit, static_argnums=0)
def step(module, params, cache, part, lengths):
    variables = {"params": params, "cache": cache}
    outputs, changed = module.apply(variables, part, lengths=lengths, mutable=["cache"])
    return outputs, changed["cache"]


def decode(module, params, inputs, width=8, lengths=None):
    """Reads the inputs, so many at a time; returns all outputs and the cache."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
    # As Flax users make it.
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["cache"])
    lengths = jnp.full(BATCH, width) if lengths is None else lengths
    outputs = []
    for part in np.split(inputs, inputs.shape[1] // width, axis=1):
        out, cache = step(module, params, cache, part, lengths)
        outputs.append(out)
    return np.concatenate(outputs, axis=1), cache["coreset"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decodes_and_learns_like_the_plain_module(inputs, options):
    variables = plain(**options).init(jax.random.key(1), inputs)
    chex.assert_trees_all_equal(ours(**options).init(jax.random.key(1), inputs), variables)
    mask = linen.make_causal_mask(inputs[..., 0])

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def learn(variables, module):
        outputs = module.apply(variables, inputs, mask=mask)
        return jnp.sum(jnp.sin(outputs)), outputs

    (_, expected), gradients = learn(variables, plain(**options))
    (_, outputs), our_gradients = learn(variables, ours(**options))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(our_gradients, gradients, rtol=1e-5, atol=1e-5)
    assert np.any(gradients["params"]["query"]["kernel"])
    found, cache = decode(ours(decode=True, **options), variables["params"], inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(cache.lengths, LENGTH)


def test_drops_out_and_sows_like_the_plain_module(inputs):
    variables = plain().init(jax.random.key(1), inputs)
    options = {"sow_weights": True, "mutable": ["intermediates"], "deterministic": False}
    rngs = {"dropout": jax.random.key(2)}
    expected, found = (
        make(dropout_rate=0.5).apply(variables, inputs[:, :7], inputs, rngs=rngs, **options)
        for make in (plain, ours)
    )
    assert len(jax.tree.leaves(found[1])) == 1
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_groups_and_rotary_positions_against_a_direct_computation(inputs):
    options = {"num_kv_heads": 2, "rope_base": 100.0}
    params = ours(**options).init(jax.random.key(1), inputs)["params"]
    query, key, value = (
        jnp.einsum("bnf,fhd->bnhd", inputs, params[name]["kernel"]) + params[name]["bias"]
        for name in ("query", "key", "value")
    )
    assert key.shape == (BATCH, LENGTH, 2, FEATURES // HEADS)
    query, key = (rotate(each, jnp.arange(LENGTH)[None], 100.0) for each in (query, key))
    heads = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    out = params["out"]
    expected = jnp.einsum("bnhd,hdf->bnf", heads, out["kernel"]) + out["bias"]
    mask = linen.make_causal_mask(inputs[..., 0])
    at_once = ours(**options).apply({"params": params}, inputs, mask=mask)
    decoding = ours(decode=True, **options)
    stepwise, _ = decode(decoding, params, inputs)
    for found in (at_once, stepwise):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # Of a ragged batch, each sequence has its own places.
    lengths = jnp.array([8, 5])
    found, cache = decode(decoding, params, inputs[:, :8], lengths=lengths)
    np.testing.assert_array_equal(cache.lengths, lengths)
    np.testing.assert_allclose(found[1, :5], expected[1, :5], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_init_makes_an_empty_cache_and_leaves_it_empty(inputs):
    module = ours(decode=True)
    outputs, variables = module.init_with_output(jax.random.key(0), inputs)
    cache = variables["cache"]["coreset"]
    np.testing.assert_array_equal(cache.lengths, 0)
    assert cache.config.max_length == LENGTH
    assert cache.positions.shape == (BATCH, HEADS, 64)
    # What a prompt would answer.
    found, changed = module.apply(variables, inputs, mutable=["cache"])
    np.testing.assert_allclose(outputs, found, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(changed["cache"]["coreset"].lengths, LENGTH)
    longer = ours(decode=True, max_length=1000)
    longer = jax.eval_shape(longer.init, jax.random.key(0), inputs[:, :1])
    assert longer["cache"]["coreset"].config.max_length == 1000
    rngs = {"params": jax.random.key(0), "cache": jax.random.key(5)}
    other = module.init(rngs, inputs)["cache"]["coreset"]
    assert np.any(other.rng != cache.rng)


@pytest.mark.slow
def test_many_steps_keep_shapes_and_lengths(inputs):
    module = ours(decode=True, window=12)
    variables = plain().init(jax.random.key(1), inputs)
    expected = plain().apply(variables, inputs, mask=linen.make_causal_mask(inputs[..., 0]))
    outputs, cache = decode(module, variables["params"], jnp.tile(inputs, (1, 5, 1)), 1)
    np.testing.assert_allclose(outputs[:, :LENGTH], expected, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(outputs))
    np.testing.assert_array_equal(cache.lengths, 200)
    assert np.all(np.asarray(cache.positions[..., :56]) >= 0)
    restored = serialization.from_bytes(cache, serialization.to_bytes(cache))
    chex.assert_trees_all_equal(restored, cache)


def test_takes_the_options_of_a_cache(inputs):
    options = {**CACHE, "query_norm": 2.0, "compressor": compressors.sampled()}
    module = CoresetAttention(HEADS, decode=True, **options)
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
    assert shapes["cache"]["coreset"].config == CacheConfig(max_length=LENGTH, **options)


@pytest.mark.slow
def test_wrong_use_is_refused(inputs):
    module = ours(decode=True)
    variables = module.init(jax.random.key(0), inputs[:, :20])
    params = {"params": variables["params"]}

    def check(named, variables, *arguments, module=module, **options):
        with pytest.raises(ValueError, match=named):
            module.apply(variables, *arguments, mutable=["cache"], **options)

    check("not initialized", params, inputs)
    check("max_length 20", variables, inputs)
    check("batch", variables, inputs[:1, :5])
    check("inputs_q", variables, inputs[0])
    check("inputs_k", variables, inputs, inputs)
    check("mask", variables, inputs, mask=jnp.ones((1, 1, LENGTH, LENGTH), bool))
    check("dtype", variables, inputs[:, :5], module=ours(decode=True, dtype=jnp.bfloat16))
    check("lengths", params, inputs, lengths=jnp.ones(BATCH, int), module=ours())
    check("inputs_k", params, inputs, None, inputs, module=ours())
    check("num_kv_heads", params, inputs, module=ours(num_kv_heads=3))
    check("qkv_features", params, inputs, module=ours(qkv_features=30))
    check("rope_base", params, inputs, module=ours(qkv_features=12, rope_base=1e4))
    with pytest.raises(ValueError, match="size"):
        CoresetAttention(HEADS, size=10, decode=True).init(jax.random.key(0), inputs)
    with pytest.raises(TypeError, match="size"):
        CoresetAttention(HEADS)
