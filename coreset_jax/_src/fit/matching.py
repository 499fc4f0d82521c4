r"""Matching: weights and values fitted to the attention of sample queries over the whole cache.

Samples alone do not say enough: with no more of them than pairs, a fit answers them exactly and
nothing else. What a fit in the kernel put behind the keys says the rest, and
:func:`correct_to_queries` corrects it by what the samples miss. The last eighth of them is held
back, and judges whether the correction is taken.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.fit.query_targets import (
    evaluate,
    held_back,
    matched_log_weights,
    matched_values,
    unless_worse,
)
from coreset_jax._src.geometry.kernel_geometry import fitting_geometry
from coreset_jax._src.geometry.kernels import gaussian_kernel
from coreset_jax._src.geometry.solves import one_by_one
from coreset_jax._src.precision import matmul

# The ridge of a correction, in roundings of the largest eigenvalue (at most the largest sum of a
# row).
_ROUNDINGS = 64

# No weight falls below this share of the mean, or of what it was where that was less: pairs that
# stand for themselves alone may stay as light as they are.
_LEAST_WEIGHT = 0.1

# Largest logarithm of the norm of a feature, above that at the root mean square.
_MOST_LIFT = 30.0


def correct(
    normal: Float[Array, "m m"],
    shares: Float[Array, "q m"],
    unit: Float[Array, ""],
    outputs: Float[Array, "q c"],
    coefficients: Float[Array, "m c1"],
    least: Float[Array, " m"],
) -> Float[Array, "m c1"]:
    r"""Coefficients with a denominator nearer to one, and the numerator that goes with it.

    .. math::
       w' = \max\bigl(\mathrm{least},\; w + N^{-1} P^T (1 - P w)\bigr), \qquad
       U' = U + N^{-1} P^T \bigl( (P w') \cdot Y - P U \bigr)

    for coefficients :math:`[U, w]`. Where no weights bring the denominator to one, the numerator is
    still fitted to make the right ratio with it.

    Args:
      normal: :math:`N`, positive definite ``[m, m]``.
      shares: :math:`P`, in any unit ``[q, m]``.
      unit: what a share of one is in that unit.
      outputs: :math:`Y`, ``[q, c]``.
      coefficients: numerator, and denominator last ``[m, c + 1]``.
      least: what no weight may fall below ``[m]``.

    Returns:
      The coefficients ``[m, c + 1]``; NaN where ``normal`` is not positive definite to rounding.
    """
    factor = jax.scipy.linalg.cho_factor(normal)

    def change(missing: Array) -> Array:
        return jax.scipy.linalg.cho_solve(factor, matmul(shares.T, missing))

    shown = matmul(shares, coefficients)
    weights = coefficients[:, -1:] + change(unit - shown[:, -1:])
    weights = jnp.maximum(weights, least[:, None])
    masses = matmul(shares, weights)
    numerator = coefficients[:, :-1] + change(masses * outputs - shown[:, :-1])
    return jnp.concatenate([numerator, weights], axis=-1)


def correct_to_queries(
    head: Head,
    coreset: Coreset,
    info: Info,
    kernel_radius: Float[Array, ""] | None,
    *,
    strength: float,
    soft_cap: float | None = None,
) -> tuple[Coreset, Info]:
    """A coreset corrected by what sample queries miss; see :class:`coreset_jax.refit.matching`.

    Args:
      head: a head with sample queries.
      coreset: what is to be corrected; its weights are positive.
      info: what has happened before.
      kernel_radius: the radius of the kernel on unit keys; ``None`` for the default.
      strength: how much a change in the kernel counts beside the samples, static.
      soft_cap: the cap of the samples' scores, static, see :func:`coreset_jax.attention`.
    """
    geometry = fitting_geometry(head.standardization, kernel_radius)
    dtype = head.dtype
    held = jnp.isfinite(coreset.log_weights)
    count = jnp.sum(held).astype(dtype)
    centers = jnp.where(held[:, None], geometry.scaled(coreset.keys), 0)
    weights = jnp.where(held, jnp.exp(coreset.log_weights.astype(dtype)), 0)

    # Features of norm one: their norms go into the coefficients, and out of the shares. Keys far
    # out count as what they are, or the shares of the heaviest would be all that the trace sees.
    norms = geometry.radius * geometry.true_squares(coreset.keys) / 2 - geometry.level
    lift = jnp.where(held, jnp.minimum(norms, _MOST_LIFT), 0)
    heights = jnp.exp(lift)[:, None]
    coefficients = heights * weights[:, None] * geometry.coefficients(coreset.values)
    targets = evaluate(head, coreset.keys, held, soft_cap)
    unseen = held_back(targets.queries.shape[0])
    if np.all(unseen):
        # Nothing is left to fit to.
        return unless_worse(targets, head, coreset, info, coreset.values, coreset.log_weights)
    totals = targets.cache.maximum + jnp.log(targets.cache.total)
    shares = targets.scores - totals[:, None] - lift[None]
    # In the unit in which their squares sum to the number of pairs, as those of the kernel's
    # diagonal do.
    top = jnp.max(shares)
    shares = jnp.where(unseen[:, None], 0, jnp.exp(shares - top))
    unit = jnp.sqrt(count / jnp.sum(jnp.square(shares)))
    shares = unit * shares
    unit *= jnp.exp(-top)

    # Attention does not see a common factor: the one with which the mass is the cache's.
    shown = matmul(shares, coefficients[:, -1])
    common = unit * jnp.sum(shown) / jnp.sum(jnp.square(shown))
    coefficients, weights = common * coefficients, common * weights
    kernel = jnp.where(held[:, None] & held[None], gaussian_kernel(centers, centers), 0)
    normal = matmul(shares.T, shares) + strength * kernel
    ridge = _ROUNDINGS * jnp.finfo(dtype).eps * jnp.max(jnp.sum(normal, axis=-1))
    # Empty slots keep a matrix that can be solved.
    normal += jnp.diag(jnp.where(held, ridge, 1).astype(dtype))
    outputs = geometry.value_gain * targets.outputs()
    least = _LEAST_WEIGHT * jnp.minimum(weights, jnp.sum(weights) / count)
    after = one_by_one(correct)(normal, shares, unit, outputs, coefficients, heights[:, 0] * least)

    masses = jnp.where(held, after[:, -1], 1)
    log_weights = jnp.where(held, jnp.log(masses) - lift, -jnp.inf)
    chosen = geometry.restore_values(after[:, :-1] / masses[:, None])
    return unless_worse(targets, head, coreset, info, chosen, log_weights, unseen=unseen)


def match_to_queries(
    head: Head,
    coreset: Coreset,
    info: Info,
    *,
    ridge: float,
    bound: float,
    gradient_steps: int,
) -> tuple[Coreset, Info]:
    """A coreset with weights and values fitted to the samples alone.

    Args:
      head: a head with sample queries.
      coreset: whose keys are kept.
      info: what has happened before.
      ridge: regularization of the values, relative to the largest eigenvalue, static.
      bound: largest absolute log-weight, static.
      gradient_steps: gradient steps behind the least squares for the weights, static.
    """
    held = jnp.isfinite(coreset.log_weights)
    targets = evaluate(head, coreset.keys, held)
    log_weights = matched_log_weights(
        jnp.exp(targets.scores - targets.cache.maximum[:, None]),
        targets.cache.total,
        bound=bound,
        gradient_steps=gradient_steps,
    )
    # An empty slot has a score that leaves nothing of its weight.
    shares = jax.nn.softmax(targets.scores + log_weights[None], axis=-1)
    outputs = head.standardization.restore_values(targets.outputs())
    values = matched_values(shares, outputs, ridge=ridge)
    return unless_worse(targets, head, coreset, info, values, log_weights)
