r"""Fits in the kernel behind some keys, and steps of the keys to where the fit is better.

The best columns behind keys are linear least squares in the kernel; a step of Gauss and Newton
moves every key by itself, with what stands behind the keys held.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coreset_jax.kernels import gaussian_kernel, one_by_one

HIGHEST = jax.lax.Precision.HIGHEST

# Pairs of the cache whose kernel with the coreset is held at a time.
_BLOCK = 2048

# What a head is given of memory, over the entries of that kernel, and over those of one that is
# kept, of which there are two.
_KERNEL_SHARE = 32
_KEPT_SHARE = 8

# The ridge of a fit, in roundings of the largest eigenvalue (at most the largest sum of a row).
_ROUNDINGS = 64

# What is added to the curvature of a step, as a share of its mean; how much of a step is that of
# the one before; and how far it may go, in units of the kernel's width.
_DAMPING = 0.1
_MOMENTUM = 0.4
_LONGEST_STEP = 0.5

# How often masses are fitted again to those that are held.
_MASS_ROUNDS = 2

# Entries of the kernel between a head and its keys that a fit leaves to the step behind it, which
# otherwise makes them once more.
_MOST_KEPT = 2**21


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
      seen: the kernel between these keys and those of the source, if it was kept.
    """

    kernel: Float[Array, "m m"]
    moments: Float[Array, "m c"]
    columns: Float[Array, "m c"]
    seen: Float[Array, "blocks m b"] | None

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


def best_columns(
    source: Source, marks: Float[Array, "m d"], free: Bool[Array, " m"], keep: bool = False
) -> Fit:
    """The columns behind some keys that explain most of the source.

    Args:
      source: the cache.
      marks: the keys.
      free: which of them are fitted.
      keep: whether a step follows, which uses the kernel again.
    """
    both = free[:, None] & free[None]
    kernel = jnp.where(both, gaussian_kernel(marks, marks), 0)
    kernel += _ones_where(~free, kernel.dtype)

    blocks, width = source.columns.shape[:2]
    keep = keep and len(marks) * blocks * width <= _MOST_KEPT

    def add(total: Array, block: Source) -> tuple[Array, Array | None]:
        seen = gaussian_kernel(marks, block.keys)
        total += jnp.matmul(seen, block.columns, precision=HIGHEST)
        return total, seen if keep else None

    start = jnp.zeros_like(marks, shape=(marks.shape[0], source.columns.shape[-1]))
    moments, seen = jax.lax.scan(add, start, source)
    moments = jnp.where(free[:, None], moments, 0)
    return Fit(kernel, moments, one_by_one(_solve)(_ridged(kernel), moments), seen)


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

    def short(state: tuple[Array, Array, Array]) -> Array:
        rounds, masses, held = state
        return (rounds < _MASS_ROUNDS) & jnp.any(free & ~held & (masses < least))

    def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rounds, masses, held = state
        held = held | (free & (masses < least))
        fitted = free & ~held
        both = fitted[:, None] & fitted[None]
        known = jnp.where(held, least, 0)
        right = fit.moments[:, -1] - jnp.matmul(fit.kernel, known, precision=HIGHEST)
        matrix = _ridged(jnp.where(both, fit.kernel, 0) + _ones_where(~fitted, fit.kernel.dtype))
        solved = one_by_one(_solve)(matrix, jnp.where(fitted, right, 0)[:, None])[:, 0]
        return rounds + 1, jnp.where(held, least, solved), held

    # Made from the marks, so that everything carried varies over the mesh axes that they do.
    none = jnp.zeros_like(free)
    start = (jnp.sum(none), fit.columns[:, -1], none)
    _, masses, _ = jax.lax.while_loop(short, again, start)
    return jnp.where(free, jnp.maximum(masses, least), 0)


