"""Errors of coresets, and means of them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import coreset_jax as cj

BLOCK_SIZE = 2048
"""Pairs whose scores are held at a time: 64 MB of them for 8 heads with 1024 queries each."""


@jax.jit
def relative_error(
    queries: Float[Array, "*heads q d"], exact: Float[Array, "*heads q dv"], coreset: cj.Coreset
) -> Float[Array, "*heads q"]:
    """Every query's error over a coreset, relative to the mean norm of its head's exact outputs.

    Args:
      queries: queries `[..., q, d]`.
      exact: their attention over the whole cache `[..., q, dv]`.
      coreset: what answers them instead.
    """
    outputs = cj.attend(queries, coreset, block_size=BLOCK_SIZE)
    norm = jnp.mean(jnp.linalg.norm(exact, axis=-1), axis=-1, keepdims=True)
    return jnp.linalg.norm(outputs - exact, axis=-1) / norm


def geometric_mean(values: np.ndarray) -> float:
    """The geometric mean over all entries; infinite where one is, or is not a number."""
    values = np.where(np.isnan(values), np.inf, values)
    return float(np.exp(np.mean(np.log(np.maximum(values, np.finfo(np.float32).tiny)))))
