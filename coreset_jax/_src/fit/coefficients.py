r"""Fits in the kernel: the best coefficients behind some keys, a linear least squares.

A pair adds the coefficients ``[value, 1]`` at its key to the numerator and the denominator. The
fit finds those behind a few keys that are nearest to all of a cache's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coreset_jax._src.geometry.kernels import gaussian_kernel
from coreset_jax._src.geometry.solves import solve_definite
from coreset_jax._src.precision import inner_products, matmul, root

# Pairs of the cache whose kernel with the coreset is held at a time.
BLOCK = 2048

# The ridge of a fit, in roundings of the largest eigenvalue (at most the largest sum of a row).
_ROUNDINGS = 64

# How often masses are fitted again to those that are held.
_MASS_ROUNDS = 2

# Entries of the kernel between a head and its keys that a fit leaves to the step behind it, which
# otherwise makes them once more.
MOST_KEPT = 2**21


class Source(NamedTuple):
    """A cache as a fit sees it, in blocks of one length.

    Attributes:
      keys: scaled so that the kernel has no radius ``[blocks, block, d]``.
      coefficients: ``[value, 1]`` of each pair, ``[blocks, block, c]``; zero for what is not to be
        fitted.
      levels: the same number for each block: half the squared norm of a key at the root mean
        square, whose feature has norm one ``[blocks]``.
    """

    keys: Float[Array, "blocks b d"]
    coefficients: Float[Array, "blocks b c"]
    levels: Float[Array, " blocks"]

    def energy(self) -> Float[Array, ""]:
        """The squared norm of the source in the kernel, from all pairs of pairs."""

        def between(one: "Source", other: "Source") -> Array:
            products = inner_products(one.coefficients, other.coefficients)
            halves = jnp.sum(jnp.square(one.keys), axis=-1, keepdims=True) / 2
            lifted = jnp.exp(halves - one.levels) * seen_by(one.keys, other)
            return jnp.sum(lifted * products)

        return jnp.sum(
            jax.lax.map(lambda one: jax.lax.map(lambda two: between(one, two), self), self)
        )


def seen_by(centers: Float[Array, "m d"], block: Source) -> Float[Array, "m b"]:
    r"""What each pair of one block adds at some keys, with the norm of its feature.

    .. math:: e^{-\|x - k\|^2 / 2} \cdot e^{\|k\|^2 / 2 - \mathrm{level}}
              = e^{\langle x, k \rangle - \|x\|^2 / 2 - \mathrm{level}}
    """
    halves = jnp.sum(jnp.square(centers), axis=-1, keepdims=True) / 2
    return jnp.exp(inner_products(centers, block.keys) - (halves + block.levels))


class Fit(NamedTuple):
    """The best coefficients behind some keys.

    Attributes:
      kernel: of these keys with each other ``[m, m]``; zero for what is not fitted.
      moments: the source as seen from these keys ``[m, c]``.
      coefficients: :math:`Y`, ``[m, c]``.
      seen: the kernel between these keys and those of the source, if it was kept.
    """

    kernel: Float[Array, "m m"]
    moments: Float[Array, "m c"]
    coefficients: Float[Array, "m c"]
    seen: Float[Array, "blocks m b"] | None

    def captured(self, coefficients: Float[Array, "m c"]) -> Float[Array, ""]:
        r"""How much of the source some coefficients explain: its squared norm less the error.

        .. math:: 2 \langle Y, \mu \rangle - \langle Y, G Y \rangle
        """
        drawn = matmul(self.kernel, coefficients)
        return jnp.sum(coefficients * (2 * self.moments - drawn))


def blocks_of(
    keys: Float[Array, "n d"], coefficients: Float[Array, "n c"], level: Float[Array, ""]
) -> Source:
    """The source of a fit; what fills up the last block has coefficients of zero."""
    count = keys.shape[0]
    blocks = -(-count // BLOCK)
    width = -(-count // blocks)
    pad = ((0, blocks * width - count), (0, 0))

    def cut(rows: Array) -> Array:
        return jnp.pad(rows, pad).reshape(blocks, width, -1)

    return Source(cut(keys), cut(coefficients), jnp.broadcast_to(level, blocks))


def project_onto(
    source: Source, centers: Float[Array, "m d"], free: Bool[Array, " m"], keep: bool = False
) -> Fit:
    """Kernel and moments of some keys, before anything is fitted: all coefficients are zero.

    Args:
      source: the cache.
      centers: the keys.
      free: which of them are fitted.
      keep: whether a step follows, which uses the kernel with the source again.
    """
    both = free[:, None] & free[None]
    kernel = jnp.where(both, gaussian_kernel(centers, centers), 0)
    blocks, width = source.coefficients.shape[:2]
    keep = keep and len(centers) * blocks * width <= MOST_KEPT

    def add(total: Array, block: Source) -> tuple[Array, Array | None]:
        seen = seen_by(centers, block)
        return total + matmul(seen, block.coefficients), seen if keep else None

    zeros = jnp.zeros_like(centers, shape=(centers.shape[0], source.coefficients.shape[-1]))
    moments, seen = jax.lax.scan(add, zeros, source)
    return Fit(kernel, jnp.where(free[:, None], moments, 0), zeros, seen)


def fit_coefficients(fit: Fit, free: Bool[Array, " m"]) -> Fit:
    """The coefficients that explain most of the source."""
    return fit._replace(coefficients=solve_definite(_definite(fit.kernel, free), fit.moments))


def _definite(kernel: Float[Array, "m m"], fitted: Bool[Array, " m"]) -> Float[Array, "m m"]:
    """The kernel, zero but for what is fitted, with a ridge; the identity for the rest."""
    ridge = _ROUNDINGS * jnp.finfo(kernel.dtype).eps * jnp.max(jnp.sum(kernel, axis=-1))
    return kernel + jnp.diag(jnp.where(fitted, ridge, 1))


class LeastMasses(NamedTuple):
    r"""What no mass may fall below: :math:`\max(f_s, c \|Y'_s\|)`, of all columns but the last.

    Attributes:
      floors: :math:`f`, ``[m]``.
      per_length: :math:`c`.
    """

    floors: Float[Array, " m"]
    per_length: Float[Array, ""]

    def of(self, coefficients: Float[Array, "m c"]) -> Float[Array, " m"]:
        """The least masses of some coefficients."""
        lengths = root(jnp.sum(jnp.square(coefficients[:, :-1]), axis=-1))
        return jnp.maximum(self.floors, self.per_length * lengths)


def fit_with_least_masses(
    fit: Fit, free: Bool[Array, " m"], least: LeastMasses
) -> tuple[Fit, Float[Array, " m"]]:
    """A fit, and its last column, the masses, none of them below the least.

    Masses that are held at their least take from the others what they have too much: these are
    fitted once more, and perhaps again.

    Args:
      fit: kernel and moments.
      free: which keys are fitted ``[m]``.
      least: what no mass may fall below.
    """
    coefficients, masses = _with_least_masses(fit.kernel, fit.moments, free, least)[:2]
    return fit._replace(coefficients=coefficients), masses


@jax.custom_vjp
def _with_least_masses(
    kernel: Array, moments: Array, free: Array, least: LeastMasses
) -> tuple[Array, Array, Array]:
    """Coefficients, masses, and which of these were held at their least."""
    State = tuple[Array, Array, Array, Array, Array]  # noqa: N806

    def unfinished(state: State) -> Array:
        rounds, _, masses, floors, held = state
        short = jnp.any(free & ~held & (masses < floors))
        return (rounds == 0) | ((rounds <= _MASS_ROUNDS) & short)

    def solve(state: State) -> State:
        rounds, coefficients, masses, floors, held = state
        held = held | (free & (masses < floors) & (rounds > 0))
        solved = _solved_beside(kernel, moments, free, held, floors)
        coefficients = jnp.where(rounds == 0, solved, coefficients)
        masses = jnp.where(held, floors, solved[:, -1])
        return rounds + 1, coefficients, masses, least.of(coefficients), held

    # Made from the fit, so that everything carried varies over the mesh axes that it does.
    none, zeros = jnp.zeros_like(free), jnp.zeros_like(moments[:, 0])
    start = (jnp.sum(none), jnp.zeros_like(moments), zeros, zeros, none)
    _, coefficients, masses, floors, held = jax.lax.while_loop(unfinished, solve, start)
    return coefficients, jnp.where(free, jnp.maximum(masses, floors), 0), held


def _solved_beside(
    kernel: Array, moments: Array, free: Array, held: Array, floors: Array
) -> Float[Array, "m c"]:
    """The coefficients of free keys beside others that are held with the least of masses."""
    fitted = free & ~held
    inner = jnp.where(fitted[:, None] & fitted[None], kernel, 0)
    known = matmul(kernel, jnp.where(held, floors, 0))
    missing = moments.at[:, -1].add(-known)
    return solve_definite(_definite(inner, fitted), jnp.where(fitted[:, None], missing, 0))


def _forward(kernel: Array, moments: Array, free: Array, least: LeastMasses) -> Any:
    found = _with_least_masses(kernel, moments, free, least)
    return found, (kernel, moments, least, free, found[2])


def _backward(kept: Any, cotangents: Any) -> Any:
    """The derivative with the choice of masses that are held, held as well."""
    *smooth, free, held = kept

    def found(kernel: Array, moments: Array, least: LeastMasses) -> tuple[Array, Array]:
        nothing = jnp.zeros_like(moments[:, 0])
        coefficients = _solved_beside(kernel, moments, free, jnp.zeros_like(held), nothing)
        floors = least.of(coefficients)
        solved = _solved_beside(kernel, moments, free, held, floors)
        masses = jnp.where(held, floors, jnp.maximum(solved[:, -1], floors))
        return coefficients, jnp.where(free, masses, 0)

    kernel, moments, least = jax.vjp(found, *smooth)[1](cotangents[:2])
    return kernel, moments, None, least


_with_least_masses.defvjp(_forward, _backward)
