"""A cache to thin, as points for those who thin points, and what a choice of pairs answers."""

import jax
import numpy as np

import coreset_jax as cj

WIDTH = 32


def cache(count):
    """Clustered keys, and values that follow them with noise; and queries."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((16, WIDTH))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    keys = centers[rng.integers(0, 16, count)] + 0.15 * rng.standard_normal((count, WIDTH))
    keys *= 4 / np.linalg.norm(keys, axis=1, keepdims=True)
    values = keys @ rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    values += rng.standard_normal((count, WIDTH))
    queries = 1.2 * rng.standard_normal((512, WIDTH))
    return [array.astype(np.float32) for array in (keys, values, queries)]


def error_of_pairs(kept, keys, values, queries):
    """The mean error of attention over some pairs, alike in weight."""
    exact = cj.attention(queries, keys, values)
    wrong = cj.attention(queries, keys[kept], values[kept]) - exact
    return float(np.mean(np.linalg.norm(wrong, axis=-1)))


def error_of_balanced(keys, values, queries, size, draws=4):
    """The same for balanced coresets, in the mean over a few."""
    exact = cj.attention(queries, keys, values)
    keys, values, queries = (
        np.broadcast_to(array, (draws, *array.shape)) for array in (keys, values, queries)
    )
    coreset = cj.balanced()(jax.random.key(0), keys, values, size=size)
    wrong = cj.attend(queries, coreset) - exact[None]
    return float(np.mean(np.linalg.norm(wrong, axis=-1)))
