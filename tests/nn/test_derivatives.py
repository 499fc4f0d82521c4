"""Derivatives through caches and modules that decode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coreset_jax.nn import CoresetCache
from coreset_jax.nn import linen as coreset_linen
from coreset_jax.nn.nnx import CoresetAttention
from tests.nn.conftest import CONFIG, SUBSETS

OPTIONS = {"size": 64, "sinks": 4, "window": 12, "block_size": 8}


def passes(config, sequences, prompt, steps, weights):
    """A number that depends on all outputs of a prompt and some steps behind it."""

    def loss(arrays):
        queries, keys, values = arrays
        cache = CoresetCache.init(config, jax.random.key(0), keys, values)
        total, start = 0.0, 0
        for count in (prompt, *[1] * steps):
            new = (array[:, start : start + count] for array in (queries, keys, values))
            outputs, cache = cache.read_and_extend(*new)
            total += jnp.sum(outputs * weights[:, start : start + count])
            start += count
        return total

    return loss, tuple(jnp.asarray(array[:2], jnp.float64) for array in sequences)


def check(loss, arrays):
    loss = jax.jit(loss)
    found = jax.jit(jax.grad(loss))(arrays)
    rng = np.random.default_rng(2)
    for number in range(3):
        directions = [np.zeros_like(array) for array in arrays]
        directions[number] = rng.standard_normal(arrays[number].shape)

        def at(step, directions=directions):
            return loss(tuple(a + step * d for a, d in zip(arrays, directions, strict=True)))

        expected = (at(1e-6) - at(-1e-6)) / 2e-6
        along = np.sum(found[number] * directions[number])
        np.testing.assert_allclose(along, expected, rtol=1e-4, atol=1e-6)


# Below capacity, a prompt that is fitted, and one that is chosen from; behind that, blocks that
# leave the window and are halved.
@pytest.mark.parametrize(
    ("config", "prompt", "steps"),
    [
        (CONFIG, 30, 2),
        pytest.param(CONFIG, 130, 1, marks=pytest.mark.slow),
        pytest.param(SUBSETS, 130, 3, marks=pytest.mark.slow),
    ],
    ids=["below", "fitted", "chosen"],
)
def test_derivatives_are_those_of_the_function(sequences, x64, config, prompt, steps):
    weights = np.random.default_rng(1).standard_normal((2, 150, 4, 6))
    check(*passes(config, sequences, prompt, steps, weights))


@pytest.mark.slow
def test_older_tokens_are_not_forgotten(sequences, x64):
    """Where fits are halved, weights count as grown by a constant: near, and never zero or NaN."""
    weights = np.zeros((2, 150, 4, 6))
    weights[:, 139] = 1
    loss, arrays = passes(CONFIG, sequences, 130, 10, weights)
    for found in jax.jit(jax.grad(loss))(arrays):
        assert jnp.all(jnp.isfinite(found))
    assert jnp.mean(jnp.any(found[:, 4:100] != 0, axis=(2, 3))) > 0.2


@pytest.mark.slow
def test_modules_that_decode_learn():
    inputs = jax.random.normal(jax.random.key(3), (2, 100, 32))
    module = CoresetAttention(4, 32, num_kv_heads=2, rope_base=1e4, rngs=nnx.Rngs(0), **OPTIONS)
    module.init_cache((2, 150, 32))

    def loss(module, inputs):
        first = module(inputs, decode=True)
        return jnp.sum(first**2) + jnp.sum(module(inputs[:, :1], decode=True) ** 2)

    found = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param))(module, inputs)
    for leaf in jax.tree.leaves(found):
        assert jnp.all(jnp.isfinite(leaf))
        assert jnp.any(leaf != 0)

    module = coreset_linen.CoresetAttention(4, num_kv_heads=2, decode=True, **OPTIONS)
    variables = module.init(jax.random.key(0), inputs)

    def linen_loss(params):
        state = {"params": params, "cache": variables["cache"]}
        first, changed = module.apply(state, inputs, mutable=["cache"])
        second, _ = module.apply(state | changed, inputs[:, :1], mutable=["cache"])
        return jnp.sum(first**2) + jnp.sum(second**2)

    for leaf in jax.tree.leaves(jax.grad(linen_loss)(variables["params"])):
        assert jnp.all(jnp.isfinite(leaf))
