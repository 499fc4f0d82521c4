"""KVzip: the pairs that a reconstruction of the context looks up."""

from coreset_jax.budgets.looked_up import Division, KeepLookedUp


class kvzip(KeepLookedUp):  # noqa: N801
    r"""Keeps the pairs with the largest attention weight that any query gives them, and sinks.

    .. math::
       s_i = \max_q \frac{e^{\mathrm{scale}\langle q,k_i\rangle}}
                         {\sum_l e^{\mathrm{scale}\langle q,k_l\rangle}}, \qquad
       S = \{1, \dots, a\} \cup \{n - r + 1, \dots, n\} \cup \operatorname{top}_{m-a-r} s_i,
       \qquad w_i = 1

    with :math:`a` = ``sinks`` and :math:`r` = ``num_recent``. In the paper the queries are those
    of a reconstruction: the model is asked to repeat its context and reads it once more behind the
    full cache, in chunks, and a query's attention goes to the sinks, its own chunk of the cache
    and the text of the reconstruction itself. Such scores are given as ``scores``; without them
    the ``queries`` give the score, and each sees the whole cache and nothing else. Queries of all
    heads of a group count alike.

    With ``axes`` the pairs of largest score of all heads along them are kept: in the paper those
    of all layers and heads, ``(0, -1)`` for ``[layers, batch, heads, n, d]``. Without, every head
    keeps as many.

    Args:
      scale: the softmax scale, a scalar or ``[...]``; ``None`` means ``1/sqrt(d)``.
      axes: the leading axes of keys whose heads share a budget, none by default.
      max_multiple: with ``axes``, the most pairs that a head keeps, as a multiple of ``size``, at
        least 1; ``None`` means all of its pairs.
      sinks: the first pairs, which are kept, 0 or more, at most ``size`` of them.
      num_recent: the last pairs, which are kept, 0 or more; the authors' code keeps none.

    A compressor; see :class:`coreset_jax.Compressor`. It is query-informed and draws nothing.
    Without ``axes`` its coresets have ``size`` slots, and with them as many as the largest head
    may have: heads that keep fewer leave some empty. No more than ``size`` pairs a head are kept
    in the mean.

    Raises:
      ValueError: on bad options; when called, if ``queries`` are not given or empty, beside
        ``scores`` too, or keys have no such axes.

    References:
      Kim, Kim, Kwon, Lee, Yun, Song, *KVzip: Query-Agnostic KV Cache Compression with Context
      Reconstruction*, NeurIPS 2025, arXiv 2505.23416, Section 3; defaults are those of
      https://github.com/NVIDIA/kvpress, to which the authors' page points.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 4, 128, 16))
    >>> compressor = cj.baselines.kvzip(num_recent=2, axes=-1)
    >>> coreset = compressor(jax.random.key(1), keys, values, size=16, queries=queries)
    >>> coreset.keys.shape, int((coreset.indices >= 0).sum())
    ((4, 128, 16), 64)
    """

    num_recent: int = 0

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        super().validate()
        self.static_count("num_recent", 0)

    def division(self, size: int) -> Division:
        """What ``size`` slots are for: all for pairs that are kept."""
        sinks = min(self.sinks, size)
        return Division(size, 0, sinks, min(self.num_recent, size - sinks))
