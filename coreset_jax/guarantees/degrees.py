r"""How large an exponential sum can be in a ball of queries, Taylor degree by Taylor degree.

With atoms of keys :math:`k_i`, vectors :math:`u_i` and masses :math:`\zeta_i`,

.. math::
   \Big\| \sum_i u_i e^{\langle q, k_i\rangle} \Big\|
     \le \sum_{j<J} \frac{\rho^j}{j!} \|T_j\| + \mathrm{tail}, \qquad
   T_j = \sum_i k_i^{\otimes j} \otimes u_i, \qquad \|q\| \le \rho

where :math:`\|T_j\|` may be the operator norm of any matrix that the entries of the tensor are
arranged in: :math:`q^{\otimes j} \otimes w` has norm one in each of them. The same holds for the
scalar sum of the masses.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from coreset_jax._src.precision import matmul
from coreset_jax.guarantees.norms import row_norms, spectral_norms, unit_roundoff
from coreset_jax.guarantees.tails import geometric_series, tail_bounds

# Atoms of one matrix product over them: its rounding grows with their number.
TILE = 128

# A tensor of degree 3 is written down if it has no more entries than this.
_LARGEST = 2**16


class Measure(NamedTuple):
    """Atoms of an exponential sum, in the unit problem.

    Attributes:
      keys: ``[n, d]``, zero where an atom has no weight; each entry with up to two roundings.
      vectors: ``[n, dv]``.
      masses: ``[n]``.
      vector_errors: how far each vector may be from the true one ``[n]``.
      mass_errors: and each mass ``[n]``.
    """

    keys: Float[Array, "n d"]
    vectors: Float[Array, "n dv"]
    masses: Float[Array, " n"]
    vector_errors: Float[Array, " n"]
    mass_errors: Float[Array, " n"]


class Moments(NamedTuple):
    """Mass and first moment of a measure, and how far they may be from the true ones.

    Those of the sum of two measures are the sums of theirs.

    Attributes:
      mass: the sum of the masses ``[]``.
      mass_error: ``[]``.
      first: the sum of the masses times the keys ``[d]``.
      first_error: ``[]``, of its norm.
    """

    mass: Float[Array, ""]
    mass_error: Float[Array, ""]
    first: Float[Array, " d"]
    first_error: Float[Array, ""]


class DegreeBounds(NamedTuple):
    """Upper bounds on what each degree adds to the sums in the ball.

    Attributes:
      numerator: of the sum of the vectors ``[J + 1]``, the tail last.
      denominator: of the sum of the masses ``[J + 1]``, the tail last.
      numerator_kernel: on the whole sum of the vectors, by one quadratic form ``[]``.
      denominator_kernel: the same for the masses ``[]``.
      moments: mass and first moment.
    """

    numerator: Float[Array, " shares"]
    denominator: Float[Array, " shares"]
    numerator_kernel: Float[Array, ""]
    denominator_kernel: Float[Array, ""]
    moments: Moments


class _Norms(NamedTuple):
    """Norms of the tensors of the first degrees, as computed, and their Frobenius norms."""

    operator: list[Array]
    frobenius: list[Array]


def default_degrees(width: int, value_width: int) -> int:
    """How many degrees are bounded apart where nothing is said: 4 if the third costs little."""
    return 4 if width * width * (width + 1) // 2 * value_width <= _LARGEST else 3


def _pairs(width: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs a <= b of columns: the monomials of degree two."""
    left, right = np.triu_indices(width)
    return left, right


def _whole(half: Float[Array, "pairs columns"], width: int) -> Float[Array, "d d columns"]:
    """The symmetric tensor, from its monomials of degree two."""
    left, right = _pairs(width)
    places = np.zeros((width, width), np.int32)
    places[left, right] = places[right, left] = np.arange(len(left))
    return half[places]


def _weighed(half: Float[Array, "pairs columns"], width: int) -> Float[Array, "pairs columns"]:
    """The monomials weighed so that norms are those of the whole tensor."""
    left, right = _pairs(width)
    weights = np.where(left == right, 1.0, math.sqrt(2.0))
    return half * jnp.asarray(weights, half.dtype)[:, None]


class _MonomialSums(NamedTuple):
    """Sums over the atoms of monomials of the keys, times columns.

    The columns are the vector, the mass, the mass times the key and, for degree 3 of the vectors,
    the key times the vector.

    Attributes:
      low: with 1 and the key ``[1 + d, columns]``.
      high: with the products of degree two ``[d (d + 1) / 2, columns]``, or ``None``.
    """

    low: Float[Array, "d1 columns"]
    high: Float[Array, "pairs columns"] | None


