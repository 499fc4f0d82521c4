"""A source and its coreset as the atoms of one exponential sum, which is how they disagree."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src.core.coreset import Coreset, SignedCoreset, normalizers
from coreset_jax._src.geometry.standardize import Standardization
from coreset_jax.guarantees.degrees import Measure
from coreset_jax.guarantees.norms import row_norms, unit_roundoff


class Atoms(NamedTuple):
    """Source and coreset of one head as atoms of the unit problem.

    Attributes:
      difference: source minus coreset.
      coreset: the coreset alone.
      source_norm: the largest norm of a value of the source.
      coreset_norm: and of the coreset, infinite if its output is no convex combination of them.
      finite: whether everything is.
    """

    difference: Measure
    coreset: Measure
    source_norm: Float[Array, ""]
    coreset_norm: Float[Array, ""]
    finite: Bool[Array, ""]


def holds_pairs_of(
    coreset: Coreset | SignedCoreset,
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    length: Int[Array, ""],
) -> Bool[Array, ""]:
    """Whether all pairs of a coreset are, bit by bit, distinct pairs of the source."""
    if isinstance(coreset, SignedCoreset):
        return jnp.zeros_like(length, bool)
    indices, empty = coreset.indices, jnp.isneginf(coreset.log_weights)
    rows = jnp.clip(indices, 0, keys.shape[0] - 1)
    alike = jnp.all(keys[rows] == coreset.keys, axis=-1)
    alike &= jnp.all(values[rows] == coreset.values, axis=-1)
    alike &= (indices >= 0) & (indices < length)
    ascending = indices[1:] > indices[:-1]
    return jnp.all(alike | empty) & jnp.all(ascending | empty[1:] | empty[:-1])


def _weights(
    pairs: Coreset | SignedCoreset, dtype: jnp.dtype, error: Float[Array, ""] | float
) -> tuple[Array, Array, Array]:
    """Weights, normalizers, and the relative error of a weight in unit roundoffs.

    Args:
      pairs: a coreset, or the source.
      dtype: of the weights.
      error: of the log-weights, in unit roundoffs.
    """
    log_weights = pairs.log_weights.astype(dtype)
    heaviest = jnp.max(log_weights)
    logarithms = log_weights - jnp.where(jnp.isneginf(heaviest), 0, heaviest)
    weights, taken = jnp.exp(logarithms), log_weights > -jnp.inf
    signs = jnp.where(taken, normalizers(pairs).astype(dtype), jnp.zeros_like(weights))
    # Any common factor of the weights is as good as another: it cancels. The sum makes numerator
    # and denominator comparable with the source's.
    total = jnp.sum(weights * signs)
    absolute = jnp.sum(weights * jnp.abs(signs))
    total = jnp.where(total > 0, total, jnp.where(absolute > 0, absolute, 1))
    # Attention works with logarithms, and reads what underflows here: such a weight is somewhere
    # between nothing and twice the least number.
    least = 1024 * jnp.finfo(dtype).tiny
    weights = jnp.where(taken, jnp.maximum(weights / total, least), 0)
    # Roundings of the logarithm, which the exponential magnifies, of itself, and of the quotient.
    errors = 32 + 2 * jnp.abs(logarithms) + 2 * error
    errors = jnp.where(weights > least, errors, 1 / unit_roundoff(dtype))
    return weights, signs, jnp.where(taken, errors, 0)


def atoms_of(
    source: Coreset,
    coreset: Coreset | SignedCoreset,
    standardization: Standardization,
    held: Bool[Array, ""],
    error: Float[Array, ""] | None,
    block_size: int,
) -> Atoms:
    """The atoms of one head.

    The atoms of both sides stand one behind the other. Where the coreset's pairs are the source's,
    a kept pair is one atom instead, with the difference of both weights: fewer atoms, and no
    cancellation between them.

    Args:
      source: all pairs, with log-weights that are minus infinity on padding.
      coreset: its coreset.
      standardization: the unit problem.
      held: whether the coreset's pairs are the source's, see :func:`holds_pairs_of`.
      error: of all log-weights, in unit roundoffs; ``None`` if those of the source are zero.
      block_size: atoms are padded to a multiple of it.
    """
    dtype = standardization.rho.dtype
    unit = unit_roundoff(dtype)
    count = source.keys.shape[0]
    inside = source.log_weights > -jnp.inf
    weights, signs, weight_errors = _weights(coreset, dtype, 0.0 if error is None else error)
    taken = weights > 0

    def shown(mask: Array, rows: Array) -> Array:
        # What is masked may hold anything: it is selected away, not multiplied by zero.
        return jnp.where(mask[:, None], rows, jnp.zeros_like(rows))

    kept_keys = shown(taken, standardization.unit_keys(coreset.keys))
    # Values of a signed coreset are coefficients of the output, which a mean value enters times
    # the normalizer.
    shift = signs[:, None] * standardization.value_center
    kept_values = shown(
        taken, (coreset.values.astype(dtype) - shift) / standardization.value_radius
    )
    kept_norms = row_norms(kept_values)
    # A difference of two numbers is exact but for its last rounding; a product in it is not.
    shift_errors = jnp.zeros_like(kept_norms)
    if isinstance(coreset, SignedCoreset):
        shift_errors = 4 * unit * row_norms(shift) / standardization.value_radius
    kept_masses = weights * signs
    mass_errors = unit * weight_errors * jnp.abs(kept_masses)
    vector_errors = weights * (unit * weight_errors * kept_norms + shift_errors)
    kept = Measure(
        kept_keys, weights[:, None] * kept_values, kept_masses, vector_errors, mass_errors
    )
    ratios = (kept_norms + shift_errors) / jnp.where(taken, signs, 1)
    convex = jnp.all((signs > 0) | ~taken) & jnp.any(taken)

    rows = jnp.where(held & taken, coreset.indices, count)
    if error is None:
        masses = jnp.where(inside, 1 / jnp.sum(inside, dtype=dtype), 0)
        errors = jnp.zeros_like(masses)
    else:
        masses, _, roundings = _weights(source, dtype, error)
        errors = unit * roundings * masses
    errors = errors.at[rows].add(mass_errors, mode="drop")
    masses = masses.at[rows].add(-kept_masses, mode="drop")
    errors += 4 * unit * jnp.abs(masses)
    source_values = shown(inside, standardization.unit_values(source.values))
    source_norms = row_norms(source_values)
    given = Measure(
        shown(inside, standardization.unit_keys(source.keys)),
        masses[:, None] * source_values,
        masses,
        source_norms * (errors + 8 * unit * jnp.abs(masses)),
        errors,
    )
    own = jnp.where(held, 0, 1).astype(dtype)
    taken_away = Measure(*(own * array for array in kept))
    taken_away = taken_away._replace(vectors=-taken_away.vectors, masses=-taken_away.masses)

    def padded(array: Array) -> Array:
        missing = -array.shape[0] % block_size
        return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))

    # Padding of the source is no part of it; everything of the coreset is read by attention.
    numbers = [*standardization, coreset.keys, coreset.values, signs]
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(array)) for array in numbers]))
    finite &= jnp.all(coreset.log_weights < jnp.inf) & jnp.all(source.log_weights < jnp.inf)
    grow = 1 + 64 * unit
    return Atoms(
        difference=Measure(*map(padded, map(_behind, given, taken_away))),
        coreset=Measure(*map(padded, kept)),
        source_norm=grow * jnp.max(source_norms),
        coreset_norm=jnp.where(convex, grow * jnp.max(ratios), jnp.inf),
        finite=finite,
    )


def _behind(first: Array, second: Array) -> Array:
    return jnp.concatenate([first, second])
