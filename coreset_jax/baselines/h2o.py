"""H2O: the pairs with the most attention so far, and the most recent ones."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax._src.core.head import Head
from coreset_jax._src.queries.scores import mean_attention
from coreset_jax.baselines.scores import KeepAttended


class h2o(KeepAttended):  # noqa: N801
    r"""Keeps heavy hitters and recent pairs, as a rule half of each.

    .. math::
       S = \{n - r + 1, \dots, n\} \cup
           \operatorname{top}_{m-r} \Bigl\{ \sum_j \mathrm{softmax}_i(\mathrm{scale}
           \langle q_j, k_i\rangle) : i \le n - r \Bigr\}, \qquad
       r = \lfloor \mathrm{recent\_fraction} \cdot m \rfloor, \quad w_i = 1

    The method as it shrinks a cache that is complete, in one step. The paper evicts one pair for
    every token decoded, and so never gets back what it once dropped; and its queries are the
    tokens' own, each of which sees what came before it, where sample queries see all pairs here.

    Args:
      recent_fraction: the share of ``size`` that goes to the newest pairs, from 0 to 1.
      groups: query heads that share a key-value head, with as many samples each.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.

    A compressor; see :class:`coreset_jax.Compressor`. It is query-informed and draws nothing.

    Raises:
      ValueError: if ``recent_fraction`` lies outside 0..1, or on other bad options.

    References:
      Zhang et al., *H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
      Models*, NeurIPS 2023, arXiv 2306.14048, Section 4.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 128, 16))
    >>> coreset = cj.baselines.h2o()(jax.random.key(1), keys, values, size=8, queries=queries)
    >>> print(coreset.indices[-4:])
    [124 125 126 127]
    """

    recent_fraction: float = 0.5

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        super().validate()
        self.static_float("recent_fraction", positive=False)
        if not 0 <= self.recent_fraction <= 1:
            raise ValueError(
                f"recent_fraction must lie between 0 and 1, got {self.recent_fraction}."
            )

    def score(self, head: Head, size: int) -> Float[Array, " n"]:
        """Mean attention, and more than any for recent pairs."""
        assert head.queries is not None
        first_recent = head.length - int(self.recent_fraction * size)
        recent = jnp.arange(head.count) >= first_recent
        return jnp.where(recent, jnp.inf, mean_attention(head, head.queries))
