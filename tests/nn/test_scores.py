"""Caches and modules with capped scores, learned sink logits, and values tied to keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from coreset_jax.nn import CacheConfig, CoresetCache
from coreset_jax.nn import linen as our_linen
from coreset_jax.nn.nnx import CoresetAttention
from tests import brute_force
from tests.nn.conftest import CONFIG, KV_HEADS, SUBSETS, Sequences

# Scores of these sequences reach ten.
SOFT_CAP = 1.5
SINK_LOGITS = np.array([2.0, -1.0, 0.5, 4.0], np.float32)

MODULE = {"size": 64, "sinks": 4, "window": 52, "block_size": 8, "num_kv_heads": 2}
MODULE |= {"soft_cap": 0.2, "use_sink_logits": True, "rope_base": 100.0}
FEATURES, HEADS = 24, 4


def read(config, sequences, *lengths):
    """The cache behind a prompt, and the outputs of that and of the next token."""
    cache = CoresetCache.init(config, jax.random.key(1), *sequences[1:])
    prompt, cache = cache.read_and_extend(*sequences, *lengths, sink_logits=SINK_LOGITS)
    token = sequences.cut(0, 1)
    answer, after = cache.read_and_extend(*token, sink_logits=SINK_LOGITS)
    return prompt, answer, cache, after


@pytest.mark.parametrize("soft_cap", [None, SOFT_CAP])
def test_below_capacity_attention_is_exact(sequences, soft_cap):
    lengths = np.full(4, 30)
    # Without a middle, quick to compile.
    config = CONFIG.replace(window=52, soft_cap=soft_cap)
    prompt, answer, _, _ = read(config, sequences, lengths)
    first = sequences.cut(0, 30)
    expected = first.causal(soft_cap, SINK_LOGITS)
    np.testing.assert_allclose(prompt[:, :30], expected, rtol=1e-5, atol=1e-6)
    both = zip(first, sequences.cut(0, 1), strict=True)
    whole = type(first)(*(np.concatenate(each, axis=1) for each in both))
    expected = whole.causal(soft_cap, SINK_LOGITS)[:, -1:]
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-6)
    # Both matter.
    assert np.mean(np.abs(expected - whole.causal(soft_cap)[:, -1:])) > 0.01
    assert np.mean(np.abs(expected - whole.causal(2, SINK_LOGITS)[:, -1:])) > 0.01


@pytest.mark.slow
def test_compressed_pairs_have_their_weights_behind_the_cap(sequences, weights):
    """What a token reads is what is held, by brute force in float64."""
    prompt, _, cache, after = read(CONFIG.replace(soft_cap=SOFT_CAP), sequences)
    expected = sequences.causal(SOFT_CAP, SINK_LOGITS)
    np.testing.assert_allclose(prompt, expected, rtol=1e-5, atol=1e-6)
    queries = sequences.cut(0, 1).queries
    keys, values = (
        np.concatenate(parts, axis=2)
        for parts in zip(cache.sinks, cache.middle.pairs[:2], cache.recent, strict=True)
    )
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.asarray(weights(cache), np.float64))
    rows = np.asarray(queries).reshape(4, KV_HEADS, -1, queries.shape[-1])
    sinks = np.broadcast_to(SINK_LOGITS.reshape(KV_HEADS, -1), rows.shape[:-1])
    expected = brute_force.attention(
        rows, keys, values, log_weights, soft_cap=SOFT_CAP, sink_logits=sinks
    )
    found = cache.attend(queries, sink_logits=SINK_LOGITS)
    np.testing.assert_allclose(
        found[:, 0], expected.reshape(found[:, 0].shape), rtol=1e-4, atol=1e-5
    )
    assert np.any(log_weights > 0.5)
    np.testing.assert_array_equal(after.lengths, cache.lengths + 1)


def test_values_that_are_a_slice_of_the_keys_stay_it(sequences):
    """Where the compressor keeps pairs; through a prompt and what leaves the window behind it."""
    tied = sequences._replace(values=sequences.keys[..., : sequences.values.shape[-1]])
    cache = CoresetCache.init(SUBSETS, jax.random.key(1), *tied[1:])
    _, cache = cache.read_and_extend(*tied)
    for _ in range(2):
        cache = cache.append(*tied[1:])
    for keys, values in (cache.sinks, cache.middle.pairs[:2], cache.recent):
        np.testing.assert_array_equal(values, keys[..., : values.shape[-1]])
        assert np.any(values != 0)


def test_options_that_do_not_fit_are_refused(sequences, empty_cache):
    for soft_cap in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="soft_cap"):
            CacheConfig(size=300, soft_cap=soft_cap)
    for logits in (np.zeros(3), np.zeros((4, 1)), np.zeros(4, int)):
        with pytest.raises(ValueError, match="sink_logits"):
            empty_cache().read_and_extend(*sequences, sink_logits=logits)
    with pytest.raises(ValueError, match="attention_fn"):
        CoresetAttention(
            HEADS,
            FEATURES,
            rngs=nnx.Rngs(0),
            attention_fn=lambda query, key, value: value,
            **MODULE,
        )


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((2, 40, FEATURES)), jnp.float32)


def expected_heads(query, key, value):
    """Attention of a module with the options above, by brute force."""
    return Sequences(query, key, value).causal(MODULE["soft_cap"], SINK_LOGITS)


def test_nnx_modules_decode_and_learn_with_both(inputs):
    module = CoresetAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **{**MODULE, "rope_base": None})
    module.attention_fn.sink_logits.set_value(jnp.asarray(SINK_LOGITS))
    projected = (part(inputs) for part in (module.query, module.key, module.value))
    expected = module.out(jnp.asarray(expected_heads(*projected), jnp.float32))
    module.init_cache(inputs.shape)
    mask = nnx.make_causal_mask(inputs[..., 0])

    @nnx.jit
    def run(module, inputs):
        def loss(module):
            return jnp.sum(jnp.sin(module(inputs, mask=mask, decode=False)))

        found = nnx.grad(loss)(module)["attention_fn"]["sink_logits"]
        return module(inputs, decode=True), module(inputs, is_causal=True, decode=False), found

    *outputs, gradient = run(module, inputs)
    for found in outputs:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.all(gradient.get_value() != 0)


def test_modules_with_positions_decode_as_they_learn(inputs):
    ours = functools.partial(our_linen.CoresetAttention, HEADS, **MODULE)
    variables = ours(decode=True).init(jax.random.key(0), inputs)
    params = variables["params"] | {"sink_logits": jnp.asarray(SINK_LOGITS)}
    found, _ = ours(decode=True).apply({**variables, "params": params}, inputs, mutable=["cache"])
    mask = linen.make_causal_mask(inputs[..., 0])
    expected = ours().apply({"params": params}, inputs, mask=mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    module = CoresetAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **MODULE)
    for name in ("query", "key", "value", "out"):
        for leaf in ("kernel", "bias"):
            getattr(getattr(module, name), leaf).set_value(params[name][leaf])
    module.attention_fn.sink_logits.set_value(params["sink_logits"])
    np.testing.assert_allclose(module(inputs, mask=mask), expected, rtol=1e-5, atol=1e-5)
    module.init_cache(inputs.shape)
    np.testing.assert_allclose(module(inputs, decode=True), expected, rtol=1e-5, atol=1e-5)
