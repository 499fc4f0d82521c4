"""H2O: the pairs with the most attention so far, and the most recent ones."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax import validation
from coreset_jax.baselines.scores import Head, keep_largest, mean_attention
from coreset_jax.coreset import Compressor


@dataclasses.dataclass(frozen=True)
class _HeavyHitters:
    recent: float
    scale: float | None

    def __call__(self, head: Head, *, size: int, block_size: int) -> Float[Array, " n"]:
        assert head.queries is not None
        samples = head.queries.reshape(-1, head.queries.shape[-1])
        scores = mean_attention(head, samples, scale=self.scale, block_size=block_size)
        first_recent = head.length - int(self.recent * size)
        return jnp.where(jnp.arange(scores.shape[0]) >= first_recent, jnp.inf, scores)


def h2o(recent: float = 0.5, scale: float | None = None) -> Compressor:
    r"""Keeps heavy hitters and recent pairs, as a rule half of each.

    .. math::
       S = \{n - r + 1, \dots, n\} \cup
           \operatorname{top}_{m-r} \Bigl\{ \sum_j \mathrm{softmax}_i(\mathrm{scale}
           \langle q_j, k_i\rangle) : i \le n - r \Bigr\}, \qquad
       r = \lfloor \mathrm{recent} \cdot m \rfloor, \quad w_i = 1

    The method as it shrinks a cache that is complete, in one step. The paper evicts one pair for
    every token decoded, and so never gets back what it once dropped; and its queries are the
    tokens' own, each of which sees what came before it, where sample queries see all pairs here.

    Args:
      recent: the share of ``size`` that goes to the newest pairs, from 0 to 1.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` ``(rng, keys [..., n, d], values [..., n, dv], *,
      size, lengths=None, queries=None) -> Coreset``. It is query-informed: ``queries [..., q, d]``
      are raw queries with the leading axes of keys, those of a group one after another. It draws
      nothing. Log-weights are 0, float32 or wider, and NaN in a head whose queries hold a NaN or
      an infinity. A head no longer than ``size`` is kept whole, and ``size >= n`` returns the
      cache itself. The call raises ``ValueError`` without ``queries``, if shapes do not fit, if
      ``size`` is not a positive integer or if ``lengths`` lie outside ``1..n``.

    Raises:
      ValueError: if ``recent`` lies outside 0..1, or ``scale`` is not a static positive number.

    References:
      Zhang et al., *H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
      Models*, NeurIPS 2023, arXiv 2306.14048, Section 4.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 128, 16))
    >>> coreset = cj.baselines.h2o()(jax.random.key(1), keys, values, size=8, queries=queries)
    >>> print(coreset.indices[-4:])
    [124 125 126 127]
    """
    recent = validation.static_float("recent", recent, positive=False)
    if recent is None or not 0 <= recent <= 1:
        raise ValueError(f"recent must lie between 0 and 1, got {recent}.")
    score = _HeavyHitters(recent, validation.static_float("scale", scale))
    return keep_largest(score, groups=1)
