"""Pairs put behind a coreset: weights are absolute, so that new pairs simply have weight one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import refit
from tests import brute_force
from tests.compressors import sampled

HEADS, COUNT, NEW, SIZE, WIDTH = 3, 120, 40, 40, 8
COMPRESSORS = {
    "fitted": cj.fitted(),
    "balanced": cj.balanced(block_size=32, landmarks=32, max_swaps=32),
    "weights": refit.weights(sampled()),
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_new_pairs_have_weight_one(name):
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, HEADS, COUNT + NEW, WIDTH)).astype(np.float32)
    # New pairs look elsewhere than old ones, so that their share of the attention shows.
    values[:, COUNT:] += 2
    queries = rng.standard_normal((HEADS, 50, WIDTH)).astype(np.float32)
    first = [array[:, :COUNT] for array in (keys, values)]
    coreset = COMPRESSORS[name](jax.random.key(0), *first, size=SIZE)
    exact = brute_force.attention(queries, keys, values)

    @jax.jit
    def errors(log_weights):
        behind = jnp.concatenate([log_weights, jnp.zeros((HEADS, NEW))], axis=-1)
        pairs = [
            jnp.concatenate([ours, array[:, COUNT:]], axis=-2)
            for ours, array in ((coreset.keys, keys), (coreset.values, values))
        ]
        missed = cj.attention(queries, *pairs, behind) - exact
        return jnp.mean(jnp.linalg.norm(missed, axis=-1), axis=-1)

    total = jax.nn.logsumexp(coreset.log_weights, axis=-1, keepdims=True)
    error = errors(coreset.log_weights)
    # In what a sum of 1/2 leaves of them, and where the mass is half or twice of what it is.
    assert np.all(error < 0.2 * errors(coreset.log_weights - total + np.log(0.5)))
    for factor in (0.5, 2.0):
        assert np.all(error < 0.9 * errors(coreset.log_weights + np.log(factor)))
    # And it is an answer: better than that of the new pairs alone, and of the old ones.
    for part in (slice(COUNT), slice(COUNT, None)):
        alone = brute_force.attention(queries, keys[:, part], values[:, part])
        assert np.all(error < 0.7 * np.mean(np.linalg.norm(alone - exact, axis=-1), axis=-1))
