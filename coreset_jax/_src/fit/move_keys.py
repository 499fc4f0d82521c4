r"""Keys, weights and values of a coreset moved to where they answer best.

What a coreset of :math:`m` pairs can do is not tied to the keys of the cache. The error in the
kernel of a fit,

.. math:: \Bigl\| \sum_i a_i\, \psi(k_i) - \sum_s Y_s\, \psi(x_s) \Bigr\|^2, \qquad
          \langle \psi(k), \psi(x) \rangle = e^{-\|k - x\|^2 / 2},

with :math:`a_i` the coefficients ``[values, 1]`` of a pair, is quadratic in :math:`Y` and smooth in
the :math:`x`. A few steps of Gauss and Newton in the keys, each with the best :math:`Y` behind
them, take a third off the error of attention.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.fit.coefficients import (
    BLOCK,
    MOST_KEPT,
    LeastMasses,
    Source,
    blocks_of,
    fit_with_least_masses,
    project_onto,
)
from coreset_jax._src.fit.newton import descend
from coreset_jax._src.fit.pivots import alone_in_head, log_importance
from coreset_jax._src.geometry.kernel_geometry import Geometry, fitting_geometry

# No key stands for less than this part of a pair.
_LEAST_WEIGHT = 0.1

# No value lies further out than so many times the farthest of the cache.
_FARTHEST_VALUE = 4.0


class _Problem(NamedTuple):
    """What is to be fitted, and the keys that it starts from.

    Attributes:
      source: the pairs to be fitted.
      places: places in the head of the coreset's pairs ``[m]``; beyond it for empty slots.
      still: heavy pairs that were kept, which stay what they are ``[m]``.
      free: the others ``[m]``.
      centers: the coreset's keys, scaled ``[m, d]``.
      coefficients: weight times ``[value, 1]`` of each of these pairs ``[m, dv + 1]``.
    """

    source: Source
    places: Int[Array, " m"]
    still: Bool[Array, " m"]
    free: Bool[Array, " m"]
    centers: Float[Array, "m d"]
    coefficients: Float[Array, "m dv1"]


def _problem(
    head: Head, coreset: Coreset, geometry: Geometry, alone: Bool[Array, " m"] | None
) -> _Problem:
    held = jnp.isfinite(coreset.log_weights)
    places = jnp.where(held & (coreset.indices >= 0), coreset.indices, head.count)
    # Heavy pairs that were kept stay what they are, and nothing else has to answer for them.
    if alone is None:
        # Which pairs are heavy is a choice, and has no derivative.
        fixed, around = jax.lax.stop_gradient((head, geometry))
        importance = log_importance(around, fixed.keys, fixed.values, fixed.inside)
        heavy = alone_in_head(fixed, importance, coreset.indices.shape[0])
        alone = heavy[jnp.minimum(places, head.count - 1)]
    still = (places < head.count) & alone
    free = held & ~still
    fitted = head.inside.at[jnp.where(still, places, head.count)].set(False, mode="drop")
    masses = jnp.exp(jnp.where(fitted, head.log_masses, -jnp.inf))
    coefficients = masses[:, None] * geometry.coefficients(head.values)
    centers = jnp.where(free[:, None], geometry.scaled(coreset.keys), 0)
    log_masses = coreset.log_weights.astype(head.dtype) + geometry.log_lift(centers)
    masses = jnp.exp(jnp.where(free, log_masses, -jnp.inf))
    return _Problem(
        blocks_of(geometry.scaled(head.keys), coefficients, geometry.level),
        places,
        still,
        free,
        centers,
        masses[:, None] * geometry.coefficients(coreset.values),
    )


def move_and_fit(
    head: Head,
    coreset: Coreset,
    info: Info,
    kernel_radius: Float[Array, ""] | None,
    *,
    steps: int,
    alone: Bool[Array, " m"] | None = None,
    last_fit: bool = True,
) -> tuple[Coreset, Info]:
    """A coreset with its keys moved, and weights and values fitted behind them.

    Where that does not lessen the error in the kernel, the coreset is returned as it was.

    Args:
      head: the head.
      coreset: what is to be improved; its weights are positive.
      info: what has happened before.
      kernel_radius: the radius of the kernel on unit keys; ``None`` for the default.
      steps: steps of the keys, static; with 0 only keys beyond the reach of the geometry move.
      alone: which pairs of the coreset stand for themselves alone and stay what they are; ``None``
        for those that are heavy.
      last_fit: whether weights and values are fitted after the last step, static. Without that fit
        they belong to the keys before the step, and the caller has to fit them again. At least one
        step is needed then.
    """
    geometry = fitting_geometry(head.standardization, kernel_radius)
    problem = _problem(head, coreset, geometry, alone)
    source, free, centers = problem.source, problem.free, problem.centers
    before: Array | None = None
    if steps:
        state = descend(source, centers, problem.coefficients, free, steps)
        centers, last, before = state.centers, state.fit, state.captured
    keys = geometry.restore_scaled(centers).astype(coreset.keys.dtype)
    if last_fit and keys.dtype != head.dtype:
        # Fitted for where the rounded keys lie.
        centers = jnp.where(free[:, None], geometry.scaled(keys), 0)
    log_lifts = geometry.log_lift(centers)

    # Coefficients are lowered to those of the exponential kernel again. Masses are held above zero,
    # and above what would take a value far out of the range of all others.
    floors = _LEAST_WEIGHT * jnp.exp(log_lifts)
    least = LeastMasses(floors, 1 / (_FARTHEST_VALUE * geometry.value_gain))

    if last_fit:
        last = project_onto(source, centers, free)
        before = last.captured(problem.coefficients) if before is None else before
        last, masses = fit_with_least_masses(last, free, least)
    else:
        masses = jnp.maximum(last.coefficients[:, -1], least.of(last.coefficients))
        masses = jnp.where(free, masses, 0)
    divisors = jnp.where(free, masses, 1)
    values = geometry.restore_values(last.coefficients[:, :-1] / divisors[:, None])
    values = values.astype(coreset.values.dtype)
    rows = jnp.minimum(problem.places, head.count - 1)
    log_weights = jnp.where(free, jnp.log(divisors) - log_lifts, head.log_masses[rows])

    assert before is not None
    # What is judged is what is returned, rounded.
    after = jnp.where(free[:, None], masses[:, None] * geometry.coefficients(values), 0)
    improved = last.captured(after) > before
    better = improved & (jnp.sum(free | problem.still) < head.length)
    moved, stay = better & free, better & problem.still
    errors = {}
    if head.measured:
        energy = source.energy()
        captured = jnp.where(better, last.captured(after), before)
        errors = {
            "kernel_energy": energy,
            "kernel_error_before": jnp.maximum(energy - before, 0),
            "kernel_error_after": jnp.maximum(energy - captured, 0),
        }
    if alone is None:
        # A compressor may have kept a heavy pair with another key or value.
        coreset = coreset._replace(
            keys=jnp.where(stay[:, None], head.keys[rows], coreset.keys),
            values=jnp.where(stay[:, None], head.values[rows], coreset.values),
        )
    return coreset._replace(
        keys=jnp.where(moved[:, None], keys, coreset.keys),
        values=jnp.where(moved[:, None], values, coreset.values),
        log_weights=jnp.where(
            moved | stay, log_weights.astype(coreset.log_weights.dtype), coreset.log_weights
        ),
    ), info.with_fit(improved, **errors)


def workspace(count: int, size: int) -> int:
    """Numbers that a fit of ``size`` keys to ``count`` pairs holds."""
    kept = size * count if size * count <= MOST_KEPT else 0
    return size * max(size, min(count, BLOCK)) + 2 * kept
