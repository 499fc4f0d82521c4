r"""Relocation: keys, weights and values of a coreset moved to where they answer best.

What a coreset of :math:`m` pairs can do is not tied to the keys of the cache. The error in the
kernel of a fit,

.. math:: \Bigl\| \sum_i a_i\, \psi(k_i) - \sum_s Y_s\, \psi(x_s) \Bigr\|^2, \qquad
          \langle \psi(k), \psi(x) \rangle = e^{-\|k - x\|^2 / 2},

with :math:`a_i` the columns ``[values, 1]`` of a pair, is quadratic in :math:`Y` and smooth in the
:math:`x`. A few steps of Gauss and Newton in the keys, each with the best :math:`Y` behind them,
take a third off the error of attention.
"""

import dataclasses
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.coreset import Compressor, Coreset
from coreset_jax.geometry import fitting_geometry
from coreset_jax.pivots import heavy_pairs, log_importance
from coreset_jax.problem import reduce
from coreset_jax.refit.projection import columns_of
from coreset_jax.refit.steps import (
    best_columns,
    blocks_of,
    kernel_entries,
    least_masses,
    walk,
)
from coreset_jax.refit.wrapper import Refitted, refitted

# No key stands for less than this part of a pair.
_LEAST_WEIGHT = 0.1

# No value lies further out than so many times the farthest of the cache.
_FARTHEST_VALUE = 4.0


class _Settings(NamedTuple):
    """What of a relocation is fixed at compile time.

    Attributes:
      scale: the softmax scale, or ``None``.
      steps: how many.
      fits: whether what stands behind the keys is fitted to where the last step leaves them.
    """

    scale: float | None
    steps: int
    fits: bool


