"""SnapKV: what the last queries of a prompt attend to, and the neighbours of it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax import validation
from coreset_jax.baselines.scores import Head, keep_largest, mean_attention
from coreset_jax.coreset import Compressor


@dataclasses.dataclass(frozen=True)
class _PooledAttention:
    window: int
    kernel_size: int
    scale: float | None

    def __call__(self, head: Head, *, size: int, block_size: int) -> Float[Array, " n"]:
        assert head.queries is not None
        observed = head.queries[:, -self.window :].reshape(-1, head.queries.shape[-1])
        scores = mean_attention(head, observed, scale=self.scale, block_size=block_size)
        first_recent = head.length - min(self.window, size)
        recent = jnp.arange(scores.shape[0]) >= first_recent
        # The window and padding have no part in the votes, nor in the pools of their neighbours.
        pooled = jax.lax.reduce_window(
            jnp.where(recent, -jnp.inf, scores),
            -jnp.inf,
            jax.lax.max,
            (self.kernel_size,),
            (1,),
            "SAME",
        )
        return jnp.where(recent, jnp.inf, pooled)


def snapkv(
    window: int = 32, kernel_size: int = 7, groups: int = 1, scale: float | None = None
) -> Compressor:
    r"""Keeps a window of recent pairs, and what the window's queries attend to before it.

    .. math::
       a_i = \sum_{j \in \mathrm{window}} \mathrm{softmax}_i(\mathrm{scale}\langle q_j,k_i\rangle),
       \qquad
       S = \{n - w + 1, \dots, n\} \cup
           \operatorname{top}_{m-w} \Bigl\{ \max_{|l - i| \le c/2} a_l : i \le n - w \Bigr\}

    with :math:`c` the kernel size and weights :math:`w_i = 1`. Pooling is by the maximum over
    neighbouring pairs, so that what surrounds a pair of much attention is kept with it; pairs that
    share a maximum enter in their order. (The paper pools by the maximum, with a kernel of 7 and a
    window of 32 for LongBench; the constructor of the authors' code has a mean of 5 and 64.)

    Samples have no place in the sequence: the last ones are taken for those of the window, and
    each sees the whole cache, where in a prompt it does not see the pairs behind its own.

    Args:
      window: queries observed, and newest pairs kept (at most ``size`` of them).
      kernel_size: pairs of a pool, odd; 1 does not pool.
      groups: query heads that share a key-value head. Their samples lie one after another, and
        the last ``window`` of each are observed; their votes are added.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` ``(rng, keys [..., n, d], values [..., n, dv], *,
      size, lengths=None, queries=None) -> Coreset``. It is query-informed: ``queries [..., q, d]``
      are raw queries with the leading axes of keys, in their order. It draws nothing. Log-weights
      are 0, float32 or wider, and NaN in a head whose queries hold a NaN or an infinity. A head no
      longer than ``size`` is kept whole, and ``size >= n`` returns the cache itself. The call
      raises ``ValueError`` without ``queries``, if they do not divide into groups, if shapes do not
      fit, if ``size`` is not a positive integer or if ``lengths`` lie outside ``1..n``.

    Raises:
      ValueError: if a count is not a static positive integer, ``kernel_size`` is even, or
        ``scale`` is not a static positive number.

    References:
      Li et al., *SnapKV: LLM Knows What You are Looking for Before Generation*, NeurIPS 2024,
      arXiv 2404.14469, Section 4.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 128, 16))
    >>> compressor = cj.baselines.snapkv(window=4)
    >>> coreset = compressor(jax.random.key(1), keys, values, size=16, queries=queries)
    >>> print(coreset.indices[-4:])
    [124 125 126 127]
    """
    for name, count in (("window", window), ("kernel_size", kernel_size), ("groups", groups)):
        validation.check_count(name, count)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
    scale = validation.static_float("scale", scale)
    return keep_largest(_PooledAttention(int(window), int(kernel_size), scale), groups=int(groups))
