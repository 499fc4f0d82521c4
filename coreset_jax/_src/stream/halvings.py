"""One halving of the lightest pairs of a summary: by a walk with feedback, or by a compressor."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax._src import checks
from coreset_jax._src.balance.walks import swap_refinement
from coreset_jax._src.core.compressor import Compressor
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.scale import shared_scale
from coreset_jax._src.geometry.kernel_geometry import Geometry
from coreset_jax._src.geometry.kernels import exponential_kernel, simultaneous_gram
from coreset_jax._src.precision import matmul
from coreset_jax._src.stream.sketch import LEVELS, Pairs, Settings, Sketch

Halving = tuple[Int[Array, " b"], Float[Array, " b"], Int[Array, ""]]
"""Places of the pairs looked at, the change of their weights, and their weight class."""


def check_compressor(compressor: Any) -> None:
    """Raises ``ValueError`` unless a compressor can halve blocks of a stream; ``None`` passes."""
    if compressor is None:
        return
    if not isinstance(compressor, Compressor):
        raise ValueError(f"compressor must be a Compressor, got {compressor!r}.")
    if compressor.signed:
        reason = "it returns signed coresets, and weights of a stream are positive"
    elif compressor.needs_queries:
        reason = "it needs sample queries, and a stream has none"
    elif any(map(checks.is_traced, jax.tree.leaves(compressor))):
        reason = "its options are traced, and those of a stream are fixed at compile time"
    else:
        return
    raise ValueError(f"compressor {type(compressor).__name__} cannot continue a stream: {reason}.")


def check_heads(
    compressor: Compressor | None, leading: tuple[int, ...], block_size: int, width: int
) -> None:
    """Raises ``ValueError`` unless a compressor can halve blocks of all heads; ``None`` passes."""
    if compressor is not None:
        block = jax.ShapeDtypeStruct((*leading, block_size, width), jnp.float32)
        compressor.check_call(block, block_size // 2, None)


def stream_scale(scale: float | None, compressor: Compressor | None) -> float | None:
    """The softmax scale of a stream: its own, or else its compressor's; ``None`` for the default.

    Raises ``ValueError`` if the two differ, or that of the compressor is not one number.
    """
    theirs = None if compressor is None else compressor.coreset_scale
    shared: Any = shared_scale("a stream and its compressor", scale, theirs)
    if shared is None:
        return None
    if jnp.ndim(shared):
        raise ValueError(f"scale must be one number for all heads of a stream, got {shared}.")
    return float(shared)


def options_of_heads(
    compressor: Compressor | None, like: Float[Array, "*heads"]
) -> Compressor | None:
    """The compressor with its array options as one number a head, sharded as ``like``."""

    def of_heads(option: Array) -> Array:
        return jnp.zeros_like(like) + jnp.broadcast_to(jnp.asarray(option, like.dtype), like.shape)

    return jax.tree.map(of_heads, compressor)


def halve(
    rng: Array, pairs: Pairs, sketch: Sketch, geometry: Geometry, settings: Settings
) -> Halving:
    """Halves some of the lightest pairs, by the compressor if there is one, or by the walk."""
    if settings.compressor is None:
        return _halve_by_walk(rng, pairs, sketch, geometry, settings)
    return _halve_by_compressor(rng, pairs, settings.compressor, settings)


def _levels(weights: Float[Array, " s"]) -> Int[Array, " s"]:
    """The class of each weight: the nearest power of two; ``LEVELS`` for an empty slot."""
    logarithms = jnp.log2(jnp.where(weights > 0, weights, 1))
    levels = jnp.clip(jnp.round(logarithms).astype(jnp.int32), 0, LEVELS - 1)
    return jnp.where(weights > 0, levels, LEVELS)


def _halve_by_walk(
    rng: Array, pairs: Pairs, sketch: Sketch, geometry: Geometry, settings: Settings
) -> Halving:
    """Halves the oldest pairs of the lightest class that has two."""
    width = min(settings.block_size, pairs.weights.shape[0])
    levels = _levels(pairs.weights)
    populations = jnp.sum(levels[:, None] == jnp.arange(LEVELS)[None], axis=0)
    level = jnp.argmax(populations >= 2)
    # Where every class has at most one pair, the two lightest of all are halved.
    lonely = populations[level] < 2
    count = jnp.where(lonely, 2, jnp.minimum(populations[level] // 2 * 2, width // 2 * 2))
    group = jnp.where(lonely, levels, (levels != level).astype(jnp.int32))
    places = jnp.lexsort((pairs.positions, group))[:width]
    taken = jnp.arange(width) < count

    weights = jnp.where(taken, pairs.weights[places], 0)
    mean = jnp.sum(weights) / count.astype(weights.dtype)
    # The vectors to be balanced are the weighted ones; within a class weights are nearly equal.
    shares = weights / mean
    keys = jnp.where(taken[:, None], geometry.keys(pairs.keys[places]), 0)
    values = jnp.where(taken[:, None], geometry.values(pairs.values[places]), 0)
    gram = simultaneous_gram(keys, values, keys, values, geometry.radius, 0.0)
    gram = shares[:, None] * gram * shares[None]
    # The pull of the sketch, in the units of the Gram matrix and of a pair's weight.
    standardization, mass = geometry.standardization, sketch.coefficients[:, -1:]
    centered = sketch.coefficients[:, :-1] - mass * standardization.value_center[None]
    unit = geometry.value_gain * centered / standardization.value_radius
    kernel = exponential_kernel(keys, geometry.keys(sketch.landmarks), geometry.radius)
    pulls = matmul(kernel, jnp.concatenate([unit, mass], axis=-1) / mean)
    pull = shares * (jnp.sum(pulls[:, :-1] * values, axis=-1) + pulls[:, -1]) / 2
    signs = settings.walk(rng, gram, pull, count)
    if settings.max_swaps:
        signs = swap_refinement(gram, pull, signs, max_swaps=settings.max_swaps)

    kept = jnp.where(taken & (signs > 0), weights, 0)
    kept = kept * (jnp.sum(weights) / jnp.sum(kept))
    level = jnp.where(lonely, levels[places[0]], level)
    return places, kept - weights, level


def _halve_by_compressor(
    rng: Array, pairs: Pairs, compressor: Compressor, settings: Settings
) -> Halving:
    """Halves a block of the lightest pairs by a compressor, which does not see their weights.

    Of what it returns only places and weights count: the pairs kept are those of the block.
    """
    levels, block_size = _levels(pairs.weights), settings.block_size
    places = jnp.lexsort((pairs.positions, levels))[:block_size]
    head = Head.prepare(
        rng,
        jnp.zeros_like(places[0]),
        pairs.keys[places],
        pairs.values[places],
        jnp.full_like(places[0], block_size),
        None,
        ragged=False,
        **compressor.query_ball.at_scale(settings.scale)._asdict(),
    )
    coreset, _ = compressor.on_head(head, block_size // 2)
    multiples = jnp.exp(coreset.log_weights).astype(pairs.weights.dtype)
    chosen = jnp.where(coreset.indices < 0, block_size, coreset.indices)
    weights = pairs.weights[places]
    kept = jnp.zeros_like(weights).at[chosen].set(multiples, mode="drop") * weights
    kept = kept * (jnp.sum(weights) / jnp.sum(kept))
    return places, kept - weights, jnp.min(levels)
