r"""The error of a summary: a sketch that can be cancelled, and a ledger that bounds it.

The error of weighted pairs against the pairs that they stand for is a signed measure,

.. math:: \mathcal{E} = \sum_{\text{kept}} w_i\,\delta_{k_i} [v_i, 1]
          - \sum_{\text{absorbed}} \delta_{k_i} [v_i, 1],

of numerator and denominator at once. The *sketch* is its projection to a few landmark keys: linear,
so that errors add up in it, and independent of the geometry in which pairs are balanced. The
*ledger* adds up what every halving can have done to any query.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src.attention import default_scale
from coreset_jax._src.balance.walks import Walk
from coreset_jax._src.core.compressor import Compressor
from coreset_jax._src.geometry.kernel_geometry import Geometry, default_kernel_radius
from coreset_jax._src.geometry.kernels import exponential_kernel
from coreset_jax._src.geometry.solves import regularized_inverse
from coreset_jax._src.geometry.standardize import Standardization
from coreset_jax._src.precision import inner_products, matmul

# Weights are powers of two from 2^0 on, up to a factor: as many classes as an int32 counts.
LEVELS = 32


class Pairs(NamedTuple):
    """Weighted pairs of one head, in any order.

    Attributes:
      keys: keys ``[s, d]``.
      values: values ``[s, dv]``.
      weights: how many absorbed pairs each stands for ``[s]``; 0 in an empty slot.
      positions: their places in the stream ``[s]``, int32; -1 in an empty slot.
    """

    keys: Float[Array, "s d"]
    values: Float[Array, "s dv"]
    weights: Float[Array, " s"]
    positions: Int[Array, " s"]


class Settings(NamedTuple):
    """What of a summary is fixed at compile time.

    Attributes:
      block_size: pairs that one halving looks at, even.
      query_norm: largest norm of a raw query.
      scale: the softmax scale.
      walk: the walk that picks the signs.
      max_swaps: swaps that may refine them.
      ridge: regularization of the landmarks' Gram matrix, relative to its diagonal.
      compressor: what halves instead of the walk, without feedback; ``None`` for the walk.
    """

    block_size: int
    query_norm: float
    scale: float
    walk: Walk
    max_swaps: int
    ridge: float
    compressor: Compressor | None

    @classmethod
    def at_width(
        cls, width: int, *, query_norm: float | None, scale: float | None, **options: Any
    ) -> "Settings":
        """Settings for keys of a width, which decides what is ``None``."""
        query_norm = width**0.5 if query_norm is None else query_norm
        scale = default_scale(width) if scale is None else scale
        return cls(query_norm=query_norm, scale=scale, **options)


class Sketch(NamedTuple):
    r"""The error measure, projected to landmarks.

    Attributes:
      landmarks: raw keys ``[l, d]``, in the dtype of the pairs.
      coefficients: :math:`a`, such that :math:`\mathcal{E} \approx \sum_l \delta_l\, a_l`,
        ``[l, dv + 1]``; raw values, so that it outlives any change of geometry.
      placed: pairs that had been absorbed when the landmarks were chosen; 0 before that.
    """

    landmarks: Float[Array, "l d"]
    coefficients: Float[Array, "l dv1"]
    placed: Int[Array, ""]


class Ledger(NamedTuple):
    r"""What every halving has added to the error, at most.

    For raw queries up to the norm the summary was made for, and keys and values measured from the
    centers below, the error of the numerator is at most the sum of ``numerator``, and that of the
    denominator at most the sum of ``denominator``.

    Attributes:
      key_center: where keys are measured from ``[d]``; fixed by the first halving.
      value_center: the same for values ``[dv]``.
      key_radius: largest distance of a key from there so far.
      value_radius: the same for values.
      key_sum: sum of all absorbed keys ``[d]``.
      numerator: bounds by weight class ``[levels]``.
      denominator: bounds by weight class ``[levels]``.
    """

    key_center: Float[Array, " d"]
    value_center: Float[Array, " dv"]
    key_radius: Float[Array, ""]
    value_radius: Float[Array, ""]
    key_sum: Float[Array, " d"]
    numerator: Float[Array, " levels"]
    denominator: Float[Array, " levels"]


def weighted_standardization(
    pairs: Pairs, ledger: Ledger, fresh: Bool[Array, ""], settings: Settings
) -> Standardization:
    """The unit problem of weighted pairs, around the centers of the ledger unless ``fresh``."""
    dtype = pairs.weights.dtype
    keys, values = pairs.keys.astype(dtype), pairs.values.astype(dtype)
    inside = pairs.weights > 0
    total = jnp.maximum(jnp.sum(pairs.weights), 1)

    def extent(rows: Array, center: Array, radius: Array) -> tuple[Array, Array, Array]:
        mean = matmul(pairs.weights, rows) / total
        center = jnp.where(fresh, mean, center)
        squares = jnp.where(inside, jnp.sum(jnp.square(rows - center[None]), axis=-1), 0)
        radius = jnp.maximum(jnp.sqrt(jnp.max(squares)), jnp.where(fresh, 0, radius))
        radius = jnp.where(radius > 0, radius, 1)
        return center, radius, jnp.sqrt(jnp.sum(pairs.weights * squares) / total) / radius

    key_center, key_radius, key_spread = extent(keys, ledger.key_center, ledger.key_radius)
    value_center, value_radius, value_spread = extent(
        values, ledger.value_center, ledger.value_radius
    )
    scale, query_norm = (
        jnp.full_like(key_radius, each) for each in (settings.scale, settings.query_norm)
    )
    return Standardization(
        key_center,
        key_radius,
        key_spread,
        value_center,
        value_radius,
        value_spread,
        scale * key_radius * query_norm,
        scale,
        query_norm,
        jnp.ones_like(key_center),
    )


def recentered(ledger: Ledger, standardization: Standardization) -> Ledger:
    """The ledger with the centers and radii of a unit problem."""
    names = ("key_center", "value_center", "key_radius", "value_radius")
    return ledger._replace(**{name: getattr(standardization, name) for name in names})


def landmark_keys(pairs: Pairs, landmarks: int) -> Float[Array, "l d"]:
    """Keys at even distances in the stream."""
    inside = pairs.weights > 0
    order = jnp.argsort(jnp.where(inside, pairs.positions, jnp.iinfo(jnp.int32).max))
    places = jnp.arange(landmarks) * jnp.sum(inside) // landmarks
    return pairs.keys[order[places]]


def solver(
    geometry: Geometry, landmarks: Float[Array, "l d"], settings: Settings
) -> Float[Array, "l l"]:
    r"""The regularized inverse :math:`(E_{LL} + \lambda I)^{-1}` of the landmarks' Gram matrix."""
    centers = geometry.keys(landmarks)
    gram = exponential_kernel(centers, centers, geometry.radius)
    return regularized_inverse(gram, settings.ridge)


