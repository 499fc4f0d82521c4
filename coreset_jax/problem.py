r"""The exact reduction of a cache to unit keys, unit values and one radius :math:`\rho`.

The theorems speak of keys and values of norm at most one and of queries of norm at most
:math:`\rho`. Every cache is such an instance after an affine change that attention does not see
(*Nearly Optimal Attention Coresets*, Section 2):

- the mean key, subtracted from all keys, cancels between numerator and denominator;
- a factor taken out of the keys goes into the queries, with the softmax scale;
- attention is affine in the values, so their mean and size come out and are put back.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.attention import accumulation_dtype, default_scale


class Reduction(NamedTuple):
    r"""The affine maps between a cache and its unit problem, one a head.

    Attributes:
      key_center: mean key :math:`\bar k`, ``[..., d]``.
      key_radius: :math:`\kappa = \max_i \|k_i - \bar k\|`, ``[...]`` (1 where all keys agree).
      key_spread: root mean square of the unit keys' norms, ``[...]``, at most 1: small where a
        few keys lie far out.
      value_center: mean value :math:`\bar v`, ``[..., dv]``.
      value_radius: :math:`\max_i \|v_i - \bar v\|`, ``[...]`` (1 where all values agree).
      value_spread: root mean square of the unit values' norms, ``[...]``, at most 1.
      rho: radius of the unit queries, ``[...]``.
      scale: the softmax scale that the unit queries have absorbed, ``[...]``.
    """

    key_center: Float[Array, "*heads d"]
    key_radius: Float[Array, "*heads"]
    key_spread: Float[Array, "*heads"]
    value_center: Float[Array, "*heads dv"]
    value_radius: Float[Array, "*heads"]
    value_spread: Float[Array, "*heads"]
    rho: Float[Array, "*heads"]
    scale: Float[Array, "*heads"]


class Calibration(NamedTuple):
    r"""What a cache asks of a coreset, judged by sample queries; one entry a head.

    Attributes:
      query_norm: largest norm of a sample query, ``[...]``.
      rho: radius of the unit queries, :math:`\mathrm{scale}\,\kappa\,\max\|q\|`, ``[...]``.
      rho_quantiles: the same for quantiles of the norms, ``[..., quantiles]``.
      key_radius: :math:`\kappa = \max_i \|k_i - \bar k\|`, ``[...]``.
      key_spread: root mean square distance of the keys over that, ``[...]``.
      dominating: the share of the pairs that have 90 % of a query's attention, in the mean over
        the samples, ``[...]``: small where attention is sharp.
    """

    query_norm: Float[Array, "*heads"]
    rho: Float[Array, "*heads"]
    rho_quantiles: Float[Array, "*heads quantiles"]
    key_radius: Float[Array, "*heads"]
    key_spread: Float[Array, "*heads"]
    dominating: Float[Array, "*heads"]


def check_radius(
    keys: Float[Array, "*heads n d"],
    rho: ArrayLike | None,
    query_norm: ArrayLike | None,
    queries: Float[Array, "*heads q d"] | None,
    scale: float | None,
) -> None:
    """Raises ``ValueError`` unless the arguments name the query radius in at most one way.

    Sample ``queries`` may stand beside a radius, which then wins.
    """
    leading = keys.shape[:-2]
    validation.check_positive("rho", rho, leading)
    validation.check_positive("query_norm", query_norm, leading)
    validation.check_positive("scale", scale)
    if rho is not None and query_norm is not None:
        raise ValueError("rho and query_norm both name the query radius; give one of them.")
    if queries is not None:
        validation.check_queries(queries, keys)


def radius_arrays(keys: Array, values: Array, *radii: ArrayLike | None) -> tuple[Array | None, ...]:
    """Radii as arrays of the dtype of sums, so that Python numbers and arrays share a trace."""
    dtype = accumulation_dtype(keys, values)
    return tuple(None if radius is None else jnp.asarray(radius, dtype) for radius in radii)


def radii_of_heads(
    keys: Float[Array, "*heads n d"], values: Array, *radii: Array | None
) -> tuple[Float[Array, "*heads"] | None, ...]:
    """Radii that are one number or one a head as one a head, sharded as the keys are."""
    zeros = jnp.zeros_like(keys[..., 0, 0], accumulation_dtype(keys, values))
    return tuple(None if radius is None else zeros + radius.astype(zeros.dtype) for radius in radii)


def _center_radius_spread(
    array: Float[Array, "*heads n d"], lengths: Int[Array, "*heads"] | None
) -> tuple[Float[Array, "*heads d"], Float[Array, "*heads"], Float[Array, "*heads"]]:
    # In units of a power of two near the largest number, or squares would under- or overflow.
    inside = jnp.full((), True)
    if lengths is not None:
        inside = (jnp.arange(array.shape[-2]) < jnp.asarray(lengths)[..., None])[..., None]
    peak = jnp.max(jnp.where(inside, jnp.abs(array), 0), axis=(-2, -1), keepdims=True)
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(peak), peak, 0))
    # Well within the exponents of the dtype, so that neither factor over- or underflows. A product
    # with a power of two is exact, and fuses with the sums.
    most = jnp.finfo(array.dtype).maxexp - 8
    unit = jnp.ldexp(jnp.ones_like(peak), jnp.clip(exponent, -most, most))
    center, radius, spread = _scaled_extent(array * (1 / unit), lengths)
    unit = unit[..., 0, 0]
    # Where all rows agree the radius is 1, whatever their size.
    radius = jnp.where(spread > 0, radius * unit, radius)
    return center * unit[..., None], radius, spread


def _scaled_extent(
    array: Float[Array, "*heads n d"], lengths: Int[Array, "*heads"] | None
) -> tuple[Float[Array, "*heads d"], Float[Array, "*heads"], Float[Array, "*heads"]]:
    if lengths is None:
        center = jnp.mean(array, axis=-2)
        squares = jnp.sum(jnp.square(array - center[..., None, :]), axis=-1)
        mean = jnp.mean(squares, axis=-1)
    else:
        # Padding may hold anything: it is selected away, not multiplied by zero.
        inside = jnp.arange(array.shape[-2]) < jnp.asarray(lengths)[..., None]
        array = jnp.where(inside[..., None], array, jnp.zeros_like(array))
        total = jnp.asarray(lengths).astype(array.dtype)
        center = jnp.sum(array, axis=-2) / total[..., None]
        squares = jnp.sum(jnp.square(array - center[..., None, :]), axis=-1)
        squares = jnp.where(inside, squares, jnp.zeros_like(squares))
        mean = jnp.sum(squares, axis=-1) / total
    radius = jnp.sqrt(jnp.max(squares, axis=-1))
    # Rows that all agree differ from their mean by its rounding, which must not be blown up.
    rounding = 64 * jnp.finfo(array.dtype).eps * jnp.max(jnp.abs(array), axis=(-2, -1))
    agree = radius <= rounding * array.shape[-1] ** 0.5
    spread = jnp.where(agree, 0, jnp.sqrt(mean) / radius)
    return center, jnp.where(agree, jnp.ones_like(radius), radius), spread


def reduce(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    *,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    queries: Float[Array, "*heads q d"] | None = None,
    scale: float | None = None,
    lengths: Int[Array, "*heads"] | None = None,
) -> Reduction:
    r"""Finds the unit problem of a cache.

    .. math::
       \kappa = \max_i \|k_i - \bar k\|, \qquad
       \rho = \mathrm{scale} \cdot \kappa \cdot \max\|q\|

    The radius comes from the first of ``rho``, ``query_norm`` and ``queries`` that is given, and
    from ``query_norm = sqrt(d)`` (a Gaussian query) where none is.

    Args:
      keys: keys ``[..., n, d]``.
      values: values ``[..., n, dv]``.
      rho: the radius of unit queries itself, a scalar or ``[...]``.
      query_norm: largest norm of a raw query, a scalar or ``[...]``.
      queries: sample raw queries ``[..., q, d]``; their largest norm is taken.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      lengths: valid pairs of each head ``[...]``; ``None`` means all.

    Returns:
      The reduction, in float32 or wider. A NaN or an infinity among the valid pairs of a head
      makes that head's centers and radii non-finite.

    Raises:
      ValueError: if shapes do not fit or a radius is not positive.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Section 2.

    >>> import jax, jax.numpy as jnp
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 100, 16))
    >>> reduction = reduce(keys, values, query_norm=4.0)
    >>> float(jnp.max(jnp.linalg.norm(unit_keys(reduction, keys), axis=-1)))
    1.0
    """
    validation.check_cache(keys, values)
    validation.check_lengths(lengths, keys)
    check_radius(keys, rho, query_norm, queries, scale)
    dtype = accumulation_dtype(keys, values)
    key_center, key_radius, key_spread = _center_radius_spread(keys.astype(dtype), lengths)
    value_center, value_radius, value_spread = _center_radius_spread(values.astype(dtype), lengths)
    softmax_scale = jnp.full_like(
        key_radius, default_scale(keys.shape[-1]) if scale is None else scale
    )
    if rho is not None:
        radius = jnp.asarray(rho, dtype)
    elif query_norm is not None:
        radius = softmax_scale * key_radius * jnp.asarray(query_norm, dtype)
    elif queries is not None:
        norms = jnp.linalg.norm(queries.astype(dtype), axis=-1)
        # All-zero samples ask nothing; a tiny radius keeps the reduction invertible.
        largest = jnp.maximum(jnp.max(norms, axis=-1), jnp.finfo(dtype).eps)
        radius = softmax_scale * key_radius * largest
    else:
        radius = softmax_scale * key_radius * keys.shape[-1] ** 0.5
    return Reduction(
        key_center,
        key_radius,
        key_spread,
        value_center,
        value_radius,
        value_spread,
        jnp.broadcast_to(radius, key_radius.shape),
        softmax_scale,
    )


def unit_keys(reduction: Reduction, keys: Float[Array, "*heads n d"]) -> Float[Array, "*heads n d"]:
    r"""Centered keys of norm at most one: :math:`(k - \bar k)/\kappa`."""
    centered = keys - reduction.key_center[..., None, :]
    return centered / reduction.key_radius[..., None, None]


def restore_keys(
    reduction: Reduction, unit: Float[Array, "*heads n d"]
) -> Float[Array, "*heads n d"]:
    """The inverse of :func:`unit_keys`."""
    return unit * reduction.key_radius[..., None, None] + reduction.key_center[..., None, :]


def unit_values(
    reduction: Reduction, values: Float[Array, "*heads n dv"]
) -> Float[Array, "*heads n dv"]:
    r"""Centered values of norm at most one: :math:`(v - \bar v)/\max\|v - \bar v\|`."""
    centered = values - reduction.value_center[..., None, :]
    return centered / reduction.value_radius[..., None, None]


def restore_values(
    reduction: Reduction, unit: Float[Array, "*heads n dv"]
) -> Float[Array, "*heads n dv"]:
    """The inverse of :func:`unit_values`; it takes attention outputs back as well."""
    return unit * reduction.value_radius[..., None, None] + reduction.value_center[..., None, :]


def unit_queries(
    reduction: Reduction, queries: Float[Array, "*heads q d"]
) -> Float[Array, "*heads q d"]:
    r"""Queries of the unit problem, :math:`\mathrm{scale}\,\kappa\,q`, read with scale 1."""
    return queries * (reduction.scale * reduction.key_radius)[..., None, None]


def restore_queries(
    reduction: Reduction, unit: Float[Array, "*heads q d"]
) -> Float[Array, "*heads q d"]:
    """The inverse of :func:`unit_queries`."""
    return unit / (reduction.scale * reduction.key_radius)[..., None, None]


def calibrate(
    keys: Float[Array, "*heads n d"],
    queries: Float[Array, "*heads q d"],
    *,
    scale: float | None = None,
    lengths: Int[Array, "*heads"] | None = None,
    quantiles: Sequence[float] = (0.5, 0.9, 0.99),
    mass: float = 0.9,
) -> Calibration:
    r"""Measures which case of the theory a cache is: its radius, and how sharp its attention is.

    .. math:: \rho = \mathrm{scale} \cdot \max_i \|k_i - \bar k\| \cdot \max \|q\|

    Up to :math:`\rho` of 3 or 4 errors can be certified; beyond, :math:`e^\rho` promises
    nothing, and what a coreset gives is what it measures. Where few pairs dominate, no fixed
    share of them serves all queries.

    Args:
      keys: cached keys ``[..., n, d]``.
      queries: raw queries that read them ``[..., q, d]``, those of a group one after another.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      lengths: valid pairs of each head ``[...]``; ``None`` means all.
      quantiles: of the norms of the queries, each between 0 and 1.
      mass: the share of the attention in ``dominating``.

    Returns:
      The calibration, in float32 or wider.

    Raises:
      ValueError: if shapes do not fit, or a quantile or ``mass`` lies outside 0..1.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Section 2.

    >>> import jax
    >>> keys, queries = jax.random.normal(jax.random.key(0), (2, 4, 256, 16))
    >>> calibration = calibrate(keys, queries)
    >>> calibration.rho.shape, calibration.rho_quantiles.shape
    ((4,), (4, 3))
    """
    validation.check_cache(keys, keys)
    validation.check_queries(queries, keys)
    validation.check_lengths(lengths, keys)
    validation.check_positive("scale", scale)
    for name, shares in (("quantiles", tuple(quantiles)), ("mass", (mass,))):
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"{name} must lie between 0 and 1, got {shares}.")
    scale = default_scale(keys.shape[-1]) if scale is None else scale
    return _calibrate(keys, queries, lengths, scale, jnp.asarray(quantiles), mass)


@jax.jit
def _calibrate(
    keys: Float[Array, "*heads n d"],
    queries: Float[Array, "*heads q d"],
    lengths: Int[Array, "*heads"] | None,
    scale: ArrayLike,
    quantiles: Float[Array, " quantiles"],
    mass: ArrayLike,
) -> Calibration:
    dtype = accumulation_dtype(keys, queries)
    keys, queries = keys.astype(dtype), queries.astype(dtype)
    scale, mass = jnp.asarray(scale, dtype), jnp.asarray(mass, dtype)
    _, key_radius, key_spread = _center_radius_spread(keys, lengths)
    norms = jnp.linalg.norm(queries, axis=-1)
    unit = scale * key_radius
    levels = jnp.moveaxis(jnp.quantile(norms, quantiles.astype(dtype), axis=-1), 0, -1)

    def one_head(keys: Array, queries: Array, length: Array) -> Array:
        inside = jnp.arange(keys.shape[0]) < length

        def one_query(query: Array) -> Array:
            scores = scale * jnp.matmul(
                jnp.where(inside[:, None], keys, 0), query, precision=jax.lax.Precision.HIGHEST
            )
            masses = jax.nn.softmax(jnp.where(inside, scores, -jnp.inf))
            # As many as it takes; those before the last one have less.
            gathered = jnp.cumsum(-jnp.sort(-masses))
            return jnp.minimum(1 + jnp.sum(gathered < mass), length) / length

        return jnp.mean(jax.lax.map(one_query, queries, batch_size=16))

    counts = jnp.zeros_like(norms[..., 0], jnp.int32) + (
        keys.shape[-2] if lengths is None else jnp.asarray(lengths).astype(jnp.int32)
    )
    for _ in keys.shape[:-2]:
        one_head = jax.vmap(one_head)
    return Calibration(
        jnp.max(norms, axis=-1),
        unit * jnp.max(norms, axis=-1),
        unit[..., None] * levels,
        key_radius,
        key_spread,
        one_head(keys, queries, counts),
    )
