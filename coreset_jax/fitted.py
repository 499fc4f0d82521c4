"""The default: pivots that are moved, with weights and values fitted behind them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax import refit, validation
from coreset_jax.attention import accumulation_dtype
from coreset_jax.coreset import Compressor, Coreset
from coreset_jax.ends import with_ends
from coreset_jax.pivots import pivoted
from coreset_jax.problem import check_radius, reduce
from coreset_jax.refit.relocate import moves
from coreset_jax.stretches import stretch_count, stretched

# Sample queries are matched by so many pairs together: what one is given is taken from the others.
_MOST_MATCHED = 2048

# Of the pairs that are fitted together, so many are moved together: neighbours in a text are alike,
# and the passes over the cache that moves take are those of a stretch.
_MOST_MOVED = 256


@dataclasses.dataclass(frozen=True)
class _Moved:
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
                "query_norm": of_each(self.query_norm, *axes),
                "scale": self.scale,
            }

        radius = options(groups, stretches, parts)
        if parts > 1:
            compressor = moves(pivoted(**radius), steps=self.steps, **radius)
            compressor = stretched(compressor, most=moved)
            compressor = refit.relocation(compressor, steps=0, **options(groups, stretches))
        else:
            compressor = refit.relocation(pivoted(**radius), steps=self.steps, **radius)
        compressor = stretched(compressor, most=self.most)
        if matched:
            compressor = refit.matching(compressor, **options(groups))
            compressor = stretched(compressor, most=_MOST_MATCHED)
        return compressor(rng, keys, values, size=size, lengths=lengths, queries=queries)


def moved_pairs(
    *,
    query_norm: ArrayLike | None = None,
    scale: float | None = None,
    steps: int = 3,
    most: int = 512,
) -> Compressor:
    """What :func:`fitted` does with the pairs between the ends.

    Weights are those of the fit, and sum to the number of pairs only as well as it fits: they can
    stand beside pairs of weight one. Options are those of :func:`fitted`, unchecked.
    """
    return _Moved(query_norm, scale, steps, most)


@functools.partial(jax.jit, static_argnames="scale")
def _query_norms(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    rho: Float[Array, "*heads"],
    lengths: Int[Array, "*heads"],
    *,
    scale: float | None,
) -> Float[Array, "*heads"]:
    """Norms of raw queries that have these radii in the whole cache: its parts have other units."""

    def one_head(keys: Array, values: Array, rho: Array, length: Array) -> Array:
        reduction = reduce(keys, values, rho=rho, scale=scale, lengths=length)
        norm = reduction.rho / (reduction.scale * reduction.key_radius)
        # A head with a NaN says so elsewhere.
        return jnp.where(jnp.isfinite(norm) & (norm > 0), norm, jnp.ones_like(norm))

    for _ in keys.shape[:-2]:
        one_head = jax.vmap(one_head)
    return one_head(keys, values, rho, lengths)


@dataclasses.dataclass(frozen=True)
class _Fitted:
    rho: ArrayLike | None
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
        validation.check_lengths(lengths, keys)
        moved = self.moved
        check_radius(keys, self.rho, moved.query_norm, queries, moved.scale)
        if self.rho is not None:
            leading, count = keys.shape[:-2], keys.shape[-2]
            rho = jnp.asarray(self.rho, accumulation_dtype(keys, values))
            counts = jnp.asarray(count if lengths is None else lengths).astype(jnp.int32)
            of_heads = (jnp.broadcast_to(each, leading) for each in (rho, counts))
            norms = _query_norms(keys, values, *of_heads, scale=moved.scale)
            moved = dataclasses.replace(moved, query_norm=norms)
        compressor = with_ends(moved, sinks=self.sinks, recent=self.recent)
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
    recent: float = 0.125,
) -> Compressor:
    """What mostly errs least for its size: pivots, moved and refitted, and matched to samples.

    :func:`coreset_jax.pivots.pivoted` picks the keys, :func:`coreset_jax.refit.relocation` moves
    them and fits what stands behind them to the cache, and where sample queries are given
    :func:`coreset_jax.refit.matching` corrects that by what they hear. The sequence is cut into
    stretches for that (:func:`coreset_jax.stretches.stretched`): time is linear in the length, and
    neighbours in a text are alike, so that a fit of their own serves them better. Keys move 256 at
    a time, and what stands behind them is fitted ``most`` at a time.
    ``docs/selection.md`` and ``docs/leaderboard.md`` say what else was measured.

    The first and the last pairs of the cache stay what they are
    (:func:`coreset_jax.ends.with_ends`), but for the factor that all weights are given to sum to
    the length: what comes next asks most of them. Where pairs have no order, or a window is kept
    elsewhere, set ``sinks`` and ``recent`` to 0.

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
      recent: the part of the slots that goes to the last pairs, at least 0 and below 1.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor`. Weights of a head sum to its length; keys and
      values are in the dtype of the cache. Heads are worked through one after another: call it
      inside ``jax.shard_map`` where they are sharded.

    Raises:
      ValueError: on bad options here; when called, as :func:`coreset_jax.compression.balanced`.

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
    scale = validation.static_float("scale", scale)
    validation.check_count("steps", steps, 0)
    validation.check_count("most", most)
    validation.check_count("sinks", sinks, 0)
    recent = validation.static_part("recent", recent)
    return _Fitted(rho, _Moved(query_norm, scale, int(steps), int(most)), int(sinks), recent)
