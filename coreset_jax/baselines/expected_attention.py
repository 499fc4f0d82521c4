"""Expected attention: attention under a Gaussian of the queries, times the norm of the value."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax._src.core.head import Head
from coreset_jax._src.precision import accumulation_dtype, matmul
from coreset_jax.baselines.scores import KeepAttended


class expected_attention(KeepAttended):  # noqa: N801
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

    A compressor; see :class:`coreset_jax.Compressor`. It is query-informed and draws nothing.

    Raises:
      ValueError: on bad options.

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

    sinks: int = 4
    epsilon: float = 0.0

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        super().validate()
        self.static_count("sinks", 0)
        self.static_float("epsilon", positive=False)
        if self.epsilon < 0:
            raise ValueError(f"epsilon must be at least 0, got {self.epsilon}.")

    def score(self, head: Head, size: int) -> Float[Array, " n"]:
        """The logarithm of expected attention times the norm of the value."""
        del size
        samples = self.grouped(head)
        dtype = accumulation_dtype(head.keys, head.values, samples)
        keys, scale = head.keys.astype(dtype), head.scale
        sinks = jnp.arange(head.count) < self.sinks
        judged = head.inside & ~sinks

        def log_attention(queries: Float[Array, "q d"]) -> Float[Array, " n"]:
            mean = jnp.mean(queries, axis=0)
            centered = queries - mean[None]
            covariance = matmul(centered.T, centered) / queries.shape[0]
            spread = jnp.sum(matmul(keys, covariance) * keys, axis=-1)
            exponents = scale * matmul(keys, mean) + jnp.square(scale) / 2 * spread
            return jax.nn.log_softmax(jnp.where(judged, exponents, -jnp.inf))

        # One query head after another: each makes an array as large as the keys.
        logs = jax.lax.map(log_attention, samples.astype(dtype))
        log_mean = jax.nn.logsumexp(logs, axis=0) - math.log(logs.shape[0])
        if self.epsilon:
            log_mean = jnp.logaddexp(log_mean, math.log(self.epsilon))
        # As logarithms, of which small ones differ where their exponentials are all zero.
        norms = jnp.linalg.norm(head.values.astype(dtype), axis=-1)
        return jnp.where(sinks, jnp.inf, log_mean + jnp.log(norms))
