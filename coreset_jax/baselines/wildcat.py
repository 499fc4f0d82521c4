r"""WildCat: pivots of a randomly pivoted Cholesky factor, with Nyström values behind them.

Schröder, Mackey, *WildCat: Near-Linear Attention in Theory and Practice*, 2026, arXiv 2602.10056.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src.core.compressor import Compressor, leaf
from coreset_jax._src.core.coreset import with_normalizers
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.precision import matmul

# Residuals below so many roundings are rounding: times e^|z|^2 they would be picked again, and a
# factor that divides by them explodes.
_ROUNDINGS = 512


class Pivots(NamedTuple):
    """The pivots of one head, bin after bin, in the order in which they were picked.

    Attributes:
      order: positions in the cache ``[m]``, int32.
      values: Nyström values behind them ``[m, dv]``: numerators, not yet divided by anything.
      weights: signed Nyström weights ``[m]``, about ``n`` in sum.
    """

    order: Int[Array, " m"]
    values: Float[Array, "m dv"]
    weights: Float[Array, " m"]


def _bin_pivots(
    keys: Float[Array, "b d"],
    columns: Float[Array, "b c"],
    squares: Float[Array, " b"],
    inside: Bool[Array, " b"],
    uniforms: Callable[[Array], Float[Array, " b"]],
    count: int,
) -> tuple[Int[Array, " p"], Float[Array, "p c"]]:
    """Pivots of one bin, and what the Nyström weights make of ``columns`` behind them."""
    dtype = keys.dtype
    rounding = _ROUNDINGS * jnp.finfo(dtype).eps

    places = jnp.arange(keys.shape[0])

    def step(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        residuals, free, active, factor, picked = state
        draws = -jnp.log(-jnp.log(uniforms(index)))
        # A race of exponential clocks: probabilities are never summed, and cannot overflow.
        scores = jnp.where(residuals > 0, jnp.log(residuals) + squares, -jnp.finfo(dtype).max / 2)
        pivot = jnp.argmax(jnp.where(free, scores + draws, -jnp.inf)).astype(jnp.int32)
        left = residuals[pivot]
        distances = jnp.sum(jnp.square(keys - keys[pivot][None]), axis=-1)
        row = jnp.exp(-distances / 2) - matmul(factor[:, pivot], factor)
        row = row / jnp.sqrt(jnp.where(left > 0, left, 1))
        # Where nothing is left, further pivots are idle: a row of zeros.
        row = jnp.where(inside & (left > 0), row, 0)
        row = jnp.where(places == pivot, jnp.sqrt(left), row)
        residuals = residuals - jnp.square(row)
        residuals = jnp.where((residuals > rounding) & (places != pivot), residuals, 0)
        active = active | ((places == pivot) & (left > 0))
        factor, picked = factor.at[index].set(row), picked.at[index].set(pivot)
        return residuals, free & (places != pivot), active, factor, picked

    # Made from the keys, so that everything carried is sharded as they are.
    zeros = jnp.where(squares < 0, squares, 0)
    start = (
        zeros + inside.astype(dtype),
        inside,
        inside & (squares < 0),
        jnp.zeros((count, 1), dtype) + zeros[None],
        jnp.zeros((count,), jnp.int32) + zeros[:1].astype(jnp.int32),
    )
    _, _, active, factor, picked = jax.lax.fori_loop(0, count, step, start)

    # The factor of G_SS is that of its columns at the pivots: W = L^-T L^-1 G_S: = L^-T factor.
    corner = jnp.take(factor, picked, axis=1)
    # W is the identity at the pivots themselves. Left out of the products they are not rounded by
    # keys that are further out, and these are most often pivots.
    others = inside & ~active
    active = jnp.take(active, picked)
    exponents = squares / 2
    top = jnp.max(jnp.where(others, exponents, -jnp.inf))
    lifted = jnp.where(others, jnp.exp(exponents - top), 0)[:, None] * columns
    right = matmul(factor, lifted)

    # By hand, a row at a time, like the factor itself: a solver of LAPACK's does not shard.
    def substitute(step: Array, solved: Array) -> Array:
        index = count - 1 - step
        known = matmul(corner[index], solved)
        each = (right[index] - known) / jnp.where(active[index], corner[index, index], 1)
        return solved.at[index].set(jnp.where(active[index], each, 0))

    solved = jax.lax.fori_loop(0, count, substitute, jnp.zeros_like(right))
    most = 0.9 * math.log(float(jnp.finfo(dtype).max))
    lowered = jnp.exp(jnp.minimum(top - jnp.take(exponents, picked), most))
    behind = jnp.take(columns, picked, axis=0) + solved * lowered[:, None]
    return picked, jnp.where(active[:, None], behind, 0)


def pivots(
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    uniforms: Callable[[Array, Array], Float[Array, " b"]],
    length: Int[Array, ""] | int,
    *,
    size: int,
    scale: ArrayLike,
    bins: int,
    temperature: float,
) -> Pivots:
    """Pivots of one head with fitted values and normalizers, from the random numbers given.

    Args:
      keys: keys ``[n, d]``, float32 or wider, zero in padding.
      values: values ``[n, dv]`` of the same dtype.
      uniforms: gives the numbers from ``(0, 1)`` of a step in a bin, ``[ceil(n / bins)]``.
      length: valid pairs, at the front; at least ``size``.
      size: pivots, static, a multiple of the bins.
      scale: the softmax scale.
      bins: parts of the cache that are treated apart, static.
      temperature: what keys are divided by.

    Returns:
      The pivots.
    """
    count = keys.shape[0]
    width = -(-count // bins)
    inside = jnp.arange(count) < length
    keys = keys * (jnp.sqrt(scale) / temperature)
    center = jnp.sum(keys, axis=0, keepdims=True) / jnp.asarray(length, keys.dtype)
    keys = jnp.where(inside[:, None], keys - center, 0)
    columns = jnp.concatenate([values, jnp.ones_like(values[:, :1])], axis=-1)

    numbers = jnp.arange(bins, dtype=jnp.int32)
    # In this order the product stays below 2^31.
    starts = numbers * (length // bins) + numbers * (length % bins) // bins
    stops = jnp.append(starts[1:], jnp.asarray(length, jnp.int32))
    places = starts[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    within = places < stops[:, None]

    def one_bin(
        number: Array, places: Array, within: Array
    ) -> tuple[Int[Array, " p"], Float[Array, "p c"]]:
        held = jnp.take(keys, places, axis=0, mode="clip")
        picked, solved = _bin_pivots(
            held,
            jnp.take(columns, places, axis=0, mode="clip"),
            jnp.sum(jnp.square(held), axis=-1),
            within,
            lambda step: uniforms(step, number),
            size // bins,
        )
        return jnp.take(places, picked), solved

    order, solved = jax.vmap(one_bin)(numbers, places, within)
    solved = solved.reshape(size, -1)
    return Pivots(order.reshape(size).astype(jnp.int32), solved[:, :-1], solved[:, -1])


class wildcat(Compressor):  # noqa: N801
    r"""WildCat: keys by randomly pivoted Cholesky, values and normalizers by Nyström.

    Keys are centered, :math:`z = \sqrt{\mathrm{scale}}\,(k - \bar k)/\tau`, and the kernel is
    :math:`G_{ij} = e^{-\|z_i - z_j\|^2/2}`. Pivots :math:`S` are drawn one after another,

    .. math::
       P(i) \propto e^{\|z_i\|^2} \bigl(G_{ii} - G_{iS} G_{SS}^{-1} G_{Si}\bigr), \qquad
       W_{si} = \bigl(G_{SS}^{-1} G_{S:}\bigr)_{si}\, e^{(\|z_i\|^2 - \|z_s\|^2)/2},

    and the answer to a query is

    .. math:: \frac{\sum_s e^{\mathrm{scale}\langle q, k_s\rangle} (W V)_s}
                   {\sum_s e^{\mathrm{scale}\langle q, k_s\rangle} (W 1)_s} .

    A coreset's log-weights are flat, :math:`\log(n/m)`; its values are :math:`\tfrac mn W V` and
    its normalizers :math:`\tfrac mn W 1`, of which some are negative. The authors' code also clamps
    answers to the range of the values; that is left out here, and never mattered where it was
    measured.

    The factor is trusted down to 512 roundings: a residual below that (:math:`6\cdot10^{-5}` in
    float32) counts as zero. Without this the authors' rule picks copies of far-out keys again,
    whose rounding is multiplied by :math:`e^{\|z\|^2}`, and weights explode once the
    pivots all but span the cache. Pivots that are drawn when nothing is left have values and
    normalizers of zero. Where :math:`\|z\|^2` differs by more than 150 between keys that are not
    picked, what the shorter ones add is lost to the range of float32.

    Args:
      bins: consecutive parts of the cache that are treated apart, each with ``size / bins``
        pivots. Time and memory are divided by it.
      temperature: :math:`\tau`; the authors' rule for keys and queries of one size is the default.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.

    A compressor; see :class:`coreset_jax.Compressor`. It returns a :class:`SignedCoreset`, looks at
    no query, and wants a ``size`` that is a multiple of ``bins``. Time is
    :math:`O(n m^2 / \mathrm{bins}^2)` a head in ``m / bins`` sequential steps, twice; memory beside
    the cache is a float32 copy of it and a factor of ``n * m / bins`` numbers.

    Raises:
      ValueError: on bad options; when called, if ``size`` is no multiple of ``bins``.

    References:
      Schröder, Mackey, *WildCat: Near-Linear Attention in Theory and Practice*, 2026,
      arXiv 2602.10056.
      Chen, Epperly, Tropp, Webber, *Randomly pivoted Cholesky*, 2023, arXiv 2207.06503.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 128, 16))
    >>> coreset = cj.baselines.wildcat()(jax.random.key(1), keys, values, size=48)
    >>> coreset.keys.shape, coreset.normalizers.shape
    ((4, 48, 16), (4, 48))
    >>> cj.attend(keys[:, :3], coreset).shape
    (4, 3, 16)
    """

    bins: int = 1
    temperature: float = math.sqrt(3.94582)
    scale: ArrayLike | None = leaf(default=None)
    keeps_pairs = False
    signed: ClassVar[bool] = True

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_count("bins")
        self.static_float("temperature")

    def check_call(self, keys: Any, size: int, queries: Any) -> None:
        """Raises ``ValueError`` unless every bin can have as many pivots."""
        super().check_call(keys, size, queries)
        if size < keys.shape[-2] and size % self.bins:
            raise ValueError(
                f"size must be a multiple of bins; got size {size} and bins {self.bins}."
            )

    def on_head(self, head: Head, size: int) -> tuple[Any, Info]:
        """The signed coreset of one head; a whole cache has normalizers of one."""
        if size < head.count:
            return super().on_head(head, size)
        whole = head.whole()
        return with_normalizers(whole, jnp.ones_like(whole.log_weights)), Info()

    def compress_head(self, head: Head, size: int) -> tuple[Any, Info]:
        """Draws the pivots, and weighs what stands for the head behind them."""
        count, length, dtype = head.count, head.length, head.dtype
        width = -(-count // self.bins)
        tiny = float(jnp.finfo(dtype).tiny)

        def uniforms(step: Array, number: Array) -> Array:
            each = jax.random.fold_in(jax.random.fold_in(head.key, number), step)
            return jax.random.uniform(each, (width,), dtype, minval=tiny)

        found = pivots(
            head.keys.astype(dtype),
            head.values.astype(dtype),
            uniforms,
            length,
            size=size,
            scale=head.scale,
            bins=self.bins,
            temperature=self.temperature,
        )
        # A head no longer than this is kept whole, whatever its pivots are.
        whole = length <= size
        slots = jnp.arange(size, dtype=jnp.int32)
        order = jnp.where(whole, jnp.where(slots < length, slots, count), found.order)
        mean_weight = jnp.where(whole, 1, length.astype(dtype) / size)
        indices, places = jax.lax.sort((order, slots), num_keys=1)
        coreset = head.pairs(indices, jnp.full((size,), jnp.log(mean_weight)))
        fitted = jnp.take(found.values, places, axis=0) / mean_weight
        weights = jnp.take(found.weights, places) / mean_weight
        values = jnp.where(whole, coreset.values, fitted.astype(coreset.values.dtype))
        normalizers = jnp.where(whole, jnp.ones_like(weights), weights)
        return with_normalizers(coreset._replace(values=values), normalizers), Info()

    def workspace(self, count: int, size: int, width: int) -> int:
        """The factors of all bins, and the cache in the dtype of sums."""
        return count * (size // self.bins + 2 * width)
