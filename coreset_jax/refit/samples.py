r"""What sample queries hear of a cache, and fits of what stands behind some keys to that.

With scores :math:`s_{qi}` of the samples and their exact outputs :math:`Y`, attention matching has
weights under which the kept pairs have the mass of all, and then values that answer like all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax.attention import PartialAttention, merge, partial_attention
from coreset_jax.coreset import Coreset
from coreset_jax.kernels import inner_products, one_by_one, regularized_solve
from coreset_jax.problem import Reduction, unit_keys, unit_queries, unit_values

HIGHEST = jax.lax.Precision.HIGHEST

# Scores of the samples over the whole cache that are held at a time.
_SCORES = 2**20

# Steps of a power iteration from ones. The matrices are positive: one singular value stands out.
_POWER_STEPS = 20

# Ridge of the least squares for weights, in roundings of the largest singular value: above the
# rounding of scores, by which copies of a key differ.
_ROUNDINGS = 1000


class Hearing(NamedTuple):
    r"""What the samples of one head hear: of the whole cache, and of the keys that are kept.

    Attributes:
      reduction: the unit problem of the head, in whose units everything here is.
      queries: unit queries ``[q, d]``, to be read with scale 1.
      cache: the state of attention over the whole cache, of unit values ``[q, ...]``.
      scores: of the kept keys ``[q, m]``; :math:`-\infty` in an empty slot.
    """

    reduction: Reduction
    queries: Float[Array, "q d"]
    cache: PartialAttention
    scores: Float[Array, "q m"]

    def outputs(self) -> Float[Array, "q dv"]:
        """Exact attention, of unit values."""
        return self.cache.output / self.cache.total[:, None]

    def miss(
        self, values: Float[Array, "m dv"], log_weights: Float[Array, " m"]
    ) -> Float[Array, ""]:
        """Mean squared error over the samples, in unit values, of raw values behind the keys."""
        shares = jax.nn.softmax(self.scores + log_weights.astype(self.scores.dtype)[None], axis=-1)
        unit = unit_values(self.reduction, values.astype(shares.dtype))
        heard = jnp.matmul(shares, unit, precision=HIGHEST)
        return jnp.mean(jnp.sum(jnp.square(heard - self.outputs()), axis=-1))


def hear(
    reduction: Reduction,
    queries: Float[Array, "q d"],
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    inside: Bool[Array, " n"],
    coreset: Coreset,
) -> Hearing:
    """Asks the whole cache, a block of its pairs at a time, and the kept keys.

    Args:
      reduction: the unit problem of the head.
      queries: raw queries ``[q, d]``.
      keys: raw keys ``[n, d]``; any finite numbers in padding.
      values: raw values ``[n, dv]``, likewise.
      inside: which pairs are no padding ``[n]``.
      coreset: whose keys are asked.
    """
    dtype = reduction.rho.dtype
    unit = unit_queries(reduction, queries.astype(dtype))
    count = keys.shape[0]
    width = min(count, max(_SCORES // queries.shape[0], 1))
    blocks = -(-count // width)
    rest = blocks * width - count
    source = (
        jnp.pad(keys, ((0, rest), (0, 0))).reshape(blocks, width, -1),
        jnp.pad(values, ((0, rest), (0, 0))).reshape(blocks, width, -1),
        jnp.pad(inside, (0, rest)).reshape(blocks, width),
    )

    def ask(
        heard: PartialAttention, block: tuple[Array, Array, Array]
    ) -> tuple[PartialAttention, None]:
        keys, values, inside = block
        more = partial_attention(
            unit,
            unit_keys(reduction, keys.astype(dtype)),
            unit_values(reduction, values.astype(dtype)),
            jnp.where(inside, 0, -jnp.inf).astype(dtype),
            scale=1.0,
        )
        return merge(heard, more), None

    # Made from what is asked, so that it varies over the mesh axes that they do.
    zeros = jnp.zeros_like(unit[:, 0]) + jnp.zeros_like(keys[0, 0], dtype)
    nothing = PartialAttention(
        zeros - jnp.inf, zeros, zeros[:, None] + jnp.zeros_like(values[:1], dtype)
    )
    cache, _ = jax.lax.scan(ask, nothing, source)
    scores = inner_products(unit, unit_keys(reduction, coreset.keys.astype(dtype)))
    held = jnp.isfinite(coreset.log_weights)
    return Hearing(reduction, unit, cache, jnp.where(held[None], scores, -jnp.inf))


def unless_worse(
    hearing: Hearing,
    length: Int[Array, ""],
    coreset: Coreset,
    values: Float[Array, "m dv"],
    log_weights: Float[Array, " m"],
) -> Coreset:
    """The coreset with other values and weights, or as it was where the samples hear no gain.

    Args:
      hearing: what the samples hear.
      length: pairs of the head. A coreset that holds all of them stays what it is.
      coreset: the coreset to be mended.
      values: raw values ``[m, dv]``.
      log_weights: logarithms of the weights ``[m]``; those of empty slots are not looked at.

    Returns:
      The coreset; with NaN log-weights if a sample holds a NaN or an infinity.
    """
    held = jnp.isfinite(coreset.log_weights)
    # What is compared is what is returned, rounded.
    values = values.astype(coreset.values.dtype)
    log_weights = log_weights.astype(coreset.log_weights.dtype)
    before = hearing.miss(coreset.values, coreset.log_weights)
    better = hearing.miss(values, jnp.where(held, log_weights, -jnp.inf)) < before
    better &= jnp.sum(held) < length
    taken = better & held
    log_weights = jnp.where(taken, log_weights, coreset.log_weights)
    finite = jnp.all(jnp.isfinite(hearing.queries))
    return coreset._replace(
        values=jnp.where(taken[:, None], values, coreset.values),
        log_weights=jnp.where(finite, log_weights, jnp.nan),
    )


def largest_square(matrix: Float[Array, "q m"]) -> Float[Array, ""]:
    """The square of the largest singular value of a matrix without negative entries."""

    def step(_: Array, direction: Array) -> Array:
        image = jnp.matmul(matrix, direction, precision=HIGHEST)
        direction = jnp.matmul(matrix.T, image, precision=HIGHEST)
        return direction / jnp.maximum(jnp.linalg.norm(direction), jnp.finfo(matrix.dtype).tiny)

    start = jnp.ones_like(matrix[0]) * matrix.shape[1] ** -0.5
    direction = jax.lax.fori_loop(0, _POWER_STEPS, step, start)
    return jnp.sum(jnp.square(jnp.matmul(matrix, direction, precision=HIGHEST)))


def _least_squares(
    matrix: Float[Array, "q m"], right: Float[Array, " q"], ridge: Float[Array, ""]
) -> Float[Array, " m"]:
    """Least squares with a ridge by a QR factor, which does not square the condition."""
    eye = jnp.zeros_like(matrix, shape=(matrix.shape[1],) * 2) + jnp.eye(
        matrix.shape[1], dtype=matrix.dtype
    )
    orthogonal, triangular = jnp.linalg.qr(jnp.concatenate([matrix, ridge * eye]))
    image = jnp.matmul(right, orthogonal[: matrix.shape[0]], precision=HIGHEST)
    return jax.scipy.linalg.solve_triangular(triangular, image)


def matched_log_weights(
    masses: Float[Array, "q m"], totals: Float[Array, " q"], *, bound: float, steps: int
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
      steps: gradient steps after the clip, static.

    References:
      Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284.
    """
    square = largest_square(masses)
    ridge = _ROUNDINGS * jnp.finfo(masses.dtype).eps * jnp.sqrt(square)

    def bounded(weights: Array) -> Array:
        return jnp.clip(weights, jnp.exp(-bound), jnp.exp(bound))

    def step(_: Array, weights: Array) -> Array:
        missing = jnp.matmul(masses, weights, precision=HIGHEST) - totals
        return bounded(weights - jnp.matmul(missing, masses, precision=HIGHEST) / square)

    # Where no query sees any kept key the masses are zero.
    square = jnp.where(square > 0, square, 1)
    ridge = jnp.where(ridge > 0, ridge, 1)
    start = bounded(one_by_one(_least_squares)(masses, totals, ridge))
    return jnp.log(jax.lax.fori_loop(0, steps, step, start))


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
    gram = jnp.matmul(shares.T, shares, precision=HIGHEST)
    eye = jnp.zeros_like(gram) + jnp.eye(gram.shape[0], dtype=gram.dtype)
    return regularized_solve(
        gram + ridge * largest_square(shares) * eye,
        jnp.matmul(shares.T, outputs, precision=HIGHEST),
        float(jnp.finfo(gram.dtype).eps),
    )
