r"""The high Taylor degrees of an exponential sum, through pairs of its atoms.

Degree j of :math:`\sum_i u_i e^{\langle q, k_i\rangle}` is the tensor
:math:`T_j = \sum_i k_i^{\otimes j} \otimes u_i` at :math:`q^{\otimes j} / j!`. It has too many
entries to be written down, but inner products of its slices are powers of those of the keys: one
pass over pairs of blocks sees them all and holds no more than a pair of blocks. With

.. math::
   \kappa_j(x) = \frac{(sx)^j}{1 - sx} = \sum_{i \ge j} (sx)^i, \qquad
   \Big\| \sum_{i \ge j} \frac{T_i(q)}{i!} \Big\|^2
     \le \sum_{i \ge j} \frac{(\rho^i / i!)^2}{s^i} \;
         \Big\| \sum_{il} \kappa_j(\langle k_i, k_l\rangle) u_i u_l^T \Big\|

by Cauchy and Schwarz over the degrees. A geometric kernel promises within a few percent of what
the exponential's does while its rounding stays relative however small the products are.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax._src.precision import inner_products, matmul
from coreset_jax.guarantees.norms import largest_eigenvalues, unit_roundoff

# Terms of a series over degrees that are summed; the rest is bounded by a geometric series.
_TERMS = 128

# Kernels tried: s times the largest squared norm of a key.
_REACHES = tuple(step / 25 for step in range(1, 25))


class Tails(NamedTuple):
    r"""Upper bounds on sums over pairs of atoms, rounding included.

    Attributes:
      reach: the kernel's :math:`s`.
      vectors: operator norm of the sum of :math:`\kappa_J u_i u_l^T`.
      vector_trace: its trace.
      masses: the sum of :math:`\kappa \zeta_i \zeta_l`, of degree 4 or, with ``squares``, 3.
      squares: operator norm of the sum of :math:`\langle k_i, k_l\rangle^2 u_i u_l^T`, and
      square_trace: its trace; ``None`` if not asked for.
    """

    reach: Float[Array, ""]
    vectors: Float[Array, ""]
    vector_trace: Float[Array, ""]
    masses: Float[Array, ""]
    squares: Float[Array, ""] | None
    square_trace: Float[Array, ""] | None


class _Rounding(NamedTuple):
    """What rounding may add to sums over pairs: of kernels of degree 3 and 4, and of squares."""

    third: Float[Array, ""]
    fourth: Float[Array, ""]
    squares: Float[Array, ""]


def geometric_series(
    rho: Float[Array, ""], reaches: Float[Array, " s"], start: int
) -> Float[Array, " s"]:
    r"""An upper bound on :math:`\sum_{j \ge J} (\rho^j / j!)^2 / s^j`; infinite if out of range.

    Args:
      rho: radius of the queries.
      reaches: the kernel's :math:`s` ``[s]``.
      start: the first degree :math:`J`.
    """
    dtype = reaches.dtype
    degrees = range(start, start + _TERMS)
    powers = jnp.asarray(list(degrees), dtype)
    factorials = jnp.asarray([math.lgamma(degree + 1) for degree in degrees], dtype)
    logarithms = 2 * (powers * jnp.log(rho) - factorials) - powers * jnp.log(reaches)[:, None]
    terms = jnp.exp(logarithms)
    # From the last term on they fall faster than a geometric series of ratio one half.
    total = jnp.sum(terms, axis=-1) + terms[:, -1]
    ratio = jnp.square(rho / (start + _TERMS)) / reaches
    # Where a term is finite its logarithm is a sum of numbers of a few hundred.
    total = total * (1 + 4096 * unit_roundoff(dtype)) + jnp.finfo(dtype).tiny
    return jnp.where(ratio < 0.5, total, jnp.inf)


def _best_reach(
    rho: Float[Array, ""],
    largest: Float[Array, ""],
    squares: Float[Array, " n"],
    weights: Float[Array, " n"],
    start: int,
) -> Float[Array, ""]:
    """The s whose bound is the smallest, judged by the diagonal of the sum over pairs.

    Args:
      rho: radius of the queries.
      largest: the largest squared norm of a key, or more.
      squares: squared norms of the keys ``[n]``.
      weights: squared norms of the vectors ``[n]``.
      start: the first degree of the tail.
    """
    reaches = jnp.asarray(_REACHES, squares.dtype)

    def diagonal(reach: Array) -> Array:
        products = reach * (squares / largest)
        return jnp.sum(weights * products**start / (1 - products))

    diagonals = jax.lax.map(diagonal, reaches)
    bounds = geometric_series(rho, reaches / largest, start) * diagonals
    return reaches[jnp.argmin(jnp.where(jnp.isnan(bounds), jnp.inf, bounds))] / largest


def _pair_sums(
    keys: Float[Array, "n d"],
    vectors: Float[Array, "n dv"],
    masses: Float[Array, "n 3"],
    reach: Float[Array, ""],
    blocks: Int[Array, ""],
    *,
    block_size: int,
    even: bool,
    squares: bool,
) -> tuple[Float[Array, "dv dv"], Float[Array, " 3"], Float[Array, "dv dv"]]:
    r"""Goes once through all pairs of blocks, each unordered pair once.

    Args:
      keys: keys of the atoms ``[n, d]``, n a multiple of ``block_size``.
      vectors: vectors ``[n, dv]``.
      masses: numbers to sum by columns with the even kernel ``[n, 3]``.
      reach: the kernel's s, below one over the largest squared norm of a key.
      blocks: blocks that hold anything; those behind are not looked at.
      block_size: atoms of a block, static.
      even: whether the vectors are summed with the kernel of degree 4 too, and not 3.
      squares: whether they are also summed with :math:`(sx)^2`.

    Returns:
      The sums of vectors, of masses, and of vectors with the squares, the last without columns
      if not asked for.
    """
    width = vectors.shape[-1]
    columns = 2 * width if squares else width

    def rows(array: Array, number: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, number * block_size, block_size)

    def row_of_blocks(left: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        left_keys, left_masses = reach * rows(keys, left), rows(masses, left)

        def block(right: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            products = inner_products(left_keys, rows(keys, right))
            cubes = products * products * products / (1 - products)
            fourths = products * cubes
            # Pairs within one block are met from both sides.
            factor = jnp.where(left == right, 0.5, 1.0).astype(keys.dtype)
            right_vectors = factor * rows(vectors, right)
            part = matmul(fourths if even else cubes, right_vectors)
            if squares:
                part = jnp.concatenate([part, matmul(products * products, right_vectors)], axis=-1)
            right_masses = factor * rows(masses, right)
            return sums[0] + part, sums[1] + matmul(matmul(left_masses.T, fourths), right_masses)

        # Row by row: rounding grows with the additions that one number goes through.
        start = jnp.zeros_like(keys, shape=(block_size, columns)), jnp.zeros_like(sums[1])
        part, mass_part = jax.lax.fori_loop(left, blocks, block, start)
        return sums[0] + matmul(rows(vectors, left).T, part), sums[1] + mass_part

    start = jnp.zeros_like(keys, shape=(width, columns)), jnp.zeros_like(keys, shape=(3, 3))
    half, mass_sums = jax.lax.fori_loop(jnp.zeros_like(blocks), blocks, row_of_blocks, start)
    first, second = half[:, :width], half[:, width:]
    return first + first.T, 2 * jnp.diagonal(mass_sums), second + second.T if squares else second


def _rounding(
    keys: Float[Array, "n d"],
    weights: Float[Array, " n"],
    fourth: Float[Array, ""],
    reach: Float[Array, ""],
    limit: Float[Array, ""],
    length: int,
) -> _Rounding:
    r"""Bounds the rounding of :math:`\sum_{il} \kappa_j(\langle k_i, k_l\rangle) c_i c_l`.

    A sum is off by ``length`` unit roundoffs of the sum of its absolute terms, and each term by
    the error of its inner product times the slope of the kernel. Both are sums of
    :math:`|\kappa_j|`: known where j is even, and in between by Cauchy and Schwarz where it is odd.

    Args:
      keys: keys ``[n, d]``.
      weights: :math:`\|c_i\|`, ``[n]``.
      fourth: the sum of :math:`\kappa_4 \|c_i\| \|c_l\|`, as computed.
      reach: the kernel's s.
      limit: the largest ``s |x|``, below one.
      length: additions that one number goes through.
    """
    count, width = keys.shape
    unit = unit_roundoff(keys.dtype)
    error = 1.1 * (width + 6) * unit * limit
    total = jnp.sum(weights)
    matrix = matmul(keys.T, weights[:, None] * keys)
    # The floors are for products so small that they are nothing but error.
    second = (1.1 + 4 * count * unit) * jnp.sum(jnp.square(reach * matrix))
    second = second + 16 * jnp.square(error * total)
    fourth = 1.2 * fourth + 4e4 * jnp.square(jnp.square(error) * total)
    # x^2 / (1 - x) = x^2 + x^3 + x^4 / (1 - x), and x^4 is at most (1 + limit) times the last.
    whole = second + jnp.sqrt(second * (1 + limit) * fourth) + fourth
    third = jnp.sqrt(whole * fourth)
    slope = limit / (1 - limit)
    additions = 1.1 * (length + 16) * unit
    return _Rounding(
        third=additions * third + error * (3 + slope) * whole,
        fourth=additions * fourth + error * (4 + slope) * third,
        squares=additions * second + 2 * error * jnp.sqrt(second) * total,
    )


def tail_bounds(
    keys: Float[Array, "n d"],
    vectors: Float[Array, "n dv"],
    masses: Float[Array, " n"],
    rho: Float[Array, ""],
    blocks: Int[Array, ""],
    *,
    start: int,
    block_size: int,
    squares: bool,
) -> Tails:
    """Bounds the sums over pairs that the tails need.

    Args:
      keys: keys of the atoms ``[n, d]``, n a multiple of ``block_size``.
      vectors: vectors ``[n, dv]``.
      masses: masses ``[n]``.
      rho: radius of the queries, which the choice of the kernel depends on.
      blocks: blocks that hold atoms; those behind are not looked at.
      start: the first degree of the vectors' tail, 3 or 4.
      block_size: atoms of a block, static.
      squares: whether to bound the vectors' degree 2 as well; the masses' tail begins at 3 then.
    """
    count, width = keys.shape
    value_width = vectors.shape[-1]
    unit = unit_roundoff(keys.dtype)
    key_squares = jnp.sum(jnp.square(keys), axis=-1)
    vector_squares = jnp.sum(jnp.square(vectors), axis=-1)
    norms, absolute = jnp.sqrt(vector_squares), jnp.abs(masses)
    largest = (1 + 4 * (width + 8) * unit) * jnp.max(key_squares)
    largest = jnp.maximum(largest, jnp.finfo(keys.dtype).tiny ** 0.25)
    reach = _best_reach(rho, largest, key_squares, vector_squares, start)
    vector_sums, mass_sums, square_sums = _pair_sums(
        keys,
        jnp.concatenate([vectors, masses[:, None]], axis=-1) if squares else vectors,
        jnp.stack([masses, norms, absolute], axis=-1),
        reach,
        blocks,
        block_size=block_size,
        even=start == 4,
        squares=squares,
    )
    length = 2 * (block_size + count // block_size)
    vector_rounding, mass_rounding = (
        _rounding(keys, weights, fourth, reach, reach * largest, length)
        for weights, fourth in ((norms, mass_sums[1]), (absolute, mass_sums[2]))
    )
    if squares:
        mass_sum, mass_error = vector_sums[-1, -1], mass_rounding.third
    else:
        mass_sum, mass_error = mass_sums[0], mass_rounding.fourth

    error = vector_rounding.fourth if start == 4 else vector_rounding.third
    matrices, errors = [vector_sums[:value_width, :value_width]], [error]
    if squares:
        # These are the squared inner products themselves, without the reach.
        matrices.append(square_sums[:value_width, :value_width] / jnp.square(reach))
        errors.append(vector_rounding.squares * 1.01 / jnp.square(reach))
    norm_bounds = largest_eigenvalues(matrices) + jnp.stack(errors)
    traces = [
        jnp.maximum(jnp.trace(matrix), 0) + value_width * error
        for matrix, error in zip(matrices, errors, strict=True)
    ]
    return Tails(
        reach=reach,
        vectors=norm_bounds[0],
        vector_trace=traces[0],
        masses=jnp.maximum(mass_sum, 0) + mass_error,
        squares=norm_bounds[1] if squares else None,
        square_trace=traces[1] if squares else None,
    )
