r"""Signs from a Gram matrix: the walks of vector balancing.

A walk sees ``count`` vectors only through their Gram matrix :math:`G` and through the *field*
:math:`f_i = \langle w_i, \text{what is there already}\rangle`, and picks signs
:math:`x \in \{\pm 1\}` that keep :math:`\|\text{what is there} + \sum_i x_i w_i\|` small.

All walks share one signature, ``walk(rng, gram, field, count) -> signs``:

- ``gram [b, b]`` and ``field [b]``, of which the first ``count`` entries take part;
- ``count`` is even, and may be traced;
- signs ``[b]`` are +1 and -1 in equal numbers among the first ``count``, 0 after them.

A walk is sequential by nature: vmap it over blocks and heads, never over its steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src.geometry.solves import identity_like, one_by_one, solve_definite
from coreset_jax._src.precision import matmul

Count = Int[Array, ""] | int
Walk = Callable[[Array, Float[Array, "b b"], Float[Array, " b"], Count], Float[Array, " b"]]


def _pair_problem(
    gram: Float[Array, "b b"], field: Float[Array, " b"], count: Count
) -> tuple[Float[Array, "p p"], Float[Array, " p"], Bool[Array, " p"]]:
    """Gram matrix, field and mask of the differences of consecutive vectors."""
    rows = gram[0::2] - gram[1::2]
    active = 2 * jnp.arange(gram.shape[0] // 2) < count
    return rows[:, 0::2] - rows[:, 1::2], field[0::2] - field[1::2], active


def _signs_of_pairs(
    pair_signs: Float[Array, " p"], active: Bool[Array, " p"]
) -> Float[Array, " b"]:
    pair_signs = jnp.where(active, pair_signs, jnp.zeros_like(pair_signs))
    return jnp.stack([pair_signs, -pair_signs], axis=-1).reshape(-1)


def greedy_pairs(
    rng: Array, gram: Float[Array, "b b"], field: Float[Array, " b"], count: Count
) -> Float[Array, " b"]:
    r"""Takes consecutive vectors two by two, one +, one -, whichever way lowers the norm.

    .. math:: y_p = -\mathrm{sign}\,\langle w_{2p} - w_{2p+1}, \textstyle\sum_{q<p} y_q
       (w_{2q} - w_{2q+1}) \rangle

    Deterministic (``rng`` is not used); :math:`O(b)` a step.

    Args:
      rng: unused, for the common signature.
      gram: Gram matrix ``[b, b]``, ``b`` even.
      field: pull of what is there already ``[b]``.
      count: vectors that take part, even.

    Returns:
      Signs ``[b]``.

    >>> import jax, jax.numpy as jnp
    >>> vectors = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]])
    >>> greedy_pairs(jax.random.key(0), vectors @ vectors.T, jnp.zeros(4), 4)
    Array([ 1., -1., -1.,  1.], dtype=float32)
    """
    del rng
    pair_gram, pair_field, active = _pair_problem(gram, field, count)

    def step(p: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        pull, signs = carry
        sign = jnp.where(pull[p] > 0, -1.0, 1.0).astype(pull.dtype)
        return pull + sign * pair_gram[p], signs.at[p].set(sign)

    steps = pair_field.shape[0]
    _, signs = jax.lax.fori_loop(0, steps, step, (pair_field, jnp.zeros_like(pair_field)))
    return _signs_of_pairs(signs, active)


def self_balancing(
    rng: Array,
    gram: Float[Array, "b b"],
    field: Float[Array, " b"],
    count: Count,
    *,
    constant: float | Float[Array, ""] = 1.0,
) -> Float[Array, " b"]:
    r"""The online self-balancing walk, on the differences of consecutive vectors.

    .. math::
       P(y_p = +1) = \tfrac12 - \frac{\langle u_p, \sum_{q<p} y_q u_q\rangle}{2c}
       \text{ clipped to } [0, 1], \qquad u_p = \frac{w_{2p} - w_{2p+1}}{2 \max_i \|w_i\|}

    The walk's guarantee (:math:`O(\sqrt{\log n})`-subgaussian) asks for
    :math:`c = 30\log(n/\delta)`; a small constant does better in practice.

    Args:
      rng: a JAX random key.
      gram: Gram matrix ``[b, b]``, ``b`` even.
      field: pull of what is there already ``[b]``.
      count: vectors that take part, even.
      constant: the constant :math:`c`.

    Returns:
      Signs ``[b]``.

    References:
      Alweiss, Liu, Sawhney, *Discrepancy minimization via a self-balancing walk*, STOC 2021.
    """
    pair_gram, pair_field, active = _pair_problem(gram, field, count)
    # The theorem is about vectors of norm at most one.
    largest = jnp.max(jnp.diagonal(gram))
    square = 4 * jnp.where(largest > 0, largest, 1)
    pair_gram, pair_field = pair_gram / square, pair_field / square
    uniforms = jax.random.uniform(rng, pair_field.shape, pair_field.dtype)

    def step(p: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        pull, signs = carry
        probability = jnp.clip(0.5 - pull[p] / (2 * constant), 0.0, 1.0)
        sign = jnp.where(uniforms[p] < probability, 1.0, -1.0).astype(pull.dtype)
        return pull + sign * pair_gram[p], signs.at[p].set(sign)

    steps = pair_field.shape[0]
    _, signs = jax.lax.fori_loop(0, steps, step, (pair_field, jnp.zeros_like(pair_field)))
    return _signs_of_pairs(signs, active)


class _GramSchmidtState(NamedTuple):
    root: Float[Array, "b b"]
    position: Float[Array, " b"]
    alive: Bool[Array, " b"]


def gram_schmidt_rounding(
    rng: Array,
    gram: Float[Array, "b b"],
    start: Float[Array, " b"],
    alive: Bool[Array, " b"],
    *,
    balanced: bool,
    ridge: float = 1e-4,
) -> Float[Array, " b"]:
    r"""Rounds a point of the cube to signs by the Gram-Schmidt walk.

    With the alive set :math:`A`, its pivot :math:`p` and
    :math:`M = (G_{AA} + \lambda I)^{-1}`, each step moves along :math:`u_A = M e_p / M_{pp}`
    (the combination of the alive vectors that is shortest with :math:`u_p = 1`) to one of the
    two faces it meets, each with probability inverse to its distance. A frozen element leaves
    :math:`M = W W^\top` by a projection of the rows of :math:`W`.
    :math:`\sum_i (x_i - x_i^0) w_i` is subgaussian with constant 1 for vectors of norm at most
    one.

    Args:
      rng: a JAX random key.
      gram: Gram matrix ``[b, b]``.
      start: a point of the cube :math:`[-1, 1]^b`.
      alive: which elements take part ``[b]``; the others are returned as they are.
      balanced: restrict every direction to :math:`\sum_i u_i = 0`
        (:math:`u = \alpha M e_p + \beta M 1`), so that the sum of the point is kept.
      ridge: :math:`\lambda`, relative to the mean of the diagonal.

    Returns:
      A point ``[b]`` with entries +1 and -1 where alive.

    References:
      Bansal, Dadush, Garg, Lovett, *The Gram-Schmidt walk*, STOC 2018.
      Harshaw, Savje, Spielman, Zhang, *Balancing covariates in randomized experiments with the
      Gram-Schmidt walk design*, 2019.
    """
    width = gram.shape[0]
    dtype = gram.dtype
    permutation_rng, step_rng = jax.random.split(rng)
    # A fixed random priority keeps the pivot until it freezes, as the walk demands.
    priority = jax.random.uniform(permutation_rng, (width,))
    uniforms = jax.random.uniform(step_rng, (width,), dtype)
    both = alive[:, None] & alive[None, :]
    eye = identity_like(gram)
    scale = jnp.sum(jnp.where(alive, jnp.diagonal(gram), 0)) / jnp.maximum(jnp.sum(alive), 1)
    scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    # Elements that take no part get the identity: invertible, and untouched by the others.
    regular = jnp.where(both, gram / scale, 0) + jnp.where(alive, ridge, 1.0) * eye
    # M = W W^T is kept by its root: what is left of M after many downdates is small beside M, and
    # would drown in its rounding.
    root = jnp.where(both, one_by_one(_inverse_root)(regular, eye), 0)
    # (A^-1)_ii is never below 1 / A_ii.
    least = 1 / jnp.diagonal(regular)
    tiny = jnp.finfo(dtype).tiny

    def step(index: Array, state: _GramSchmidtState) -> _GramSchmidtState:
        root, position, alive = state
        pivot = jnp.argmax(jnp.where(alive, priority, -1.0))
        column = matmul(root, root[pivot])
        column = column.at[pivot].max(least[pivot])
        if balanced:
            ones = matmul(root, jnp.sum(root, axis=0))
            total = jnp.sum(ones)
            # Not negative (Cauchy-Schwarz), but a difference of nearly equal numbers.
            product = column[pivot] * total
            determinant = jnp.maximum(
                product - ones[pivot] ** 2, 8 * jnp.finfo(dtype).eps * product
            )
            direction = (total * column - ones[pivot] * ones) / jnp.maximum(determinant, tiny)
        else:
            direction = column / jnp.where(column[pivot] > tiny, column[pivot], 1.0)
        direction = jnp.where(alive, direction, 0).at[pivot].set(1.0)
        if balanced:
            # What rounding left of the sum goes to the others, so that it is zero by construction.
            others = alive.at[pivot].set(False)
            excess = jnp.sum(direction) / jnp.maximum(jnp.sum(others), 1)
            direction = direction - jnp.where(others, excess, 0)
        moving = alive & (direction != 0)
        safe = jnp.where(moving, direction, 1.0)
        up = jnp.where(moving, (jnp.sign(safe) - position) / safe, jnp.inf)
        down = jnp.where(moving, (jnp.sign(safe) + position) / safe, jnp.inf)
        first_up, first_down = jnp.argmin(up), jnp.argmin(down)
        far_up, far_down = jnp.maximum(up[first_up], 0), jnp.maximum(down[first_down], 0)
        goes_up = uniforms[index] * (far_up + far_down) < far_down
        # One element alone cannot move without changing the sum: it is at a face already,
        # up to rounding.
        alone = balanced & (jnp.sum(alive) == 1)
        length = jnp.where(alone, 0.0, jnp.where(goes_up, far_up, -far_down))
        frozen = jnp.where(alone, pivot, jnp.where(goes_up, first_up, first_down))
        position = jnp.clip(position + length * direction, -1.0, 1.0)
        face = jnp.where(goes_up, jnp.sign(direction[frozen]), -jnp.sign(direction[frozen]))
        face = jnp.where(alone, jnp.where(position[frozen] < 0, -1.0, 1.0), face)
        position = position.at[frozen].set(face)
        row = root[frozen]
        square = jnp.maximum(jnp.sum(jnp.square(row)), least[frozen])
        overlaps = matmul(root, row) / square
        root = (root - overlaps[:, None] * row).at[frozen].set(0)
        done = ~jnp.any(alive)
        new = _GramSchmidtState(root, position, alive.at[frozen].set(False))
        return jax.tree.map(lambda a, b: jnp.where(done, a, b), state, new)

    state = _GramSchmidtState(root, start, alive)
    return jax.lax.fori_loop(0, width, step, state).position


def _inverse_root(matrix: Float[Array, "b b"], eye: Float[Array, "b b"]) -> Float[Array, "b b"]:
    """W with ``W W^T`` the inverse of a positive definite matrix."""
    return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(matrix), eye, lower=True).T


def gram_schmidt(
    rng: Array,
    gram: Float[Array, "b b"],
    field: Float[Array, " b"],
    count: Count,
    *,
    ridge: float = 1e-4,
) -> Float[Array, " b"]:
    r"""The balanced Gram-Schmidt walk, from the fractional point that best cancels the field.

    The walk starts at the point of the cube with :math:`\sum_i x_i = 0` along
    :math:`-(G + \lambda I)^{-1} f`, and rounds it as :func:`gram_schmidt_rounding` does:
    randomly, without bias, and with the sum kept. :math:`O(b^2)` a step.

    Args:
      rng: a JAX random key.
      gram: Gram matrix ``[b, b]``.
      field: pull of what is there already ``[b]``.
      count: vectors that take part, even.
      ridge: :math:`\lambda`, relative to the mean of the diagonal.

    Returns:
      Signs ``[b]``.
    """
    width = gram.shape[0]
    alive = jnp.arange(width) < count
    both = alive[:, None] & alive[None, :]
    scale = jnp.sum(jnp.where(alive, jnp.diagonal(gram), 0)) / jnp.maximum(count, 1)
    scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    diagonal = jnp.where(alive, ridge, 1.0) * jnp.eye(width, dtype=gram.dtype)
    regular = jnp.where(both, gram / scale, 0) + diagonal
    targets = jnp.stack([jnp.where(alive, field / scale, 0), alive.astype(gram.dtype)], axis=1)
    solved, ones = solve_definite(regular, targets).T
    start = jnp.where(alive, ones * jnp.sum(solved) / jnp.maximum(jnp.sum(ones), 1e-30) - solved, 0)
    # Well inside the cube, so that rounding has room in every direction.
    start = start * jnp.minimum(1.0, 0.5 / jnp.maximum(jnp.max(jnp.abs(start)), 1e-30))
    signs = gram_schmidt_rounding(rng, gram, start, alive, balanced=True, ridge=ridge)
    return jnp.where(alive, signs, 0)


def swap_refinement(
    gram: Float[Array, "b b"],
    field: Float[Array, " b"],
    signs: Float[Array, " b"],
    *,
    max_swaps: Count,
) -> Float[Array, " b"]:
    r"""Exchanges a + and a - as long as that lowers the energy.

    .. math:: \mathcal{E}(x) = x^\top G x + 2 f^\top x, \qquad
       \Delta_{ij} = 4\,(s_j - s_i + G_{ii} + G_{jj} - 2 G_{ij}), \quad s = Gx + f

    Each swap takes the + whose own flip gains most, then its best partner. The energy never
    rises and the sum of the signs is kept; :math:`O(b)` a swap.

    Args:
      gram: Gram matrix ``[b, b]``.
      field: pull of what is there already ``[b]``.
      signs: signs ``[b]``; zeros take no part.
      max_swaps: swaps at most.

    Returns:
      Signs ``[b]`` of no higher energy.
    """
    diagonal = jnp.diagonal(gram)
    places = jnp.arange(gram.shape[0], dtype=jnp.int32)

    def improve(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        swaps, signs, pull, _ = state
        drop = _first_largest(jnp.where(signs > 0, pull - diagonal, -jnp.inf))
        row = gram[drop]
        change = jnp.where(signs < 0, pull + diagonal - 2 * row, jnp.inf)
        take = _first_largest(-change)
        # Rounding must not let two swaps undo each other forever.
        tolerance = 1e-6 * (diagonal[drop] + diagonal[take])
        better = change[take] - pull[drop] + diagonal[drop] < -tolerance
        step = jnp.where(better, 2.0, 0.0).astype(pull.dtype)
        signs += jnp.where(places == take, step, 0) - jnp.where(places == drop, step, 0)
        return swaps + 1, signs, pull + step * (gram[take] - row), better

    def unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
        swaps, _, _, better = state
        return better & (swaps < max_swaps)

    pull = field + matmul(gram, signs)
    start = (jnp.zeros((), jnp.int32), signs, pull, jnp.any(signs > 0))
    return jax.lax.while_loop(unfinished, improve, start)[1]


def _first_largest(numbers: Float[Array, " b"]) -> Int[Array, ""]:
    """The place of the largest number, by two plain reductions.

    An ``argmax`` reduces pairs, which XLA does not vectorize on CPU: it took most of a swap.
    """
    places = jnp.arange(numbers.shape[0], dtype=jnp.int32)
    last = numbers.shape[0] - 1
    return jnp.min(jnp.where(numbers == jnp.max(numbers), places, last))
