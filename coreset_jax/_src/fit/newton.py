r"""Keys on their way to where a fit is better: steps of Gauss and Newton.

A step moves every key by itself, with the coefficients behind the keys held.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coreset_jax._src.fit.coefficients import Fit, Source, fit_coefficients, project_onto, seen_by
from coreset_jax._src.precision import matmul, root

# What is added to the curvature of a step, as a share of its mean; how much of a step is that of
# the one before; and how far it may go, in units of the kernel's width.
_DAMPING = 0.1
_MOMENTUM = 0.4
_LONGEST_STEP = 0.5


def newton_step(
    source: Source, centers: Float[Array, "m d"], free: Bool[Array, " m"], fit: Fit
) -> Float[Array, "m d"]:
    r"""A step of Gauss and Newton for every key by itself.

    .. math:: \delta_s = \frac{\sum_i G_{si} \langle Y_s, a_i\rangle (k_i - x_s)
              - \sum_t G_{st} \langle Y_s, Y_t\rangle (x_t - x_s)}{\|Y_s\|^2 + \mathrm{damping}}

    Keys near one another would both go where one of them is missed: steps are damped, and no longer
    than half of the kernel's width. Moments and kernel of the fit are those of the source and of
    these keys; its coefficients may be any.
    """

    def pull(keys: Array, coefficients: Array, kernel: Array) -> Array:
        return matmul(kernel * matmul(fit.coefficients, coefficients.T), keys)

    def add(total: Array, each: tuple[Source, Array | None]) -> tuple[Array, None]:
        block, seen = each
        seen = seen_by(centers, block) if seen is None else seen
        return total + pull(block.keys, block.coefficients, seen), None

    # What is not free has coefficients of zero, and neither pulls nor is pulled.
    total, _ = jax.lax.scan(add, jnp.zeros_like(centers), (source, fit.seen))
    total -= pull(centers, fit.coefficients, fit.kernel)
    # All forces together: what the fit leaves of the moments, which is little.
    left = fit.moments - matmul(fit.kernel, fit.coefficients)
    total -= jnp.sum(fit.coefficients * left, axis=-1, keepdims=True) * centers
    curvature = jnp.sum(jnp.square(fit.coefficients), axis=-1)
    mean = jnp.sum(curvature) / jnp.maximum(jnp.sum(free), 1).astype(curvature.dtype)
    curvature += _DAMPING * mean + jnp.finfo(curvature.dtype).tiny
    step = total / curvature[:, None]
    length = root(jnp.sum(jnp.square(step), axis=-1, keepdims=True))
    return step * jnp.minimum(1, _LONGEST_STEP / jnp.maximum(length, _LONGEST_STEP))


class GaussNewtonState(NamedTuple):
    """Keys on their way, and the last fit behind them.

    Attributes:
      centers: the keys ``[m, d]``.
      velocity: their last step ``[m, d]``.
      fit: the coefficients behind where they were before it; without the kernel with the source.
      captured: how much of the source was explained at the start, see :meth:`Fit.captured`.
    """

    centers: Float[Array, "m d"]
    velocity: Float[Array, "m d"]
    fit: Fit
    captured: Float[Array, ""]


def descend(
    source: Source,
    centers: Float[Array, "m d"],
    coefficients: Float[Array, "m c"],
    free: Bool[Array, " m"],
    steps: int,
) -> GaussNewtonState:
    """Keys after some steps, with a fit before each.

    Args:
      source: the cache.
      centers: the keys to begin with ``[m, d]``.
      coefficients: the coefficients of these keys before any fit ``[m, c]``.
      free: which of them move ``[m]``.
      steps: how many, static, at least one.
    """

    def advance(number: Array, state: GaussNewtonState) -> GaussNewtonState:
        fit = fit_coefficients(project_onto(source, state.centers, free, keep=True), free)
        captured = jnp.where(number == 0, fit.captured(coefficients), state.captured)
        step = newton_step(source, state.centers, free, fit)
        velocity = _MOMENTUM * state.velocity + (1 - _MOMENTUM) * step
        # A fit that failed moves nothing.
        velocity = jnp.where(free[:, None] & jnp.isfinite(velocity), velocity, 0)
        fit = fit._replace(seen=None)
        return GaussNewtonState(state.centers + velocity, velocity, fit, captured)

    size = centers.shape[0]
    nothing = jnp.zeros_like(coefficients)
    fit = Fit(jnp.zeros_like(centers, shape=(size, size)), nothing, nothing, None)
    start = GaussNewtonState(centers, jnp.zeros_like(centers), fit, nothing[0, 0])
    return jax.lax.fori_loop(0, steps, advance, start)