def _monomial_sums(
    measure: Measure, tiles: Int[Array, ""], *, second: bool, third: bool
) -> _MonomialSums:
    """Goes through the atoms once; ``second`` and ``third`` say which tensors are wanted."""
    width, value_width = measure.keys.shape[-1], measure.vectors.shape[-1]
    left, right = _pairs(width)

    def add(number: Array, sums: _MonomialSums) -> _MonomialSums:
        keys, vectors, masses = (
            jax.lax.dynamic_slice_in_dim(array, number * TILE, TILE) for array in measure[:3]
        )
        parts = [vectors, masses[:, None], masses[:, None] * keys]
        if third:
            parts.append((keys[:, :, None] * vectors[:, None, :]).reshape(TILE, -1))
        columns, rows = jnp.concatenate(parts, axis=-1), keys.T

        def added(total: Array, monomials: Array) -> Array:
            return total + matmul(monomials, columns)

        low = added(sums.low, jnp.concatenate([jnp.ones_like(rows[:1]), rows]))
        if sums.high is None:
            return _MonomialSums(low, None)
        return _MonomialSums(low, added(sums.high, rows[left] * rows[right]))

    columns = value_width + 1 + width + (width * value_width if third else 0)
    low = jnp.zeros_like(measure.keys, shape=(1 + width, columns))
    high = jnp.zeros_like(measure.keys, shape=(len(left), columns)) if second else None
    return jax.lax.fori_loop(jnp.zeros_like(tiles), tiles, add, _MonomialSums(low, high))


def _low_degrees(
    sums: _MonomialSums, width: int, value_width: int, degrees: int
) -> tuple[_Norms, _Norms]:
    """Norms of the tensors that are written down, of the vectors and of the masses."""

    def frobenius(array: Array) -> Array:
        rounding = array.size * unit_roundoff(array.dtype)
        return jnp.sqrt(jnp.sum(jnp.square(array))) * (1 + rounding)

    keys_from = value_width + 1
    low, high = sums
    vectors = [low[0, :value_width], low[1:, :value_width]]
    masses = [low[0, value_width], low[1:, value_width], low[1:, keys_from : keys_from + width]]
    unfoldings = [vectors[1], masses[2]]
    if high is not None:
        vectors.append(_weighed(high[:, :value_width], width))
        masses.append(_weighed(high[:, keys_from : keys_from + width], width))
        by_key = _whole(high[:, :value_width], width).reshape(width, -1)
        unfoldings += [masses[3], vectors[2], by_key]
    if high is not None and degrees == 4:
        vectors.append(_weighed(high[:, keys_from + width :], width))
        unfoldings += [vectors[3], vectors[3].reshape(-1, value_width)]
    norms = spectral_norms(unfoldings)
    vector_norms, mass_norms = (list(map(frobenius, tensors)) for tensors in (vectors, masses))
    # Vectors and scalars have one norm only; of two unfoldings the lesser norm counts.
    split = len(masses) - 1
    pairs = zip(norms[split::2], norms[split + 1 :: 2], strict=True)
    vector_best = [vector_norms[0], norms[0], *(jnp.minimum(*pair) for pair in pairs)]
    mass_best = [*mass_norms[:2], *norms[1:split]]
    return _Norms(vector_best, vector_norms), _Norms(mass_best, mass_norms)


def _shares(
    norms: _Norms,
    slacks: Sequence[Array],
    outer: Array,
    tail: Array,
    trace: Array,
    reach: Array,
    rho: Array,
    degrees: int,
) -> tuple[Float[Array, " shares"], Float[Array, ""]]:
    """What each degree adds at most, and the bound by one kernel.

    That kernel has the exponential's coefficients up to the tail and goes on geometrically; its
    quadratic form is all that Cauchy and Schwarz need to know.

    Args:
      norms: of the degrees before the tail.
      slacks: rounding of their tensors, in Frobenius norm.
      outer: what the errors of the atoms may add to the whole.
      tail: operator norm of the sum over pairs with the kernel from the tail on.
      trace: its trace.
      reach: the kernel's s.
      rho: radius of the queries.
      degrees: shares wanted before the last, which takes all that is left.
    """
    unit = unit_roundoff(reach.dtype)
    start = len(norms.operator)
    factors = [rho**degree / math.factorial(degree) for degree in range(start + 1)]
    series = geometric_series(rho, reach[None], start)[0]
    bounds = [
        factor * (norm + slack)
        for factor, norm, slack in zip(factors, norms.operator, slacks, strict=False)
    ]
    rest = sum(bounds[degrees:], start=jnp.sqrt(series) * jnp.sqrt(tail) + outer)
    gain = factors[start] / reach**start
    form, coefficients = gain * trace, series / gain
    for factor, norm, slack in zip(factors, norms.frobenius, slacks, strict=False):
        form, coefficients = form + factor * jnp.square(norm + slack), coefficients + factor
    kernel = jnp.sqrt(form) * jnp.sqrt(coefficients) + outer
    return (1 + 64 * unit) * jnp.stack([*bounds[:degrees], rest]), (1 + 64 * unit) * kernel


