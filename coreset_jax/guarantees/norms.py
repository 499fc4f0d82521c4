"""Operator norms bounded from above by matrix products alone, in any precision."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax._src.precision import matmul

# After K squarings the bound exceeds the eigenvalue by at most a factor side^(1 / 2^(K + 1)).
_SQUARINGS = 8


def unit_roundoff(dtype: jnp.dtype) -> float:
    """The largest relative error of one rounding."""
    return float(jnp.finfo(dtype).eps) / 2


def row_norms(rows: Float[Array, "... width"]) -> Float[Array, "..."]:
    """Euclidean norms along the last axis."""
    return jnp.sqrt(jnp.sum(jnp.square(rows), axis=-1))


def _frobenius(matrices: Float[Array, "count a b"]) -> Float[Array, "count 1 1"]:
    return jnp.sqrt(jnp.sum(jnp.square(matrices), axis=(-2, -1), keepdims=True))


def _not_zero(sizes: Array) -> Array:
    return jnp.where(sizes > 0, sizes, jnp.ones_like(sizes))


def largest_eigenvalues(matrices: Sequence[Float[Array, "a a"]]) -> Float[Array, " count"]:
    r"""Upper bounds on the operator norms of symmetric matrices, by repeated squaring.

    .. math::
       \|M\| = \|M^{2^K}\|^{1/2^K} \le \|M^{2^K}\|_F^{1/2^K}, \qquad K = 8

    which is at most 1.5 % too large up to a side of 2000. Unlike a power iteration it can only
    err upwards, and unlike a decomposition it is matrix products alone. The square of a matrix of
    Frobenius norm 1 is off by at most ``side + 8`` unit roundoffs in that norm, and those are
    added.

    Args:
      matrices: symmetric ``[a, a]`` each, of any sides, exact as given.

    Returns:
      The bounds; NaN where a matrix is not finite.
    """
    side = max(matrix.shape[0] for matrix in matrices)
    # Padded to one shape, so that one short program serves them all.
    powers = jnp.stack([jnp.pad(matrix, [(0, side - matrix.shape[0])] * 2) for matrix in matrices])
    slack = 1.1 * (side + 8) * unit_roundoff(powers.dtype)
    # Neither may the first squares overflow or vanish, nor those of the powers.
    largest = jnp.max(jnp.abs(powers), axis=(-2, -1), keepdims=True)

    def square(power: Array, _: None) -> tuple[Array, Array]:
        # Any size will do that is near the norm: the equation holds for all.
        size = _not_zero(_frobenius(power))
        return matmul(power / size, power / size), size

    def root(bound: Array, size: Array) -> tuple[Array, None]:
        return size * jnp.sqrt(bound + slack), None

    powers, sizes = jax.lax.scan(square, powers / _not_zero(largest), None, length=_SQUARINGS)
    # The last norm errs by the rounding of its own sum, of which the root leaves next to nothing.
    bounds, _ = jax.lax.scan(root, 1.1 * _frobenius(powers), sizes, reverse=True)
    return (largest * bounds * (1 + 2 * slack))[:, 0, 0]


def spectral_norms(matrices: Sequence[Float[Array, "a b"]]) -> Float[Array, " count"]:
    """Upper bounds on the operator norms of matrices, from the Gram matrix of the shorter side.

    Args:
      matrices: ``[a, b]`` each, of any shapes, exact as given.

    Returns:
      The bounds, at most a few percent too large; NaN where a matrix is not finite.
    """
    grams, scales, slacks = [], [], []
    for matrix in matrices:
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        scale = jnp.max(jnp.abs(tall))
        scaled = tall / _not_zero(scale)
        gram = matmul(scaled.T, scaled)
        unit = unit_roundoff(gram.dtype)
        grams.append(gram)
        scales.append(scale)
        slacks.append(1.1 * (tall.shape[0] + 8) * unit * jnp.trace(gram))
    bounds = largest_eigenvalues(grams) + jnp.stack(slacks)
    return jnp.stack(scales) * jnp.sqrt(bounds) * (1 + 16 * unit_roundoff(bounds.dtype))
