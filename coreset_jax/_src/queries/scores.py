"""Scores of pairs by the attention of sample queries."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax._src.core.head import Head
from coreset_jax._src.precision import accumulation_dtype, inner_products, matmul

# Attention weights of one head that are held at a time.
WEIGHTS = 2**22

# What is found of the pairs of a head, arrays `[n]`.
_Found = tuple[Array, ...]

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


def largest_attention(
    head: Head, queries: Float[Array, "q d"], log_others: Float[Array, " q"] | None = None
) -> Float[Array, " n"]:
    """The largest attention weight that any of the queries gives a pair ``[n]``; see the mean.

    Args:
      head: one head of the cache.
      queries: raw queries ``[q, d]``.
      log_others: the logarithm of what each attends to beside this head, in the unit of
        :math:`e^{score}`, ``[q]``; ``None`` for nothing.
    """

    def add(found: _Found, weights: Array, _: Array) -> _Found:
        largest, total = found
        return jnp.maximum(largest, jnp.max(weights, axis=0)), total + jnp.sum(weights, axis=0)

    largest, total = _reduced(head, queries, add, 2, log_others)
    # A maximum of several forgets a NaN on CPU, where the compiler fuses it; a sum does not.
    return jnp.where(jnp.isnan(total), jnp.nan, largest)


def _mean(head: Head, queries: Float[Array, "q d"], power: int) -> Float[Array, " n"]:
    def add(found: _Found, weights: Array, shares: Array) -> _Found:
        return (found[0] + matmul(shares, weights**power),)

    return _reduced(head, queries, add, 1)[0]


def _reduced(
    head: Head,
    queries: Float[Array, "q d"],
    add: Callable[[_Found, Array, Array], _Found],
    parts: int,
    log_others: Float[Array, " q"] | None = None,
) -> _Found:
    """What a function makes of the queries' attention weights, from zeros, a block after another.

    Args:
      head: one head of the cache.
      queries: raw queries ``[q, d]``.
      add: what was found so far, a tuple of arrays ``[n]``, the weights of a block of queries
        ``[b, n]``, each at least 0, and their shares ``[b]``, which sum to one over all blocks;
        what is found then. Padding behind the queries has a share of 0 and the attention of the
        last of them.
      parts: arrays in that tuple.
      log_others: see :func:`largest_attention`.
    """
    dtype = accumulation_dtype(head.keys, queries)
    keys, samples = head.keys.astype(dtype), queries.shape[0]
    blocks = -(-samples // max(WEIGHTS // head.count, 1))
    # Blocks of nearly one length: little padding.
    width = -(-samples // blocks)
    rows = jnp.pad(queries.astype(dtype), ((0, blocks * width - samples), (0, 0)), mode="edge")
    shares = jnp.where(jnp.arange(blocks * width) < samples, 1 / samples, 0).astype(dtype)
    others = None
    if log_others is not None:
        others = jnp.pad(log_others.astype(dtype), (0, blocks * width - samples), mode="edge")
        others = others.reshape(blocks, width)

    def step(found: _Found, block: tuple[Array, Array, Array | None]) -> tuple[_Found, None]:
        rows, shares, others = block
        logits = head.scale * inner_products(rows, keys)
        logits = jnp.where(head.inside[None], logits, -jnp.inf)
        if others is None:
            weights = jax.nn.softmax(logits, axis=-1)
        else:
            totals = jnp.logaddexp(jax.nn.logsumexp(logits, axis=-1), others)
            weights = jnp.exp(logits - totals[:, None])
        return add(found, weights, shares), None

    # Made from both, so that it varies over the mesh axes that either does.
    start = (jnp.zeros_like(keys[:, 0]) + jnp.zeros_like(rows[0, 0]),) * parts
    found, _ = jax.lax.scan(
        step, start, (rows.reshape(blocks, width, -1), shares.reshape(blocks, width), others)
    )
    return found
