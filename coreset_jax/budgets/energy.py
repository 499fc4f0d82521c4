"""A split without queries: more for heads whose cache is hard to compress."""

import functools

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from coreset_jax._src.core.compressor import leaf
from coreset_jax._src.core.coreset import Coreset, SignedCoreset, normalizers
from coreset_jax._src.core.driver import Cache, for_each_head
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.turns import in_turns
from coreset_jax._src.geometry.kernel_geometry import balancing_geometry
from coreset_jax._src.geometry.kernels import exponential_kernel
from coreset_jax._src.precision import matmul
from coreset_jax.budgets.shared import Shared


def energy(head: Head, coreset: Coreset | SignedCoreset, *, probes: int) -> Float[Array, ""]:
    r"""The energy of a coreset's error in the kernel of the balance, of one head.

    .. math:: e^2 = \frac1p \sum_{l=1}^{p}
       \left\| \frac{\sum_i E_{li} v_i}{\sum_i E_{li}}
             - \frac{\sum_s w_s E_{ls} v_s}{\sum_s w_s z_s E_{ls}} \right\|^2

    with :math:`E_{li} = e^{r\langle k_l, k_i\rangle}` and values in the geometry of a balance, so
    that heads of any scale compare, and :math:`p` keys of the cache, evenly spaced, for :math:`l`.

    Args:
      head: the head.
      coreset: any compressor's result for it.
      probes: :math:`p`.
    """
    geometry, dtype = balancing_geometry(head.standardization), head.dtype
    places = (jnp.arange(probes, dtype=dtype) + 0.5) * (head.length.astype(dtype) / probes)
    centers = geometry.keys(head.keys[jnp.minimum(places.astype(jnp.int32), head.length - 1)])
    coefficients = geometry.coefficients(head.values) * head.inside[:, None].astype(dtype)
    moments = geometry.moments(centers, head.keys, coefficients)

    signs = normalizers(coreset).astype(dtype)[:, None]
    # Values of a signed coreset are coefficients, which a mean value enters times the normalizer.
    shift = (signs - 1) * head.standardization.value_center[None]
    kept = jnp.concatenate([geometry.values(coreset.values.astype(dtype) - shift), signs], axis=-1)
    kernel = exponential_kernel(centers, geometry.keys(coreset.keys), geometry.radius)
    answers = matmul(kernel * jnp.exp(coreset.log_weights.astype(dtype))[None], kept)

    # As attention, which does not see a common factor of the weights.
    exact = moments[:, :-1] / moments[:, -1:]
    wrong = exact - answers[:, :-1] / answers[:, -1:]
    return jnp.mean(jnp.sum(jnp.square(wrong), axis=-1))


class by_energy(Shared):  # noqa: N801
    r"""Budgets by how wrong a small coreset of each head is, without queries.

    The error of a coreset of :math:`m` pairs falls like :math:`c_h / m^p`, with :math:`p = 1` for
    balanced ones and :math:`\tfrac12` for samples. The smallest sum of errors for a given sum of
    budgets has

    .. math:: m_h \propto c_h^{1/(1+p)} .

    :math:`c_h` is measured on the coreset of the least size, which is made in any case: the root
    of :func:`coreset_jax.budgets.energy.energy`, its error in the kernel of the balance, in units
    of the head's own values. Each head then has the nearest of a few sizes, by ratio, between
    ``least`` and ``max_multiple`` times ``size`` (:func:`coreset_jax.budgets.split.split`), so that
    no more than ``size`` pairs a head are kept in the mean: sizes must be static under ``jax.jit``.

    Time is that of one compression at each of the ``2 * num_sizes + 1`` sizes, plus ``probes``
    queries' attention; memory that of the coresets of all sizes. A head has, bit by bit, what the
    compressor keeps of it at its size.

    Args:
      compressor: any compressor.
      rho: the radius of unit queries, a scalar or ``[...]``; see :class:`coreset_jax.balanced`.
      query_norm: largest norm of a raw query instead. If neither is given, it is that of
        ``compressor``; without one, the call's sample ``queries`` decide, and without them
        ``sqrt(d)``.
      scale: the softmax scale; ``None`` means that of ``compressor``.
      order: :math:`p`, how fast the compressor's error falls.
      least: smallest budget of a head, a share of ``size`` in ``(0, 1]``.
      max_multiple: largest budget of a head, a multiple of ``size``, at least 1.
      num_sizes: sizes tried on either side of ``size``.
      probes: keys at which the error is measured.
      axes: the leading axes of keys whose heads share a budget: the last by default; with
        ``(0, -1)`` the heads of all layers of ``[layers, batch, heads, n, d]``.

    A compressor; see :class:`coreset_jax.Compressor`. Its coresets have
    ``min(max_multiple * size, n)`` slots a head. A head whose error is not finite has the least.
    ``size >= n`` returns what the compressor returns.

    Raises:
      ValueError: on bad options; when called, if keys have no such axes.

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

    rho: ArrayLike | None = leaf(default=None)
    query_norm: ArrayLike | None = leaf(default=None)
    scale: ArrayLike | None = leaf(default=None)
    order: float = 1.0
    least: float = 0.5
    probes: int = 256

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        super().validate()
        self.static_float("order")
        self.static_bounded("least", most=1.0)
        self.static_count("probes")

    @property
    def floor(self) -> float:
        """Smallest budget of a head, as a share of the mean."""
        return self.least

    @property
    def reads_queries(self) -> bool:
        """Whether their norm is the radius, or the compressor wants them."""
        radius = self.query_ball[:2]
        return self.compressor.reads_queries or all(each is None for each in radius)

    def shares(self, cache: Cache, size: int, smallest: Coreset) -> Float[Array, "*heads"]:
        """The root of the energy of each head, to the power of the law."""
        del size
        measure = functools.partial(energy, probes=self.probes)
        workspace = self.probes * cache.keys.shape[-2]
        found = for_each_head(in_turns(measure, workspace), cache, self.query_ball, smallest)
        return found ** (0.5 / (1 + self.order))
