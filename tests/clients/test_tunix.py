"""Wrapped models of google-tunix against the same models with their own caches."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tunix.generate import sampler
from tunix.models.gemma3 import model as gemma3
from tunix.models.qwen3 import model as qwen3

from coreset_jax import baselines
from coreset_jax.nn.tunix import init_cache, wrap, wrap_model
from tests.clients import tiny

# Room for everything that these tests read, so that nothing is compressed.
ROOMY = {"size": 132, "sinks": 4, "window": 64, "block_size": 64}
SMALL = {"size": 64, "sinks": 4, "window": 16, "block_size": 16}
WINDOW_ONLY = {"size": 36, "sinks": 4, "window": 16, "block_size": 16}
BATCH = 2

architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


@architectures
def test_nothing_compressed_is_the_plain_model(architecture):
    slots, prompt = 80, 60
    tokens = tiny.random_tokens(BATCH, 68)
    model = tiny.build(architecture)
    plain, _ = tiny.run(model, tiny.plain_cache(model, BATCH, slots), tokens, prompt, slots)
    assert jnp.std(plain) > 0.2
    wrap_model(model, **ROOMY)
    ours, _ = tiny.run(model, model.init_cache(BATCH, slots), tokens, prompt, slots)
    chex.assert_trees_all_close(ours, plain, rtol=0, atol=1e-6)


@architectures
def test_without_a_cache_it_is_the_same_layer(architecture):
    attention = tiny.global_attention(architecture)
    wrapped = wrap(attention, **SMALL)
    assert isinstance(wrapped, type(attention))
    inputs, positions = tiny.inputs_like(attention, 9), jnp.arange(9)[None]
    # Not causal: without a cache any mask will do.
    mask = jnp.ones((BATCH, 9, 9), bool)
    found, expected = (
        tiny.call(layer, inputs, positions, None, mask) for layer in (wrapped, attention)
    )
    chex.assert_trees_all_equal(found, expected)


@architectures
def test_parameters_are_the_same_objects(architecture):
    model = tiny.build(architecture)
    before = dict(nnx.to_flat_state(nnx.state(model)))
    wrap_model(model, **SMALL)
    after = dict(nnx.to_flat_state(nnx.state(model)))
    assert before.keys() == after.keys()
    assert all(after[path].get_value() is before[path].get_value() for path in before)


@architectures
def test_decoding_takes_one_trace_and_no_more_memory(architecture):
    model, slots = tiny.build(architecture), 320
    wrap_model(model, **SMALL)
    cache = model.init_cache(BATCH, slots)
    layer = f"layer_{tiny.GLOBAL_LAYER[architecture]}"
    size = tiny.cache_bytes(cache)
    chex.clear_trace_counter()

    @nnx.jit
    @functools.partial(chex.assert_max_traces, n=1)
    def step(model, tokens, start, cache):
        mask = jnp.broadcast_to(jnp.arange(slots) <= start, (BATCH, 1, slots))
        return model(tokens[:, None], jnp.full((BATCH, 1), start), cache, mask)

    tokens = tiny.random_tokens(BATCH, 300)
    for i in range(300):
        logits, cache = step(model, tokens[:, i], jnp.asarray(i), cache)
    assert jnp.all(jnp.isfinite(logits))
    assert tiny.cache_bytes(cache) == size
    assert cache[layer].keys() == {"coreset", "end_index"}
    held = cache[layer]["coreset"]
    assert jnp.all(held.lengths == 300)
    # A slot a pair, once full.
    assert jnp.all(jnp.sum(held.positions >= 0, axis=-1) <= SMALL["size"])


# With norms of queries and keys, with a soft cap, and with caches that layers share.
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gemma4"])
def test_long_prompts_are_compressed_at_once(architecture):
    model, slots, prompt = tiny.build(architecture), 320, 300
    tokens = tiny.random_tokens(BATCH, 306)
    plain, _ = tiny.run(model, tiny.plain_cache(model, BATCH, slots), tokens, prompt, slots)
    wrap_model(model, **{**SMALL, "size": 192})
    ours, _ = tiny.run(model, model.init_cache(BATCH, slots), tokens, prompt, slots)
    # A prompt reads itself exactly; what is left of it then answers for all of it.
    chex.assert_trees_all_close(ours[:, :prompt], plain[:, :prompt], rtol=0, atol=2e-6)
    error = jnp.linalg.norm(ours[:, prompt:] - plain[:, prompt:])
    assert 0 < error < 0.5 * jnp.linalg.norm(plain[:, prompt:])


def test_gemmas_scale_is_taken():
    norm = gemma3.QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
    attention = tiny.global_attention("gemma3", query_pre_attn_norm=norm)
    assert wrap(attention, **SMALL).coreset_config.scale == 8**-0.5


def test_window_only_is_the_plain_model_with_a_hole_in_its_mask():
    model, slots, prompt = tiny.build("qwen3"), 80, 60
    tokens = tiny.random_tokens(BATCH, 64)
    plain_cache = tiny.plain_cache(model, BATCH, slots)
    graph, state = nnx.split(tiny.build("qwen3"))
    ours = nnx.merge(graph, state)
    wrap_model(ours, **WINDOW_ONLY)
    cache, start = ours.init_cache(BATCH), 0
    for count in (prompt, 1, 1, 1, 1):
        some = tokens[:, start : start + count]
        positions = jnp.broadcast_to(start + jnp.arange(count), (BATCH, count))
        mask = tiny.causal_mask(start, count, slots)
        if start:
            held = cache["layer_0"]["coreset"].positions[0, 0]
            assert jnp.sum(held >= 0) < start
            kept = jnp.isin(jnp.arange(slots), held) | (jnp.arange(slots) == start)
            mask = mask & kept
        mask = jnp.broadcast_to(mask, (BATCH, count, slots))
        expected, plain_cache = tiny.step(model, some, positions, plain_cache, mask)
        logits, cache = tiny.step(ours, some, positions, cache, None)
        chex.assert_trees_all_close(logits, expected, rtol=0, atol=1e-6)
        start += count


@architectures
@pytest.mark.parametrize("options", [{"compressor": baselines.uniform()}, WINDOW_ONLY])
def test_compressors_plug_in(architecture, options):
    attention = tiny.global_attention(architecture)
    wrapped = wrap(attention, **{**SMALL, **options})
    call = jax.jit(
        lambda inputs, positions, cache: tiny.call(wrapped, inputs, positions, cache, None)
    )
    cache = wrapped.init_cache(BATCH)
    inputs = tiny.inputs_like(attention, 150)
    cache, _ = call(inputs[:, :100], jnp.arange(100)[None], cache)
    for i in range(100, 150):
        cache, outputs = call(inputs[:, i : i + 1], jnp.full((BATCH, 1), i), cache)
    assert jnp.all(jnp.isfinite(outputs))
    assert jnp.all(cache["coreset"].lengths == 150)


@architectures
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_padding_takes_no_place(architecture, side):
    attention, slots, prompt = tiny.global_attention(architecture), 24, 12
    real = {
        "left": jnp.arange(prompt) >= jnp.array([[5], [0]]),
        "right": jnp.arange(prompt) < jnp.array([[7], [12]]),
        "anywhere": jnp.arange(prompt) % 3 != jnp.array([[0], [1]]),
    }[side]
    inputs = tiny.inputs_like(attention, prompt + 6)
    numbers = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    # The generated tokens; one of them is padding.
    valid = jnp.concatenate([real, jnp.ones((BATCH, 6), bool).at[0, 2].set(False)], axis=1)
    shown = jnp.pad(valid, ((0, 0), (0, slots - valid.shape[1])))
    caches = [tiny.layer_cache(BATCH, slots), wrap(attention, **ROOMY).init_cache(BATCH)]
    layers = [
        jax.jit(functools.partial(tiny.call, layer))
        for layer in (attention, wrap(attention, **ROOMY))
    ]
    start = 0
    # Gemma 4 reads one token at a time behind a prompt.
    for count in (prompt, *[1] * 6) if architecture == "gemma4" else (prompt, 1, 1, 1, 3):
        some = slice(start, start + count)
        mask = tiny.causal_mask(start, count, slots) & shown[:, None]
        positions = numbers if start == 0 else numbers[:, -1:] + start + jnp.arange(count)
        outputs = []
        for i, layer in enumerate(layers):
            caches[i], output = layer(inputs[:, some], positions, caches[i], mask)
            outputs.append(jnp.where(valid[:, some, None], output, 0))
        chex.assert_trees_all_close(outputs[1], outputs[0], rtol=0, atol=2e-6)
        start += count
    np.testing.assert_array_equal(caches[1]["coreset"].lengths, jnp.sum(valid, axis=1))
    np.testing.assert_array_equal(caches[1]["end_index"], caches[0]["end_index"])


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text):
        return [3 + ord(letter) % (tiny.VOCABULARY - 3) for letter in text]

    def decode(self, tokens):
        return "".join(chr(ord("0") + int(token)) for token in tokens)

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


@pytest.mark.parametrize(
    ("architecture", "beams"), [*((name, None) for name in tiny.ARCHITECTURES), ("qwen3", 2)]
)
def test_samplers_need_no_change(architecture, beams):
    texts = []
    for options in (None, ROOMY):
        model = tiny.build(architecture)
        if options is not None:
            wrap_model(model, **options)
        config = sampler.CacheConfig(64, len(model.layers), tiny.KV_HEADS, tiny.HEAD_DIM)
        # Prompts of two lengths: the shorter one is padded on its left.
        answers = sampler.Sampler(model, Letters(), config)(
            ["attention is a sum", "weights"],
            max_generation_steps=20,
            max_prompt_length=24,
            beam_size=beams,
            eos_tokens=[tiny.VOCABULARY],  # Never.
        )
        texts.append(answers.text)
    assert {len(text) for text in texts[0]} == {20}
    assert texts[1] == texts[0]


def test_caches_may_be_narrower_than_the_model():
    attention = tiny.global_attention("qwen3")
    wrapped = wrap(attention, **ROOMY)
    inputs = tiny.inputs_like(attention, 20)
    call = jax.jit(lambda cache: wrapped(inputs, jnp.arange(20)[None], cache, None))
    exact, rounded = (call(wrapped.init_cache(BATCH, dtype)) for dtype in (None, jnp.bfloat16))
    assert rounded[0]["coreset"].recent.keys.dtype == jnp.bfloat16
    assert rounded[1].dtype == exact[1].dtype == jnp.float32
    chex.assert_trees_all_close(rounded[1], exact[1], atol=0.05)


@pytest.mark.parametrize("architecture", ["llama3", "gemma3"])
def test_strict_promotion_is_passed_on(architecture):
    """To the models' own parts, which refuse integer positions by themselves."""
    wrapped = wrap(tiny.global_attention(architecture), **ROOMY)
    inputs, positions = tiny.inputs_like(wrapped, 9), jnp.arange(9.0)[None]
    mask = jnp.broadcast_to(tiny.causal_mask(0, 9, 12), (BATCH, 9, 12))
    call = jax.jit(lambda cache, mask: wrapped(inputs, positions, cache, mask))
    expected = call(wrapped.init_cache(BATCH), mask)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for given in (mask, None):
            found = call(wrapped.init_cache(BATCH), given)
            chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-6)