def bound_degrees(
    measure: Measure,
    rho: Float[Array, ""],
    blocks: Int[Array, ""],
    *,
    degrees: int,
    block_size: int,
) -> DegreeBounds:
    r"""Bounds every Taylor degree of an exponential sum over the ball of queries.

    Degrees 0 and 1 are the norm of a vector and of a matrix. Degree 2 and, with ``degrees`` 4,
    degree 3 are tensors that are written down; the least operator norm of two unfoldings counts.
    (For wide keys degree 2 is summed over pairs instead.) The rest is
    :func:`coreset_jax.guarantees.tails.tail_bounds`. The tensors of the masses are one degree
    smaller, so that degree 3 is written down as well, and their tail is a quadratic form.

    Every sum is bounded together with its rounding: unit roundoff, times the additions that one
    number goes through within a block and from block to block, times a bound on the sum of the
    absolute terms, in whatever order the terms of one block are added. To that comes what the
    errors of the atoms amount to, each times :math:`e^{\rho\|k\|}`.

    Args:
      measure: the atoms, ``n`` a multiple of ``TILE`` and of ``block_size``.
      rho: radius of the queries.
      blocks: blocks that hold atoms; those behind are not looked at.
      degrees: degrees bounded apart, J, 3 or 4.
      block_size: atoms of a block, a multiple of ``TILE``.

    Returns:
      The bounds, in the units of the vectors and of the masses.
    """
    keys, vectors, masses, vector_errors, mass_errors = measure
    count, width = keys.shape
    unit = unit_roundoff(keys.dtype)
    written = degrees == 4 or width * (width + 1) <= max(count, 2**12)
    sums = _monomial_sums(
        measure, blocks * (block_size // TILE), second=written, third=degrees == 4
    )
    vector_norms, mass_norms = _low_degrees(sums, width, vectors.shape[-1], degrees)
    tails = tail_bounds(
        keys,
        vectors,
        masses,
        rho,
        blocks,
        start=degrees,
        block_size=block_size,
        squares=not written,
    )
    if tails.squares is not None and tails.square_trace is not None:
        vector_norms.operator.append(jnp.sqrt(tails.squares))
        vector_norms.frobenius.append(jnp.sqrt(tails.square_trace))

    key_norms = row_norms(keys)
    # The sums of absolute terms are rounded too.
    crude = 1.1 + count * unit
    rounding = crude * (TILE + count // TILE + 16) * unit

    def slacks(weights: Array) -> list[Array]:
        return [rounding * jnp.sum(weights * key_norms**degree) for degree in range(4)]

    def outer(weights: Array, errors: Array) -> Array:
        total = crude * (jnp.sum(errors) + 3 * unit * rho * jnp.sum(weights * key_norms))
        # No error stays none where the exponential overflows.
        grown = jnp.exp(rho * jnp.max(key_norms) * (1 + (width + 8) * unit)) * total
        return jnp.where(total > 0, grown, jnp.zeros_like(total))

    sizes, absolute = row_norms(vectors), jnp.abs(masses)
    vector_slacks, mass_slacks = slacks(sizes), slacks(absolute)
    numerator, numerator_kernel = _shares(
        vector_norms,
        vector_slacks,
        outer(sizes, vector_errors),
        tails.vectors,
        tails.vector_trace,
        tails.reach,
        rho,
        degrees,
    )
    denominator, denominator_kernel = _shares(
        mass_norms,
        mass_slacks,
        outer(absolute, mass_errors),
        tails.masses,
        tails.masses,
        tails.reach,
        rho,
        degrees,
    )
    value_width = vectors.shape[-1]
    moments = Moments(
        mass=sums.low[0, value_width],
        mass_error=mass_slacks[0] + crude * jnp.sum(mass_errors),
        first=sums.low[1:, value_width],
        first_error=mass_slacks[1]
        + crude * jnp.sum((mass_errors + 4 * unit * absolute) * key_norms),
    )
    return DegreeBounds(numerator, denominator, numerator_kernel, denominator_kernel, moments)
