"""The default: pivots that are moved, with weights and values fitted behind them."""

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from coreset_jax import refit
from coreset_jax._src import checks
from coreset_jax._src.core.compressor import Compressor, leaf
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.fit.move_keys import move_and_fit
from coreset_jax._src.fit.pivots import candidate_count, select_pivots
from coreset_jax.combinators import chunk_count, chunked, keep_ends

# Slots of a chunk whose weights and values are matched to the sample queries together.
_MATCHED_TOGETHER = 2048


class pivoted(Compressor):  # noqa: N801
    r"""Heavy pairs, and pivots of a randomly pivoted Cholesky factor among the others.

    Use it inside a refit, such as :class:`coreset_jax.refit.move_keys`. Alone it has a large error:
    all pivots have the same weight, and they are no random sample of the pairs.

    Heavy pairs would be worth a slot each even if every other slot were shared evenly among the
    rest; they are kept in any case. The others are pivots, drawn with probability in proportion to
    what those before them leave of a pair, times its importance, from ``3 * size`` candidates, or
    768 if that is more, which are themselves drawn in proportion to importance to the power 3/4.
    Time grows with the cube of the pivots, and memory beside the cache is a factor of ``candidates
    * size`` numbers: for more than some hundred pivots use :class:`coreset_jax.chunked`.

    Args:
      rho: the radius of unit queries, a scalar or ``[...]``; see :class:`coreset_jax.balanced`.
      query_norm: largest norm of a raw query instead. If neither is given, the call's sample
        ``queries`` decide, and without them ``sqrt(d)``.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      kernel_radius: the kernel on unit keys in which pivots stand apart, a scalar or ``[...]``;
        ``None`` for the one that measured best.

    A compressor; see :class:`coreset_jax.Compressor`. Heavy pairs have weight one; the weights of
    a head sum to its length.

    Raises:
      ValueError: on bad options.

    References:
      Chen, Epperly, Tropp, Webber, *Randomly pivoted Cholesky*, 2023, arXiv 2207.06503.
      Schröder, Mackey, *WildCat*, 2026, arXiv 2602.10056, for pivots of a cache.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 512, 16))
    >>> coreset = cj.pivoted()(jax.random.key(1), keys, values, size=64)
    >>> coreset.keys.shape
    (4, 64, 16)
    """

    rho: ArrayLike | None = leaf(default=None)
    query_norm: ArrayLike | None = leaf(default=None)
    scale: ArrayLike | None = leaf(default=None)
    kernel_radius: Any = leaf(default=None)
    of_products = True

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Selects heavy pairs and pivots."""
        return select_pivots(head, size, self.kernel_radius)

    def workspace(self, count: int, size: int, width: int) -> int:
        """The factor, and the candidates."""
        candidates = candidate_count(count, size)
        return candidates * (size + width)


class _move_pivots(refit.move_keys):  # noqa: N801
    """Pivots with their keys moved; the heavy ones, with weights of their own, stay as they are."""

    last_fit: bool = True

    def fit_head(self, head: Head, coreset: Coreset, info: Info) -> tuple[Coreset, Info]:
        own = head.log_masses[jnp.minimum(coreset.indices, head.count - 1)]
        return move_and_fit(
            head,
            coreset,
            info,
            self.kernel_radius,
            steps=self.newton_steps,
            alone=coreset.log_weights == own,
            last_fit=self.last_fit,
        )


class _fitted_together(Compressor):  # noqa: N801
    """Pairs that are fitted together: pivots, moved a part at a time."""

    newton_steps: int = 3
    moved_together: int = 256
    composite = True

    def fills(self, size: int) -> bool:
        return self._stages(size).fills(size)

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        return self._stages(size).on_head(head, size)

    def _stages(self, size: int) -> Compressor:
        steps = self.newton_steps
        selected: Compressor = pivoted()
        if chunk_count(size, self.moved_together) == 1:
            return _move_pivots(selected, newton_steps=steps)
        if steps:
            selected = _move_pivots(selected, newton_steps=steps, last_fit=False)
        return _move_pivots(chunked(selected, chunk_size=self.moved_together), newton_steps=0)


class fitted(Compressor):  # noqa: N801
    """Usually the lowest error at a given size: pivots, moved and refitted, and matched to samples.

    The sequence is cut into chunks, so that time is linear in the length; and neighbors in a text
    are alike, so that a fit of their own serves them better. The stages, each on chunks of its own:

    1. of ``moved_together`` slots: :class:`pivoted` selects keys, and Gauss-Newton steps move them;
    2. of ``chunk_size`` slots: weights and values are fitted behind all keys of the chunk
       (:class:`coreset_jax.refit.move_keys` without steps);
    3. of 2048 slots, if there are sample queries: :class:`coreset_jax.refit.matching` corrects
       weights and values for them, where those held back say that this is better.

    Keys may have a long bias in a pair of channels that rotary positions turn, as those of Qwen 2.5
    do, or be wide in channels where samples do not look: such channels count as about as wide as
    the others.

    The first and the last pairs of the cache stay what they are (:class:`coreset_jax.keep_ends`):
    later queries attend mostly to these. Where pairs have no order, or a window is kept elsewhere,
    set ``sinks`` and ``recent_fraction`` to 0. Its coresets are no subsets: where pairs must be
    those of the cache, :class:`coreset_jax.balanced` is the method. ``docs/selection.md`` and
    ``docs/leaderboard.md`` say what else was measured.

    Args:
      rho: the radius of unit queries, a scalar or ``[...]``; see :class:`coreset_jax.balanced`.
      query_norm: largest norm of a raw query instead, a scalar or ``[...]``. If neither is given,
        the call's sample ``queries`` decide, and without them ``sqrt(d)``.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      newton_steps: steps of the keys.
      chunk_size: most pairs that are fitted together.
      moved_together: most pairs whose keys are selected and moved together. Neighbors in a text are
        alike, and the passes over the cache that moves take are those of a chunk.
      sinks: the first pairs that are kept; of few slots no more than an eighth.
      recent_fraction: the share of the slots that goes to the last pairs, at least 0 and below 1.
      soft_cap: the cap of scores, for the fit to sample queries, see
        :class:`coreset_jax.refit.matching`.

    A compressor; see :class:`coreset_jax.Compressor`. Weights say how many pairs of the cache a
    pair stands for, as they were fitted: they sum to the length only as well as the fit.

    Raises:
      ValueError: on bad options.

    References:
      Chen, Epperly, Tropp, Webber, *Randomly pivoted Cholesky*, 2023, arXiv 2207.06503, and
      Schröder, Mackey, *WildCat*, 2026, arXiv 2602.10056, for the keys to begin with;
      Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284,
      for fits to sample queries.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 512, 16))
    >>> coreset = cj.fitted()(jax.random.key(1), keys, values, size=64)
    >>> coreset.keys.shape
    (4, 64, 16)
    """

    rho: ArrayLike | None = leaf(default=None)
    query_norm: ArrayLike | None = leaf(default=None)
    scale: ArrayLike | None = leaf(default=None)
    newton_steps: int = 3
    chunk_size: int = 512
    moved_together: int = 256
    sinks: int = 4
    recent_fraction: float = 0.125
    soft_cap: float | None = None
    keeps_pairs = False
    composite = True

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_count("newton_steps", 0)
        self.static_count("chunk_size")
        self.static_count("moved_together")
        self.static_count("sinks", 0)
        fraction = checks.static_part("recent_fraction", self.recent_fraction)
        object.__setattr__(self, "recent_fraction", fraction)
        object.__setattr__(self, "soft_cap", checks.static_float("soft_cap", self.soft_cap))

    @property
    def reads_queries(self) -> bool:
        """Weights and values are matched to them."""
        return True

    def fills(self, size: int) -> bool:
        """Whether slots divide evenly among the chunks, with sample queries and without."""
        return all(self._stages(matched).fills(size) for matched in (False, True))

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Select, move, fit and match between the ends."""
        return self._stages(head.queries is not None).on_head(head, size)

    def _stages(self, matched: bool) -> Compressor:
        stages: Compressor = _fitted_together(
            newton_steps=self.newton_steps, moved_together=self.moved_together
        )
        stages = chunked(stages, chunk_size=self.chunk_size)
        if matched:
            matching = refit.matching(stages, soft_cap=self.soft_cap)
            stages = chunked(matching, chunk_size=_MATCHED_TOGETHER)
        return keep_ends(stages, sinks=self.sinks, recent_fraction=self.recent_fraction)
