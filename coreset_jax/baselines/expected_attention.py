"""Expected attention: attention under a Gaussian of the queries, times the norm of the value."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax import validation
from coreset_jax.attention import accumulation_dtype, default_scale
from coreset_jax.baselines.scores import Head, keep_largest
from coreset_jax.coreset import Compressor


@dataclasses.dataclass(frozen=True)
class _ExpectedAttention:
    sinks: int
    epsilon: float
    scale: float | None

    def __call__(self, head: Head, *, size: int, block_size: int) -> Float[Array, " n"]:
        del size, block_size
        assert head.queries is not None
        dtype = accumulation_dtype(head.keys, head.values, head.queries)
        keys = head.keys.astype(dtype)
        scale = default_scale(keys.shape[-1]) if self.scale is None else self.scale
        matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        sinks = jnp.arange(keys.shape[0]) < self.sinks
        judged = head.inside & ~sinks

        def log_attention(queries: Float[Array, "q d"]) -> Float[Array, " n"]:
            mean = jnp.mean(queries, axis=0)
            centered = queries - mean[None]
            covariance = matmul(centered.T, centered) / queries.shape[0]
            spread = jnp.sum(matmul(keys, covariance) * keys, axis=-1)
            exponents = scale * matmul(keys, mean) + scale**2 / 2 * spread
            return jax.nn.log_softmax(jnp.where(judged, exponents, -jnp.inf))

        # One query head after another: each makes an array as large as the keys.
        logs = jax.lax.map(log_attention, head.queries.astype(dtype))
        log_mean = jax.nn.logsumexp(logs, axis=0) - math.log(logs.shape[0])
        if self.epsilon:
            log_mean = jnp.logaddexp(log_mean, math.log(self.epsilon))
        # As logarithms, of which small ones differ where their exponentials are all zero.
        norms = jnp.linalg.norm(head.values.astype(dtype), axis=-1)
        return jnp.where(sinks, jnp.inf, log_mean + jnp.log(norms))


def expected_attention(
    sinks: int = 4, epsilon: float = 0.0, groups: int = 1, scale: float | None = None
) -> Compressor:
    r"""Keeps the pairs that a Gaussian of the queries attends to most, and attention sinks.

    With mean :math:`\mu` and covariance :math:`\Sigma` of the sample queries and
    :math:`s = \mathrm{scale}`,

    .. math::
       \hat z_i = \mathbb{E}\, e^{s\langle q, k_i\rangle}
         = e^{s\langle\mu, k_i\rangle + \frac{s^2}{2} k_i^T \Sigma k_i}, \qquad
       \mathrm{score}_i = \Bigl( \frac{\hat z_i}{\sum_l \hat z_l} + \epsilon \Bigr) \|v_i\|,
       \qquad w_i = 1

    The first ``sinks`` pairs are kept unjudged and left out of the sum. In the paper :math:`\mu`
    and :math:`\Sigma` are those of hidden states, carried to the queries of future positions by
    the model's weights and a mean rotation, and values are judged behind the output projection: at
    decoding it needs no queries. Here sample queries, rotated already, give both, and values
    count as they are cached.

    Args:
      sinks: pairs kept at the front, 0 or more.
      epsilon: :math:`\epsilon`, 0 or more; a larger one gives the norms of values more say.
      groups: query heads that share a key-value head. Their samples lie one after another; each
        has a Gaussian of its own, and their attention is averaged.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` ``(rng, keys [..., n, d], values [..., n, dv], *,
      size, lengths=None, queries=None) -> Coreset``. It is query-informed: ``queries [..., q, d]``
      are raw queries with the leading axes of keys. It draws nothing. Log-weights are 0, float32
      or wider, and NaN in a head whose queries hold a NaN or an infinity. A head no longer than
      ``size`` is kept whole, and ``size >= n`` returns the cache itself. The call raises
      ``ValueError`` without ``queries``, if they do not divide into groups, if shapes do not fit,
      if ``size`` is not a positive integer or if ``lengths`` lie outside ``1..n``.

    Raises:
      ValueError: if ``sinks`` or ``groups`` is not a static integer of at least 0 or 1, or
        ``epsilon`` is negative, or ``scale`` is not a static positive number.

    References:
      Devoto, Jeblick, Jégou, *Expected Attention: KV Cache Compression by Estimating Attention
      from Future Queries Distribution*, 2025, arXiv 2510.00636, Section 3; defaults are those of
      the authors' code, https://github.com/NVIDIA/kvpress.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 128, 16))
    >>> compressor = cj.baselines.expected_attention()
    >>> coreset = compressor(jax.random.key(1), keys, values, size=32, queries=queries)
    >>> print(coreset.indices[:4])
    [0 1 2 3]
    """
    validation.check_count("sinks", sinks, least=0)
    validation.check_count("groups", groups)
    epsilon = validation.static_float("epsilon", epsilon, positive=False)
    if epsilon is None or epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}.")
    score = _ExpectedAttention(int(sinks), epsilon, validation.static_float("scale", scale))
    return keep_largest(score, groups=int(groups))
