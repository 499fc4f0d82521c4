r"""A lower bound on a coreset's worst error: a search over the ball of queries.

The error that the theorems bound is a supremum over a ball, and an average over sample queries
says little about it. The search climbs the error itself by projected gradient ascent, so whatever
it reports is reached by a query that it names. Truth lies between this and a certificate.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax._src import checks, meshes
from coreset_jax._src.core.attend import attend
from coreset_jax._src.core.coreset import Coreset, SignedCoreset, normalizers
from coreset_jax._src.core.driver import Cache
from coreset_jax._src.core.turns import over_axes
from coreset_jax._src.precision import accumulation_dtype, inner_products, matmul
from coreset_jax.guarantees.candidates import candidates, unit_vectors
from coreset_jax.guarantees.checks import check_comparison
from coreset_jax.guarantees.tilt import spread_center, tilted

# To screen a candidate costs half a step.
_CANDIDATES_PER_START = 16

# Length of the last step of an ascent over that of the first.
_LAST_STEP = 1e-3


class Adversary(NamedTuple):
    """What a search for the worst query found.

    Attributes:
      error: the largest error met, ``[...]``, in the units of the values: a lower bound on the
        supremum. NaN for a head whose source or coreset is not finite.
      query: the raw query that reaches it, ``[..., d]``.
      errors: the largest error that each ascent met, ``[..., starts]``. Where many of them agree
        with ``error`` a better query is unlikely.
      rho: the radius of the unit queries searched, ``[...]``.
    """

    error: Float[Array, "*heads"]
    query: Float[Array, "*heads d"]
    errors: Float[Array, "*heads starts"]
    rho: Float[Array, "*heads"]


class _Sums(NamedTuple):
    r"""Softmax sums over a part of the pairs, and their derivatives by the query.

    With :math:`p_i = w_i e^{\langle q, k_i\rangle - M}`, normalizers :math:`z` and a unit vector
    :math:`u` of the value space.
    """

    maximum: Float[Array, " s"]  # M
    total: Float[Array, " s"]  # sum_i p_i z_i
    output: Float[Array, "s dv"]  # sum_i p_i v_i
    total_gradient: Float[Array, "s d"]  # sum_i p_i z_i k_i
    output_gradient: Float[Array, "s d"]  # sum_i p_i <u, v_i> k_i


class _Ascent(NamedTuple):
    """The state of the ascents, in the unit ball."""

    points: Float[Array, "s d"]
    directions: Float[Array, "s dv"]
    optimizer: optax.OptState
    best_points: Float[Array, "s d"]
    best_errors: Float[Array, " s"]


def _sums(
    queries: Float[Array, "s d"],
    directions: Float[Array, "s dv"],
    pairs: Coreset | SignedCoreset,
) -> _Sums:
    scores = inner_products(queries, pairs.keys) + pairs.log_weights
    maximum = jnp.max(scores, axis=-1)
    # A block of empty slots alone must give zeros, not the NaN of (-inf) - (-inf).
    shift = jnp.where(jnp.isneginf(maximum), jnp.zeros_like(maximum), maximum)
    masses = jnp.exp(scores - shift[:, None])
    signed = masses * normalizers(pairs)
    along = masses * inner_products(directions, pairs.values)
    gradients = matmul(jnp.concatenate([signed, along]), pairs.keys)
    total_gradient, output_gradient = jnp.split(gradients, 2)
    output = matmul(masses, pairs.values)
    return _Sums(maximum, jnp.sum(signed, axis=-1), output, total_gradient, output_gradient)


def _merge(left: _Sums, right: _Sums) -> _Sums:
    maximum = jnp.maximum(left.maximum, right.maximum)
    shift = jnp.where(jnp.isneginf(maximum), jnp.zeros_like(maximum), maximum)

    def scaled(part: _Sums) -> list[Array]:
        factor = jnp.exp(part.maximum - shift)
        return [part.total * factor, *(rows * factor[:, None] for rows in part[2:])]

    return _Sums(maximum, *map(jnp.add, scaled(left), scaled(right)))


def _output_and_gradient(
    queries: Float[Array, "s d"],
    directions: Float[Array, "s dv"],
    pairs: Coreset | SignedCoreset,
    block_size: int,
) -> tuple[Float[Array, "s dv"], Float[Array, "s d"]]:
    r"""Attention, and the gradient by the query of its component along a direction.

    .. math::
       \nabla_q \langle u, \mathrm{Attn}(q)\rangle
         = \frac{\sum_i p_i \langle u, v_i - z_i \mathrm{Attn}(q)\rangle k_i}{\sum_i p_i z_i}

    One pass over blocks of pairs gives both; reverse mode would need a second one, or the scores
    of all pairs in memory. Where the denominator is not positive the output is infinite.
    """
    count = pairs.keys.shape[0]
    block_size = min(block_size, count)
    whole = count // block_size * block_size

    def part(start: Array | int, width: int) -> _Sums:
        def rows(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, start, width)

        return _sums(queries, directions, jax.tree.map(rows, pairs))

    sums = part(whole, count - whole) if whole < count else part(0, block_size)
    starts = jnp.arange(0 if whole < count else block_size, whole, block_size)
    sums, _ = jax.lax.scan(
        lambda carry, start: (_merge(carry, part(start, block_size)), None), sums, starts
    )
    total = sums.total[:, None]
    output = sums.output / total
    along = jnp.sum(output * directions, axis=-1, keepdims=True)
    gradient = (sums.output_gradient - along * sums.total_gradient) / total
    # The denominator is positive at the center, so the ball holds a query where it vanishes.
    return jnp.where(total > 0, output, jnp.full_like(output, jnp.inf)), gradient


def _search_head(
    rng: Array,
    source: Coreset,
    coreset: Coreset | SignedCoreset,
    rho: Float[Array, ""],
    learning_rate: Float[Array, ""],
    starts: int,
    steps: int,
    block_size: int,
) -> tuple[Float[Array, " starts"], Float[Array, "starts d"]]:
    r"""The largest error that each ascent meets, and the point of the unit ball where it does.

    Each step of :math:`\max_{q, u} \langle u, \mathrm{Attn}(q) - \mathrm{Attn}'(q)\rangle` is a
    gradient step in q at the last u, then the best u: the direction of the error itself.
    """

    def difference(points: Float[Array, "s d"]) -> Float[Array, "s dv"]:
        return attend(rho * points, source, scale=1.0, block_size=block_size) - attend(
            rho * points, coreset, scale=1.0, block_size=block_size
        )

    # Candidates compete in groups of one kind: the best of all would crowd into few basins.
    count = _CANDIDATES_PER_START * starts
    points = candidates(rng, source, coreset, rho, count, block_size=block_size)
    screened = jax.lax.map(difference, points.reshape(-1, starts, points.shape[-1]))
    screened = screened.reshape(starts, _CANDIDATES_PER_START, -1)
    errors = jnp.linalg.norm(screened, axis=-1)
    winners = jnp.argmax(errors, axis=-1)

    def winning(groups: Float[Array, "starts candidates width"]) -> Float[Array, "starts width"]:
        return jnp.take_along_axis(groups, winners[:, None, None], axis=1)[:, 0]

    points = winning(points.reshape(starts, _CANDIDATES_PER_START, -1))
    # A step of unit gradients, not of Adam: its scaling by coordinate bends the direction, and a
    # projected ascent then rests where the error still grows along the sphere.
    # Steps of full length travel along the sphere; a supremum inside needs ever shorter ones.
    half = steps // 2
    transformation = optax.sgd(
        optax.exponential_decay(learning_rate, steps - half, _LAST_STEP, transition_begin=half)
    )
    state = _Ascent(
        points=points,
        directions=unit_vectors(winning(screened)),
        optimizer=jax.vmap(transformation.init)(points),
        best_points=points,
        best_errors=winning(errors[..., None])[:, 0],
    )

    def step(state: _Ascent, _: None) -> tuple[_Ascent, None]:
        queries = rho * state.points
        given, given_gradient = _output_and_gradient(queries, state.directions, source, block_size)
        kept, kept_gradient = _output_and_gradient(queries, state.directions, coreset, block_size)
        errors = jnp.linalg.norm(given - kept, axis=-1)
        better = errors > state.best_errors
        # optax descends.
        updates, optimizer = jax.vmap(transformation.update)(
            unit_vectors(kept_gradient - given_gradient), state.optimizer
        )
        points = optax.apply_updates(state.points, updates)
        return _Ascent(
            points=jax.vmap(optax.projections.projection_l2_ball)(points),
            directions=unit_vectors(given - kept),
            optimizer=optimizer,
            best_points=jnp.where(better[:, None], state.points, state.best_points),
            best_errors=jnp.where(better, errors, state.best_errors),
        ), None

    state, _ = jax.lax.scan(step, state, None, length=steps)
    return state.best_errors, state.best_points


def _search_heads(
    shared: tuple[Array, ArrayLike],
    numbers: Int[Array, "*heads"],
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    coreset: Coreset | SignedCoreset,
    query_center: Float[Array, "*heads d"] | None,
    ball: dict[str, Any],
    *,
    starts: int,
    steps: int,
    block_size: int,
) -> Adversary:
    """The search of some heads, which draw by their numbers."""
    rng, learning_rate = shared
    dtype = accumulation_dtype(keys, values, coreset.keys, coreset.values)
    keys, values = keys.astype(dtype), values.astype(dtype)
    seen = tilted(keys, values, coreset, query_center, **ball)
    standardization = seen.standardization

    def standardized(pairs: Coreset | SignedCoreset) -> Any:
        named = pairs._asdict().items()
        fields = {k: v.astype(dtype) for k, v in named if k not in ("indices", "scale")}
        pairs = pairs._replace(**fields)
        # Values of a signed coreset are coefficients of the output, which a mean value enters
        # times the normalizer.
        centers = normalizers(pairs)[..., None] * standardization.value_center[..., None, :]
        unit_values = (pairs.values - centers) / standardization.value_radius[..., None, None]
        return pairs._replace(keys=standardization.unit_keys(pairs.keys), values=unit_values)

    def search(
        number: Array, source: Coreset, coreset: Coreset | SignedCoreset, rho: Array
    ) -> tuple[Array, Array]:
        head_rng = jax.random.fold_in(rng, number)
        rate = jnp.asarray(learning_rate, dtype)
        return _search_head(head_rng, source, coreset, rho, rate, starts, steps, block_size)

    source, kept = standardized(seen.source), standardized(seen.coreset)
    search = over_axes(search, keys.ndim - 2)
    errors, points = search(numbers, source, kept, standardization.rho)
    errors = errors * standardization.value_radius[..., None]
    best = jnp.argmax(errors, axis=-1, keepdims=True)
    point = jnp.take_along_axis(points, best[..., None], axis=-2)
    query = standardization.restore_queries(standardization.rho[..., None, None] * point)
    if seen.center is not None:
        query = query + seen.center[..., None, :]
    error = jnp.take_along_axis(errors, best, axis=-1)
    return Adversary(error[..., 0], query[..., 0, :], errors, standardization.rho)


@functools.partial(jax.jit, static_argnames=("starts", "steps", "block_size"))
def _adversary(
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    coreset: Coreset | SignedCoreset,
    query_center: Float[Array, "*#heads d"] | None,
    ball: dict[str, Any],
    learning_rate: ArrayLike,
    *,
    starts: int,
    steps: int,
    block_size: int,
) -> Adversary:
    numbers = Cache(rng, keys, values, None, None, None, measured=False).numbers
    center = spread_center(query_center, keys)
    search = functools.partial(_search_heads, starts=starts, steps=steps, block_size=block_size)
    of_heads = numbers, keys, values, coreset, center, ball
    return meshes.for_heads(search, keys.ndim - 2, (rng, learning_rate), *of_heads)


def adversary(
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    coreset: Coreset | SignedCoreset,
    *,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    queries: Float[Array, "*heads q d"] | None = None,
    scale: ArrayLike | None = None,
    lengths: Int[Array, "*heads"] | None = None,
    query_center: Float[Array, "*#heads d"] | None = None,
    starts: int = 64,
    steps: int = 40,
    learning_rate: float = 1.0,
    block_size: int = 1024,
) -> Adversary:
    r"""Searches a ball of queries for the one that a coreset answers worst.

    .. math::
       \sup_{\|q - \mu\| \le R} \; \| \mathrm{Attn}(q) - \mathrm{Attn}'(q) \|, \qquad
       R = \frac{\rho}{\mathrm{scale} \cdot \max_i \|k_i - \bar k\|}

    from below, by projected gradient ascent. Candidates (keys that the coreset weighs differently,
    chosen by what they can attract and at random, the singular vectors of the error's first
    degree, and random points) are screened, and the best climb. The ball has the raw query
    :math:`\mu` at its center, zero unless it is given, whatever the mean of the keys.

    Args:
      rng: a JAX random key; every head gets a fold of its own.
      keys: the source's keys ``[..., n, d]``.
      values: the source's values ``[..., n, dv]``.
      coreset: what any compressor made of them, signed ones included.
      rho: radius of the unit queries, see :func:`coreset_jax.geometry.standardize`.
      query_norm: or the radius of the raw queries. Each is a scalar or ``[...]``.
      queries: or sample raw queries ``[..., q, d]`` whose largest norm is the radius; with none
        of the three the radius of the raw queries is ``sqrt(d)``.
      scale: the softmax scale, a scalar or ``[...]``; ``None`` means the coreset's, and where that
        has none ``1/sqrt(d)``. Any other than the coreset's is an error.
      lengths: valid pairs of each head ``[...]``; ``None`` means all.
      query_center: the middle :math:`\mu` of the ball, ``[..., d]``, of which ``rho`` and
        ``query_norm`` are radii then, and from which the distance of sample ``queries`` counts;
        ``None`` means zero.
      starts: ascents of a head, static. Up to ``rho = 2`` a few find the supremum; beyond, local
        maxima multiply and more starts find a few percent more.
      steps: gradient steps of an ascent, static.
      learning_rate: length of a step in radii of the ball; it shrinks a thousandfold over
        the second half of the steps.
      block_size: pairs per step of each pass, static: a head holds ``starts * block_size`` scores.

    Returns:
      The error, the query that reaches it, and the errors of all ascents. The error is infinite
      if a query was met at which the denominator of a signed coreset is not positive.

    Raises:
      ValueError: if shapes do not fit, a radius is not positive or named twice, or ``starts``,
        ``steps``, ``learning_rate`` or ``block_size`` is not positive.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Section 2, for the
      supremum that is bounded here.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> coreset = cj.balanced(rho=1.0)(jax.random.key(1), keys, values, size=64)
    >>> worst = adversary(jax.random.key(2), keys, values, coreset, rho=1.0)
    >>> worst.query.shape, worst.errors.shape
    ((16,), (64,))
    >>> query = worst.query[None]
    >>> difference = cj.attention(query, keys, values) - cj.attend(query, coreset)
    >>> bool(abs(jax.numpy.linalg.norm(difference) - worst.error) < 1e-5)
    True
    """
    ball: dict[str, Any] = {
        "rho": rho,
        "query_norm": query_norm,
        "queries": queries,
        "scale": scale,
        "lengths": lengths,
    }
    ball["scale"] = check_comparison(keys, values, coreset, query_center, **ball)
    # What is compared is the unit problem, into which the scale goes.
    coreset = coreset._replace(scale=None)
    for name, count in (("starts", starts), ("steps", steps), ("block_size", block_size)):
        checks.check_count(name, count)
    checks.check_positive("learning_rate", learning_rate)
    return _adversary(
        rng,
        keys,
        values,
        coreset,
        query_center,
        ball,
        learning_rate,
        starts=int(starts),
        steps=int(steps),
        block_size=int(block_size),
    )
