r"""The exact change of a cache to unit keys, unit values and one radius :math:`\rho`.

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
from jaxtyping import Array, Float, Integer

from coreset_jax._src import checks
from coreset_jax._src.attention import default_scale
from coreset_jax._src.geometry.channels import channel_units
from coreset_jax._src.precision import accumulation_dtype, matmul, root


class Standardization(NamedTuple):
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
      query_norm: largest norm of a raw query, :math:`\rho / (\mathrm{scale}\,\kappa)`, ``[...]``:
        the same for every part of a cache, where :math:`\rho` is not.
      key_units: factors of the channels :math:`D`, ``[..., d]``. Keys are multiplied by them and
        queries divided, before anything else; ``key_radius`` and ``rho`` are measured after that.
        All are one unless wide channels are narrowed; see
        :func:`coreset_jax._src.geometry.channels.channel_units`.
    """

    key_center: Float[Array, "*heads d"]
    key_radius: Float[Array, "*heads"]
    key_spread: Float[Array, "*heads"]
    value_center: Float[Array, "*heads dv"]
    value_radius: Float[Array, "*heads"]
    value_spread: Float[Array, "*heads"]
    rho: Float[Array, "*heads"]
    scale: Float[Array, "*heads"]
    query_norm: Float[Array, "*heads"]
    key_units: Float[Array, "*heads d"]

    def unit_keys(self, keys: Float[Array, "*heads n d"]) -> Float[Array, "*heads n d"]:
        r"""Centered keys of norm at most one: :math:`D (k - \bar k)/\kappa`."""
        keys = keys.astype(self.rho.dtype)
        factors = (1 / self.key_radius)[..., None, None] * self._units()
        return (keys - self.key_center[..., None, :]) * factors

    def restore_keys(self, unit: Float[Array, "*heads n d"]) -> Float[Array, "*heads n d"]:
        """The inverse of :meth:`unit_keys`."""
        factors = self.key_radius[..., None, None] / self._units()
        return unit * factors + self.key_center[..., None, :]

    def _units(self) -> Float[Array, "*heads 1 d"]:
        return self.key_units[..., None, :]

    def unit_values(self, values: Float[Array, "*heads n dv"]) -> Float[Array, "*heads n dv"]:
        r"""Centered values of norm at most one: :math:`(v - \bar v)/\max\|v - \bar v\|`."""
        values = values.astype(self.rho.dtype)
        return (values - self.value_center[..., None, :]) * (1 / self.value_radius)[..., None, None]

    def restore_values(self, unit: Float[Array, "*heads n dv"]) -> Float[Array, "*heads n dv"]:
        """The inverse of :meth:`unit_values`; it takes attention outputs back as well."""
        return unit * self.value_radius[..., None, None] + self.value_center[..., None, :]

    def unit_queries(self, queries: Float[Array, "*heads q d"]) -> Float[Array, "*heads q d"]:
        r"""Queries of the unit problem, read with scale 1: :math:`s \kappa D^{-1} q`."""
        queries = queries.astype(self.rho.dtype)
        return queries * ((self.scale * self.key_radius)[..., None, None] / self._units())

    def restore_queries(self, unit: Float[Array, "*heads q d"]) -> Float[Array, "*heads q d"]:
        """The inverse of :meth:`unit_queries`."""
        return unit / ((self.scale * self.key_radius)[..., None, None] / self._units())


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
      query_center: the mean query :math:`\mu`, ``[..., d]``.
      centered_rho: :math:`\mathrm{scale}\,\kappa\,\max\|q - \mu\|`, ``[...]``: the radius that
        counts for promises about the mean query.
      directions: how many directions the samples take about their mean,
        :math:`(\mathrm{tr}\,\Sigma)^2 / \mathrm{tr}\,\Sigma^2`, ``[...]``, between 1 and ``d``;
        0 if they are all alike.
    """

    query_norm: Float[Array, "*heads"]
    rho: Float[Array, "*heads"]
    rho_quantiles: Float[Array, "*heads quantiles"]
    key_radius: Float[Array, "*heads"]
    key_spread: Float[Array, "*heads"]
    dominating: Float[Array, "*heads"]
    query_center: Float[Array, "*heads d"]
    centered_rho: Float[Array, "*heads"]
    directions: Float[Array, "*heads"]


def check_radius(
    keys: Float[Array, "*heads n d"],
    rho: ArrayLike | None,
    query_norm: ArrayLike | None,
    queries: Float[Array, "*heads q d"] | None,
    scale: ArrayLike | None,
) -> None:
    """Raises ``ValueError`` unless the arguments name the query radius in at most one way.

    Sample ``queries`` may stand beside a radius, which then wins.
    """
    leading = keys.shape[:-2]
    checks.check_positive("rho", rho, leading)
    checks.check_positive("query_norm", query_norm, leading)
    checks.check_positive("scale", scale, leading)
    if rho is not None and query_norm is not None:
        raise ValueError("rho and query_norm both name the query radius; give one of them.")
    if queries is not None:
        checks.check_queries(queries, keys)


def _center_radius_spread(
    array: Float[Array, "*heads n d"],
    lengths: Integer[Array, "*heads"] | None,
    shares: Float[Array, "*heads n"] | None = None,
    queries: Float[Array, "*heads q d"] | None = None,
    narrow: bool = False,
) -> tuple[
    Float[Array, "*heads d"],
    Float[Array, "*heads"],
    Float[Array, "*heads"],
    Float[Array, "*heads d"],
]:
    """Mean row, largest distance from it, root mean square distance over that, units of channels.

    The radius is 1 and the spread 0 where all rows agree. Means are those of the ``shares`` of the
    rows, which sum to one; ``None`` for equal ones. Distances are those behind the units of
    channels, of which there are none unless wide ones are to be made ``narrow``.
    """
    count = jnp.full(array.shape[:-2], array.shape[-2]) if lengths is None else lengths
    inside = jnp.arange(array.shape[-2]) < jnp.asarray(count)[..., None]
    if lengths is not None:
        # Padding may hold anything: it is selected away, not multiplied by zero.
        array = jnp.where(inside[..., None], array, jnp.zeros_like(array))
    # In units of a power of two near the largest number, or squares would under- or overflow: such
    # a product is exact. Well within the exponents of the dtype, so that its inverse is one too.
    limits = jnp.finfo(array.dtype)
    most = 2.0 ** (limits.maxexp - 8)
    peak = jnp.max(jnp.abs(array), axis=(-2, -1))
    unit = jax.lax.reduce_precision(jnp.clip(peak, 1 / most, most), limits.nexp, 0)
    array = array * (1 / unit)[..., None, None]
    total = jnp.asarray(count).astype(array.dtype)

    def mean(rows: Array) -> Array:
        if shares is None:
            return jnp.sum(rows, axis=-2) / total[..., None]
        return jnp.sum(shares[..., None] * rows, axis=-2)

    center = mean(array)
    offsets = array - center[..., None, :]
    units = jnp.ones_like(center)
    if narrow:
        counted = inside.astype(array.dtype) / total[..., None] if shares is None else shares
        units = channel_units(array, center, counted, queries)
        offsets = offsets * units[..., None, :]
    squares = jnp.sum(jnp.square(offsets), axis=-1)
    if lengths is not None:
        squares = jnp.where(inside, squares, jnp.zeros_like(squares))
    radius = root(jnp.max(squares, axis=-1))
    # Rows that all agree differ from their mean by its rounding, which must not be blown up.
    rounding = 64 * limits.eps * (peak / unit) * array.shape[-1] ** 0.5
    agree = radius <= rounding
    spread = jnp.where(agree, 0, root(mean(squares[..., None])[..., 0]) / radius)
    return center * unit[..., None], jnp.where(agree, 1, radius * unit), spread, units


def largest_norm(
    queries: Float[Array, "*heads q d"] | None, width: int
) -> Float[Array, "*heads"] | float:
    """The largest norm of some sample queries, or that of a Gaussian query where there are none."""
    if queries is None:
        return width**0.5
    squares = jnp.sum(jnp.square(queries.astype(accumulation_dtype(queries))), axis=-1)
    # All-zero samples ask nothing; a tiny radius keeps the change of units invertible.
    return jnp.maximum(root(jnp.max(squares, axis=-1)), jnp.finfo(squares.dtype).eps)


def standardize(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    *,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    queries: Float[Array, "*heads q d"] | None = None,
    scale: ArrayLike | None = None,
    lengths: Integer[Array, "*heads"] | None = None,
    log_weights: Float[Array, "*heads n"] | None = None,
    narrow: bool = False,
) -> Standardization:
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
      scale: the softmax scale, a scalar or ``[...]``; ``None`` means ``1/sqrt(d)``.
      lengths: valid pairs of each head ``[...]``; ``None`` means all.
      log_weights: logarithms of the pairs' weights ``[..., n]``, of which centers are means then;
        ``None`` means that all are alike.
      narrow: whether channels in which keys are far wider than in others are brought to the width
        of these, static. Then :math:`\kappa` is that of the keys after that, and queries within
        the radius are those of a ball before it: in wide channels they are as small as these are
        wide.

    Returns:
      The standardization, in float32 or wider. A NaN or an infinity among the valid pairs of a head
      makes that head's centers and radii non-finite.

    Raises:
      ValueError: if shapes do not fit or a radius is not positive.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Section 2.

    >>> import jax, jax.numpy as jnp
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 100, 16))
    >>> standardization = standardize(keys, values, query_norm=4.0)
    >>> float(jnp.max(jnp.linalg.norm(standardization.unit_keys(keys), axis=-1)))
    1.0
    """
    checks.check_cache(keys, values)
    checks.check_lengths(lengths, keys)
    check_radius(keys, rho, query_norm, queries, scale)
    dtype = accumulation_dtype(keys, values)
    shares = None
    if log_weights is not None:
        if log_weights.shape != keys.shape[:-1]:
            raise ValueError(
                "log_weights must be [..., n], one for each pair; got log_weights "
                f"{log_weights.shape} for keys {keys.shape}."
            )
        logits = log_weights.astype(dtype)
        if lengths is not None:
            inside = jnp.arange(keys.shape[-2]) < jnp.asarray(lengths)[..., None]
            logits = jnp.where(inside, logits, -jnp.inf)
        shares = jax.nn.softmax(logits)
    key_center, key_radius, key_spread, key_units = _center_radius_spread(
        keys.astype(dtype), lengths, shares, queries, narrow
    )
    value_center, value_radius, value_spread, _ = _center_radius_spread(
        values.astype(dtype), lengths, shares
    )
    softmax_scale = jnp.full_like(
        key_radius, default_scale(keys.shape[-1]) if scale is None else scale
    )
    unit = softmax_scale * key_radius
    # Made from the keys, so that all is sharded as they are.
    zeros = jnp.zeros_like(unit)
    if rho is not None:
        radius = zeros + jnp.asarray(rho, dtype)
        norm = radius / unit
        # A cache with a NaN says so elsewhere; a radius that is none says so here.
        norm = jnp.where(jnp.isfinite(norm) & (norm > 0), norm, jnp.ones_like(norm))
        norm = jnp.where(jnp.isfinite(radius) & (radius > 0), norm, jnp.nan)
    elif query_norm is not None:
        norm = zeros + jnp.asarray(query_norm, dtype)
    else:
        norm = zeros + jnp.asarray(largest_norm(queries, keys.shape[-1]), dtype)
    return Standardization(
        key_center,
        key_radius,
        key_spread,
        value_center,
        value_radius,
        value_spread,
        radius if rho is not None else unit * norm,
        softmax_scale,
        norm,
        key_units,
    )