@architectures
def test_layers_wrapped_alike_have_equal_graphs(architecture):
    attentions = [tiny.global_attention(architecture) for _ in range(2)]
    one, other = (nnx.split(wrap(each, **SMALL))[0] for each in attentions)
    assert nnx.split(attentions[0])[0] == nnx.split(attentions[1])[0]
    assert one == other
    assert nnx.split(wrap(attentions[0], **ROOMY))[0] != one


def test_rematerialized_layers_hand_the_cache_on():
    model = tiny.build("qwen3", remat_config=qwen3.RematConfig.DECODER)
    wrap_model(model, **ROOMY)
    tokens = tiny.random_tokens(BATCH, 12)
    logits, cache = tiny.run(model, model.init_cache(BATCH), tokens, 10, 16)
    assert jnp.all(jnp.isfinite(logits))
    assert jnp.all(cache["layer_1"]["coreset"].lengths == 12)


def test_only_the_layers_named_are_wrapped():
    model = tiny.build("qwen3")
    wrap_model(model, layers=[1], **SMALL)
    cache = init_cache(model, BATCH, 40)
    assert cache["layer_0"]["k"].shape == (BATCH, 40, tiny.KV_HEADS, tiny.HEAD_DIM)
    assert "coreset" in cache["layer_1"]
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, model.init_cache(BATCH, 40, jnp.float32))


