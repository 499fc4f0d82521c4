"""The method for caches with sample queries: what they look up, and few pairs for all the rest."""

import jax.numpy as jnp

from coreset_jax._src import checks
from coreset_jax._src.core.coreset import Coreset, ascending, concatenated
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.fit.pivots import candidate_count
from coreset_jax._src.fit.represent import represent
from coreset_jax.budgets.looked_up import Division, KeepLookedUp

# Slots for every sink: of a few, sinks would leave nothing for all the rest.
_SLOTS_A_SINK = 8

# Samples that memory is planned for; how many there are is not known before a call.
_SAMPLES = 1024


class attended(KeepLookedUp):  # noqa: N801
    r"""Keeps the pairs that sample queries look up, and fits a few to all the rest.

    A pair is looked up if some query :math:`q` gives it much of its attention:

    .. math:: s_i = \max_q \frac{e^{\mathrm{scale}\langle q,k_i\rangle}}
                               {\sum_l e^{\mathrm{scale}\langle q,k_l\rangle}}

    Such pairs answer single questions, and nothing can stand for them. Those of largest score take
    ``kept_fraction`` of the slots, each with weight one, and beside them the first and the last
    pairs of the cache, which later queries attend to whatever they ask. The other slots hold pivots
    for all pairs that are left: they are drawn where the samples' attention tells pairs apart, and
    weights and values behind them are fitted to its outputs.

    With ``axes`` the slots for what is looked up are one budget for all heads along them, spent
    where scores are largest: heads of a pretrained model differ by far in how many they need.

    Args:
      scale: the softmax scale, a scalar or ``[...]``; ``None`` means ``1/sqrt(d)``.
      kept_fraction: the share of the slots for pairs that are kept, at least 0 and below 1.
      axes: the leading axes of keys whose heads share a budget, none by default; with ``(0, -1)``
        the heads of all layers of ``[layers, batch, heads, n, d]``.
      max_multiple: with ``axes``, the most pairs that a head keeps, as a multiple of ``size``, at
        least 1; ``None`` means all of its pairs.
      sinks: the first pairs, which are kept; of few slots no more than an eighth.
      recent_fraction: the share of the slots for the last pairs, which are kept, at least 0 and at
        most ``kept_fraction``.

    A compressor; see :class:`coreset_jax.Compressor`. It wants sample ``queries`` when called, like
    those that will come (:mod:`coreset_jax.queries`); with ``scores`` those are not searched for
    what is looked up. Without ``axes`` its coresets have ``size`` slots, and with them as many as
    the largest head may have: heads that keep fewer leave some empty. No more than ``size`` pairs
    a head are kept in the mean.

    Raises:
      ValueError: on bad options; when called, if ``queries`` are not given or empty, or keys have
        no such axes.

    References:
      Kim, Kim, Kwon, Lee, Yun, Song, *KVzip: Query-Agnostic KV Cache Compression with Context
      Reconstruction*, 2025, arXiv 2505.23416, for the score and for one budget over all heads;
      Chen, Epperly, Tropp, Webber, *Randomly pivoted Cholesky*, 2023, arXiv 2207.06503, for pivots;
      Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284,
      for fits to samples.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 4, 512, 16))
    >>> compressor = cj.attended(axes=0)
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64, queries=queries)
    >>> int((coreset.indices >= 0).sum())
    256
    """

    kept_fraction: float = 0.75
    recent_fraction: float = 1 / 32
    keeps_pairs = False
    of_products = True

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        super().validate()
        for name in ("kept_fraction", "recent_fraction"):
            object.__setattr__(self, name, checks.static_part(name, getattr(self, name)))
        if self.recent_fraction > self.kept_fraction:
            raise ValueError(
                "recent_fraction must be at most kept_fraction, got "
                f"{self.recent_fraction:g} and {self.kept_fraction:g}."
            )

    def workspace(self, count: int, size: int, width: int) -> int:
        """Shares of the pivots' candidates, their kernel, and a block of scores."""
        candidates = candidate_count(count, size)
        return _SAMPLES * candidates + candidates * candidates + count * width

    def division(self, size: int) -> Division:
        """What ``size`` slots are for: at least one is for all that is not kept."""
        kept = min(round(self.kept_fraction * size), size - 1)
        sinks = min(self.sinks, size // _SLOTS_A_SINK, kept)
        recent = min(int(self.recent_fraction * size), kept - sinks)
        return Division(kept, size - kept, sinks, recent)

    @staticmethod
    def with_rest(head: Head, kept: Coreset, rest: int) -> tuple[Coreset, Info]:
        """The pairs that are kept, and pivots that are fitted to all others."""
        places = jnp.where(kept.indices < 0, head.count, kept.indices)
        left = head.inside.at[places].set(False, mode="drop")
        pivots, info = represent(head, left, rest)
        slots = kept.indices.shape[0] + rest
        return ascending(concatenated([kept, pivots], slots)), info
