"""A split without queries: more for heads whose cache is hard to compress."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.budgets.split import (
    check_axes,
    check_compressor,
    check_multiple,
    check_share,
    grid,
    resolve_axes,
    select,
    split,
)
from coreset_jax.coreset import Compressor, Coreset
from coreset_jax.geometry import balancing_geometry
from coreset_jax.kernels import exponential_kernel
from coreset_jax.problem import check_radius, radii_of_heads, radius_arrays, reduce


def _energy_of_head(
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    length: Int[Array, ""],
    coreset: Coreset,
    rho: Float[Array, ""] | None,
    query_norm: Float[Array, ""] | None,
    queries: Float[Array, "q d"] | None,
    *,
    probes: int,
    scale: float | None,
) -> Float[Array, ""]:
    """The energy of one head; see :func:`energies`."""
    inside = jnp.arange(keys.shape[0]) < length
    # Padding may hold anything.
    keys = jnp.where(inside[:, None], keys, jnp.zeros_like(keys))
    values = jnp.where(inside[:, None], values, jnp.zeros_like(values))
    reduction = reduce(
        keys,
        values,
        rho=rho,
        query_norm=query_norm,
        queries=queries,
        scale=scale,
        lengths=length,
    )
    geometry = balancing_geometry(reduction)
    dtype = reduction.rho.dtype
    places = (jnp.arange(probes, dtype=dtype) + 0.5) * (length.astype(dtype) / probes)
    marks = geometry.keys(keys[jnp.minimum(places.astype(jnp.int32), length - 1)])

    columns = geometry.values(values)
    columns = jnp.concatenate([columns, jnp.ones_like(columns[:, :1])], axis=-1)
    moments = geometry.moments(marks, keys, columns * inside[:, None].astype(dtype))

    held = jnp.isfinite(coreset.log_weights)
    weights = jnp.where(held, jnp.exp(coreset.log_weights.astype(dtype)), 0)
    ones = jnp.ones_like(weights)
    normalizers = ones if coreset.normalizers is None else coreset.normalizers.astype(dtype)
    kept = jnp.concatenate([geometry.values(coreset.values), normalizers[:, None]], axis=-1)
    kernel = exponential_kernel(marks, geometry.keys(coreset.keys), geometry.radius)
    kernel = jnp.where(held[None], kernel * weights[None], 0)
    answers = jnp.matmul(kernel, jnp.where(held[:, None], kept, 0), precision="highest")

    # As attention, which does not see a common factor of the weights.
    exact = moments[:, :-1] / moments[:, -1:]
    wrong = exact - answers[:, :-1] / answers[:, -1:]
    return jnp.mean(jnp.sum(jnp.square(wrong), axis=-1))


@functools.partial(jax.jit, static_argnames=("probes", "scale"))
def energies(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    lengths: Int[Array, "*heads"] | None,
    coreset: Coreset,
    rho: Array | None,
    query_norm: Array | None,
    queries: Float[Array, "*heads q d"] | None,
    *,
    probes: int,
    scale: float | None,
) -> Float[Array, "*heads"]:
    r"""The energy of a coreset's error in the kernel of the balance, ``[...]``.

    .. math:: e_h^2 = \frac1p \sum_{l=1}^{p}
       \left\| \frac{\sum_i E_{li} v_i}{\sum_i E_{li}}
             - \frac{\sum_s w_s E_{ls} v_s}{\sum_s w_s z_s E_{ls}} \right\|^2

    with :math:`E_{li} = e^{r\langle k_l, k_i\rangle}` and values in the geometry of a balance, so
    that heads of any scale compare, and :math:`p` keys of the cache, evenly spaced, for :math:`l`.

    Args:
      keys: keys ``[..., n, d]``.
      values: values ``[..., n, dv]``.
      lengths: valid pairs of each head ``[...]``; ``None`` means all.
      coreset: any compressor's result.
      rho: radius of the unit queries; see :func:`coreset_jax.problem.reduce`.
      query_norm: or that of the raw ones.
      queries: or samples of them.
      probes: :math:`p`.
      scale: the softmax scale.
    """
    one_head = functools.partial(_energy_of_head, probes=probes, scale=scale)
    rho, query_norm = radii_of_heads(keys, values, rho, query_norm)
    counts = jnp.zeros_like(keys[..., 0, 0], jnp.int32) + (
        keys.shape[-2] if lengths is None else jnp.asarray(lengths).astype(jnp.int32)
    )
    for _ in keys.shape[:-2]:
        one_head = jax.vmap(one_head)
    return one_head(keys, values, counts, coreset, rho, query_norm, queries)


@dataclasses.dataclass(frozen=True)
class _ByEnergy:
    compressor: Compressor
    rho: ArrayLike | None
    query_norm: ArrayLike | None
    order: float
    least: float
    most: float
    steps: int
    probes: int
    axes: tuple[int, ...]
    scale: float | None

    def __call__(
        self,
        rng: Array,
        keys: Float[Array, "*heads n d"],
        values: Float[Array, "*heads n dv"],
        *,
        size: int,
        lengths: Int[Array, "*heads"] | None = None,
        queries: Float[Array, "*heads q d"] | None = None,
    ) -> Coreset:
        validation.check_cache(keys, values)
        validation.check_size(size)
        validation.check_lengths(lengths, keys)
        check_radius(keys, self.rho, self.query_norm, queries, self.scale)
        axes = resolve_axes("axes", self.axes, keys)
        compress = functools.partial(
            self.compressor, rng, keys, values, lengths=lengths, queries=queries
        )
        count = keys.shape[-2]
        if size >= count:
            return compress(size=size)
        sizes = grid(int(size), count, self.least, self.most, self.steps)
        coresets = [compress(size=each) for each in sizes]
        rho, query_norm = radius_arrays(keys, values, self.rho, self.query_norm)
        given = rho is not None or query_norm is not None
        energy = energies(
            keys,
            values,
            lengths,
            coresets[0],
            rho,
            query_norm,
            None if given else queries,
            probes=self.probes,
            scale=self.scale,
        )
        shares = energy ** (0.5 / (1 + self.order))
        levels = split(shares, lengths, count, axes, sizes=sizes, size=int(size))
        return select(levels, coresets)


def by_energy(
    compressor: Compressor,
    *,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    order: float = 1.0,
    least: float = 0.5,
    most: float = 2.0,
    steps: int = 2,
    probes: int = 256,
    axes: int | tuple[int, ...] = -1,
    scale: float | None = None,
) -> Compressor:
    r"""Budgets by how wrong a small coreset of each head is, without queries.

    The error of a coreset of :math:`m` pairs falls like :math:`c_h / m^p`, with :math:`p = 1` for
    balanced ones and :math:`\tfrac12` for samples. The smallest sum of errors for a given sum of
    budgets has

    .. math:: m_h \propto c_h^{1/(1+p)} .

    :math:`c_h` is measured on the coreset of the least size, which is made in any case: the root
    of :func:`coreset_jax.budgets.energy.energies`, its error in the kernel of the balance, in units
    of the head's own values. Each head then has the nearest of a few sizes, by ratio, between
    ``least`` and ``most`` times ``size`` (:func:`coreset_jax.budgets.split.split`), so that no more
    than ``size`` pairs a head are kept in the mean: sizes must be static under ``jax.jit``.

    Time is that of one compression at each of the ``2 * steps + 1`` sizes, each compiled apart,
    plus ``probes`` queries' attention; memory that of the coresets of all sizes. A head has, bit by
    bit, what the compressor keeps of it at its size.

    Args:
      compressor: any compressor.
      rho: the radius of unit queries, a scalar or ``[...]``; see
        :func:`coreset_jax.compression.balanced`.
      query_norm: largest norm of a raw query instead. If neither is given, the call's sample
        ``queries`` decide, and without them ``sqrt(d)``.
      order: :math:`p`, how fast the compressor's error falls.
      least: smallest budget of a head, a share of ``size`` in ``(0, 1]``.
      most: largest budget of a head, a multiple of ``size``, at least 1.
      steps: sizes tried on either side of ``size``.
      probes: keys at which the error is measured.
      axes: the leading axes of keys whose heads share a budget: the last by default; with
        ``(0, -1)`` the heads of all layers of ``[layers, batch, heads, n, d]``.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` ``(rng, keys [..., n, d], values [..., n, dv], *,
      size, lengths=None, queries=None) -> Coreset`` with ``min(most * size, n)`` slots a head. A
      head whose error is not finite has the least. Normalizers pass through, and ``size >= n``
      returns what the compressor returns. The call raises ``ValueError`` if keys have no such axes,
      if a radius is not positive or named twice, and as the compressor does.

    Raises:
      ValueError: if ``compressor`` cannot be called, or an option is not a static number in its
        range.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Theorem 4, for the
      law of the error.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> keys = keys.at[0, :, 2:].set(0)  # keys of two dimensions are easily covered
    >>> compressor = cj.budgets.by_energy(cj.baselines.kmeans(iterations=2))
    >>> coreset = compressor(jax.random.key(1), keys, jnp.tanh(keys), size=64)
    >>> coreset.keys.shape
    (2, 128, 16)
    >>> print((coreset.indices >= 0).sum(axis=-1))
    [32 90]
    """
    check_compressor(compressor)
    validation.check_count("steps", steps)
    validation.check_count("probes", probes)
    validation.static_float("order", order)
    return _ByEnergy(
        compressor,
        rho,
        query_norm,
        float(validation.static_float("order", order)),
        check_share("least", least),
        check_multiple("most", most),
        int(steps),
        int(probes),
        check_axes(axes),
        validation.static_float("scale", scale),
    )