def newton_step(
    source: Source, marks: Float[Array, "m d"], free: Bool[Array, " m"], fit: Fit
) -> Float[Array, "m d"]:
    r"""A step of Gauss and Newton for every key by itself.

    .. math:: \delta_s = \frac{\sum_i G_{si} \langle Y_s, a_i\rangle (k_i - x_s)
              - \sum_t G_{st} \langle Y_s, Y_t\rangle (x_t - x_s)}{\|Y_s\|^2 + \mathrm{damping}}

    Keys near one another would both go where one of them is missed: steps are damped, and no longer
    than half of the kernel's width. Moments and kernel of the fit are those of the source and of
    these keys; its columns may be any.
    """

    def pull(keys: Array, columns: Array, seen: Array | None) -> Array:
        products = jnp.matmul(fit.columns, columns.T, precision=HIGHEST)
        forces = (gaussian_kernel(marks, keys) if seen is None else seen) * products
        return jnp.matmul(forces, keys, precision=HIGHEST)

    def add(total: Array, block: tuple[Source, Array | None]) -> tuple[Array, None]:
        source, seen = block
        return total + pull(*source, seen), None

    # What is not free has columns of zero, and neither pulls nor is pulled.
    total, _ = jax.lax.scan(add, jnp.zeros_like(marks), (source, fit.seen))
    total -= pull(marks, fit.columns, fit.kernel)
    # All forces together: what the fit leaves of the moments, which is little.
    left = fit.moments - jnp.matmul(fit.kernel, fit.columns, precision=HIGHEST)
    total -= jnp.sum(fit.columns * left, axis=-1, keepdims=True) * marks
    curvature = jnp.sum(jnp.square(fit.columns), axis=-1)
    mean = jnp.sum(curvature) / jnp.maximum(jnp.sum(free), 1).astype(curvature.dtype)
    curvature += _DAMPING * mean + jnp.finfo(curvature.dtype).tiny
    step = total / curvature[:, None]
    length = jnp.sqrt(jnp.sum(jnp.square(step), axis=-1, keepdims=True))
    return step * jnp.minimum(1, _LONGEST_STEP / jnp.maximum(length, _LONGEST_STEP))


class Walk(NamedTuple):
    """Keys on their way, and the last fit behind them."""

    marks: Float[Array, "m d"]
    velocity: Float[Array, "m d"]
    fit: Fit


def walk(
    source: Source,
    start: Float[Array, "m d"],
    free: Bool[Array, " m"],
    first: Fit,
    steps: int,
    fits: bool = True,
) -> Walk:
    """Keys after some steps from where they were fitted first.

    Args:
      source: the cache.
      start: the keys to begin with.
      free: which of them move.
      first: the fit behind them, which kept its kernel if there are steps.
      steps: how many, static.
      fits: whether a fit follows the last step, static; if not, that before it is returned.
    """

    def move(walk: Walk) -> Walk:
        step = newton_step(source, walk.marks, free, walk.fit)
        velocity = _MOMENTUM * walk.velocity + (1 - _MOMENTUM) * step
        # A fit that failed moves nothing.
        velocity = jnp.where(free[:, None] & jnp.isfinite(velocity), velocity, 0)
        return Walk(walk.marks + velocity, velocity, walk.fit)

    def advance(_: Array, walk: Walk) -> Walk:
        walk = move(walk)
        return walk._replace(fit=best_columns(source, walk.marks, free, keep=True))

    begun = Walk(start, jnp.zeros_like(start), first)
    if steps == 0:
        return begun
    if fits:
        return jax.lax.fori_loop(0, steps, advance, begun)
    return move(jax.lax.fori_loop(0, steps - 1, advance, begun))


def kernel_entries(count: int, size: int) -> int:
    """Entries of the kernels that a head holds, many times what they are.

    A processor is busy with the products of one head; those of several at once are only slower.
    """
    entries = _KERNEL_SHARE * size * max(size, min(count, _BLOCK))
    kept = size * count if size * count <= _MOST_KEPT else 0
    return max(entries, _KEPT_SHARE * kept)
