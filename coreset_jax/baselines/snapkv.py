"""SnapKV: what the last queries of a prompt attend to, and the neighbors of it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax._src.core.head import Head
from coreset_jax._src.queries.scores import mean_attention
from coreset_jax.baselines.scores import KeepAttended


class snapkv(KeepAttended):  # noqa: N801
    r"""Keeps a window of recent pairs, and what the window's queries attend to before it.

    .. math::
       a_i = \sum_{j \in \mathrm{window}} \mathrm{softmax}_i(\mathrm{scale}\langle q_j,k_i\rangle),
       \qquad
       S = \{n - w + 1, \dots, n\} \cup
           \operatorname{top}_{m-w} \Bigl\{ \max_{|l - i| \le c/2} a_l : i \le n - w \Bigr\}

    with :math:`c` the kernel size and weights :math:`w_i = 1`. Pooling is by the maximum over
    neighboring pairs, so that what surrounds a pair of much attention is kept with it; pairs that
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

    A compressor; see :class:`coreset_jax.Compressor`. It is query-informed and draws nothing.

    Raises:
      ValueError: if ``kernel_size`` is even, or on other bad options.

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

    window: int = 32
    kernel_size: int = 7

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        super().validate()
        self.static_count("window")
        self.static_count("kernel_size")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}.")

    def score(self, head: Head, size: int) -> Float[Array, " n"]:
        """Pooled attention of the window, and more than any for the window itself."""
        observed = self.grouped(head)[:, -self.window :].reshape(-1, head.keys.shape[-1])
        scores = mean_attention(head, observed)
        recent = jnp.arange(head.count) >= head.length - min(self.window, size)
        # The window and padding have no part in the votes, nor in the pools of their neighbors.
        pooled = jax.lax.reduce_window(
            jnp.where(recent, -jnp.inf, scores),
            -jnp.inf,
            jax.lax.max,
            (self.kernel_size,),
            (1,),
            "SAME",
        )
        return jnp.where(recent, jnp.inf, pooled)
