r"""Compression to a size by repeated balanced halving: the paper's coreset as a program.

Each level halves the pairs and doubles the weight of those it keeps; its error is at most
:math:`2 D / m'` where it leaves :math:`m'` pairs and balances to a discrepancy :math:`D`, a
geometric series that the last level dominates.
(*Nearly Optimal Attention Coresets*, Theorem 4.)
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax import validation, walks
from coreset_jax.coreset import Compressor, Coreset, gather, over_heads, whole_cache
from coreset_jax.fields import ExactField, Field, LandmarkField, UnitPairs
from coreset_jax.geometry import balancing_geometry
from coreset_jax.halving import Level, halve
from coreset_jax.problem import check_radius, radii_of_heads, radius_arrays, reduce, unit_keys


class _Settings(NamedTuple):
    """What of a balanced compressor is fixed at compile time; see :func:`balanced`."""

    scale: float | None
    walk: walks.Walk
    block_size: int
    landmarks: int | None
    max_swaps: int
    passes: int
    ridge: float


class _Schedule(NamedTuple):
    """The halvings of a compression, the same for all heads; each entry is ``[levels]``.

    Attributes:
      threshold: pairs above which a head takes part.
      blocks: blocks to go through.
      passes: passes over the blocks.
    """

    threshold: Int[Array, " levels"]
    blocks: Int[Array, " levels"]
    passes: Int[Array, " levels"]


def _schedule(count: int, size: int, block_size: int, passes: int, *, ragged: bool) -> _Schedule:
    """The halvings from ``count`` pairs, or from any fewer if ``ragged``, to ``size``."""
    levels = (-(-count // size) - 1).bit_length()
    thresholds, blocks = [], []
    for remaining in range(levels, 0, -1):
        # A shorter head joins late, so that all heads do their last halving together.
        most = min(count, size << remaining) if ragged else count
        left = max(-(-most // 2), size)
        thresholds.append(size << (remaining - 1))
        blocks.append(-(-2 * (most - left) // block_size))
        count = count if ragged else left
    columns = (thresholds, blocks, [1] * (levels - 1) + [passes])
    return _Schedule(*(jnp.asarray(column, jnp.int32) for column in columns))


def _spare_heaviest(level: Level, halved: Int[Array, ""], norms: Float[Array, " n"]) -> Level:
    """The level with the pairs of largest norm moved behind the first ``halved``.

    They are the ones that a halving would hurt most.
    """
    places = jnp.zeros_like(level.indices) + jnp.arange(level.indices.shape[0], dtype=jnp.int32)
    inside = places < level.left
    weights = jnp.where(inside, norms[level.indices], jnp.inf)
    # Sorts that carry their payload: gathers by an order of places would lose the sharding.
    _, lightest_first = jax.lax.sort((weights, places), num_keys=1)
    _, ranks = jax.lax.sort((lightest_first, places), num_keys=1)
    spared = (ranks >= halved) | ~inside
    # Both groups stay in order: neighbours in the sequence are alike, and balance each other.
    groups = (spared.astype(jnp.int32), places, level.indices, level.doubled.astype(jnp.int32))
    _, _, indices, doubled = jax.lax.sort(groups, num_keys=2)
    return level._replace(indices=indices, doubled=doubled.astype(bool))


def _landmark_places(
    rng: Array, landmarks: int, count: int, length: Int[Array, ""]
) -> Int[Array, " l"]:
    """Random places, stratified over the sequence so that every stretch of it is known."""
    landmarks = min(landmarks, count)
    starts = jnp.arange(landmarks, dtype=jnp.float32)
    offsets = jax.random.uniform(rng, (landmarks,), jnp.float32)
    stride = length.astype(jnp.float32) / landmarks
    return jnp.minimum(((starts + offsets) * stride).astype(jnp.int32), length - 1)


def _compress_head(
    rng: Array,
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    length: Int[Array, ""],
    rho: Float[Array, ""] | None,
    query_norm: Float[Array, ""] | None,
    queries: Float[Array, "q d"] | None,
    kernel_radius: Float[Array, ""] | None,
    *,
    size: int,
    ragged: bool,
    settings: _Settings,
) -> Coreset:
    """The coreset of one head."""
    reduction = reduce(
        keys,
        values,
        rho=rho,
        query_norm=query_norm,
        queries=queries,
        scale=settings.scale,
        lengths=length if ragged else None,
    )
    count, dtype = keys.shape[0], reduction.rho.dtype
    geometry = balancing_geometry(reduction, kernel_radius)
    radius = geometry.radius
    landmark_rng, level_rng = jax.random.split(rng)
    block_size = min(settings.block_size, count + count % 2)
    schedule = _schedule(count, size, block_size, settings.passes, ragged=ragged)
    levels = schedule.blocks.shape[0]
    # Made from the keys, so that everything carried varies over the mesh axes that they do.
    places = jnp.zeros_like(keys[:, 0], jnp.int32) + jnp.arange(count, dtype=jnp.int32)

    def load(indices: Array, inside: Array) -> UnitPairs:
        # Read from the source block by block: no second copy of the cache in float32.
        zero = jnp.zeros((), dtype)
        return UnitPairs(
            jnp.where(inside[:, None], geometry.keys(keys[indices]), zero),
            jnp.where(inside[:, None], geometry.values(values[indices]), zero),
            indices,
        )

    def spare_heaviest(level: Level, halved: Array) -> Level:
        # By their true norms, that of the geometry's kernel without its reach.
        squares = jnp.sum(jnp.square(unit_keys(reduction, keys.astype(dtype))), axis=-1)
        masses = jnp.log1p(jnp.sum(jnp.square(geometry.values(values)), axis=-1))
        norms = radius / jnp.square(geometry.reach) * squares + masses
        return _spare_heaviest(level, halved, norms)

    def step(number: Array, level: Level) -> Level:
        threshold, blocks, passes = (column[number] for column in schedule)
        half = jnp.maximum((level.left + 1) // 2, size)
        target = jnp.where(level.left > threshold, half, level.left)
        # Only the last level can leave some of its pairs at their old weight.
        if ragged or count != size << levels:
            level = jax.lax.cond(
                number == levels - 1,
                lambda: spare_heaviest(level, 2 * (level.left - target)),
                lambda: level,
            )
        return halve(
            jax.random.fold_in(level_rng, number),
            level,
            load,
            target,
            blocks,
            passes,
            walk=settings.walk,
            block_size=block_size,
            max_swaps=settings.max_swaps,
        )

    field: Field
    if settings.landmarks is None:
        field = ExactField.empty(load(places, places < length), radius)
    else:
        spots = _landmark_places(landmark_rng, settings.landmarks, count, length)
        landmarks = load(spots, jnp.ones_like(spots, bool)).keys
        field = LandmarkField.empty(landmarks, radius, values.shape[-1], ridge=settings.ridge)
    level = Level(places, jnp.zeros_like(places, bool), length, field)
    level = jax.lax.fori_loop(0, levels, step, level)

    inside = jnp.arange(size) < level.left
    multiples = jnp.where(inside, 1 + level.doubled[:size].astype(jnp.int32), 0)
    indices = jnp.where(inside, level.indices[:size], count)
    indices, multiples = jax.lax.sort((indices, multiples), num_keys=1)
    # A balance that met a NaN (a radius, a sample query, a matrix that would not factor) or an
    # overflow picks signs all the same: its answer must not look like one.
    numbers = [reduction.key_radius, reduction.value_radius, radius, level.field]
    sound = (reduction.rho > 0) & (radius > 0)
    for number in jax.tree.leaves(numbers):
        sound &= jnp.all(jnp.isfinite(number))
    multiples = multiples.astype(dtype)
    log_weights = jnp.log(multiples) + jnp.log(length.astype(dtype) / jnp.sum(multiples))
    log_weights = jnp.where(sound, log_weights, jnp.nan)
    return gather(keys, values, jnp.where(indices < count, indices, -1), log_weights)


@functools.partial(jax.jit, static_argnames=("size", "settings"))
def _compress(
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    lengths: Int[Array, "*heads"] | None,
    rho: Array | None,
    query_norm: Array | None,
    queries: Float[Array, "*heads q d"] | None,
    kernel_radius: Array | None,
    *,
    size: int,
    settings: _Settings,
) -> Coreset:
    head = functools.partial(
        _compress_head, size=size, ragged=lengths is not None, settings=settings
    )
    rho, query_norm, kernel_radius = radii_of_heads(keys, values, rho, query_norm, kernel_radius)
    return over_heads(head, rng, keys, values, lengths, rho, query_norm, queries, kernel_radius)


@dataclasses.dataclass(frozen=True)
class _Balanced:
    rho: ArrayLike | None
    query_norm: ArrayLike | None
    kernel_radius: ArrayLike | None
    settings: _Settings

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
        check_radius(keys, self.rho, self.query_norm, queries, self.settings.scale)
        validation.check_positive("kernel_radius", self.kernel_radius, keys.shape[:-2])
        if size >= keys.shape[-2]:
            return whole_cache(keys, values, lengths)
        rho, query_norm, kernel_radius = radius_arrays(
            keys, values, self.rho, self.query_norm, self.kernel_radius
        )
        given = rho is not None or query_norm is not None
        return _compress(
            rng,
            keys,
            values,
            lengths,
            rho,
            query_norm,
            None if given else queries,
            kernel_radius,
            size=int(size),
            settings=self.settings,
        )


def balanced(
    *,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    scale: float | None = None,
    walk: walks.Walk = walks.greedy_pairs,
    kernel_radius: ArrayLike | None = None,
    block_size: int = 512,
    landmarks: int | None = 512,
    max_swaps: int = 256,
    passes: int = 2,
    ridge: float = 1e-4,
) -> Compressor:
    r"""Repeated halving of the whole cache by a balancing walk; the compressor of the paper.

    .. math::
       \sup_{\|q\|\le\rho} \|\mathrm{Attn}(q) - \mathrm{Attn}'(q)\|
         = O\!\left(\sqrt d\, e^{\rho + o(\rho)} / m\right)

    in the unit problem of :func:`coreset_jax.problem.reduce`. That bound is the theorem's, for a
    subgaussian walk in the kernel of radius ``rho``; the defaults are those that measured best,
    and are not proved (``docs/balancing.md``). Blocks of pairs are balanced in
    order, each against the field of everything before it, in its own level and in the levels
    before (:mod:`coreset_jax.halving`). Time is linear in ``n``, and memory above the inputs
    a few numbers a pair and a few ``block_size x block_size`` matrices a head.

    Args:
      rho: the radius of unit queries, a scalar or ``[...]``.
      query_norm: largest norm of a raw query instead, a scalar or ``[...]``. If neither is given,
        the call's sample ``queries`` decide, and without them ``sqrt(d)``.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      walk: a function of :mod:`coreset_jax.walks`, or any of the same signature. It is part of
        the compiled program's identity: pass a module-level function, not a fresh lambda.
      kernel_radius: the geometry of the balance, a scalar or ``[...]``; ``None`` means
        :func:`coreset_jax.geometry.default_kernel_radius`.
      block_size: pairs in a block, even.
      landmarks: landmark keys that represent the field; ``None`` means the exact field, which
        takes :math:`n^2` products and a float32 copy of the cache.
      max_swaps: swaps that may refine a block after its walk; 0 leaves the walk's signs alone.
      passes: passes over the blocks of the last level, each further one a refinement by swaps.
      ridge: regularisation of the landmarks' Gram matrix, relative to its diagonal.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` ``(rng, keys [..., n, d], values [..., n, dv], *,
      size, lengths=None, queries=None) -> Coreset``. Any float dtype and any ``n`` and ``size``;
      ``size >= n`` returns the cache itself. Each kept pair stands for as many as its weight
      says, and the weights of a head sum to its length. A head with a NaN or an infinity among
      its pairs gets NaN log-weights. Sharded heads stay where they are; on a mesh of Explicit
      axes call it inside ``jax.shard_map``.

    Raises:
      ValueError: on bad options here; on ill-fitting shapes, a ``size`` below 1, ``lengths``
        outside ``1..n`` or a radius that is not positive when called, before any tracing.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Theorems 3 to 5.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 512, 16))
    >>> compressor = cj.balanced(query_norm=4.0)
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64)
    >>> coreset.keys.shape
    (4, 64, 16)
    >>> print(jnp.exp(coreset.log_weights).sum(axis=-1).round(3))
    [512. 512. 512. 512.]
    """
    scale = validation.static_float("scale", scale)
    ridge = validation.static_float("ridge", ridge)
    validation.check_count("block_size", block_size, 2)
    validation.check_count("max_swaps", max_swaps, 0)
    validation.check_count("passes", passes)
    if landmarks is not None:
        validation.check_count("landmarks", landmarks)
    if block_size % 2:
        raise ValueError(f"block_size must be even, got {block_size}.")
    if not callable(walk):
        raise ValueError(f"walk must be a function of coreset_jax.walks, got {walk!r}.")
    settings = _Settings(scale, walk, block_size, landmarks, max_swaps, passes, ridge)
    return _Balanced(rho, query_norm, kernel_radius, settings)
