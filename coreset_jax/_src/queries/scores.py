"""Scores of pairs by the attention of sample queries."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax._src.core.head import Head
from coreset_jax._src.precision import accumulation_dtype, inner_products, matmul

# Attention weights of one head that are held at a time.
WEIGHTS = 2**22

# Samples that memory is planned for; how many there are is not known before a call.
_SAMPLES = 2048


def workspace(count: int, width: int) -> int:
    """Numbers that the mean takes: weights of a block of samples, and keys in the dtype of sums."""
    return min(WEIGHTS, _SAMPLES * count) + count * width


def mean_attention(head: Head, queries: Float[Array, "q d"]) -> Float[Array, " n"]:
    r"""The mean over queries of their attention weights, a few queries at a time.

    .. math::
       a_i = \frac1q \sum_{j=1}^{q} \frac{e^{\mathrm{scale}\langle q_j,k_i\rangle}}
                                        {\sum_l e^{\mathrm{scale}\langle q_j,k_l\rangle}}

    Every query sees all valid pairs: samples have no place in the sequence.

    Args:
      head: one head of the cache.
      queries: raw queries ``[q, d]``.

    Returns:
      The means ``[n]``, in float32 or wider; 0 for padding.
    """
    return _mean(head, queries, power=1)


def mean_squared_attention(head: Head, queries: Float[Array, "q d"]) -> Float[Array, " n"]:
    """The mean over queries of their squared attention weights ``[n]``; see the mean."""
    return _mean(head, queries, power=2)


def _mean(head: Head, queries: Float[Array, "q d"], power: int) -> Float[Array, " n"]:
    dtype = accumulation_dtype(head.keys, queries)
    keys, samples = head.keys.astype(dtype), queries.shape[0]
    blocks = -(-samples // max(WEIGHTS // head.count, 1))
    # Blocks of nearly one length: little padding.
    width = -(-samples // blocks)
    rows = jnp.pad(queries.astype(dtype), ((0, blocks * width - samples), (0, 0)))
    shares = jnp.where(jnp.arange(blocks * width) < samples, 1 / samples, 0).astype(dtype)

    def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        rows, shares = block
        logits = head.scale * inner_products(rows, keys)
        weights = jax.nn.softmax(jnp.where(head.inside[None], logits, -jnp.inf), axis=-1)
        return total + matmul(shares, weights**power), None

    # Made from both, so that it varies over the mesh axes that either does.
    start = jnp.zeros_like(keys[:, 0]) + jnp.zeros_like(rows[0, 0])
    total, _ = jax.lax.scan(
        add, start, (rows.reshape(blocks, width, -1), shares.reshape(blocks, width))
    )
    return total
