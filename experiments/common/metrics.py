"""Errors of coresets, and means of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import coreset_jax as cj
from coreset_jax import baselines

BLOCK_SIZE = 2048
"""Pairs whose scores are held at a time: 64 MB of them for 8 heads with 1024 queries each."""

FLOAT_BYTES = 4
"""Keys, values, log-weights and normalizers are counted in float32."""


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


def divergence(
    exact: Float[np.ndarray, "*batch length vocabulary"],
    other: Float[np.ndarray, "*batch length vocabulary"],
) -> Float[np.ndarray, "*batch"]:
    r"""Bits a token that are lost by predicting as the other where tokens come as the exact says.

    .. math:: \frac1n \sum_i \sum_b p_i(b) \log_2 \frac{p_i(b)}{q_i(b)}

    Args:
      exact: natural logarithms of :math:`p_i(b)`.
      other: likewise of :math:`q_i(b)`.
    """
    exact, other = (np.asarray(each, np.float64) for each in (exact, other))
    bits = np.sum(np.exp(exact) * (exact - other), axis=-1) / math.log(2)
    return np.mean(bits, axis=-1)


def geometric_mean(values: np.ndarray) -> float:
    """The geometric mean over all entries; infinite where one is, or is not a number."""
    values = np.where(np.isnan(values), np.inf, values)
    return float(np.exp(np.mean(np.log(np.maximum(values, np.finfo(np.float32).tiny)))))


def coreset_bytes(coreset: cj.Coreset, bits: int | None = None) -> int:
    """Bytes of a coreset in float32: keys, values, and what else answers depend on.

    Empty slots are left out unless they are quantized, and so are log-weights where all pairs of a
    head weigh the same: one number says it.

    Args:
      coreset: a coreset.
      bits: of a number in keys and values, where they are quantized.
    """
    held = coreset.log_weights != -jnp.inf
    pairs = int(jnp.sum(held))
    if bits is None:
        found = FLOAT_BYTES * pairs * (coreset.keys.shape[-1] + coreset.values.shape[-1])
    else:
        found = baselines.quantized_bytes(coreset, bits)
    if bool(jnp.any(held & (coreset.log_weights != coreset.log_weights[..., :1]))):
        found += FLOAT_BYTES * pairs
    if isinstance(coreset, baselines.SignedCoreset):
        found += FLOAT_BYTES * pairs
    return found
