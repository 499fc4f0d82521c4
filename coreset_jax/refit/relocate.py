r"""Relocation: keys, weights and values of a coreset moved to where they answer best.

What a coreset of :math:`m` pairs can do is not tied to the keys of the cache. The error in the
kernel of a fit,

.. math:: \Bigl\| \sum_i a_i\, \psi(k_i) - \sum_s Y_s\, \psi(x_s) \Bigr\|^2, \qquad
          \langle \psi(k), \psi(x) \rangle = e^{-\|k - x\|^2 / 2},

with :math:`a_i` the columns ``[values, 1]`` of a pair, is quadratic in :math:`Y` and smooth in the
:math:`x`. A few steps of Gauss and Newton in the keys, each with the best :math:`Y` behind them,
take a third off the error of attention.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from coreset_jax import validation
from coreset_jax.coreset import Compressor, Coreset
from coreset_jax.geometry import fitting_geometry
from coreset_jax.kernels import gaussian_kernel, one_by_one
from coreset_jax.pivots import heavy_pairs, log_importance
from coreset_jax.problem import reduce
from coreset_jax.refit.projection import columns_of
from coreset_jax.refit.wrapper import refitted

HIGHEST = jax.lax.Precision.HIGHEST

# Pairs of the cache whose kernel with the coreset is held at a time.
_BLOCK = 2048
_KERNEL_SHARE = 32

# The ridge of a fit, in roundings of the largest eigenvalue (at most the largest sum of a row).
_ROUNDINGS = 64

# What is added to the curvature of a step, as a share of its mean; how much of a step is that of
# the one before; and how far it may go, in units of the kernel's width.
_DAMPING = 0.1
_MOMENTUM = 0.4
_LONGEST_STEP = 0.5

# No key stands for less than this part of a pair.
_LEAST_WEIGHT = 0.1

# No value lies further out than so many times the farthest of the cache.
_FARTHEST_VALUE = 4.0

# How often masses are fitted again to those that are held.
_MASS_ROUNDS = 2


class _Settings(NamedTuple):
    """What of a relocation is fixed at compile time."""

    scale: float | None
    steps: int


class Source(NamedTuple):
    """A cache as a fit sees it, in blocks of one length.

    Attributes:
      keys: scaled so that the kernel has no radius ``[blocks, block, d]``.
      columns: :math:`a_i`, ``[blocks, block, c]``; zero for what is not to be fitted.
    """

    keys: Float[Array, "blocks b d"]
    columns: Float[Array, "blocks b c"]


class Fit(NamedTuple):
    """The best columns behind some keys.

    Attributes:
      kernel: of these keys with each other ``[m, m]``; the identity for what is not fitted.
      moments: the source as seen from these keys ``[m, c]``.
      columns: :math:`Y`, ``[m, c]``.
    """

    kernel: Float[Array, "m m"]
    moments: Float[Array, "m c"]
    columns: Float[Array, "m c"]

    def captured(self, columns: Float[Array, "m c"]) -> Float[Array, ""]:
        r"""How much of the source some columns explain: its squared norm less the error.

        .. math:: 2 \langle Y, \mu \rangle - \langle Y, G Y \rangle
        """
        drawn = jnp.matmul(self.kernel, columns, precision=HIGHEST)
        return jnp.sum(columns * (2 * self.moments - drawn))


def blocks_of(keys: Float[Array, "n d"], columns: Float[Array, "n c"]) -> Source:
    """The source of a fit; what fills up the last block has columns of zero."""
    count = keys.shape[0]
    blocks = -(-count // _BLOCK)
    width = -(-count // blocks)
    pad = ((0, blocks * width - count), (0, 0))
    return Source(*(jnp.pad(each, pad).reshape(blocks, width, -1) for each in (keys, columns)))


def best_columns(source: Source, marks: Float[Array, "m d"], free: Bool[Array, " m"]) -> Fit:
    """The columns behind some keys that explain most of the source."""
    both = free[:, None] & free[None]
    kernel = jnp.where(both, gaussian_kernel(marks, marks), 0)
    kernel += _ones_where(~free, kernel.dtype)

    def add(total: Array, block: Source) -> tuple[Array, None]:
        seen = gaussian_kernel(marks, block.keys)
        return total + jnp.matmul(seen, block.columns, precision=HIGHEST), None

    start = jnp.zeros_like(marks, shape=(marks.shape[0], source.columns.shape[-1]))
    moments, _ = jax.lax.scan(add, start, source)
    moments = jnp.where(free[:, None], moments, 0)
    return Fit(kernel, moments, one_by_one(_solve)(_ridged(kernel), moments))


def _ones_where(chosen: Bool[Array, " m"], dtype: jnp.dtype) -> Float[Array, "m m"]:
    return jnp.diag(jnp.where(chosen, 1, 0).astype(dtype))


def _ridged(kernel: Float[Array, "m m"]) -> Float[Array, "m m"]:
    ridge = _ROUNDINGS * jnp.finfo(kernel.dtype).eps * jnp.max(jnp.sum(kernel, axis=-1))
    return kernel + ridge * jnp.eye(kernel.shape[0], dtype=kernel.dtype)


def _solve(matrix: Float[Array, "m m"], right: Float[Array, "m c"]) -> Float[Array, "m c"]:
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), right)


def least_masses(
    fit: Fit, free: Bool[Array, " m"], least: Float[Array, " m"]
) -> Float[Array, " m"]:
    """The last column of a fit, no less than some masses, and fitted again where it is more.

    What is held at its least takes from the others what it has too much.

    Args:
      fit: a fit whose last column are the masses.
      free: which keys are fitted.
      least: the least mass of each ``[m]``.
    """
    masses, held = fit.columns[:, -1], jnp.zeros_like(free)

    def again(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        masses, held = state
        held = held | (free & (masses < least))
        fitted = free & ~held
        both = fitted[:, None] & fitted[None]
        known = jnp.where(held, least, 0)
        right = fit.moments[:, -1] - jnp.matmul(fit.kernel, known, precision=HIGHEST)
        matrix = _ridged(jnp.where(both, fit.kernel, 0) + _ones_where(~fitted, fit.kernel.dtype))
        solved = one_by_one(_solve)(matrix, jnp.where(fitted, right, 0)[:, None])[:, 0]
        return jnp.where(held, least, solved), held

    masses, _ = jax.lax.fori_loop(0, _MASS_ROUNDS, again, (masses, held))
    return jnp.where(free, jnp.maximum(masses, least), 0)


def newton_step(
    source: Source, marks: Float[Array, "m d"], free: Bool[Array, " m"], fit: Fit
) -> Float[Array, "m d"]:
    r"""A step of Gauss and Newton for every key by itself.

    .. math:: \delta_s = \frac{\sum_i G_{si} \langle Y_s, a_i\rangle (k_i - x_s)
              - \sum_t G_{st} \langle Y_s, Y_t\rangle (x_t - x_s)}{\|Y_s\|^2 + \mathrm{damping}}

    Keys near one another would both go where one of them is missed: steps are damped, and no longer
    than half of the kernel's width.
    """

    def pull(keys: Array, columns: Array) -> Array:
        products = jnp.matmul(fit.columns, columns.T, precision=HIGHEST)
        forces = gaussian_kernel(marks, keys) * products
        toward = jnp.matmul(forces, keys, precision=HIGHEST)
        return toward - jnp.sum(forces, axis=-1, keepdims=True) * marks

    def add(total: Array, block: Source) -> tuple[Array, None]:
        return total + pull(*block), None

    # What is not free has columns of zero, and neither pulls nor is pulled.
    total, _ = jax.lax.scan(add, jnp.zeros_like(marks), source)
    total -= pull(marks, fit.columns)
    curvature = jnp.sum(jnp.square(fit.columns), axis=-1)
    mean = jnp.sum(curvature) / jnp.maximum(jnp.sum(free), 1).astype(curvature.dtype)
    curvature += _DAMPING * mean + jnp.finfo(curvature.dtype).tiny
    step = total / curvature[:, None]
    length = jnp.sqrt(jnp.sum(jnp.square(step), axis=-1, keepdims=True))
    return step * jnp.minimum(1, _LONGEST_STEP / jnp.maximum(length, _LONGEST_STEP))


class Walk(NamedTuple):
    """Keys on their way, and what stands behind them."""

    marks: Float[Array, "m d"]
    velocity: Float[Array, "m d"]
    fit: Fit


def walk(
    source: Source, start: Float[Array, "m d"], free: Bool[Array, " m"], first: Fit, steps: int
) -> Walk:
    """Keys after some steps from where they were fitted first."""

    def advance(_: Array, walk: Walk) -> Walk:
        step = newton_step(source, walk.marks, free, walk.fit)
        velocity = _MOMENTUM * walk.velocity + (1 - _MOMENTUM) * step
        # A fit that failed moves nothing.
        velocity = jnp.where(free[:, None] & jnp.isfinite(velocity), velocity, 0)
        marks = walk.marks + velocity
        return Walk(marks, velocity, best_columns(source, marks, free))

    return jax.lax.fori_loop(0, steps, advance, Walk(start, jnp.zeros_like(start), first))


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
    first = best_columns(source, start, free)
    marks, _, last = walk(source, start, free, first, settings.steps)
    chosen_keys = geometry.restore_keys(marks / root).astype(coreset.keys.dtype)
    if chosen_keys.dtype != dtype:
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
    masses = least_masses(last, free, least)
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


def kernel_entries(count: int, size: int) -> int:
    """Entries of the kernels that a head holds, many times what they are.

    A processor is busy with the products of one head; those of several at once are only slower.
    """
    return _KERNEL_SHARE * size * max(size, min(count, _BLOCK))


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

    Every step is one of Gauss and Newton in the keys (:func:`newton_step`), with a part of the
    step before it, and the best columns :math:`Y` behind where they arrive,

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
      that of ``2 * steps + 1`` passes of ``n * m`` kernel values and of ``steps + 3`` Cholesky
      factors a head; memory a few ``m * m`` and ``2048 * m`` matrices for a few heads at a time.

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
    settings = _Settings(validation.static_float("scale", scale), int(steps))
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
