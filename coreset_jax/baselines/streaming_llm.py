"""StreamingLLM: attention sinks and a window of recent pairs."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax._src.core.head import Head
from coreset_jax.baselines.scores import KeepLargest


class streaming_llm(KeepLargest):  # noqa: N801
    r"""Keeps the first few pairs and the newest ones, whatever they hold.

    .. math:: S = \{1, \dots, s\} \cup \{n - (m - s) + 1, \dots, n\}, \qquad w_i = 1

    The first pairs are *sinks*: trained models send them the attention that no other pair
    deserves. Positions are those at which the keys were cached, where the paper gives kept pairs
    new, consecutive ones.

    Args:
      sinks: :math:`s`, pairs kept at the front, 0 or more. Where ``size`` is smaller, the first
        ``size`` pairs are all that is kept.

    A compressor; see :class:`coreset_jax.Compressor`. It looks at no query and draws nothing.

    Raises:
      ValueError: on bad options.

    References:
      Xiao, Tian, Chen, Han, Lewis, *Efficient Streaming Language Models with Attention Sinks*,
      ICLR 2024, arXiv 2309.17453, Section 3.2.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 128, 16))
    >>> coreset = cj.baselines.streaming_llm()(jax.random.key(1), keys, values, size=8)
    >>> print(coreset.indices)
    [  0   1   2   3 124 125 126 127]
    """

    sinks: int = 4

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_count("sinks", 0)

    def score(self, head: Head, size: int) -> Float[Array, " n"]:
        """The position, and more than any for sinks."""
        del size
        positions = jnp.arange(head.count).astype(head.dtype)
        return jnp.where(positions < self.sinks, jnp.inf, positions)
