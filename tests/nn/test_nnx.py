"""The NNX module: the plain one, with a cache that does not grow."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coreset_jax.nn import CacheConfig
from coreset_jax.nn.nnx import CoresetAttention
from coreset_jax.nn.rotary import rotate
from tests.stream import compressors

BATCH, LENGTH, FEATURES, HEADS = 2, 40, 24, 4
# Room for everything, and nothing to compress: quick to compile.
CACHE = {"size": 64, "sinks": 4, "window": 52, "block_size": 8}
NARROW = {"num_kv_heads": 1, "qkv_features": 16, "out_features": 10}
OPTIONS = {
    "grouped": {"num_kv_heads": 2},
    "narrow and normalized": {"normalize_qk": True, "use_bias": False, **NARROW},
}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((BATCH, LENGTH, FEATURES)), jnp.float32)


def pair(**options):
    """A plain module, and one of ours with its weights."""
    held = {name: options.pop(name) for name in ("rope_base", "window") if name in options}
    plain = nnx.MultiHeadAttention(
        HEADS, FEATURES, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0), **options
    )
    ours = CoresetAttention(HEADS, FEATURES, rngs=nnx.Rngs(1), **{**CACHE, **held}, **options)
    nnx.update(ours, nnx.state(plain, nnx.Param))
    return plain, ours


@nnx.jit
def step(module, inputs, lengths):
    return module(inputs, lengths=lengths, decode=True)


def decode(module, inputs):
    """Reads the inputs, eight at a time."""
    module.init_cache(inputs.shape)
    parts, lengths = np.split(inputs, inputs.shape[1] // 8, axis=1), jnp.full(BATCH, 8)
    return np.concatenate([step(module, part, lengths) for part in parts], axis=1)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decodes_and_learns_like_the_plain_module(inputs, options):
    plain, ours = pair(**options)
    mask = nnx.make_causal_mask(inputs[..., 0])

    @nnx.jit
    def learn(module):
        def loss(module):
            outputs = module(inputs, mask=mask, decode=False)
            return jnp.sum(jnp.sin(outputs)), outputs

        return nnx.value_and_grad(loss, has_aux=True)(module)

    (_, expected), gradients = learn(plain)
    (_, outputs), ours_gradients = learn(ours)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    gradients, ours_gradients = map(nnx.to_pure_dict, (gradients, ours_gradients))
    chex.assert_trees_all_close(ours_gradients, gradients, rtol=1e-5, atol=1e-5)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients["out"]))
    np.testing.assert_allclose(decode(ours, inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_rotary_positions_are_those_of_the_sequence(inputs):
    plain, ours = pair(rope_base=100.0, num_kv_heads=2)
    places = jnp.arange(LENGTH)[None]
    query, key = (rotate(part(inputs), places, 100.0) for part in (plain.query, plain.key))
    heads = jax.nn.dot_product_attention(query, key, plain.value(inputs), is_causal=True)
    for found in (decode(ours, inputs), ours(inputs, is_causal=True)):
        np.testing.assert_allclose(found, plain.out(heads), rtol=1e-5, atol=1e-6)
    # Of a ragged batch, each sequence has its own.
    lengths = jnp.array([8, 5])
    ours.init_cache(inputs.shape)
    step(ours, inputs[:, :8], lengths)
    found = step(ours, inputs[:, 16:24], jnp.full(BATCH, 8))
    np.testing.assert_array_equal(ours.cache.get_value().lengths, lengths + 8)
    alone = jnp.concatenate([inputs[1:, :5], inputs[1:, 16:24]], axis=1)
    expected = ours(alone, is_causal=True)[:, 5:]
    np.testing.assert_allclose(found[1:], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_many_steps_are_traced_once_and_keep_their_shapes(inputs):
    plain, ours = pair(num_kv_heads=2, window=12)
    expected = plain(inputs, mask=nnx.make_causal_mask(inputs[..., 0]), decode=False)
    ours.init_cache((BATCH, 1000, FEATURES))
    before = jax.tree.map(jnp.zeros_like, ours.cache.get_value())
    chex.clear_trace_counter()
    read = nnx.jit(chex.assert_max_traces(lambda module, x: module(x, decode=True), n=1))
    for place in range(200):
        outputs = read(ours, inputs[:, place % LENGTH][:, None])
        if place < LENGTH:
            found = outputs[:, 0]
            np.testing.assert_allclose(found, expected[:, place], rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(outputs))
    after = ours.cache.get_value()
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    np.testing.assert_array_equal(after.lengths, 200)


@pytest.mark.slow
def test_half_precision_modules_keep_half_precision_caches(inputs):
    _, ours = pair(num_kv_heads=2, dtype=jnp.bfloat16)
    ours.init_cache((BATCH, LENGTH, FEATURES), jnp.bfloat16)
    outputs = ours(inputs[:, :8].astype(jnp.bfloat16), decode=True)
    assert outputs.dtype == ours.cache.get_value().recent.keys.dtype == jnp.bfloat16
    ours.init_cache((BATCH, LENGTH, FEATURES))
    with pytest.raises(ValueError, match="keys must have the cache's dtype"):
        ours(inputs[:, :8].astype(jnp.bfloat16), decode=True)


@pytest.mark.slow
def test_wrong_use_is_refused(inputs):
    _, ours = pair(num_kv_heads=2)
    with pytest.raises(ValueError, match="init_cache"):
        ours(inputs, decode=True)
    with pytest.raises(ValueError, match="lengths"):
        ours(inputs, lengths=jnp.ones(BATCH, int))
    with pytest.raises(ValueError, match="input_shape"):
        ours.init_cache((BATCH, LENGTH))
    with pytest.raises(ValueError, match="input_shape"):
        ours.init_cache((BATCH, LENGTH, FEATURES + 1))
    ours.init_cache((BATCH, 20, FEATURES))
    with pytest.raises(ValueError, match="max_length 20"):
        ours(inputs, decode=True)
    with pytest.raises(ValueError, match="batch"):
        ours(inputs[:1, :5], decode=True)
    with pytest.raises(ValueError, match="inputs_q"):
        ours(inputs[0], decode=True)
    with pytest.raises(ValueError, match="inputs_q"):
        ours(inputs[..., :-1], decode=True)
    with pytest.raises(ValueError, match="inputs_k"):
        ours(inputs, inputs, decode=True)
    with pytest.raises(ValueError, match="mask"):
        ours(inputs, mask=jnp.ones((1, 1, LENGTH, LENGTH), bool), decode=True)
    with pytest.raises(ValueError, match="rope_base"):
        CoresetAttention(HEADS, 12, rope_base=1e4, rngs=nnx.Rngs(0), **CACHE)
    with pytest.raises(ValueError, match="size"):
        CoresetAttention(HEADS, FEATURES, size=10, rngs=nnx.Rngs(0))
    for options, named in (({}, "size"), ({**CACHE, "scale": 1.0}, "scale")):
        with pytest.raises(TypeError, match=named):
            CoresetAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **options)


def test_equal_modules_have_equal_graphs_and_share_a_trace(inputs):
    options = {"rope_base": 100.0, "num_kv_heads": 2, "normalize_qk": True, "dropout_rate": 0.1}
    options |= {"compressor": compressors.sampled(skew=np.array([1.0, 2.0])), **CACHE}

    def make(seed, **changes):
        return CoresetAttention(HEADS, FEATURES, rngs=nnx.Rngs(seed), **{**options, **changes})

    layers = [make(seed) for seed in range(3)]
    graph, *others = (nnx.split(layer)[0] for layer in layers)
    for other in others:
        assert other == graph
        assert hash(other) == hash(graph)
    for changes in ({"rope_base": 200.0}, {"size": 72}, {"attention_fn": jax.nn.softmax}):
        assert nnx.split(make(0, **changes))[0] != graph
    chex.clear_trace_counter()
    read = nnx.jit(chex.assert_max_traces(lambda module, x: module(x, decode=True), n=1))
    outputs = []
    for layer in layers:
        layer.init_cache(inputs.shape)
        outputs.append(read(layer, inputs[:, :1]))
    assert np.any(outputs[1] != outputs[0])


def test_takes_the_options_of_a_cache():
    options = {**CACHE, "query_norm": 2.0, "compressor": compressors.sampled()}
    module = CoresetAttention(HEADS, FEATURES, HEADS * 8, rngs=nnx.Rngs(0), **options)
    assert module.cache_config == CacheConfig(**options)
    assert module.qkv_features == HEADS * 8
