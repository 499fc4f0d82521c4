r"""Compression to a size by repeated balanced halving: the paper's coreset as a program.

Each level halves the pairs and doubles the weight of those it keeps; its error is at most
:math:`2 D / m'` where it leaves :math:`m'` pairs and balances to a discrepancy :math:`D`, a
geometric series that the last level dominates.
(*Nearly Optimal Attention Coresets*, Theorem 4.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax._src.balance.fields import ExactField, Field, LandmarkField, UnitPairs
from coreset_jax._src.balance.halving import Level, halve
from coreset_jax._src.balance.walks import Walk
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.geometry.kernel_geometry import balancing_geometry


class HalvingOptions(NamedTuple):
    """The static options of :class:`coreset_jax.balanced`; see there."""

    walk: Walk
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


def halve_repeatedly(
    head: Head,
    size: int,
    kernel_radius: Float[Array, ""] | None,
    options: HalvingOptions,
) -> tuple[Coreset, Info]:
    """Halves the pairs of a head until ``size`` are left, the heaviest of them last.

    Args:
      head: the head.
      size: pairs to keep, static.
      kernel_radius: the radius of the kernel on unit keys; ``None`` for the default.
      options: what is static.
    """
    geometry = balancing_geometry(head.standardization, kernel_radius)
    radius, count, dtype = geometry.radius, head.count, head.dtype
    keys, values, length = head.keys, head.values, head.length
    landmark_rng, level_rng = jax.random.split(head.key)
    block_size = min(options.block_size, count + count % 2)
    schedule = _schedule(count, size, block_size, options.passes, ragged=head.ragged)
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
        masses = jnp.log1p(jnp.sum(jnp.square(geometry.values(values)), axis=-1))
        return _spare_heaviest(level, halved, radius * geometry.true_squares(keys) + masses)

    def step(number: Array, level: Level) -> Level:
        threshold, blocks, passes = (column[number] for column in schedule)
        half = jnp.maximum((level.left + 1) // 2, size)
        target = jnp.where(level.left > threshold, half, level.left)
        # Only the last level can leave some of its pairs at their old weight.
        if head.ragged or count != size << levels:
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
            walk=options.walk,
            block_size=block_size,
            max_swaps=options.max_swaps,
        )

    field: Field
    if options.landmarks is None:
        field = ExactField.empty(load(places, places < length), radius)
    else:
        spots = _landmark_places(landmark_rng, options.landmarks, count, length)
        landmarks = load(spots, jnp.ones_like(spots, bool)).keys
        field = LandmarkField.empty(landmarks, radius, values.shape[-1], ridge=options.ridge)
    level = Level(places, jnp.zeros_like(places, bool), length, field)
    level = jax.lax.fori_loop(0, levels, step, level)

    inside = jnp.arange(size) < level.left
    multiples = jnp.where(inside, 1 + level.doubled[:size].astype(jnp.int32), 0)
    indices = jnp.where(inside, level.indices[:size], count)
    indices, multiples = jax.lax.sort((indices, multiples), num_keys=1)
    # A balance that met a NaN (a radius, a sample query, a matrix that would not factor) or an
    # overflow picks signs all the same: its answer must not look like one.
    numbers = [radius, level.field]
    sound = (head.standardization.rho > 0) & (radius > 0)
    for number in jax.tree.leaves(numbers):
        sound &= jnp.all(jnp.isfinite(number))
    multiples = multiples.astype(dtype)
    log_weights = jnp.log(multiples) + jnp.log(length.astype(dtype) / jnp.sum(multiples))
    log_weights = jnp.where(sound, log_weights, jnp.nan)
    info = Info(
        kernel_radius=radius / jnp.square(geometry.reach),
        rounds=jnp.sum(schedule.threshold < length, dtype=jnp.int32),
    )
    return head.pairs(indices, log_weights), info
