"""The default: pivots that are moved, with weights and values fitted behind them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax import refit, validation
from coreset_jax.coreset import Compressor, Coreset
from coreset_jax.ends import check_share, with_ends
from coreset_jax.pivots import pivoted
from coreset_jax.problem import check_radius
from coreset_jax.stretches import stretch_count, stretched

# Sample queries are matched by so many pairs together: what one is given is taken from the others.
_MOST_MATCHED = 2048

# Of the pairs that are fitted together, so many are moved together: neighbours in a text are alike,
# and the passes over the cache that moves take are those of a stretch.
_MOST_MOVED = 256


@dataclasses.dataclass(frozen=True)
class _Moved:
    """What is done with the pairs between the ends; its weights do not sum to their number."""

    rho: ArrayLike | None
    query_norm: ArrayLike | None
    scale: float | None
    steps: int
    most: int

    def __call__(
        self,
        rng: Array,
        keys: Float[Array, "*heads n d"],
        values: Float[Array, "*heads n dv"],
        *,
        size: int,
        lengths: Int[Array, "*heads"] | None = None,
        queries: Float[Array, "*heads q d"] | None = None,
    ) -> Coreset:
        matched = queries is not None
        moved = min(self.most, _MOST_MOVED)
        count = keys.shape[-2]
        groups = stretch_count(size, _MOST_MATCHED) if matched and size < count else 1
        share, count = size // groups, -(-count // groups)
        stretches = stretch_count(share, self.most) if share < count else 1
        share, count = share // stretches, -(-count // stretches)
        parts = stretch_count(share, moved) if share < count else 1

        def of_each(radius: ArrayLike | None, *axes: int) -> ArrayLike | None:
            """A radius for all stretches, in the order in which they are cut."""
            if radius is None or jnp.ndim(radius) == 0:
                return radius
            cuts = [each for each in axes if each > 1]
            wide = jnp.reshape(jnp.asarray(radius), (*keys.shape[:-2], *(1 for _ in cuts)))
            return jnp.broadcast_to(wide, (*keys.shape[:-2], *cuts))

        def options(*axes: int) -> dict[str, Any]:
            return {
                "rho": of_each(self.rho, *axes),
                "query_norm": of_each(self.query_norm, *axes),
                "scale": self.scale,
            }

        radius = options(groups, stretches, parts)
        compressor = refit.relocation(pivoted(**radius), steps=self.steps, **radius)
        if parts > 1:
            compressor = stretched(compressor, most=moved)
            compressor = refit.relocation(compressor, steps=0, **options(groups, stretches))
        compressor = stretched(compressor, most=self.most)
        if matched:
            compressor = refit.matching(compressor, **options(groups))
            compressor = stretched(compressor, most=_MOST_MATCHED)
        return compressor(rng, keys, values, size=size, lengths=lengths, queries=queries)


@dataclasses.dataclass(frozen=True)
class _Fitted:
    moved: _Moved
    sinks: int
    recent: float

    def __call__(
        self,
        rng: Array,
        keys: Float[Array, "*heads n d"],
        values: Float[Array, "*heads n dv"],
        *,
        size: int,
        lengths: Int[Array, "*heads"] | None = None,
        queries: Float[Array, "*heads q d"] | None = None,
    ) -> Coreset:
        validation.check_cache(keys, values)
        validation.check_size(size)
        check_radius(keys, self.moved.rho, self.moved.query_norm, queries, self.moved.scale)
        compressor = with_ends(self.moved, sinks=self.sinks, recent=self.recent)
        coreset = compressor(rng, keys, values, size=size, lengths=lengths, queries=queries)
        return _standing_for(coreset, keys.shape[-2] if lengths is None else lengths)


@jax.jit
def _standing_for(coreset: Coreset, lengths: ArrayLike) -> Coreset:
    """The coreset with weights that sum to the length: attention sees no common factor."""
    total = jax.nn.logsumexp(coreset.log_weights, axis=-1)
    gain = jnp.log(jnp.asarray(lengths).astype(total.dtype)) - total
    return coreset._replace(log_weights=coreset.log_weights + gain[..., None])


def fitted(
    *,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    scale: float | None = None,
    steps: int = 3,
    most: int = 512,
    sinks: int = 4,
    recent: float = 0.25,
) -> Compressor:
    """What mostly errs least for its size: pivots, moved and refitted, and matched to samples.

    :func:`coreset_jax.pivots.pivoted` picks the keys, :func:`coreset_jax.refit.relocation` moves
    them and fits what stands behind them to the cache, and where sample queries are given
    :func:`coreset_jax.refit.matching` corrects that by what they hear. The sequence is cut into
    stretches for that (:func:`coreset_jax.stretches.stretched`): time is linear in the length, and
    neighbours in a text are alike, so that a fit of their own serves them better. Keys move 256 at
    a time, and what stands behind them is fitted ``most`` at a time.
    ``docs/selection.md`` and ``docs/leaderboard.md`` say what else was measured.

    The first and the last pairs of the cache are kept as they are
    (:func:`coreset_jax.ends.with_ends`), for what comes next asks most of them. Where pairs have no
    order, or a window is kept elsewhere, set ``sinks`` and ``recent`` to 0.

    Its coresets are no subsets: where pairs must be those of the cache,
    :func:`coreset_jax.compression.balanced` is the method.

    Args:
      rho: the radius of unit queries, a scalar or ``[...]``; see
        :func:`coreset_jax.compression.balanced`.
      query_norm: largest norm of a raw query instead, a scalar or ``[...]``. If neither is given,
        the call's sample ``queries`` decide, and without them ``sqrt(d)``.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      steps: of the relocation.
      most: pairs that are fitted together at most.
      sinks: the first pairs that are kept; of few slots no more than an eighth.
      recent: the share of the slots that goes to the last pairs.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor`. Weights of a head sum to its length; keys and
      values are in the dtype of the cache. Heads are worked through one after another: call it
      inside ``jax.shard_map`` where they are sharded.

    Raises:
      ValueError: on bad options here; when called, as :func:`coreset_jax.compression.balanced`.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 512, 16))
    >>> coreset = cj.fitted()(jax.random.key(1), keys, values, size=64)
    >>> coreset.keys.shape
    (4, 64, 16)
    """
    scale = validation.static_float("scale", scale)
    validation.check_count("steps", steps, 0)
    validation.check_count("most", most)
    validation.check_count("sinks", sinks, 0)
    moved = _Moved(rho, query_norm, scale, int(steps), int(most))
    return _Fitted(moved, int(sinks), check_share("recent", recent))
