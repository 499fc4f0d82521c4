"""A cache so small that everything happens in a hundred pairs, and what to compare it with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax.nn import CacheConfig, CoresetCache
from tests.stream import compressors

# Tests share programs: they read one token at a time, or 150 of which fewer are valid.
BATCH, LENGTH, HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 150, 4, 2, 8, 6
CONFIG = CacheConfig(size=64, sinks=4, window=12, block_size=8)

# Prompts as subsets, with an option of each head.
SUBSETS = CONFIG.replace(compressor=compressors.sampled(skew=jnp.array([1e-6, 1e3])))


class Sequences(NamedTuple):
    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray

    def cut(self, start, stop):
        return Sequences(*(array[:, start:stop] for array in self))

    def entries(self, *numbers):
        return Sequences(*(array[list(numbers)] for array in self))

    def following(self, starts, count):
        """The next tokens of each sequence, from a place of its own."""
        places = (np.asarray(starts)[:, None] + np.arange(count)) % self.keys.shape[1]
        return Sequences(*(array[np.arange(len(places))[:, None], places] for array in self))

    def padded_with(self, lengths, filling):
        inside = np.arange(self.keys.shape[1]) < np.asarray(lengths)[:, None]
        return Sequences(
            self.queries, *(np.where(inside[..., None, None], a, filling) for a in self[1:])
        )

    def copies(self, number):
        """A batch of one sequence only."""
        return self.entries(*[number] * len(self.keys))

    def causal(self, soft_cap=None, sink_logits=None):
        """Every query's attention to all pairs up to its own, in float64."""
        queries, keys, values = (np.asarray(array, np.float64) for array in self)
        group = queries.shape[2] // keys.shape[2]
        keys, values = (np.repeat(array, group, axis=2) for array in (keys, values))
        scores = np.einsum("bqhd,bnhd->bhqn", queries, keys) / np.sqrt(queries.shape[-1])
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        scores = np.where(np.tri(queries.shape[1], dtype=bool), scores, -np.inf)
        most = scores.max(axis=-1, keepdims=True)
        masses, total = np.exp(scores - most), 0
        if sink_logits is not None:
            total = np.exp(np.asarray(sink_logits, np.float64)[:, None, None] - most)
        masses /= masses.sum(axis=-1, keepdims=True) + total
        return np.einsum("bhqn,bnhv->bqhv", masses, values)


@pytest.fixture(scope="session")
def sequences():
    rng = np.random.default_rng(0)
    shapes = ((HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, VALUE_WIDTH))
    return Sequences(
        *(rng.standard_normal((BATCH, LENGTH, *shape)).astype(np.float32) for shape in shapes)
    )


@pytest.fixture(scope="session")
def config():
    return CONFIG


@pytest.fixture(scope="session")
def empty_cache(sequences):
    """An empty cache for such sequences."""

    def make(config=CONFIG, like=sequences):
        return CoresetCache.init(config, jax.random.key(1), like.keys, like.values)

    return make


@pytest.fixture(scope="session")
def subsets():
    return SUBSETS


@pytest.fixture(scope="session")
def weights():
    """The weights of all pairs of a cache, in the order of its positions."""

    def all_of(cache):
        sinks = jnp.arange(cache.config.sinks) < cache.lengths[:, None]
        recent = jnp.arange(cache.config.num_recent) < cache.filled[:, None]
        middle = cache.middle.pairs.weights
        exact = (
            jnp.broadcast_to(part[:, None], (*middle.shape[:2], part.shape[-1]))
            for part in (sinks, recent)
        )
        first, last = (part.astype(middle.dtype) for part in exact)
        return jnp.concatenate([first, middle, last], axis=-1)

    return all_of
