"""The pairs that sample queries attend to most: the plainest of the query-informed methods."""

import dataclasses

from jaxtyping import Array, Float

from coreset_jax import validation
from coreset_jax.baselines.scores import Head, keep_largest, mean_attention
from coreset_jax.coreset import Compressor


@dataclasses.dataclass(frozen=True)
class _MeanAttention:
    scale: float | None

    def __call__(self, head: Head, *, size: int, block_size: int) -> Float[Array, " n"]:
        del size
        assert head.queries is not None
        samples = head.queries.reshape(-1, head.queries.shape[-1])
        return mean_attention(head, samples, scale=self.scale, block_size=block_size)


def top_attention(scale: float | None = None) -> Compressor:
    r"""Keeps the pairs with the largest mean attention weight over sample queries.

    .. math::
       a_i = \frac1q \sum_{j=1}^{q} \frac{e^{\mathrm{scale}\langle q_j,k_i\rangle}}
                                        {\sum_l e^{\mathrm{scale}\langle q_j,k_l\rangle}},
       \qquad w_i = 1

    What methods that evict by attention have in common, without windows, sinks or pooling. Where
    attention is sharp there is little to gain over it; where it is spread, dropping the mass of
    all others makes it worse than a uniform sample.

    Args:
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
      ValueError: if ``scale`` is not a static positive number.

    References:
      Zhang et al., *H2O*, NeurIPS 2023, arXiv 2306.14048, Section 3, for pairs that most of the
      attention goes to.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 128, 16))
    >>> compressor = cj.baselines.top_attention()
    >>> coreset = compressor(jax.random.key(1), keys, values, size=32, queries=queries)
    >>> coreset.keys.shape
    (32, 16)
    """
    return keep_largest(_MeanAttention(validation.static_float("scale", scale)), groups=1)
