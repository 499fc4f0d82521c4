r"""A lower bound on a coreset's worst error: a search over the ball of queries.

The error that the theorems bound is a supremum over a ball, and an average over sample queries
says little about it. The search climbs the error itself by projected gradient ascent, so whatever
it reports is reached by a query that it names. Truth lies between this and a certificate.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from coreset_jax import problem, validation
from coreset_jax.attention import accumulation_dtype, finish, partial_attention
from coreset_jax.coreset import Coreset, attend, whole_cache

# Candidates screened for each ascent; to screen one costs half a step.
_CANDIDATES_PER_START = 8

# After a quarter of the steps every ascent has settled in its basin; the best quarter go on.
_SETTLING_SHARE = 4
_FINALIST_SHARE = 4

# Pairs that stand for the whole source where a guess is all that is needed.
_SAMPLE = 256


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


def _sums(queries: Float[Array, "s d"], directions: Float[Array, "s dv"], pairs: Coreset) -> _Sums:
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    scores = dot(queries, pairs.keys.T) + pairs.log_weights
    maximum = jnp.max(scores, axis=-1)
    # A block of empty slots alone must give zeros, not the NaN of (-inf) - (-inf).
    shift = jnp.where(jnp.isneginf(maximum), jnp.zeros_like(maximum), maximum)
    masses = jnp.exp(scores - shift[:, None])
    signed = masses if pairs.normalizers is None else masses * pairs.normalizers
    gradients = dot(jnp.concatenate([signed, masses * dot(directions, pairs.values.T)]), pairs.keys)
    total_gradient, output_gradient = jnp.split(gradients, 2)
    output = dot(masses, pairs.values)
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
    pairs: Coreset,
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
    # The denominator is positive at the centre, so the ball holds a query where it vanishes.
    return jnp.where(total > 0, output, jnp.full_like(output, jnp.inf)), gradient


def _unit(vectors: Float[Array, "s width"]) -> Float[Array, "s width"]:
    """The vectors scaled to norm one; zero where a vector is zero or not finite."""
    norms = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    usable = jnp.isfinite(norms) & (norms > 0)
    ones = jnp.ones_like(norms)
    return jnp.where(usable, vectors / jnp.where(usable, norms, ones), jnp.zeros_like(vectors))


def _imbalance(source: Coreset, coreset: Coreset) -> Float[Array, " n"]:
    r"""What the two sides disagree by at each source pair, :math:`y_i = 1/n - w_i / \sum w`."""
    masses = jnp.exp(coreset.log_weights)
    if coreset.normalizers is not None:
        masses = masses * coreset.normalizers
    count = source.keys.shape[0]
    # An index of -1 would count from the end; one past the end is dropped.
    rows = jnp.where(coreset.indices < 0, count, coreset.indices)
    kept = jnp.zeros_like(source.log_weights).at[rows].add(masses / jnp.sum(masses), mode="drop")
    return jax.nn.softmax(source.log_weights) - kept


def _draw(rng: Array, logits: Float[Array, " n"], count: int) -> Int[Array, " count"]:
    """At most ``count`` places drawn without replacement in proportion to ``exp(logits)``."""
    perturbed = logits + jax.random.gumbel(rng, logits.shape, logits.dtype)
    return jax.lax.top_k(perturbed, min(count, logits.shape[0]))[1]


def _peaks(
    rng: Array,
    imbalance: Float[Array, " n"],
    source: Coreset,
    rho: Float[Array, ""],
    block_size: int,
) -> Float[Array, " n"]:
    r"""The error to expect where each key's own direction asks, if only that key makes it.

    .. math::
       \frac{a_i}{1 + a_i} \|v_i - \mathrm{Attn}(q_i)\|, \qquad
       a_i = \frac{|y_i| e^{\langle q_i, k_i\rangle}}{Z(q_i) / n}, \qquad
       q_i = \rho\,\frac{k_i}{\|k_i\|}

    with Attn and Z of a sample of the pairs, so that all keys can be looked at.
    """
    sample = _draw(rng, source.log_weights, _SAMPLE)
    keys, values = source.keys[sample], source.values[sample]
    log_weights = jax.nn.log_softmax(source.log_weights[sample])

    def expected(pair: tuple[Array, Array, Array]) -> Float[Array, ""]:
        key, value, weight = pair
        state = partial_attention(rho * _unit(key[None]), keys, values, log_weights, scale=1.0)
        background = state.maximum[0] + jnp.log(state.total[0])
        share = jax.nn.sigmoid(jnp.log(weight) + rho * jnp.linalg.norm(key) - background)
        return share * jnp.linalg.norm(value - finish(state)[0])

    pairs = (source.keys, source.values, jnp.abs(imbalance))
    return jax.lax.map(expected, pairs, batch_size=min(block_size, imbalance.shape[0]))


def _candidates(
    rng: Array,
    source: Coreset,
    coreset: Coreset,
    rho: Float[Array, ""],
    starts: int,
    block_size: int,
) -> Float[Array, "candidates d"]:
    """Points of the unit ball that a worst query may be near, kind after kind."""
    count, width = source.keys.shape
    value_width = source.values.shape[1]
    dtype = source.keys.dtype
    key_rng, peak_rng, direction_rng, radius_rng = jax.random.split(rng, 4)

    # At a large radius the worst query singles out a key that the two sides weigh differently.
    imbalance = _imbalance(source, coreset)
    scores = _peaks(peak_rng, imbalance, source, rho, block_size)
    _, order = jax.lax.top_k(scores, min(2 * starts, count))
    peaks = _unit(source.keys[order])
    # Others at random, in proportion to that difference.
    order = _draw(key_rng, jnp.log(jnp.abs(imbalance)), starts)
    some_keys = _unit(source.keys[order])

    # The first degree of the error: the right singular vectors of its Jacobian at the centre.
    centers, identity = jnp.zeros((value_width, width), dtype), jnp.eye(value_width, dtype=dtype)
    _, source_jacobian = _output_and_gradient(centers, identity, source, block_size)
    _, coreset_jacobian = _output_and_gradient(centers, identity, coreset, block_size)
    _, _, singular = jnp.linalg.svd(source_jacobian - coreset_jacobian, full_matrices=False)
    singular = singular[:starts]

    # The rest at random, of any radius: when scores saturate the worst query may lie inside.
    fixed = [some_keys, -some_keys, peaks, singular, -singular]
    remaining = _CANDIDATES_PER_START * starts - sum(points.shape[0] for points in fixed)
    random = _unit(jax.random.normal(direction_rng, (remaining, width), dtype))
    radii = jax.random.uniform(radius_rng, (remaining, 1), dtype)
    return jnp.concatenate([*fixed, random * radii])


def _ascend(
    state: _Ascent,
    transformation: optax.GradientTransformation,
    source: Coreset,
    coreset: Coreset,
    rho: Float[Array, ""],
    steps: int,
    block_size: int,
) -> _Ascent:
    r"""Climbs :math:`\max_u \langle u, \mathrm{Attn}(q) - \mathrm{Attn}'(q)\rangle` in q and u.

    Each step is a gradient step in q at the last u, followed by the best u: the direction of the
    error itself.
    """

    def step(state: _Ascent, _: None) -> tuple[_Ascent, None]:
        queries = rho * state.points
        output, gradient = _output_and_gradient(queries, state.directions, source, block_size)
        output_kept, gradient_kept = _output_and_gradient(
            queries, state.directions, coreset, block_size
        )
        difference = output - output_kept
        errors = jnp.linalg.norm(difference, axis=-1)
        better = errors > state.best_errors
        best_errors = jnp.where(better, errors, state.best_errors)
        best_points = jnp.where(better[:, None], state.points, state.best_points)
        updates, optimizer = jax.vmap(transformation.update)(
            _unit(gradient_kept - gradient), state.optimizer
        )
        points = optax.apply_updates(state.points, updates)
        points = jax.vmap(optax.projections.projection_l2_ball)(points)
        return _Ascent(points, _unit(difference), optimizer, best_points, best_errors), None

    state, _ = jax.lax.scan(step, state, None, length=steps)
    return state


def _shifted(pairs: Coreset, offset: Float[Array, " dv"]) -> Coreset:
    """The pairs with outputs lowered by ``offset``."""
    if pairs.normalizers is None:
        return pairs._replace(values=pairs.values - offset)
    return pairs._replace(values=pairs.values - offset * pairs.normalizers[:, None])


def _search_head(
    rng: Array,
    source: Coreset,
    coreset: Coreset,
    rho: Float[Array, ""],
    learning_rate: Float[Array, ""],
    starts: int,
    steps: int,
    block_size: int,
) -> tuple[Float[Array, ""], Float[Array, " d"], Float[Array, " starts"]]:
    """The worst error, the point of the unit ball that reaches it, and the errors of all starts."""

    def difference(points: Float[Array, "s d"]) -> Float[Array, "s dv"]:
        return attend(rho * points, source, scale=1.0, block_size=block_size) - attend(
            rho * points, coreset, scale=1.0, block_size=block_size
        )

    # Candidates compete in groups of one kind: the best eighth of all would crowd into few basins.
    candidates = _candidates(rng, source, coreset, rho, starts, block_size)
    screened = jax.lax.map(difference, candidates.reshape(-1, starts, candidates.shape[-1]))
    screened = screened.reshape(starts, _CANDIDATES_PER_START, -1)
    errors = jnp.linalg.norm(screened, axis=-1)
    winners = jnp.argmax(errors, axis=-1)[:, None]
    points = jnp.take_along_axis(
        candidates.reshape(starts, _CANDIDATES_PER_START, -1), winners[..., None], axis=1
    )[:, 0]
    directions = _unit(jnp.take_along_axis(screened, winners[..., None], axis=1)[:, 0])

    # A step of unit gradients, not of Adam: its scaling by coordinate bends the direction, and a
    # projected ascent then rests where the error still grows along the sphere.
    transformation = optax.sgd(optax.cosine_decay_schedule(learning_rate, steps))
    state = _Ascent(
        points,
        directions,
        jax.vmap(transformation.init)(points),
        points,
        jnp.take_along_axis(errors, winners, axis=1)[:, 0],
    )
    settling = steps // _SETTLING_SHARE
    state = _ascend(state, transformation, source, coreset, rho, settling, block_size)
    start_errors = state.best_errors
    _, finalists = jax.lax.top_k(start_errors, max(1, starts // _FINALIST_SHARE))
    state = jax.tree.map(lambda rows: rows[finalists], state)
    state = _ascend(state, transformation, source, coreset, rho, steps - settling, block_size)

    # The difference of two outputs of size one is good to 1e-7 at best. With the values measured
    # from the output itself only the difference is left to round.
    best = jnp.argmax(state.best_errors)
    point = state.best_points[best]
    query = rho * point[None]
    kept = attend(query, coreset, scale=1.0, block_size=block_size)[0]
    careful = attend(query, _shifted(source, kept), scale=1.0, block_size=block_size) - attend(
        query, _shifted(coreset, kept), scale=1.0, block_size=block_size
    )
    error = jnp.where(
        jnp.isfinite(state.best_errors[best]), jnp.linalg.norm(careful), state.best_errors[best]
    )
    return error, point, start_errors.at[finalists].set(state.best_errors)


@functools.partial(jax.jit, static_argnames=("starts", "steps", "block_size"))
def _adversary(
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    coreset: Coreset,
    rho: Float[Array, "*heads"] | float | None,
    query_norm: Float[Array, "*heads"] | float | None,
    queries: Float[Array, "*heads q d"] | None,
    scale: float | None,
    lengths: Int[Array, "*heads"] | None,
    learning_rate: float,
    *,
    starts: int,
    steps: int,
    block_size: int,
) -> Adversary:
    dtype = accumulation_dtype(keys, values, coreset.keys, coreset.values)
    keys, values = keys.astype(dtype), values.astype(dtype)
    reduction = problem.reduce(
        keys,
        values,
        rho=rho,
        query_norm=query_norm,
        queries=queries,
        scale=scale,
        lengths=lengths,
    )

    def unit(pairs: Coreset) -> Coreset:
        values = pairs.values.astype(dtype)
        normalizers = pairs.normalizers
        if normalizers is None:
            values = problem.unit_values(reduction, values)
        else:
            # Values of a refit are coefficients of the output, which a mean value enters times z.
            normalizers = normalizers.astype(dtype)
            values = values - normalizers[..., None] * reduction.value_center[..., None, :]
            values = values / reduction.value_radius[..., None, None]
        return Coreset(
            problem.unit_keys(reduction, pairs.keys.astype(dtype)),
            values,
            pairs.log_weights.astype(dtype),
            pairs.indices,
            normalizers,
        )

    def search(
        number: Array, source: Coreset, coreset: Coreset, rho: Array
    ) -> tuple[Array, Array, Array]:
        head_rng = jax.random.fold_in(rng, number)
        rate = jnp.asarray(learning_rate, dtype)
        return _search_head(head_rng, source, coreset, rho, rate, starts, steps, block_size)

    # Made from the keys, so that it is sharded as they are: vmap asks that of the axes it maps.
    number = jnp.zeros_like(keys[..., 0, 0], jnp.int32)
    leading = number.shape
    for axis, width in enumerate(leading):
        number = number * width + jax.lax.broadcasted_iota(jnp.int32, leading, axis)
    for _ in leading:
        search = jax.vmap(search)
    error, point, errors = search(
        number, unit(whole_cache(keys, values, lengths)), unit(coreset), reduction.rho
    )
    query = problem.restore_queries(reduction, (reduction.rho[..., None] * point)[..., None, :])
    return Adversary(
        error * reduction.value_radius,
        query[..., 0, :],
        errors * reduction.value_radius[..., None],
        reduction.rho,
    )


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a static Python int of at least 1, got {value!r}.")


def _check_coreset(coreset: Coreset, keys: Array, values: Array) -> None:
    validation.check_cache(coreset.keys, coreset.values)
    if (
        coreset.keys.shape[:-2] != keys.shape[:-2]
        or coreset.keys.shape[-1] != keys.shape[-1]
        or coreset.values.shape[-1] != values.shape[-1]
        or coreset.log_weights.shape != coreset.keys.shape[:-1]
    ):
        raise ValueError(
            "coreset must have the leading axes and the widths of its source; "
            f"got coreset keys {coreset.keys.shape}, values {coreset.values.shape} and "
            f"log_weights {coreset.log_weights.shape} for keys {keys.shape} and "
            f"values {values.shape}."
        )


def adversary(
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    coreset: Coreset,
    *,
    rho: Float[Array, "*heads"] | float | None = None,
    query_norm: Float[Array, "*heads"] | float | None = None,
    queries: Float[Array, "*heads q d"] | None = None,
    scale: float | None = None,
    lengths: Int[Array, "*heads"] | None = None,
    starts: int = 64,
    steps: int = 40,
    learning_rate: float = 1.0,
    block_size: int = 1024,
) -> Adversary:
    r"""Searches a ball of queries for the one that a coreset answers worst.

    .. math::
       \sup_{\|q\| \le R} \; \| \mathrm{Attn}(q) - \mathrm{Attn}'(q) \|, \qquad
       R = \frac{\rho}{\mathrm{scale} \cdot \max_i \|k_i - \bar k\|}

    from below, by projected gradient ascent. Candidates (random points, keys and their opposites,
    keys weighted by what they can attract, and the singular vectors of the error's first degree)
    are screened, the best climb, and the best of those climb to the top. The ball has the raw
    query 0 at its centre, whatever the mean of the keys.

    Args:
      rng: a JAX random key; every head gets a fold of its own.
      keys: the source's keys ``[..., n, d]``.
      values: the source's values ``[..., n, dv]``.
      coreset: what any compressor made of them, refitted ones included.
      rho: radius of the unit queries, see :func:`coreset_jax.problem.reduce`.
      query_norm: or the radius of the raw queries. Each is a scalar or ``[...]``.
      queries: or sample raw queries ``[..., q, d]`` whose largest norm is the radius; with none
        of the three the radius of the raw queries is ``sqrt(d)``.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      lengths: valid pairs of each head ``[...]``; ``None`` means all.
      starts: ascents of a head, static. Up to ``rho = 4`` a few find the supremum; beyond, local
        maxima multiply and more starts find more.
      steps: gradient steps of an ascent, static.
      learning_rate: length of the first step in radii of the ball; steps shrink to nothing by a
        cosine.
      block_size: pairs per step of each pass, static: a head holds ``starts * block_size`` scores.

    Returns:
      The error, the query that reaches it, and the errors of all ascents. The error is infinite
      if a query was met at which the denominator of a refitted coreset is not positive.

    Raises:
      ValueError: if shapes do not fit, a radius is not positive or named twice, or ``starts``,
        ``steps``, ``learning_rate`` or ``block_size`` is not positive.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Section 2, for the
      supremum that is bounded here.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> coreset = cj.compress(jax.random.key(1), keys, values, size=64, rho=1.0)
    >>> worst = adversary(jax.random.key(2), keys, values, coreset, rho=1.0)
    >>> worst.query.shape, worst.errors.shape
    ((16,), (64,))
    >>> query = worst.query[None]
    >>> difference = cj.attention(query, keys, values) - cj.attend(query, coreset)
    >>> bool(abs(jax.numpy.linalg.norm(difference) - worst.error) < 1e-5)
    True
    """
    validation.check_cache(keys, values)
    validation.check_lengths(lengths, keys)
    problem.check_radius(keys, rho, query_norm, queries, scale)
    _check_coreset(coreset, keys, values)
    for name, count in (("starts", starts), ("steps", steps), ("block_size", block_size)):
        _check_count(name, count)
    validation.check_positive("learning_rate", learning_rate)
    return _adversary(
        rng,
        keys,
        values,
        coreset,
        rho,
        query_norm,
        queries,
        scale,
        lengths,
        learning_rate,
        starts=int(starts),
        steps=int(steps),
        block_size=int(block_size),
    )
