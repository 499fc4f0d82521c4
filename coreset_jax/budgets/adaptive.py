"""AdaKV's split: a head's budget is how many of the layer's largest scores fall to it."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from coreset_jax._src.core.compressor import leaf
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.driver import Cache, for_each_head
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.turns import in_turns
from coreset_jax._src.queries.scores import WEIGHTS, mean_attention
from coreset_jax.budgets.shared import Shared
from coreset_jax.budgets.split import count_largest


def _scores(head: Head) -> Float[Array, " n"]:
    """Mean attention weights of the pairs of one head; minus infinity where there are none."""
    assert head.queries is not None
    scores = mean_attention(head, head.queries)
    # A head that is not finite has no part in this.
    return jnp.where(head.inside & jnp.isfinite(scores), scores, -jnp.inf)


class adaptive(Shared):  # noqa: N801
    r"""Budgets of the heads of a layer by how many of its largest scores they hold, as in AdaKV.

    With :math:`a_{hi}` the mean attention weight of pair :math:`i` over the sample queries of head
    :math:`h`, and :math:`T` the :math:`H m` largest of the :math:`H n` scores of a layer,

    .. math:: m_h = \alpha m + (1 - \alpha)\, |\{ i : (h, i) \in T \}|

    for the mean :math:`m` = ``size``. Each head then has the nearest of a few sizes, by ratio,
    between :math:`\alpha m` and ``max_multiple`` times :math:`m`
    (:func:`coreset_jax.budgets.split.split`), so that a layer never keeps more than :math:`H m`
    pairs: sizes must be static under ``jax.jit``. (The authors keep :math:`m_h` exactly, in arrays
    without empty slots, and judge pairs by the pooled scores of SnapKV's window.)

    Time is that of one compression at each of the ``2 * num_sizes + 1`` sizes, plus the sample
    queries' attention and a sort of the :math:`H n` scores; memory that of the coresets of all
    sizes. A head has, bit by bit, what the compressor keeps of it at its size.

    Args:
      compressor: any compressor; it is handed the ``queries`` too.
      safeguard: :math:`\alpha`, the share of ``size`` that every head has for sure, in ``(0, 1]``;
        the authors' is 0.2. With 1 all heads are alike.
      max_multiple: largest budget of a head, a multiple of ``size``, at least 1.
      num_sizes: sizes tried on either side of ``size``.
      axes: the leading axes of keys whose heads share a budget: the last by default.
      scale: the softmax scale of the scores; ``None`` means that of ``compressor``.

    A compressor; see :class:`coreset_jax.Compressor`. Its coresets have
    ``min(max_multiple * size, n)`` slots a head. It wants sample queries when called. A head whose
    scores are not finite has the least. ``size >= n`` returns what the compressor returns.

    Raises:
      ValueError: on bad options; when called, if ``queries`` are not given or empty, or keys have
        no such axes.

    References:
      Feng et al., *Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for
      Efficient LLM Inference*, NeurIPS 2025, arXiv 2407.11550, Algorithms 1 and 2, and the
      authors' code, https://github.com/FFY0/AdaKV.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 2, 512, 16))
    >>> keys = keys * jnp.array([0.3, 3.0])[:, None, None]  # flat attention, and peaks
    >>> compressor = cj.budgets.adaptive(cj.baselines.top_attention())
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64, queries=queries)
    >>> coreset.keys.shape
    (2, 128, 16)
    >>> print((coreset.indices >= 0).sum(axis=-1))
    [ 21 101]
    """

    scale: ArrayLike | None = leaf(default=None)
    safeguard: float = 0.2
    num_sizes: int = 3
    needs_queries = True

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        super().validate()
        self.static_bounded("safeguard", most=1.0)

    @property
    def floor(self) -> float:
        """Smallest budget of a head, as a share of the mean."""
        return self.safeguard

    def shares(self, cache: Cache, size: int, smallest: Coreset) -> Float[Array, "*heads"]:
        """The budget of every head before it is rounded to a size."""
        del smallest
        axes, count = self.axes_of(cache.keys.shape[:-2]), cache.keys.shape[-2]
        samples = 0 if cache.queries is None else cache.queries.shape[-2]
        one_head = in_turns(_scores, min(samples * count, WEIGHTS))
        scores = for_each_head(one_head, cache, self.query_ball)
        found = count_largest(scores, axes, mean=size, most=count).astype(scores.dtype)
        return self.safeguard * size + (1 - self.safeguard) * found