def test_a_fresh_cache_of_the_model_will_do():
    attention = tiny.global_attention("llama3")
    wrapped = wrap(attention, **SMALL)
    inputs, positions = tiny.inputs_like(attention, 70), jnp.arange(70)[None]
    call = jax.jit(lambda cache: wrapped(inputs, positions, cache, None))
    one, _ = call(tiny.layer_cache(BATCH, 1))
    other, _ = call(wrapped.init_cache(BATCH))
    # Two programs, which may round differently.
    chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-5)


def test_wrong_use_is_refused():
    model = tiny.build("gemma3")
    first = model.layers[0].attn
    with pytest.raises(ValueError, match="global"):
        wrap(first, **SMALL)
    for layers, message in (([5, 0], "global"), ([6], "0..5"), ([], "no layer")):
        with pytest.raises(ValueError, match=message):
            wrap_model(model, layers, **SMALL)
    assert all(isinstance(layer.attn, type(first)) for layer in model.layers)
    with pytest.raises(ValueError, match="no layer"):
        init_cache(model, BATCH)
    with pytest.raises(ValueError, match="no layer"):
        wrap_model(tiny.build("gemma3", num_layers=2), **SMALL)
    with pytest.raises(ValueError, match="layers"):
        wrap_model(first, **SMALL)
    with pytest.raises(ValueError, match="size"):
        wrap_model(model, size=10)
    wrap_model(model, **SMALL)
    with pytest.raises(ValueError, match="already"):
        wrap(model.layers[5].attn, **SMALL)
    with pytest.raises(ValueError, match="cache_size"):
        model.init_cache(BATCH, 0)


