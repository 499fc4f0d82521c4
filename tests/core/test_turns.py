"""Heads in turns: whatever fits into memory, the results are the same."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax._src.core import turns


@pytest.fixture
def inputs():
    return np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)


def sums(count, weights):
    """A function of one head, and of something that all heads share."""
    return {"total": jnp.sum(count * weights), "least": jnp.min(weights, keepdims=True)}


def test_turns_change_no_result(inputs, monkeypatch):
    counts = np.arange(3)
    expected = {
        "total": counts[:, None] * inputs.sum(axis=-1),
        "least": inputs.min(axis=-1, keepdims=True),
    }
    monkeypatch.setattr(turns, "_BUDGETS", {"cpu": 70, "tpu": 70, "gpu": 70})
    # 12 heads, of which 12, 7, 3, and one fit at a time, or not even one.
    for workspace, at_once in ((5, 12), (10, 6), (20, 3), (70, 1), (700, 1)):

        def all_heads(counts, inputs, workspace=workspace):
            one_head = turns.in_turns(sums, workspace)
            # The outer axis of the counts alone.
            return jax.vmap(jax.vmap(one_head, in_axes=(None, 0)))(counts, inputs)

        found = jax.jit(all_heads)(counts, inputs)
        for name, each in expected.items():
            np.testing.assert_allclose(found[name], each, rtol=1e-5, atol=1e-6)
        text = str(jax.make_jaxpr(all_heads)(counts, inputs))
        assert ("scan[" in text) == (at_once < 12)
        assert (f"length={12 // at_once}" in text) == (at_once < 12)


def test_products_take_heads_one_by_one_on_a_cpu(inputs):
    one_head = turns.in_turns(sums, 1, of_products=True)
    text = str(jax.make_jaxpr(jax.vmap(jax.vmap(one_head)))(inputs[..., 0], inputs))
    assert ("length=12" in text) == (jax.default_backend() == "cpu")


def test_a_function_is_traced_once_whatever_it_is_mapped_over(inputs):
    one_head = turns.in_turns(chex.assert_max_traces(lambda x: {"sum": jnp.sum(x)}, n=1), 2**30)
    found = jax.jit(jax.vmap(jax.vmap(one_head)))(inputs)
    np.testing.assert_allclose(found["sum"], inputs.sum(axis=-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        turns.over_axes(jnp.sum, 2)(inputs), inputs.sum(axis=-1), rtol=1e-5, atol=1e-6
    )
