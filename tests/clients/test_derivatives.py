"""Derivatives through wrapped layers that decode, by their inputs and their parameters."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coreset_jax import baselines
from coreset_jax.nn.tunix import wrap
from tests.clients import tiny

OPTIONS = {"size": 64, "sinks": 4, "window": 12, "block_size": 8}
BATCH, STEPS = 2, 2
FEATURES = 32


def passes(layer, prompt, slots=None, dtype=jnp.float32):
    """A number that depends on all outputs of a prompt and some steps behind it.

    A function of the layer's parameters and the inputs; ``slots`` are those of a cache of the
    layer's own, without which it has the one that it was wrapped for.
    """
    graph, state = nnx.split(layer)
    weights = np.random.default_rng(1).standard_normal((BATCH, prompt + STEPS, FEATURES))
    weights = weights.astype(dtype)

    def loss(state, inputs):
        layer, start, total = nnx.merge(graph, state), 0, 0.0
        cache = tiny.layer_cache(BATCH, slots) if slots else layer.init_cache(BATCH, dtype)
        for count in (prompt, *[1] * STEPS):
            positions = jnp.broadcast_to(start + jnp.arange(count), (BATCH, count))
            mask = None
            if slots:
                mask = jnp.broadcast_to(
                    tiny.causal_mask(start, count, slots), (BATCH, count, slots)
                )
            some = slice(start, start + count)
            cache, outputs = tiny.call(layer, inputs[:, some], positions, cache, mask)
            total += jnp.sum(outputs * weights[:, some])
            start += count
        return total

    return loss, state


def inputs_of(prompt):
    return jax.random.normal(jax.random.key(3), (BATCH, prompt + STEPS, FEATURES))


# Fits take long to compile.
@pytest.mark.parametrize(
    ("architecture", "compressor"),
    [("gemma2", None), *((name, baselines.uniform()) for name in ("qwen2", "qwen3", "gemma4"))],
)
def test_below_capacity_they_are_those_of_the_plain_layer(architecture, compressor):
    attention = tiny.build(architecture).layers[1].attn
    inputs, found = inputs_of(20), []
    wrapped = wrap(attention, compressor=compressor, **OPTIONS)
    for layer, slots in ((attention, 24), (wrapped, None)):
        loss, state = passes(layer, 20, slots)
        found.append(jax.jit(jax.grad(loss, argnums=(0, 1)))(state, inputs))
    (expected_state, expected), (state, by_inputs) = found
    chex.assert_trees_all_close(by_inputs, expected, rtol=1e-4, atol=1e-4)
    expected_state = dict(nnx.to_flat_state(expected_state))
    state = dict(nnx.to_flat_state(state))
    assert state.keys() == expected_state.keys()
    for path, leaf in expected_state.items():
        chex.assert_trees_all_close(state[path][...], leaf[...], rtol=1e-4, atol=1e-4)
        # No derivative that is zero for want of a way to it.
        assert jnp.any(leaf[...] != 0), path


# Fits take minutes to compile.
@pytest.mark.parametrize(
    "compressor",
    [pytest.param(None, marks=pytest.mark.slow), baselines.uniform()],
    ids=["fitted", "chosen"],
)
def test_above_capacity_they_are_those_of_the_function(x64, compressor):
    """By finite differences, which want double precision: Gemma 2 computes in that of its inputs.

    The prompt is compressed, and what is left of it answers the steps, under a cap.
    """
    # Layers of tunix, which wrapping tries, do not decode in that mode by themselves.
    with jax.enable_x64(False):
        attention = tiny.build("gemma2").layers[1].attn
        wrapped, prompt = wrap(attention, compressor=compressor, **OPTIONS), 110
    nnx.update(wrapped, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), nnx.state(wrapped)))
    loss, state = passes(wrapped, prompt, dtype=jnp.float64)
    inputs = inputs_of(prompt).astype(jnp.float64)
    loss_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    found = loss_and_grad(state, inputs)[1]
    rng = np.random.default_rng(2)

    def check(direction):
        def at(step):
            moved = jax.tree.map(
                lambda leaf, along: leaf + step * along, (state, inputs), direction
            )
            return loss_and_grad(*moved)[0]

        expected = (at(1e-6) - at(-1e-6)) / 2e-6
        along = jax.tree.reduce(
            jnp.add, jax.tree.map(lambda one, other: jnp.sum(one * other), found, direction)
        )
        assert abs(expected) > 1e-3
        np.testing.assert_allclose(along, expected, rtol=1e-4)

    zeros = jax.tree.map(jnp.zeros_like, (state, inputs))
    drawn = functools.partial(
        jax.tree.map, lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape))
    )
    check((zeros[0], drawn(inputs)))
    check((drawn(state), zeros[1]))
    # What was read before the window, and is there compressed, has a part in it.
    assert jnp.mean(jnp.any(found[1][:, 4 : prompt - 20] != 0, axis=-1)) > 0.2
