r"""Attention of sample queries as the target of a fit of weights and values.

With scores :math:`s_{qi}` of the samples and their exact outputs :math:`Y`, attention matching has
weights under which the kept pairs have the mass of all, and then values that answer like all.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Shaped

from coreset_jax._src.attention import PartialAttention, capped, merge, partial_attention
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.geometry.solves import identity_like, one_by_one, regularized_solve
from coreset_jax._src.geometry.standardize import Standardization
from coreset_jax._src.precision import inner_products, matmul, root

# Scores of the samples over the whole cache that are held at a time.
_SCORES = 2**20

# One sample of so many is held back from a fit, to judge it.
_HELD_BACK = 8

# What a fit must leave of their errors in the geometric mean to be taken, and what is nothing
# beside the mean square.
_BETTER = 0.95
_NOTHING = 1e-6

# Steps of a power iteration from ones. The matrices are positive: one singular value stands out.
_POWER_STEPS = 20

# Ridge of the least squares for weights, in roundings of the largest singular value: above the
# rounding of scores, by which copies of a key differ.
_ROUNDINGS = 1000


class QueryTargets(NamedTuple):
    r"""What the attention of one head's sample queries is, and their scores of the kept keys.

    Attributes:
      standardization: the unit problem of the head, in whose units everything here is.
      queries: unit queries ``[q, d]``, to be read with scale 1.
      cache: the state of attention over the whole cache, of unit values ``[q, ...]``.
      scores: of the kept keys ``[q, m]``; :math:`-\infty` in an empty slot.
    """

    standardization: Standardization
    queries: Float[Array, "q d"]
    cache: PartialAttention
    scores: Float[Array, "q m"]

    def outputs(self) -> Float[Array, "q dv"]:
        """Exact attention, of unit values."""
        return self.cache.output / self.cache.total[:, None]

    def squared_errors(
        self, values: Float[Array, "m dv"], log_weights: Float[Array, " m"]
    ) -> Float[Array, " q"]:
        """Squared error for each sample, in unit values, of raw values behind the keys."""
        shares = jax.nn.softmax(self.scores + log_weights.astype(self.scores.dtype)[None], axis=-1)
        unit = self.standardization.unit_values(values)
        errors = matmul(shares, unit) - self.outputs()
        return jnp.sum(jnp.square(errors), axis=-1)


def sampled_attention(
    head: Head, soft_cap: float | None = None
) -> tuple[Float[Array, "q d"], PartialAttention]:
    """Unit sample queries of a head, and their attention over all of its pairs, of unit values.

    Args:
      head: a head with sample queries.
      soft_cap: the cap of scores, static, see :func:`coreset_jax.attention`.

    Returns:
      Unit queries ``[q, d]``, to be read with scale 1, and the state of their attention over unit
      keys and values ``[q, ...]``, which was made of a block of pairs at a time.
    """
    assert head.queries is not None
    standardization, dtype = head.standardization, head.dtype
    unit = standardization.unit_queries(head.queries)
    asked, scale, key_units = _scored_by(head, unit, soft_cap)

    def add(
        state: PartialAttention, block: tuple[Array, Array, Array]
    ) -> tuple[PartialAttention, None]:
        keys, values, log_masses = block
        more = partial_attention(
            asked,
            key_units(keys),
            standardization.unit_values(values),
            log_masses,
            scale=scale,
            soft_cap=soft_cap,
        )
        return merge(state, more), None

    # Made from queries and pairs, so that it varies over the mesh axes that they do.
    zeros = jnp.zeros_like(unit[:, 0]) + jnp.zeros_like(head.keys[0, 0], dtype)
    nothing = PartialAttention(
        zeros - jnp.inf, zeros, zeros[:, None] + jnp.zeros_like(head.values[:1], dtype)
    )
    source = pairs_in_blocks(head, unit.shape[0], head.log_masses, -jnp.inf)
    return unit, jax.lax.scan(add, nothing, source)[0]


def _scored_by(
    head: Head, unit: Float[Array, "q d"], soft_cap: float | None
) -> tuple[Float[Array, "q d"], ArrayLike, Callable[[Array], Array]]:
    """Queries, the scale, and what makes keys of raw ones, between which scores are made.

    Unit keys are centered, by which scores of a query move together. That matters to a cap.
    """
    if soft_cap is None:
        return unit, 1.0, head.standardization.unit_keys
    assert head.queries is not None
    return head.queries.astype(head.dtype), head.scale, lambda keys: keys.astype(head.dtype)


def pairs_in_blocks(
    head: Head, samples: int, marks: Shaped[Array, " n"], no_mark: ArrayLike
) -> tuple[Shaped[Array, "blocks b d"], Shaped[Array, "blocks b dv"], Shaped[Array, "blocks b"]]:
    """Keys, values and a mark of each pair, in blocks whose scores by all samples can be held.

    Behind the last pair there are zeros, and the mark for none.
    """
    width = min(head.count, max(_SCORES // samples, 1))
    blocks = -(-head.count // width)
    rest = blocks * width - head.count
    return (
        jnp.pad(head.keys, ((0, rest), (0, 0))).reshape(blocks, width, -1),
        jnp.pad(head.values, ((0, rest), (0, 0))).reshape(blocks, width, -1),
        jnp.pad(marks, (0, rest), constant_values=no_mark).reshape(blocks, width),
    )


def evaluate(
    head: Head,
    keys: Float[Array, "m d"],
    held: Bool[Array, " m"],
    soft_cap: float | None = None,
) -> QueryTargets:
    """Attention of a head's sample queries over all of its pairs, and their scores of some keys.

    Args:
      head: a head with sample queries.
      keys: raw keys of a coreset of it ``[m, d]``.
      held: which of them are no empty slots ``[m]``.
      soft_cap: the cap of scores, static, see :func:`coreset_jax.attention`.
    """
    unit, cache = sampled_attention(head, soft_cap)
    asked, scale, key_units = _scored_by(head, unit, soft_cap)
    scores = capped(jnp.multiply(scale, inner_products(asked, key_units(keys))), soft_cap)
    scores = jnp.where(held[None], scores, -jnp.inf)
    return QueryTargets(head.standardization, unit, cache, scores)


def held_back(count: int) -> Bool[np.ndarray, " q"]:
    """Which of ``count`` samples a fit may not see, so that they can judge it: the last eighth.

    Samples come in the order of their tokens as a rule: neighbors are alike, and the last ones are
    nearest to those that will come. There are at least two, and of two samples none is left to fit.
    """
    found: np.ndarray = np.arange(count) >= count - max(count // _HELD_BACK, 2)
    return found


def unless_worse(
    targets: QueryTargets,
    head: Head,
    coreset: Coreset,
    info: Info,
    values: Float[Array, "m dv"],
    log_weights: Float[Array, " m"],
    *,
    unseen: Bool[np.ndarray, " q"] | None = None,
) -> tuple[Coreset, Info]:
    """The coreset with other values and weights, unless its error over the samples grows by them.

    Samples that were held back are the better judges. Over these the squared error must fall in the
    mean, and the error in the geometric mean, in which a few samples with large errors do not
    outvote all others: by a twentieth and a standard error.

    Args:
      targets: attention of the samples over the whole head.
      head: the head. A coreset that holds all of it stays what it is.
      coreset: the coreset to be improved.
      info: what has happened before.
      values: raw values ``[m, dv]``.
      log_weights: logarithms of the weights ``[m]``; those of empty slots are not looked at.
      unseen: which samples were held back ``[q]``, static; ``None`` if none of them, and all judge.
    """
    held = jnp.isfinite(coreset.log_weights)
    # What is compared is what is returned, rounded.
    values = values.astype(coreset.values.dtype)
    log_weights = log_weights.astype(coreset.log_weights.dtype)
    squares = [
        targets.squared_errors(coreset.values, coreset.log_weights),
        targets.squared_errors(values, jnp.where(held, log_weights, -jnp.inf)),
    ]
    if unseen is not None:
        squares = [each[np.flatnonzero(unseen)] for each in squares]
    before, after = (jnp.mean(each) for each in squares)
    improved = after < before
    if unseen is not None:
        nothing = _NOTHING * before + jnp.finfo(before.dtype).tiny
        gains = (jnp.log(squares[0] + nothing) - jnp.log(squares[1] + nothing)) / 2
        doubt = jnp.std(gains) / gains.shape[0] ** 0.5
        improved &= jnp.mean(gains) - doubt > -math.log(_BETTER)
    taken = improved & (jnp.sum(held) < head.length) & held
    chosen = coreset._replace(
        values=jnp.where(taken[:, None], values, coreset.values),
        log_weights=jnp.where(taken, log_weights, coreset.log_weights),
    )
    unit = head.standardization.value_radius
    return chosen, info.with_fit(
        improved,
        matched=improved.astype(jnp.int32),
        sample_error_before=unit * root(before),
        sample_error_after=unit * root(jnp.where(improved, after, before)),
    )


def largest_square(matrix: Float[Array, "q m"]) -> Float[Array, ""]:
    """The square of the largest singular value of a matrix without negative entries."""

    def step(_: Array, direction: Array) -> Array:
        image = matmul(matrix, direction)
        direction = matmul(matrix.T, image)
        return direction / jnp.maximum(
            root(jnp.sum(jnp.square(direction))), jnp.finfo(matrix.dtype).tiny
        )

    start = jnp.ones_like(matrix[0]) * matrix.shape[1] ** -0.5
    direction = jax.lax.fori_loop(0, _POWER_STEPS, step, start)
    return jnp.sum(jnp.square(matmul(matrix, direction)))


def _least_squares(
    matrix: Float[Array, "q m"], right: Float[Array, " q"], ridge: Float[Array, ""]
) -> Float[Array, " m"]:
    """Least squares with a ridge by a QR factor, which does not square the condition."""
    eye = identity_like(jnp.zeros_like(matrix, shape=(matrix.shape[1],) * 2))
    orthogonal, triangular = jnp.linalg.qr(jnp.concatenate([matrix, ridge * eye]))
    image = matmul(right, orthogonal[: matrix.shape[0]])
    return jax.scipy.linalg.solve_triangular(triangular, image)


def matched_log_weights(
    masses: Float[Array, "q m"], totals: Float[Array, " q"], *, bound: float, gradient_steps: int
) -> Float[Array, " m"]:
    r"""Logarithms of weights with which the kept masses add up to the totals.

    .. math::
       B = \mathrm{clip}\bigl(\arg\min_B \|E_S B - E 1\|,\; e^{-\mathrm{bound}},
           e^{\mathrm{bound}}\bigr) \text{ and a few steps } B \leftarrow
           \mathrm{clip}\Bigl(B - \tfrac{1}{\sigma_{\max}^2} E_S^T(E_S B - E 1)\Bigr)

    Args:
      masses: :math:`E_S`, ``[q, m]``, none of them negative.
      totals: :math:`E 1`, ``[q]``.
      bound: largest absolute log-weight, static.
      gradient_steps: gradient steps after the clip, static.

    References:
      Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284.
    """
    square = largest_square(masses)
    ridge = _ROUNDINGS * jnp.finfo(masses.dtype).eps * root(square)

    def bounded(weights: Array) -> Array:
        return jnp.clip(weights, jnp.exp(-bound), jnp.exp(bound))

    def step(_: Array, weights: Array) -> Array:
        missing = matmul(masses, weights) - totals
        return bounded(weights - matmul(missing, masses) / square)

    # Where no query sees any kept key the masses are zero.
    square = jnp.where(square > 0, square, 1)
    ridge = jnp.where(ridge > 0, ridge, 1)
    start = bounded(one_by_one(_least_squares)(masses, totals, ridge))
    return jnp.log(jax.lax.fori_loop(0, gradient_steps, step, start))


def matched_values(
    shares: Float[Array, "q m"], outputs: Float[Array, "q dv"], *, ridge: float
) -> Float[Array, "m dv"]:
    r"""Values with which the kept pairs answer like the whole cache.

    .. math:: C = \bigl(X^T X + \mathrm{ridge}\; \sigma_{\max}(X)^2 I\bigr)^{-1} X^T Y

    Args:
      shares: attention of the samples over the kept pairs :math:`X`, ``[q, m]``.
      outputs: exact outputs :math:`Y`, ``[q, dv]``.
      ridge: relative to the largest eigenvalue, static.

    References:
      Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284.
    """
    gram = matmul(shares.T, shares)
    return regularized_solve(
        gram + ridge * largest_square(shares) * identity_like(gram),
        matmul(shares.T, outputs),
        float(jnp.finfo(gram.dtype).eps),
    )
