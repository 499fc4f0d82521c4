"""The pairs that sample queries attend to most: the plainest of the query-informed methods."""

from jaxtyping import Array, Float

from coreset_jax._src.core.head import Head
from coreset_jax._src.queries.scores import mean_attention
from coreset_jax.baselines.scores import KeepAttended


class top_attention(KeepAttended):  # noqa: N801
    r"""Keeps the pairs with the largest mean attention weight over sample queries.

    .. math::
       a_i = \frac1q \sum_{j=1}^{q} \frac{e^{\mathrm{scale}\langle q_j,k_i\rangle}}
                                        {\sum_l e^{\mathrm{scale}\langle q_j,k_l\rangle}},
       \qquad w_i = 1

    What methods that evict by attention have in common, without windows, sinks or pooling. Where
    attention is sharp there is little to gain over it; where it is spread, dropping the mass of
    all others makes it worse than a uniform sample.

    Args:
      groups: query heads that share a key-value head, with as many samples each.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.

    A compressor; see :class:`coreset_jax.Compressor`. It is query-informed and draws nothing.

    Raises:
      ValueError: on bad options.

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

    def score(self, head: Head, size: int) -> Float[Array, " n"]:
        """Mean attention."""
        del size
        assert head.queries is not None
        return mean_attention(head, head.queries)