def test_wrong_calls_are_refused():
    attention = tiny.global_attention("qwen3")
    wrapped = wrap(attention, **SMALL)
    inputs, positions = tiny.inputs_like(attention, 4), jnp.arange(4)[None]
    cache = wrapped.init_cache(BATCH)
    with pytest.raises(ValueError, match="segment_ids"):
        wrapped(inputs, positions, cache, None, segment_ids=positions)
    with pytest.raises(ValueError, match="init_cache"):
        wrapped(inputs, positions, {}, None)
    for shape in ((BATCH, 4), (BATCH, 3, 4), (3, 4, 4), (BATCH, 4, 3)):
        with pytest.raises(ValueError, match="attn_mask"):
            wrapped(inputs, positions, cache, jnp.ones(shape, bool))
    with pytest.raises(ValueError, match="batch_size"):
        wrapped.init_cache(0)


@pytest.mark.parametrize("slots", [4, 9])
@pytest.mark.parametrize("fault", ["later", "hidden", "older"])
def test_masks_that_are_not_causal_are_refused(fault, slots):
    wrapped = wrap(tiny.global_attention("llama3"), **SMALL)
    inputs, positions = tiny.inputs_like(wrapped, 4), jnp.arange(4)[None]
    start = 0 if slots == 4 else 3
    cache = wrapped.init_cache(BATCH)
    if start:
        cache, _ = wrapped(inputs[:, :start], positions[:, :start], cache, None)
    good = jnp.broadcast_to(tiny.causal_mask(start, 4, slots), (BATCH, 4, slots))
    place, shown = {"later": ((0, 1, start + 2), True), "hidden": ((0, 3, start + 1), False)}.get(
        fault, ((0, 3, 0), False)
    )
    bad = good.at[place].set(shown)
    call = jax.jit(lambda cache, mask: wrapped(inputs, positions + start, cache, mask)[1])
    assert jnp.all(jnp.isfinite(call(cache, good)))
    outputs = call(cache, bad)
    # The other sequence of the batch is as it should be.
    assert jnp.all(jnp.isnan(outputs[0]))
    chex.assert_trees_all_equal(outputs[1], call(cache, good)[1])
    with pytest.raises(ValueError, match="causal"):
        wrapped(inputs, positions + start, cache, bad)