def coefficients(masses: Float[Array, " b"], values: Float[Array, "b dv"]) -> Float[Array, "b dv1"]:
    """``masses * [values, 1]``: what pairs add to numerator and denominator."""
    return masses[:, None] * jnp.concatenate([values, jnp.ones_like(values[:, :1])], axis=-1)


def projection(
    geometry: Geometry,
    landmarks: Float[Array, "l d"],
    solver: Float[Array, "l l"],
    keys: Float[Array, "b d"],
    coefficients: Float[Array, "b dv1"],
) -> Float[Array, "l dv1"]:
    """The projection to landmarks, with their ``solver``, of ``coefficients`` at other keys.

    Landmarks and keys are raw; the keys may be all those of a cache.
    """
    return matmul(solver, geometry.moments(geometry.keys(landmarks), keys, coefficients))


def bounds(
    standardization: Standardization,
    keys: Float[Array, "b d"],
    numerators: Float[Array, "b dv"],
    masses: Float[Array, " b"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Bounds of :math:`\|\sum_i e^{\langle q, k_i\rangle} c_i\|` over the ball of queries.

    Args:
      standardization: the unit problem.
      keys: unit keys.
      numerators: the numerator's :math:`c_i`, centered values times their coefficients.
      masses: the denominator's.
    """
    radius = default_kernel_radius(standardization)
    # The factor of the kernel is taken out, or one key far out would leave no digits to the rest.
    exponents = radius * inner_products(keys, keys)
    largest = jnp.max(exponents)
    kernel = jnp.exp(exponents - largest)
    factor = jnp.exp((jnp.square(standardization.rho) / radius + largest) / 2)

    # What rounding may take off a sum of products, relative to the sum of their magnitudes: both
    # inner products, and the exponent's error times the radius.
    width = keys.shape[-1] * (1 + radius) + numerators.shape[-1] + keys.shape[0] + 4
    allowance = width * jnp.finfo(keys.dtype).eps

    def norm(products: Array, sizes: Array) -> Array:
        # Where the factor overflows, nothing times it is still nothing.
        magnitude = jnp.sum(kernel * sizes[:, None] * sizes[None])
        square = jnp.sum(kernel * products) + allowance * magnitude
        return jnp.where(square > 0, factor * jnp.sqrt(square), 0 * square)

    sizes = jnp.sqrt(jnp.sum(jnp.square(numerators), axis=-1))
    numerator = norm(inner_products(numerators, numerators), sizes)
    return numerator, norm(masses[:, None] * masses[None], jnp.abs(masses))
