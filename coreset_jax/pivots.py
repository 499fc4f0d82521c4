r"""Pivots: pairs that stand apart from one another, drawn by a randomly pivoted Cholesky factor.

A balance keeps pairs that answer as they are. A refit (:mod:`coreset_jax.refit`) wants something
else of them: that between them they reach everything in the cache, whatever stands behind them.
That is what pivots are. Pairs too heavy to be shared are kept as they are.

The factor is built a block of pivots at a time: all of a block are drawn at once, and those that
clash with one drawn before are sent back, so that nearly all of the work is matrix products.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from coreset_jax import validation
from coreset_jax.coreset import Compressor, Coreset, gather, over_heads, whole_cache
from coreset_jax.geometry import Geometry, fitting_geometry
from coreset_jax.kernels import gaussian_kernel, one_by_one
from coreset_jax.problem import check_radius, radii_of_heads, radius_arrays, reduce

HIGHEST = jax.lax.Precision.HIGHEST

# Pairs that may become pivots, for each that will, and no fewer than so many in all.
_CANDIDATES = 3
_FEWEST_CANDIDATES = 768

# They are drawn in proportion to this power of their importance: with the whole of it, clusters
# of little importance are forgotten where few pairs are kept; with none, what lies far out.
_CANDIDATE_POWER = 0.75

# Residuals below so many roundings are rounding.
_ROUNDINGS = 512

# A draw that adds nothing is drawn again, but not for ever.
_MOST_ROUNDS = 64

# Of the slots, heavy pairs may take no more than so many eighths.
_HEAVY_EIGHTHS = 7


class _Settings(NamedTuple):
    """What of a pivoted compressor is fixed at compile time."""

    scale: float | None
    bin_size: int


def log_importance(
    geometry: Geometry,
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    inside: Bool[Array, " n"],
) -> Float[Array, " n"]:
    r"""Logarithms of the norms of the pairs' features, :math:`-\infty` for padding.

    .. math:: \log p_i = \tfrac r2 \|k_i\|^2 + \tfrac12 \log(\|v_i\|^2 + 1)

    in the geometry, but without its reach: keys far out count as what they are.
    """
    squares = geometry.true_squares(keys)
    masses = jnp.log1p(jnp.sum(jnp.square(geometry.values(values)), axis=-1))
    return jnp.where(inside, (geometry.radius * squares + masses) / 2, -jnp.inf)


def heavy_pairs(importance: Float[Array, " n"], size: int) -> Bool[Array, " n"]:
    r"""The pairs that a sample of ``size`` in proportion to importance holds for certain.

    .. math:: p_i \ge \tau, \qquad \sum_i \min(1, p_i / \tau) = \mathrm{size}

    They would be worth a slot each even if every other slot were shared evenly among the rest. No
    more than seven eighths of the slots are given away like this, to the heaviest.

    Args:
      importance: logarithms of the importance ``[n]``, as from :func:`log_importance`.
      size: slots, static.
    """
    most = min(importance.shape[0], size * _HEAVY_EIGHTHS // 8)
    none = jnp.zeros_like(importance, bool)
    if most == 0:
        return none

    def extend(held: Array) -> tuple[Array, Array]:
        """Those held, those that are certain beside them, and whether these are more."""
        slots = (size - jnp.sum(held)).astype(importance.dtype)
        others = jnp.where(held, -jnp.inf, importance)
        # In units of the heaviest of them: what is held may outweigh them beyond all digits.
        shares = jnp.exp(others - jnp.max(others))
        certain = held | (jnp.isfinite(others) & (shares * slots >= jnp.sum(shares)))
        return certain, jnp.any(certain & ~held)

    # Mostly there are few rounds, and nothing has to be sorted.
    held, _ = jax.lax.while_loop(
        lambda state: state[1] & (jnp.sum(state[0]) <= most),
        lambda state: extend(state[0]),
        extend(none),
    )

    def heaviest(held: Array) -> Array:
        _, order = jax.lax.top_k(importance, most)
        return held & none.at[order].set(True)

    # A loop of at most one round: under vmap a cond would sort for every head.
    return jax.lax.while_loop(lambda held: jnp.sum(held) > most, heaviest, held)


class _Factor(NamedTuple):
    """A Cholesky factor under way.

    Attributes:
      number: rounds so far.
      found: pivots so far.
      rows: of the factor ``[size + block, candidates]``; zeros behind ``found``.
      residuals: what is left of the diagonal ``[candidates]``; 0 for what cannot be drawn.
      picked: the pivots ``[size + block]``; -1 behind ``found``.
    """

    number: Int[Array, ""]
    found: Int[Array, ""]
    rows: Float[Array, "s c"]
    residuals: Float[Array, " c"]
    picked: Int[Array, " s"]


def cholesky_pivots(
    rng: Array,
    keys: Float[Array, "c d"],
    importance: Float[Array, " c"],
    target: Int[Array, ""],
    *,
    size: int,
    block: int,
) -> Int[Array, " size"]:
    r"""Pivots of a randomly pivoted Cholesky factor of a Gaussian kernel.

    .. math:: P(i) \propto p_i^2 \left( G_{ii} - G_{iS} G_{SS}^{-1} G_{Si} \right),
              \qquad G_{ij} = e^{-\|k_i - k_j\|^2 / 2}

    Args:
      rng: a JAX random key.
      keys: keys ``[c, d]``, scaled so that the kernel has no radius.
      importance: :math:`\log p_i`, ``[c]``; what has :math:`-\infty` is never drawn.
      target: pivots to draw, at most ``size``.
      size: slots, static.
      block: pivots that are drawn at once, static.

    Returns:
      The pivots ``[size]`` in the order in which they were drawn; -1 behind the last, which comes
      early where nothing is left to draw.

    References:
      Chen, Epperly, Tropp, Webber, *Randomly pivoted Cholesky*, 2023, arXiv 2207.06503.
      Epperly, Tropp, Webber, *Embrace rejection: kernel matrix approximation by accelerated
      randomly pivoted Cholesky*, 2024, arXiv 2410.03969.
    """
    count, dtype = keys.shape[0], keys.dtype
    rounding = _ROUNDINGS * float(jnp.finfo(dtype).eps)
    block = min(block, count)
    slots = jnp.arange(block)

    def unfinished(factor: _Factor) -> Array:
        left = (factor.found < target) & jnp.any(factor.residuals > 0)
        return left & (factor.number < _MOST_ROUNDS)

    def extend(factor: _Factor) -> _Factor:
        # One draw for all. Those of candidates come last: padding behind them changes no other.
        uniforms = jax.random.uniform(
            jax.random.fold_in(rng, factor.number),
            (block + count,),
            dtype,
            minval=jnp.finfo(dtype).tiny,
        )
        left = jnp.where(factor.residuals > 0, factor.residuals, 1)
        scores = jnp.where(factor.residuals > 0, jnp.log(left) + 2 * importance, -jnp.inf)
        # The largest of these are a draw without replacement: the noise is Gumbel's.
        scores -= jnp.log(-jnp.log(uniforms[block:]))
        best, drawn = jax.lax.top_k(scores, block)
        known = jnp.matmul(factor.rows[:, drawn].T, factor.rows, precision=HIGHEST)
        rows = gaussian_kernel(keys[drawn], keys) - known
        # Sent back with the probability of what it shares with one drawn before.
        corner = rows[:, drawn]
        diagonal = jnp.maximum(jnp.diagonal(corner), rounding)
        shared = jnp.square(corner) / (diagonal[:, None] * diagonal[None])
        clashes = jnp.max(jnp.where(slots[:, None] < slots[None], shared, 0), axis=0)
        taken = (clashes < uniforms[:block]) & jnp.isfinite(best)
        taken &= factor.found + jnp.cumsum(taken) <= target
        both = taken[:, None] & taken[None]
        corner = jnp.where(both, corner, 0)
        # Rounding may leave copies that the draw let through: half a rounding keeps it definite.
        corner += jnp.diag(jnp.where(taken, rounding / 2, 1).astype(dtype))
        rows = _divided(corner, jnp.where(taken[:, None], rows, 0))
        # Those that are taken come first; what stands behind them is written over.
        order = jnp.argsort(~taken, stable=True)
        rows = jnp.where(taken[:, None], rows, 0)[order]
        drawn = jnp.where(taken, drawn, -1)[order]
        residuals = factor.residuals - jnp.sum(jnp.square(rows), axis=0)
        residuals = jnp.where(residuals > rounding, residuals, 0)
        places = jnp.where(drawn >= 0, drawn, count)
        return _Factor(
            factor.number + 1,
            factor.found + jnp.sum(taken),
            jax.lax.dynamic_update_slice_in_dim(factor.rows, rows, factor.found, 0),
            residuals.at[places].set(0, mode="drop"),
            jax.lax.dynamic_update_slice_in_dim(factor.picked, drawn, factor.found, 0),
        )

    # Made from the keys, so that everything carried varies over the mesh axes that they do.
    zeros = jnp.zeros_like(keys[:, 0])
    number = jnp.zeros_like(target)
    start = _Factor(
        number,
        number,
        jnp.zeros((size + block, count), dtype) + zeros[None],
        zeros + jnp.isfinite(importance).astype(dtype),
        jnp.zeros(size + block, jnp.int32) + zeros[0].astype(jnp.int32) - 1,
    )
    return jax.lax.while_loop(unfinished, extend, start).picked[:size]


def _divided(corner: Float[Array, "b b"], rows: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """Rows of the factor: :math:`C^{-1} R` for the Cholesky factor :math:`C` of the corner."""

    def invert(corner: Array) -> Array:
        lower = jnp.linalg.cholesky(corner)
        eye = jnp.zeros_like(lower) + jnp.eye(lower.shape[0], dtype=lower.dtype)
        return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)

    # A solver would go through all the rows, which on CPU takes longer than the product.
    return jnp.matmul(one_by_one(invert)(corner), rows, precision=HIGHEST)


def _pivot_head(
    rng: Array,
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    length: Int[Array, ""],
    rho: Float[Array, ""] | None,
    query_norm: Float[Array, ""] | None,
    queries: Float[Array, "q d"] | None,
    kernel_radius: Float[Array, ""] | None,
    *,
    size: int,
    settings: _Settings,
) -> Coreset:
    """The pivots of one head."""
    count = keys.shape[0]
    inside = jnp.arange(count) < length
    source_keys, source_values = keys, values
    keys = jnp.where(inside[:, None], keys, jnp.zeros_like(keys))
    values = jnp.where(inside[:, None], values, jnp.zeros_like(values))
    reduction = reduce(
        keys,
        values,
        rho=rho,
        query_norm=query_norm,
        queries=queries,
        scale=settings.scale,
        lengths=length,
    )
    geometry = fitting_geometry(reduction, kernel_radius)
    importance = log_importance(geometry, keys, values, inside)
    heavy = heavy_pairs(importance, size)
    candidate_rng, pivot_rng = jax.random.split(rng)
    light = jnp.where(heavy, -jnp.inf, importance)
    candidates = min(count, max(_CANDIDATES * size, _FEWEST_CANDIDATES))
    scores = light
    if candidates < count:
        scores = _CANDIDATE_POWER * light + jax.random.gumbel(candidate_rng, (count,), light.dtype)
    scores, drawn = jax.lax.top_k(scores, candidates)
    found = jnp.zeros_like(heavy).at[drawn].set(jnp.isfinite(scores), unique_indices=True)
    # In the order of the sequence, behind them what cannot be drawn.
    places = jnp.flatnonzero(found, size=candidates, fill_value=count).astype(jnp.int32)
    drawable = jnp.sum(places < count)
    # Stretches of the sequence, each with its share of the pivots.
    bins = -(-size // settings.bin_size)
    width = -(-candidates // bins)
    edges = jnp.arange(bins + 1, dtype=jnp.int32)

    def shares(total: Array) -> Array:
        # In this order the product stays below 2^31.
        return edges * (total // bins) + edges * (total % bins) // bins

    starts = shares(drawable)
    spots = starts[:-1, None] + jnp.arange(width, dtype=jnp.int32)[None]
    places = jnp.where(spots < starts[1:, None], places[jnp.minimum(spots, candidates - 1)], count)
    targets = jnp.diff(shares(jnp.minimum(size, length) - jnp.sum(heavy)))
    real = jnp.minimum(places.reshape(-1), count - 1)
    near = geometry.keys(keys[real])
    # A key that is drawn in counts as one that lies there.
    excess = geometry.true_squares(keys[real]) - jnp.sum(jnp.square(near), axis=-1)
    chances = (light[real] - geometry.radius * excess / 2).reshape(places.shape)
    chances = jnp.where(places < count, chances, -jnp.inf)
    near = near.reshape(*places.shape, -1)

    def draw(each: tuple[Array, Array, Array, Array]) -> Array:
        number, keys, importance, target = each
        return cholesky_pivots(
            jax.random.fold_in(pivot_rng, number),
            jnp.sqrt(geometry.radius) * keys,
            importance,
            target,
            size=-(-size // bins),
            block=max(16, size // bins // 6),
        )

    picked = jax.lax.map(draw, (edges[:-1], near, chances, targets))
    picked = jnp.where(picked >= 0, jnp.take_along_axis(places, picked, axis=-1), count)
    # Marked in place, so that they come out in the order of the sequence.
    chosen = heavy.at[picked.reshape(-1)].set(True, mode="drop")
    # Where copies leave nothing to draw, slots go to whatever comes first.
    spare = inside & ~chosen
    chosen |= spare & (jnp.cumsum(spare) <= size - jnp.sum(chosen))
    indices = jnp.flatnonzero(chosen, size=size, fill_value=count).astype(jnp.int32)
    weights = jnp.log(length.astype(importance.dtype)) - jnp.log(
        jnp.minimum(size, length).astype(importance.dtype)
    )
    sound = jnp.isfinite(geometry.radius) & (geometry.radius > 0) & jnp.isfinite(reduction.rho)
    sound &= jnp.isfinite(reduction.value_radius)
    log_weights = jnp.where(sound, jnp.zeros_like(importance[:size]) + weights, jnp.nan)
    return gather(source_keys, source_values, jnp.where(indices < count, indices, -1), log_weights)


@functools.partial(jax.jit, static_argnames=("size", "settings"))
def _pivot(
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    lengths: Int[Array, "*heads"] | None,
    rho: Array | None,
    query_norm: Array | None,
    queries: Float[Array, "*heads q d"] | None,
    kernel_radius: Array | None,
    *,
    size: int,
    settings: _Settings,
) -> Coreset:
    head = functools.partial(_pivot_head, size=size, settings=settings)
    rho, query_norm, kernel_radius = radii_of_heads(keys, values, rho, query_norm, kernel_radius)
    # The products of one head keep a processor busy.
    more = (rho, query_norm, queries, kernel_radius)
    return over_heads(head, rng, keys, values, lengths, *more, at_once=1)


@dataclasses.dataclass(frozen=True)
class _Pivoted:
    rho: ArrayLike | None
    query_norm: ArrayLike | None
    kernel_radius: ArrayLike | None
    settings: _Settings

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
        check_radius(keys, self.rho, self.query_norm, queries, self.settings.scale)
        validation.check_positive("kernel_radius", self.kernel_radius, keys.shape[:-2])
        if size >= keys.shape[-2]:
            return whole_cache(keys, values, lengths)
        rho, query_norm, kernel_radius = radius_arrays(
            keys, values, self.rho, self.query_norm, self.kernel_radius
        )
        given = rho is not None or query_norm is not None
        return _pivot(
            rng,
            keys,
            values,
            lengths,
            rho,
            query_norm,
            None if given else queries,
            kernel_radius,
            size=int(size),
            settings=self.settings,
        )


def pivoted(
    *,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    scale: float | None = None,
    kernel_radius: ArrayLike | None = None,
    bin_size: int = 512,
) -> Compressor:
    r"""Heavy pairs, and pivots of a randomly pivoted Cholesky factor among the others.

    It is made for a refit, such as :func:`coreset_jax.refit.relocation`, to stand behind. By itself
    it is no good answer: all weights are :math:`n / m`, and pivots are anything but a sample.

    Heavy pairs (:func:`heavy_pairs`) are kept in any case. The others are pivots, drawn with
    probability in proportion to what those before them leave of a pair, times its importance
    (:func:`cholesky_pivots`), from ``3 * size`` candidates, or 768 if that is more, which are
    themselves drawn in proportion to importance to the power 3/4.

    Args:
      rho: the radius of unit queries, a scalar or ``[...]``; see
        :func:`coreset_jax.compression.balanced`.
      query_norm: largest norm of a raw query instead. If neither is given, the call's sample
        ``queries`` decide, and without them ``sqrt(d)``.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      kernel_radius: the geometry of the pivots, a scalar or ``[...]``; ``None`` means that of
        :func:`coreset_jax.geometry.fitting_geometry`.
      bin_size: pivots that are drawn apart from one another. For more than these the sequence is
        cut into stretches, so that time grows with the number of pivots and not its cube.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor`. Keys and values are bit-identical to the
      source, weights of a head sum to its length, and one with a NaN or an infinity gets NaN
      log-weights. Time is linear in the pivots, :math:`O(b^2)` for each of them with a ``bin_size``
      of :math:`b`, and memory beside the cache a factor of :math:`\max(3b, 768)\, b` numbers.
      Heads are worked through one after another: call it inside ``jax.shard_map`` where they are
      sharded.

    Raises:
      ValueError: on bad options here; on ill-fitting shapes, a ``size`` below 1, ``lengths``
        outside ``1..n`` or a radius that is not positive when called, before any tracing.

    References:
      Schröder, Mackey, *WildCat*, 2026, arXiv 2602.10056, for pivots of a cache.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 512, 16))
    >>> coreset = cj.pivoted()(jax.random.key(1), keys, values, size=64)
    >>> coreset.keys.shape
    (4, 64, 16)
    """
    scale = validation.static_float("scale", scale)
    validation.check_count("bin_size", bin_size)
    return _Pivoted(rho, query_norm, kernel_radius, _Settings(scale, int(bin_size)))
