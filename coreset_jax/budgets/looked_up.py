"""What methods share that keep the pairs that queries look up, under one budget for many heads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax._src.core.compressor import Compressor, leaf
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.driver import Cache, coresets_of, for_each_head
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.core.turns import in_turns
from coreset_jax._src.queries import scores
from coreset_jax.budgets.split import check_axes, count_largest, resolve_axes


class Division(NamedTuple):
    """What the slots of a head are for, all static.

    Attributes:
      kept: pairs of largest score, in the mean over the heads that share a budget; both ends among
        them.
      rest: slots of every head for all other pairs.
      sinks: first pairs that are kept whatever their score.
      recent: last pairs that are kept likewise.
    """

    kept: int
    rest: int
    sinks: int
    recent: int


class KeepLookedUp(Compressor):
    """Keeps the pairs that some query gives most attention, and the first and last ones.

    A head of a budget that is shared may keep up to ``max_multiple`` times its mean share; ``None``
    means all of its pairs.
    """

    scale: ArrayLike | None = leaf(default=None)
    axes: int | tuple[int, ...] = ()
    max_multiple: float | None = None
    sinks: int = 4
    needs_queries = True

    def division(self, size: int) -> Division:
        """What ``size`` slots are for; for subclasses to define."""
        raise NotImplementedError

    @staticmethod
    def with_rest(head: Head, kept: Coreset, rest: int) -> tuple[Coreset, Info]:
        """The coreset of a head with the pairs that it keeps; for subclasses to add to.

        Args:
          head: the head.
          kept: the pairs, some slots of which may be empty.
          rest: slots for all others, static.
        """
        del head, rest
        return kept, Info()

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        if self.max_multiple is not None:
            self.static_float("max_multiple")
            if self.max_multiple < 1:
                raise ValueError(f"max_multiple must be at least 1, got {self.max_multiple:g}.")
        self.static_count("sinks", 0)
        axes = self.axes if self.axes == () else check_axes("axes", self.axes)
        object.__setattr__(self, "axes", axes)

    @property
    def reads_scores(self) -> bool:
        """Whether scores of the pairs change what it returns."""
        return True

    def check_call(self, keys: Any, size: int, queries: Any) -> None:
        """Raises ``ValueError`` unless a call can be answered."""
        super().check_call(keys, size, queries)
        if self.axes:
            resolve_axes("axes", check_axes("axes", self.axes), keys.shape[:-2])

    def fills(self, size: int) -> bool:
        """Whether no slot is empty: only without a budget that heads share."""
        return not self.axes

    def workspace(self, count: int, size: int, width: int) -> int:
        """Attention weights of a block of samples, and the keys in the dtype of sums."""
        return scores.workspace(count, width)

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Keeps what queries look up in this head.

        Raises:
          ValueError: heads share a budget, and something around this asks for one by itself.
        """
        if self.axes:
            raise ValueError(
                f"{type(self).__name__} with axes {self.axes} divides a budget among heads and "
                "cannot compress one by itself: put it outermost, or leave out its axes."
            )
        division = self.division(size)
        found = with_ends(lookup_scores(head), head.length, division)
        kept = head.largest(found, division.kept)
        return _if_sound(head, found, self.with_rest(head, kept, division.rest))

    def on_heads(self, cache: Cache, size: int) -> tuple[Coreset, Info]:
        """Shares a budget among the heads, and spends what each has of it."""
        count = cache.keys.shape[-2]
        if size >= count or not self.axes:
            return super().on_heads(cache, size)
        division, with_rest = self.division(size), self.with_rest
        most = count - division.rest
        if self.max_multiple is not None:
            most = min(int(self.max_multiple * division.kept), most)
        samples = 0 if cache.queries is None else cache.queries.shape[-2]
        score = in_turns(lookup_scores, min(samples * count, scores.WEIGHTS))
        found = for_each_head(score, cache, self.query_ball)
        found = with_ends(found, cache.counts, division)
        axes = resolve_axes("axes", check_axes("axes", self.axes), found.shape[:-1])
        budgets = count_largest(found, axes, mean=division.kept, most=most)

        def compress(head: Head, found: Array, budget: Array) -> tuple[Coreset, Info]:
            kept = head.largest(found, most, budget)
            return _if_sound(head, found, with_rest(head, kept, division.rest))

        width = cache.keys.shape[-1] + cache.values.shape[-1]
        turns = in_turns(compress, self.workspace(count, size, width), of_products=self.of_products)
        return coresets_of(turns, cache, self.query_ball, False, found, budgets)


def lookup_scores(head: Head) -> Float[Array, " n"]:
    """The largest attention weight of each pair ``[n]``, given or found from the samples.

    Minus infinity for padding, and for what is not a number: a head that is not finite has no part
    in a budget that heads share.
    """
    # Scores choose, and a choice has no derivative.
    head = jax.lax.stop_gradient(head)
    found = head.scores
    if found is None:
        assert head.queries is not None
        found = scores.largest_attention(head, head.queries)
    found = found.astype(head.dtype)
    limits = jnp.finfo(head.dtype)
    finite = jnp.clip(found, limits.min, limits.max)
    return jnp.where(head.inside & ~jnp.isnan(found), finite, -jnp.inf)


def _if_sound(
    head: Head, found: Float[Array, " n"], result: tuple[Coreset, Info]
) -> tuple[Coreset, Info]:
    """The coreset of a head, with NaN weights if a score of its pairs is not a number."""
    coreset, info = result
    sound = jnp.all(~head.inside | (found > -jnp.inf))
    log_weights = jnp.where(sound, coreset.log_weights, jnp.nan)
    return coreset._replace(log_weights=log_weights), info


def with_ends(
    found: Float[Array, "*heads n"], lengths: Int[Array, "*heads"], division: Division
) -> Float[Array, "*heads n"]:
    """Scores as they are, and for the pairs at both ends more than any other.

    Args:
      found: scores ``[..., n]``, minus infinity for padding.
      lengths: valid pairs of each head ``[...]``.
      division: how many pairs there are at the ends.
    """
    places, lengths = jnp.arange(found.shape[-1]), lengths[..., None]
    ends = (places < division.sinks) | (places >= lengths - division.recent)
    # Finite: what is infinite has no part in a budget.
    return jnp.where(ends & (places < lengths), jnp.finfo(found.dtype).max, found)