def _relocate_head(
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
    """The coreset of one head, moved and fitted."""
    count, size = keys.shape[0], coreset.keys.shape[0]
    inside = jnp.arange(count) < length
    source_keys, source_values = keys, values
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
    geometry = fitting_geometry(reduction, kernel_radius)
    dtype = geometry.radius.dtype
    held = jnp.isfinite(coreset.log_weights)
    places = jnp.where(held & (coreset.indices >= 0), coreset.indices, count)
    heavy = heavy_pairs(log_importance(geometry, keys, values, inside), size)
    # Heavy pairs that were kept stay what they are, and nothing else has to answer for them.
    settled = jnp.zeros_like(heavy).at[places].set(True, mode="drop") & heavy
    still = jnp.where(places < count, settled[jnp.minimum(places, count - 1)], False)
    free = held & ~still

    root = jnp.sqrt(geometry.radius)
    # In units of the weight of a key at the root mean square: features have norm one instead of
    # e^(|x|^2 / 2), which goes into the columns.
    level = jnp.square(root * reduction.key_spread / geometry.reach) / 2

    def lift(marks: Array) -> Array:
        return jnp.exp(jnp.sum(jnp.square(marks), axis=-1, keepdims=True) / 2 - level)

    scaled = root * geometry.keys(keys)
    fitted = (inside & ~settled)[:, None].astype(dtype)
    source = blocks_of(scaled, fitted * lift(scaled) * columns_of(geometry, values))
    start = jnp.where(free[:, None], root * geometry.keys(coreset.keys), 0)
    weights = jnp.where(free, jnp.exp(coreset.log_weights.astype(dtype)), 0)[:, None]
    before = lift(start) * weights * columns_of(geometry, coreset.values)
    first = best_columns(source, start, free, keep=settings.steps > 0)
    marks, _, last = walk(source, start, free, first, settings.steps, settings.fits)
    chosen_keys = geometry.restore_keys(marks / root).astype(coreset.keys.dtype)
    if settings.fits and chosen_keys.dtype != dtype:
        # Fitted for where the rounded keys lie.
        marks = jnp.where(free[:, None], root * geometry.keys(chosen_keys), 0)
        last = best_columns(source, marks, free)

    # Columns are lowered to those of the exponential kernel again. Masses are held above zero, and
    # above what would take a value far out of the range of all others.
    lifts = lift(marks)
    reach = jnp.sqrt(jnp.sum(jnp.square(last.columns[:, :-1]), axis=-1))
    least = jnp.maximum(
        _LEAST_WEIGHT * lifts[:, 0], reach / (_FARTHEST_VALUE * geometry.value_gain)
    )
    if settings.fits:
        masses = least_masses(last, free, least)
    else:
        masses = jnp.where(free, jnp.maximum(last.columns[:, -1], least), 0)
    divisors = jnp.where(free, masses, 1)[:, None]
    chosen_values = geometry.restore_values(last.columns[:, :-1] / divisors)
    chosen_values = chosen_values.astype(coreset.values.dtype)
    # What is judged is what is returned, rounded.
    after = masses[:, None] * columns_of(geometry, chosen_values)
    better = last.captured(jnp.where(free[:, None], after, 0)) > first.captured(before)
    better &= jnp.sum(held) < length
    moved = (better & free)[:, None]
    log_weights = jnp.where(free, jnp.log(divisors[:, 0] / lifts[:, 0]), -jnp.inf)
    log_weights = jnp.where(still, 0, log_weights)
    stay = (better & still)[:, None]
    places = jnp.minimum(places, count - 1)
    return coreset._replace(
        keys=jnp.where(moved, chosen_keys, jnp.where(stay, source_keys[places], coreset.keys)),
        values=jnp.where(
            moved, chosen_values, jnp.where(stay, source_values[places], coreset.values)
        ),
        log_weights=jnp.where(
            better, log_weights.astype(coreset.log_weights.dtype), coreset.log_weights
        ),
    )


def relocation(
    compressor: Compressor,
    *,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    scale: float | None = None,
    kernel_radius: ArrayLike | None = None,
    steps: int = 3,
) -> Compressor:
    r"""Moves the keys that a compressor keeps, and refits weights and values behind them.

    Every step is one of Gauss and Newton in the keys
    (:func:`coreset_jax.refit.steps.newton_step`), with a part of the step before it, and the best
    columns :math:`Y` behind where they arrive,

    .. math:: Y = (G_{SS} + \lambda I)^{-1} G_{SN}\, a, \qquad G_{kl} = e^{-\|k - l\|^2 / 2},

    where :math:`\lambda` is a few roundings of the largest eigenvalue. Weights stay positive, and
    heavy pairs (:func:`coreset_jax.pivots.heavy_pairs`) among those kept stay as they are. Where
    all this does not lessen the error in the kernel, the coreset is returned as it was.

    Args:
      compressor: what picks the keys to begin with; any that returns positive weights.
        :func:`coreset_jax.pivots.pivoted` is the best start.
      rho: the radius of unit queries, a scalar or ``[...]``; see
        :func:`coreset_jax.compression.balanced`.
      query_norm: largest norm of a raw query instead. If neither is given, the call's sample
        ``queries`` decide, and without them ``sqrt(d)``.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      kernel_radius: the geometry of the fit, a scalar or ``[...]``; ``None`` means that of
        :func:`coreset_jax.geometry.fitting_geometry`.
      steps: how many; 0 leaves the keys where they are, but for those beyond the reach of the
        geometry, which are drawn in to it.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor`. Neither keys nor values are the source's any
      more, ``indices`` say where a key came from, and weights need not sum to the length. Time is
      that of ``2 * steps + 1`` passes of ``n * m`` kernel values, or ``steps + 1`` where these have
      no more than two million entries and are kept for the step behind a fit, and of ``steps + 1``
      Cholesky factors a head, and up to three more; memory a few ``m * m`` and ``2048 * m``
      matrices, and two of ``n * m`` where they are kept, for a few heads at a time.

    Raises:
      ValueError: on bad options here; when called, as ``compressor`` does, and if it returns
        normalizers.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Section 4, for the
      kernel; Schröder, Mackey, *WildCat*, 2026 (arXiv 2602.10056), for fits behind keys that stay.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> compressor = cj.refit.relocation(cj.pivoted())
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64)
    >>> bool((coreset.keys != keys[coreset.indices]).any())
    True
    """
    validation.check_count("steps", steps, 0)
    settings = _Settings(validation.static_float("scale", scale), int(steps), fits=True)
    return refitted(
        compressor,
        _relocate_head,
        settings,
        kernel_entries,
        rho=rho,
        query_norm=query_norm,
        kernel_radius=kernel_radius,
        scale=scale,
    )


def moves(compressor: Compressor, **options: Any) -> Compressor:
    """:func:`relocation` for another one of no steps behind it: the last fit is left to that.

    Options and errors are those of :func:`relocation`. What stands behind the keys is of where
    they were before the last step, which nobody has judged: what follows must fit again.
    """
    whole = cast(Refitted, relocation(compressor, **options))
    settings = cast(_Settings, whole.settings)
    return dataclasses.replace(whole, settings=settings._replace(fits=False))
