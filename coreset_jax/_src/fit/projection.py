r"""Projection: weights, or weights and values, that fit a coreset's keys to the whole cache.

A coreset is a measure on few keys that should act like that of the whole cache. For given keys the
best weights and values are a linear least squares problem: the error in the kernel
:math:`E_{kl} = e^{r\langle k, l\rangle}` is quadratic in them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.geometry.kernel_geometry import balancing_geometry
from coreset_jax._src.geometry.kernels import exponential_kernel
from coreset_jax._src.geometry.solves import regularized_solve
from coreset_jax._src.precision import matmul

# The kernel of a fit is half as sharp as that of a balance: what it cannot see it leaves alone.
_KERNEL_RADIUS = 0.5

# No weight falls below this share of what it was: pairs may fade, and never change sides.
_LEAST_WEIGHT = 0.1


def project(
    head: Head,
    coreset: Coreset,
    info: Info,
    kernel_radius: Float[Array, ""] | None,
    *,
    ridge: float,
    fit_values: bool,
) -> tuple[Coreset, Info]:
    """The coreset with weights, and perhaps values, that are the projection of the head.

    Where that does not lessen the error in the kernel, the coreset is returned as it was.

    Args:
      head: the head.
      coreset: what is to be improved; its weights are positive.
      info: what has happened before.
      kernel_radius: the radius of the kernel on unit keys; ``None`` for the default.
      ridge: regularization relative to the mean of the diagonal, static.
      fit_values: whether values are fitted too, static.
    """
    geometry = balancing_geometry(head.standardization, kernel_radius)
    if kernel_radius is None:
        geometry = geometry._replace(radius=_KERNEL_RADIUS * geometry.radius)
    dtype = head.dtype
    held = jnp.isfinite(coreset.log_weights)
    centers = jnp.where(held[:, None], geometry.keys(coreset.keys), 0)
    weights = jnp.where(held, jnp.exp(coreset.log_weights.astype(dtype)), 0)

    # Numerator and denominator, in the proportion in which a balance counts them.
    source = geometry.coefficients(head.values) * head.inside[:, None].astype(dtype)
    behind = geometry.coefficients(coreset.values)
    before = weights[:, None] * behind
    kernel = exponential_kernel(centers, centers, geometry.radius)
    kernel = jnp.where(held[:, None] & held[None], kernel, 0)
    missing = geometry.moments(centers, head.keys, source) - matmul(kernel, before)
    # Empty slots keep a matrix that can be solved.
    solvable = kernel + jnp.diag(jnp.where(held, 0, 1).astype(dtype))
    if fit_values:
        missing = jnp.where(held[:, None], missing, 0)
        after = before + regularized_solve(solvable, missing, ridge)
        masses = jnp.maximum(after[:, -1], _LEAST_WEIGHT * weights)
        after = after.at[:, -1].set(masses)
        values = geometry.restore_values(after[:, :-1] / jnp.where(held, masses, 1)[:, None])
    else:
        # The features of a pair are those of its key times those of its value and one.
        gap = jnp.where(held, jnp.sum(missing * behind, axis=-1), 0)
        gram = kernel * matmul(behind, behind.T) + (solvable - kernel)
        change = regularized_solve(gram, gap[:, None], ridge)[:, 0]
        masses = jnp.maximum(weights + change, _LEAST_WEIGHT * weights)
        after = masses[:, None] * behind
        values = coreset.values

    # Rounding, the ridge and the least weight may have made of the best fit a bad one; and where
    # nothing was dropped there is nothing to mend.
    change = after - before
    gained = jnp.sum(change * (2 * missing - matmul(kernel, change)))
    improved = gained > 0
    taken = improved & (jnp.sum(held) < head.length) & held
    values = jnp.where(taken[:, None], values.astype(coreset.values.dtype), coreset.values)
    log_weights = jnp.log(jnp.where(held, masses, 1)).astype(coreset.log_weights.dtype)
    return coreset._replace(
        values=values, log_weights=jnp.where(taken, log_weights, coreset.log_weights)
    ), info.with_fit(improved)