def calibrate(
    keys: Float[Array, "*heads n d"],
    queries: Float[Array, "*heads q d"],
    *,
    scale: ArrayLike | None = None,
    lengths: Integer[Array, "*heads"] | None = None,
    quantiles: Sequence[float] = (0.5, 0.9, 0.99),
    mass: float = 0.9,
) -> Calibration:
    r"""Measures which case of the theory a cache is: its radius, and how sharp its attention is.

    .. math:: \rho = \mathrm{scale} \cdot \max_i \|k_i - \bar k\| \cdot \max \|q\|

    Up to :math:`\rho` of 3 or 4 errors can be certified; beyond, :math:`e^\rho` promises
    nothing, and what a coreset gives is what it measures. Where few pairs dominate, no fixed
    share of them serves all queries. Queries of pretrained models lie about a mean that is long:
    the radius about it is what the bounds of :mod:`coreset_jax.guarantees` take as ``rho``, with
    ``query_center``.

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
    checks.check_cache(keys, keys)
    checks.check_queries(queries, keys)
    checks.check_lengths(lengths, keys)
    checks.check_positive("scale", scale)
    for name, shares in (("quantiles", tuple(quantiles)), ("mass", (mass,))):
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"{name} must lie between 0 and 1, got {shares}.")
    scale = default_scale(keys.shape[-1]) if scale is None else scale
    return _calibrate(keys, queries, lengths, scale, jnp.asarray(quantiles), mass)


@jax.jit
def _calibrate(
    keys: Float[Array, "*heads n d"],
    queries: Float[Array, "*heads q d"],
    lengths: Integer[Array, "*heads"] | None,
    scale: ArrayLike,
    quantiles: Float[Array, " quantiles"],
    mass: ArrayLike,
) -> Calibration:
    dtype = accumulation_dtype(keys, queries)
    keys, queries = keys.astype(dtype), queries.astype(dtype)
    scale, mass = jnp.asarray(scale, dtype), jnp.asarray(mass, dtype)
    _, key_radius, key_spread, _ = _center_radius_spread(keys, lengths)
    norms = jnp.linalg.norm(queries, axis=-1)
    unit = scale * key_radius
    levels = jnp.moveaxis(jnp.quantile(norms, quantiles.astype(dtype), axis=-1), 0, -1)

    def one_head(keys: Array, queries: Array, length: Array) -> Array:
        inside = jnp.arange(keys.shape[0]) < length

        def one_query(query: Array) -> Array:
            scores = scale * matmul(jnp.where(inside[:, None], keys, 0), query)
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
    center = jnp.mean(queries, axis=-2)
    offsets = queries - center[..., None, :]
    covariance = matmul(jnp.swapaxes(offsets, -1, -2), offsets)
    squares = jnp.sum(jnp.square(covariance), axis=(-2, -1))
    trace = jnp.trace(covariance, axis1=-2, axis2=-1)
    return Calibration(
        jnp.max(norms, axis=-1),
        unit * jnp.max(norms, axis=-1),
        unit[..., None] * levels,
        key_radius,
        key_spread,
        one_head(keys, queries, counts),
        center,
        unit * jnp.max(jnp.linalg.norm(offsets, axis=-1), axis=-1),
        jnp.square(trace) / jnp.where(squares > 0, squares, 1),
    )
