"""StreamingLLM: attention sinks and a window of recent pairs."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax import validation
from coreset_jax.attention import accumulation_dtype
from coreset_jax.baselines.scores import Head, keep_largest
from coreset_jax.coreset import Compressor


@dataclasses.dataclass(frozen=True)
class _Position:
    sinks: int

    def __call__(self, head: Head, *, size: int, block_size: int) -> Float[Array, " n"]:
        del size, block_size
        dtype = accumulation_dtype(head.keys)
        positions = jnp.zeros_like(head.keys[:, 0], dtype) + jnp.arange(head.keys.shape[0]).astype(
            dtype
        )
        return jnp.where(positions < self.sinks, jnp.inf, positions)


def streaming_llm(sinks: int = 4) -> Compressor:
    r"""Keeps the first few pairs and the newest ones, whatever they hold.

    .. math:: S = \{1, \dots, s\} \cup \{n - (m - s) + 1, \dots, n\}, \qquad w_i = 1

    The first pairs are *sinks*: trained models send them the attention that no other pair
    deserves. Positions are those at which the keys were cached, where the paper gives kept pairs
    new, consecutive ones.

    Args:
      sinks: :math:`s`, pairs kept at the front, 0 or more. Where ``size`` is smaller, the first
        ``size`` pairs are all that is kept.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` ``(rng, keys [..., n, d], values [..., n, dv], *,
      size, lengths=None, queries=None) -> Coreset``. It is query-free (``queries`` are ignored)
      and draws nothing. Log-weights are 0, float32 or wider. A head no longer than ``size`` is
      kept whole, and ``size >= n`` returns the cache itself. The call raises ``ValueError`` if
      shapes do not fit, if ``size`` is not a positive integer or if ``lengths`` lie outside
      ``1..n``.

    Raises:
      ValueError: if ``sinks`` is not a static integer of at least 0.

    References:
      Xiao, Tian, Chen, Han, Lewis, *Efficient Streaming Language Models with Attention Sinks*,
      ICLR 2024, arXiv 2309.17453, Section 3.2.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 128, 16))
    >>> coreset = cj.baselines.streaming_llm()(jax.random.key(1), keys, values, size=8)
    >>> print(coreset.indices)
    [  0   1   2   3 124 125 126 127]
    """
    validation.check_count("sinks", sinks, least=0)
    return keep_largest(_Position(int(sinks)), groups=None)
