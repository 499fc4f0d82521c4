"""What attentions of google-tunix differ in: what is carried, and what is refused by name."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tunix.models.qwen3 import model as qwen3

import coreset_jax.nn.tunix as our_tunix
from coreset_jax.nn.tunix import wrap, wrap_model
from tests.clients import tiny

ROOMY = {"size": 132, "sinks": 4, "window": 64, "block_size": 64}
SMALL = {"size": 64, "sinks": 4, "window": 16, "block_size": 16}
BATCH = 2


def test_attention_that_does_more_is_refused():
    partly = tiny.global_attention("qwen2")
    partly.k_bias = None
    with pytest.raises(ValueError, match="q_bias"):
        wrap(partly, **SMALL)
    more = tiny.global_attention("qwen2")
    more.sinks = nnx.Param(jnp.zeros(4))
    with pytest.raises(ValueError, match="sinks"):
        wrap(more, **SMALL)
    with pytest.raises(ValueError, match="parts"):
        wrap(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), **SMALL)

    class Doubled(qwen3.Attention):
        def block(self, *arguments, **options):
            cache, outputs = super().block(*arguments, **options)
            return cache, 2 * outputs

    doubled = tiny.global_attention("qwen3")
    doubled.__class__ = Doubled
    Doubled.__module__ = qwen3.__name__
    with pytest.raises(ValueError, match="does more"):
        wrap(doubled, **SMALL)


@pytest.mark.parametrize("soft_cap", [20.0, 100.0])
def test_a_cap_that_the_wrapper_does_not_know_is_refused(monkeypatch, soft_cap):
    attention = tiny.global_attention("gemma2", attn_logits_soft_cap=soft_cap)
    assert wrap(attention, **SMALL).coreset_config.soft_cap == soft_cap
    # Nor does it help to say the scale.
    attention.scale = tiny.HEAD_DIM**-0.5
    assert wrap(attention, **SMALL).coreset_config.soft_cap == soft_cap
    monkeypatch.setattr(our_tunix, "soft_cap_of", lambda attention: None)
    with pytest.raises(ValueError, match="large scores"):
        wrap(attention, **SMALL)
    plain = tiny.global_attention("gemma2", attn_logits_soft_cap=None)
    assert wrap(plain, **SMALL).coreset_config.soft_cap is None


# Some compute in the dtype of their parameters, others in one that they are told.
@pytest.mark.parametrize(
    ("architecture", "dtype", "told"),
    [
        ("gemma2", jnp.bfloat16, False),
        ("qwen3", jnp.bfloat16, True),
        ("llama3", jnp.float16, False),
    ],
)
def test_rounding_of_large_scores_is_no_reason_to_refuse(architecture, dtype, told):
    options = {"dtype": dtype, "param_dtype": dtype} if told else {}
    attention = tiny.global_attention(architecture, **options)
    state = nnx.state(attention)
    nnx.update(attention, jax.tree.map(lambda leaf: leaf.astype(dtype), state))
    assert wrap(attention, **SMALL).init_cache(1)["coreset"].recent.keys.dtype == dtype


def test_soft_capped_layers_are_themselves_at_scores_as_large_as_real_ones():
    attention = tiny.global_attention("gemma2", attn_logits_soft_cap=50.0)
    inputs, positions = 7 * tiny.inputs_like(attention, 40), jnp.arange(40)[None]
    wrapped = wrap(attention, **ROOMY)
    queries, keys, _ = our_tunix.project(wrapped, inputs, positions)
    scores = jnp.einsum("bqhd,bkhd->bhqk", queries[:, :, ::2], keys) / 4
    assert jnp.max(scores) > 100
    mask = jnp.broadcast_to(tiny.causal_mask(0, 40, 40), (BATCH, 40, 40))
    uncapped = tiny.global_attention("gemma2", attn_logits_soft_cap=None)

    @jax.jit
    def outputs(inputs):
        exact, wrong = (layer(inputs, positions, None, mask)[1] for layer in (attention, uncapped))
        cache, first = wrapped(inputs[:, :39], positions[:, :39], wrapped.init_cache(BATCH), None)
        _, last = wrapped(inputs[:, 39:], positions[:, 39:], cache, None)
        return exact, wrong, jnp.concatenate([first, last], axis=1)

    expected, wrong, found = outputs(inputs)
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-4)
    assert jnp.linalg.norm(wrong - expected) > 0.1 * jnp.linalg.norm(expected)


def test_layers_that_share_a_cache_are_wrapped_together():
    model = tiny.build("gemma4")
    for layers in ([1], [3]):
        with pytest.raises(ValueError, match="both or neither of 1 and 3"):
            wrap_model(model, layers, **SMALL)
    wrap_model(model, **SMALL)
    assert [hasattr(layer.attn, "coreset_config") for layer in model.layers] == [False, True] * 2
    cache = model.init_cache(BATCH, 40)
    assert cache.keys() == {"layer_0", "layer_1"}
    # A window of eight in a ring of eight.
    assert cache["layer_0"]["k"].shape[1] == 8
    shared, inputs = model.layers[3].attn, tiny.inputs_like(model.layers[3].attn, 2)
    with pytest.raises(ValueError, match="kv_shared_cache"):
        shared(inputs, jnp.arange(2)[None], None, None, kv_shared_cache=cache["layer_1"])


def test_values_that_are_raw_keys_are_carried():
    attention = tiny.global_attention("gemma4", k_eq_v_global=True, num_global_kv_heads=1)
    assert not hasattr(attention, "kv_einsum")
    wrapped = wrap(attention, **ROOMY)
    inputs, positions = tiny.inputs_like(attention, 20), jnp.arange(20)[None]
    mask = jnp.broadcast_to(tiny.causal_mask(0, 20, 20), (BATCH, 20, 20))
    caches = (None, mask), (wrapped.init_cache(BATCH), None)
    expected, found = (
        jax.jit(functools.partial(tiny.call, layer))(inputs, positions, *more)[1]
        for layer, more in zip((attention, wrapped), caches, strict=True)
    )
    chex.assert_trees_all_close(found, expected, rtol=0, atol=2e-6)


def test_latent_attention_is_refused_by_name():
    class Latent(nnx.Module):
        def __init__(self):
            self.q_proj, self.kv_a_proj_with_mqa, self.kv_b_proj, self.o_proj = (
                nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(4)
            )

    with pytest.raises(ValueError, match=r"latent.*kv_a_proj_with_mqa"):
        wrap(Latent(), **SMALL)
