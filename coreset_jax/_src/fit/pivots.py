r"""Pivots: pairs that stand apart from one another, drawn by a randomly pivoted Cholesky factor.

A balance keeps pairs that answer as they are. A refit (:mod:`coreset_jax.refit`) fits new weights
and values, and needs keys whose kernels together span those of the whole cache. Pivots are such
keys. Pairs too heavy to be shared are kept as they are.

The factor is built a block of pivots at a time: all of a block are drawn at once, and those that
clash with one drawn before are sent back, so that nearly all of the work is matrix products.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.geometry.kernel_geometry import Geometry, fitting_geometry
from coreset_jax._src.geometry.kernels import gaussian_kernel
from coreset_jax._src.geometry.sinks import likely_sinks
from coreset_jax._src.geometry.solves import cholesky_factor, one_by_one
from coreset_jax._src.precision import matmul

KernelRows = Callable[[Int[Array, " block"]], Float[Array, "block c"]]
"""Rows of a kernel between some candidates, by their numbers."""

# Pairs that may become pivots, for each that will, and no fewer than so many in all.
_CANDIDATES = 3
_FEWEST_CANDIDATES = 768

# They are drawn in proportion to this power of their importance: with the whole of it, clusters
# of little importance are forgotten where few pairs are kept; with none, what lies far out.
_CANDIDATE_POWER = 0.75

# Pivots that are drawn at once: so many in all, or a share of those that are wanted.
_FEWEST_DRAWN, _SHARE_DRAWN = 16, 6

# Residuals below so many roundings are rounding.
_ROUNDINGS = 512

# A draw that adds nothing is drawn again, but not for ever.
_MOST_ROUNDS = 64

# What outweighs all other pairs together, as a logarithm.
_FAR_BEYOND = 30.0

# Of the slots, heavy pairs may take no more than so many eighths.
_HEAVY_EIGHTHS = 7

# Rounds for which random numbers are drawn in advance: the generator takes long to compile. Later
# ones take those again, turned by the golden ratio modulo one.
_DRAWN_ROUNDS = 8
_GOLDEN_RATIO = 0.6180339887


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
    _, heaviest = jax.lax.top_k(importance, most)
    allowed = none.at[heaviest].set(True)

    def extend(state: tuple[Array, Array]) -> tuple[Array, Array]:
        """Those held, with those that are certain beside them, and whether these are more."""
        held, _ = state
        slots = (size - jnp.sum(held)).astype(importance.dtype)
        others = jnp.where(held, -jnp.inf, importance)
        # In units of the heaviest of them: what is held may outweigh them beyond all digits.
        shares = jnp.exp(others - jnp.max(others))
        certain = allowed & jnp.isfinite(others) & (shares * slots >= jnp.sum(shares))
        return held | certain, jnp.any(certain & ~held)

    # Mostly there are few rounds.
    more = jnp.any(allowed)
    return jax.lax.while_loop(lambda state: state[1], extend, (none, more))[0]


def alone_in_head(head: Head, importance: Float[Array, " n"], size: int) -> Bool[Array, " n"]:
    """The pairs that stand for themselves alone: heavy ones, and what attention rests on unasked.

    Args:
      head: the head.
      importance: logarithms of the importance of its pairs, as from :func:`log_importance`.
      size: slots, static.
    """
    sinks = likely_sinks(head.keys.astype(head.dtype), head.inside)
    # Beyond all others, and still near enough for these to count beside each other.
    return heavy_pairs(jnp.where(sinks, jnp.max(importance) + _FAR_BEYOND, importance), size)


class _Factor(NamedTuple):
    """A Cholesky factor under way.

    Attributes:
      number: rounds so far.
      found: pivots so far.
      rows: of the factor ``[size + block, candidates]``; zeros behind ``found``.
      residuals: what is left of the diagonal ``[candidates]``; 0 for what cannot be drawn.
      picked: the pivots ``[size + block]``; beyond the candidates behind ``found``.
    """

    number: Int[Array, ""]
    found: Int[Array, ""]
    rows: Float[Array, "s c"]
    residuals: Float[Array, " c"]
    picked: Int[Array, " s"]


def cholesky_pivots(
    uniforms: Float[Array, "rounds block_and_c"],
    kernel_rows: KernelRows,
    importance: Float[Array, " c"],
    target: Int[Array, ""],
    *,
    size: int,
    block: int,
) -> tuple[Int[Array, " size"], Int[Array, ""]]:
    r"""Pivots of a randomly pivoted Cholesky factor of a kernel.

    .. math:: P(i) \propto p_i^2 \left( G_{ii} - G_{iS} G_{SS}^{-1} G_{Si} \right)

    Args:
      uniforms: random numbers from ``(0, 1)`` for some rounds, ``[rounds, block + c]``.
      kernel_rows: rows of the kernel :math:`G` by their numbers; its diagonal is one.
      importance: :math:`\log p_i`, ``[c]``; what has :math:`-\infty` is never drawn.
      target: pivots to draw, at most ``size``.
      size: slots, static.
      block: pivots that are drawn at once, static, at most ``c``.

    Returns:
      The pivots ``[size]`` in the order in which they were drawn, and the rounds that it took;
      ``c`` behind the last pivot, which comes early where nothing is left to draw.

    References:
      Chen, Epperly, Tropp, Webber, *Randomly pivoted Cholesky*, 2023, arXiv 2207.06503.
      Epperly, Tropp, Webber, *Embrace rejection: kernel matrix approximation by accelerated
      randomly pivoted Cholesky*, 2024, arXiv 2410.03969.
    """
    count, dtype = importance.shape[0], importance.dtype
    rounding = _ROUNDINGS * float(jnp.finfo(dtype).eps)
    earlier = jnp.tri(block, k=-1, dtype=bool)

    def unfinished(factor: _Factor) -> Array:
        left = (factor.found < target) & jnp.any(factor.residuals > 0)
        return left & (factor.number < _MOST_ROUNDS)

    def extend(factor: _Factor) -> _Factor:
        turns, row = factor.number // len(uniforms), factor.number % len(uniforms)
        draws = uniforms[row] + turns.astype(dtype) * _GOLDEN_RATIO
        draws = jnp.maximum(draws - jnp.floor(draws), jnp.finfo(dtype).tiny)
        # What is left of nothing is -inf, and stays so. The largest scores are a draw without
        # replacement: the noise is Gumbel's.
        scores = jnp.log(factor.residuals / -jnp.log(draws[block:])) + 2 * importance
        best, drawn = jax.lax.top_k(scores, block)
        known = matmul(factor.rows[:, drawn].T, factor.rows)
        rows = kernel_rows(drawn) - known
        # Sent back with the probability of what it shares with one drawn before.
        corner = rows[:, drawn]
        diagonal = jnp.maximum(jnp.diagonal(corner), rounding)
        shared = jnp.square(corner) / (diagonal[:, None] * diagonal[None])
        clashes = jnp.max(jnp.where(earlier, shared, 0), axis=1)
        taken = (clashes < draws[:block]) & jnp.isfinite(best)
        # Not a cumulative sum, which takes long to compile.
        taken &= factor.found + jnp.sum(earlier & taken[None], axis=1) < target
        corner = jnp.where(taken[:, None] & taken[None], corner, 0)
        # Rounding may leave copies that the draw let through: half a rounding keeps it definite.
        corner += jnp.diag(jnp.where(taken, rounding / 2, 1).astype(dtype))
        # Accepted rows come first; the next round overwrites the rejected ones after them.
        order = jnp.argsort(~taken, stable=True)
        rows = _divided(corner, jnp.where(taken[:, None], rows, 0))[order]
        drawn = jnp.where(taken, drawn, count)[order]
        residuals = factor.residuals - jnp.sum(jnp.square(rows), axis=0)
        residuals = jnp.where(residuals > rounding, residuals, 0).at[drawn].set(0, mode="drop")
        return _Factor(
            factor.number + 1,
            factor.found + jnp.sum(taken),
            jax.lax.dynamic_update_slice_in_dim(factor.rows, rows, factor.found, 0),
            residuals,
            jax.lax.dynamic_update_slice_in_dim(factor.picked, drawn, factor.found, 0),
        )

    # Made from the importance, so that everything carried varies over the mesh axes that it does.
    zeros = jnp.zeros_like(importance)
    number = jnp.zeros_like(target)
    start = _Factor(
        number,
        number,
        jnp.zeros((size + block, count), dtype) + zeros[None],
        zeros + jnp.isfinite(importance).astype(dtype),
        jnp.full(size + block, count, jnp.int32) + zeros[0].astype(jnp.int32),
    )
    last = jax.lax.while_loop(unfinished, extend, start)
    return last.picked[:size], last.number


def _divided(corner: Float[Array, "b b"], rows: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """Rows of the factor: :math:`C^{-1} R` for the Cholesky factor :math:`C` of the corner."""

    def divide(corner: Array, rows: Array) -> Array:
        lower = cholesky_factor(corner)
        return jax.lax.linalg.triangular_solve(lower, rows.T, lower=True, transpose_a=True).T

    return one_by_one(divide)(corner, rows)


def candidate_count(count: int, size: int) -> int:
    """Pairs that may become pivots, of ``count`` for ``size`` slots."""
    return min(count, max(_CANDIDATES * size, _FEWEST_CANDIDATES))


def draw_pivots(
    key: Array,
    importance: Float[Array, " n"],
    target: Int[Array, ""],
    kernel_of: Callable[[Int[Array, " c"]], tuple[KernelRows, Float[Array, " c"]]],
    *,
    size: int,
    power: float,
) -> tuple[Int[Array, " size"], Int[Array, ""]]:
    """Pivots of a head: candidates by importance, and among them those of a Cholesky factor.

    Args:
      key: a random key.
      importance: logarithms ``[n]``; what has minus infinity is never drawn.
      target: pivots to draw, at most ``size``.
      kernel_of: of the places of candidates, in their order, the rows of their kernel by number,
        and what is to be added to their importance.
      size: slots, static.
      power: candidates are drawn in proportion to this power of importance, static.

    Returns:
      Places of the pivots ``[size]``, and the rounds that it took; ``n`` in slots without one.
    """
    count, dtype = importance.shape[0], importance.dtype
    candidates = candidate_count(count, size)
    block = min(max(_FEWEST_DRAWN, size // _SHARE_DRAWN), candidates)
    # A row for the choice of candidates, and one for each round; padding behind pairs changes none.
    # Drawn as a vector: a CPU's compiler unrolls short rows, and the generator is long.
    rows = 1 + _DRAWN_ROUNDS
    uniforms = jax.random.uniform(
        key, ((block + count) * rows,), dtype, minval=jnp.finfo(dtype).tiny
    )
    uniforms = uniforms.reshape(-1, rows).T
    scores = power * importance
    if candidates < count:
        scores -= jnp.log(-jnp.log(uniforms[0, block:]))
    scores, drawn = jax.lax.top_k(scores, candidates)
    # In the order of the sequence, behind them what cannot be drawn.
    places = jnp.sort(jnp.where(jnp.isfinite(scores), drawn, count))
    real = jnp.minimum(places, count - 1)
    kernel_rows, change = kernel_of(real)
    picked, rounds = cholesky_pivots(
        uniforms[1:, : block + candidates],
        kernel_rows,
        jnp.where(places < count, importance[real] + change, -jnp.inf),
        target,
        size=size,
        block=block,
    )
    return jnp.where(
        picked < candidates, places[jnp.minimum(picked, candidates - 1)], count
    ), rounds


def first_places(
    chosen: Bool[Array, " n"], allowed: Bool[Array, " n"], size: int
) -> Int[Array, " size"]:
    """Places of what was chosen, in order, and where slots are left the first that are allowed.

    ``n`` in slots that are left then.
    """
    count = chosen.shape[0]
    rank = jnp.where(chosen, 0, jnp.where(allowed, 1, 2))
    ranks, places = jax.lax.sort((rank, jnp.arange(count, dtype=jnp.int32)), num_keys=2)
    return jnp.sort(jnp.where(ranks[:size] < 2, places[:size], count))


def select_pivots(
    head: Head, size: int, kernel_radius: Float[Array, ""] | None
) -> tuple[Coreset, Info]:
    """The heavy pairs of a head, as they are, and pivots among the others, all of one weight.

    Args:
      head: the head.
      size: pairs to keep, static.
      kernel_radius: the radius of the kernel on unit keys; ``None`` for the default.
    """
    count, dtype = head.count, head.dtype
    geometry = fitting_geometry(head.standardization, kernel_radius)
    importance = log_importance(geometry, head.keys, head.values, head.inside)
    still = heavy = alone_in_head(head, importance, size)
    if head.log_weights is not None:
        # What stands for many pairs is kept, but not as it is: it may stand for more of them.
        importance = importance + jnp.where(head.inside, head.log_masses, 0)
        heavy = alone_in_head(head, importance, size)
    light = jnp.where(heavy, -jnp.inf, importance)

    def kernel_of(places: Array) -> tuple[KernelRows, Array]:
        keys = head.keys[places]
        near = geometry.scaled(keys)
        # A key that is drawn in counts as one that lies there.
        excess = geometry.radius * geometry.true_squares(keys) - jnp.sum(jnp.square(near), axis=-1)
        return lambda drawn: gaussian_kernel(near[drawn], near), -excess / 2

    picked, rounds = draw_pivots(
        head.key,
        light,
        jnp.minimum(size, head.length) - jnp.sum(heavy),
        kernel_of,
        size=size,
        power=_CANDIDATE_POWER,
    )
    # Where copies leave nothing to draw, slots go to whatever comes first.
    indices = first_places(heavy.at[picked].set(True, mode="drop"), head.inside, size)
    # What asks nothing, or beyond all numbers, has no geometry to pick in.
    sound = jnp.isfinite(geometry.radius) & (geometry.radius > 0)
    others = jnp.minimum(size, head.length) - jnp.sum(heavy)
    masses = head.log_masses
    shared = jnp.sum(jnp.exp(jnp.where(heavy, -jnp.inf, masses)))
    weight = jnp.log(shared / jnp.maximum(others, 1).astype(dtype))
    rows = jnp.minimum(indices, count - 1)
    common = jnp.where(sound, weight, jnp.nan)
    # Of few pairs, all are kept, and stand for what they stood for.
    own = (heavy & still)[rows] | (sound & (head.length <= size))
    log_weights = jnp.where(own, masses[rows], common)
    info = Info(
        kernel_radius=geometry.radius / jnp.square(geometry.reach),
        heavy=jnp.sum(heavy, dtype=jnp.int32),
        rounds=rounds,
    )
    return head.pairs(indices, log_weights), info
