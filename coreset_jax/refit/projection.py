r"""Projection: weights, or weights and values, that fit a coreset's keys to the whole cache.

A coreset is a measure on few keys that should act like that of the whole cache. Which keys it has
is one choice; what stands behind them is another, and a linear one: the error in the kernel
:math:`E_{kl} = e^{r\langle k, l\rangle}` is quadratic in it, and has a smallest value.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.coreset import Compressor, Coreset
from coreset_jax.geometry import Geometry, balancing_geometry
from coreset_jax.kernels import exponential_kernel, regularized_solve
from coreset_jax.problem import reduce
from coreset_jax.refit.wrapper import refitted

HIGHEST = jax.lax.Precision.HIGHEST

# The kernel of a fit is half as sharp as that of a balance: what it cannot see it leaves alone.
_KERNEL_RADIUS = 0.5

# No weight falls below this share of what it was: pairs may fade, and never change sides.
_LEAST_WEIGHT = 0.1


class _Settings(NamedTuple):
    """What of a refit is fixed at compile time."""

    scale: float | None
    ridge: float
    values: bool


def _refit_head(
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    length: Int[Array, ""],
    coreset: Coreset,
    rho: Float[Array, ""] | None,
    query_norm: Float[Array, ""] | None,
    queries: Float[Array, "q d"] | None,
    kernel_radius: Float[Array, ""] | None,
    *,
    settings: _Settings,
) -> Coreset:
    """The coreset of one head with other weights, and other values if the settings say so."""
    count = keys.shape[0]
    inside = jnp.arange(count) < length
    # Padding may hold anything.
    keys = jnp.where(inside[:, None], keys, jnp.zeros_like(keys))
    values = jnp.where(inside[:, None], values, jnp.zeros_like(values))
    reduction = reduce(
        keys,
        values,
        rho=rho,
        query_norm=query_norm,
        queries=queries,
        scale=settings.scale,
        lengths=length,
    )
    geometry = balancing_geometry(reduction, kernel_radius)
    if kernel_radius is None:
        geometry = geometry._replace(radius=_KERNEL_RADIUS * geometry.radius)
    dtype = reduction.rho.dtype
    held = jnp.isfinite(coreset.log_weights)
    marks = jnp.where(held[:, None], geometry.keys(coreset.keys), 0)
    weights = jnp.where(held, jnp.exp(coreset.log_weights.astype(dtype)), 0)

    # Numerator and denominator, in the proportion in which a balance counts them.
    source = columns_of(geometry, values) * inside[:, None].astype(dtype)
    columns = columns_of(geometry, coreset.values)
    before = weights[:, None] * columns
    kernel = exponential_kernel(marks, marks, geometry.radius)
    kernel = jnp.where(held[:, None] & held[None], kernel, 0)
    missing = geometry.moments(marks, keys, source) - jnp.matmul(kernel, before, precision=HIGHEST)
    # Empty slots keep a matrix that can be solved.
    solvable = kernel + jnp.diag(jnp.where(held, 0, 1).astype(dtype))
    if settings.values:
        missing = jnp.where(held[:, None], missing, 0)
        after = before + regularized_solve(solvable, missing, settings.ridge)
        masses = jnp.maximum(after[:, -1], _LEAST_WEIGHT * weights)
        after = after.at[:, -1].set(masses)
        fitted = geometry.restore_values(after[:, :-1] / jnp.where(held, masses, 1)[:, None])
    else:
        # The features of a pair are those of its key times those of its value and one.
        products = jnp.matmul(columns, columns.T, precision=HIGHEST)
        gap = jnp.where(held, jnp.sum(missing * columns, axis=-1), 0)
        gram = kernel * products + (solvable - kernel)
        change = regularized_solve(gram, gap[:, None], settings.ridge)[:, 0]
        masses = jnp.maximum(weights + change, _LEAST_WEIGHT * weights)
        after = masses[:, None] * columns
        fitted = coreset.values

    # Rounding, the ridge and the least weight may have made of the best fit a bad one; and where
    # nothing was dropped there is nothing to mend.
    change = after - before
    gained = jnp.sum(change * (2 * missing - jnp.matmul(kernel, change, precision=HIGHEST)))
    better = (gained > 0) & (jnp.sum(held) < length)
    dtypes = coreset.values.dtype, coreset.log_weights.dtype
    held_better = better & held
    return coreset._replace(
        values=jnp.where(held_better[:, None], fitted.astype(dtypes[0]), coreset.values),
        log_weights=jnp.where(held_better, jnp.log(masses).astype(dtypes[1]), coreset.log_weights),
    )


def columns_of(geometry: Geometry, values: Float[Array, "n dv"]) -> Float[Array, "n dv1"]:
    """``[values, 1]`` in the geometry."""
    scaled = geometry.values(values)
    return jnp.concatenate([scaled, jnp.ones_like(scaled[:, :1])], axis=-1)


def _matrix(count: int, size: int) -> int:
    """Entries of the Gram matrix of the kept keys."""
    del count
    return size**2


def _refitted(
    compressor: Compressor,
    rho: ArrayLike | None,
    query_norm: ArrayLike | None,
    scale: float | None,
    kernel_radius: ArrayLike | None,
    ridge: float,
    *,
    values: bool,
) -> Compressor:
    settings = _Settings(
        validation.static_float("scale", scale), validation.static_float("ridge", ridge), values
    )
    return refitted(
        compressor,
        _refit_head,
        settings,
        _matrix,
        rho=rho,
        query_norm=query_norm,
        kernel_radius=kernel_radius,
        scale=scale,
    )


def nystrom(
    compressor: Compressor,
    *,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    scale: float | None = None,
    kernel_radius: ArrayLike | None = None,
    ridge: float = 1e-2,
) -> Compressor:
    r"""Refits weights and values behind the keys that a compressor keeps.

    .. math::
       [w'_s v'_s,\; w'_s] = [w_s v_s,\; w_s] +
         (E_{SS} + \lambda I)^{-1} \left( E_{SN} [V, 1] - E_{SS} [w_s v_s,\; w_s] \right)

    the projection of the whole cache onto the kept keys, in the kernel
    :math:`E_{kl} = e^{r\langle k,l\rangle}` of unit keys, for numerator and denominator. The ridge
    draws it to what the compressor had, and weights stay positive: at least a tenth of what
    they were. Where all this does not lessen the error in the kernel, the coreset is returned as it
    was. Time is that of a pass of :math:`n m` kernel values and of one Cholesky factor a head;
    memory a few ``m x m`` matrices for as many heads as fit at a time.

    Args:
      compressor: what picks the keys; any that returns positive weights.
      rho: the radius of unit queries, a scalar or ``[...]``; see
        :func:`coreset_jax.compression.balanced`.
      query_norm: largest norm of a raw query instead. If neither is given, the call's sample
        ``queries`` decide, and without them ``sqrt(d)``.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      kernel_radius: :math:`r`, a scalar or ``[...]``; ``None`` means half of
        :func:`coreset_jax.geometry.default_kernel_radius`.
      ridge: :math:`\lambda`, relative to the mean of the diagonal. A larger one stays nearer to
        what the compressor had.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor`. Kept keys are the compressor's, bit by bit; values
      are not the source's any more, and weights need not sum to the length.

    Raises:
      ValueError: on bad options here; when called, as ``compressor`` does, and if it returns
        normalizers.

    References:
      Schröder, Mackey, *WildCat*, 2026 (arXiv 2602.10056), for Nyström values behind kept keys.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> compressor = cj.refit.nystrom(cj.balanced())
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64)
    >>> coreset.values.shape
    (64, 16)
    """
    return _refitted(compressor, rho, query_norm, scale, kernel_radius, ridge, values=True)


def log_weights(
    compressor: Compressor,
    *,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    scale: float | None = None,
    kernel_radius: ArrayLike | None = None,
    ridge: float = 1e-2,
) -> Compressor:
    r"""Refits the weights alone: keys and values stay those of the source, bit by bit.

    .. math::
       w' = w + (G_{SS} + \lambda I)^{-1} (G_{SN} 1 - G_{SS} w), \qquad
       G_{kl} = e^{r\langle k,l\rangle} (\langle v_k, v_l\rangle + 1)

    with values in the geometry of the balance (:mod:`coreset_jax.geometry`). Arguments, results and
    errors are those of :func:`nystrom`.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> compressor = cj.refit.log_weights(cj.baselines.uniform())
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64)
    >>> bool((coreset.values == values[coreset.indices]).all())
    True
    """
    return _refitted(compressor, rho, query_norm, scale, kernel_radius, ridge, values=False)
