r"""A bounded set of weighted pairs that stands for all the pairs it has absorbed.

Whenever there are more pairs than slots, the lightest of them are halved: a balancing walk drops
every other one and hands its weight to those it keeps. The originals are gone by then, but the
error against them is not forgotten: every halving starts from the pull of its sketch
(:mod:`coreset_jax.sketch`) and so cancels earlier error instead of adding to it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax import sketch as errors
from coreset_jax.attention import accumulation_dtype
from coreset_jax.coreset import Coreset
from coreset_jax.geometry import Geometry, balancing_geometry
from coreset_jax.kernels import exponential_kernel, simultaneous_gram
from coreset_jax.problem import unit_keys
from coreset_jax.sketch import HIGHEST, LEVELS, Ledger, Pairs, Settings, Sketch
from coreset_jax.walks import swap_refinement


class Summary(NamedTuple):
    """Pairs that stand for a stream, and what is known of their error.

    Attributes:
      pairs: the pairs, as many slots as the summary may hold.
      sketch: the error, as the landmarks see it.
      ledger: the error, as it can be bounded.
      absorbed: pairs absorbed so far, int32.
    """

    pairs: Pairs
    sketch: Sketch
    ledger: Ledger
    absorbed: Int[Array, ""]


def empty(
    slots: int, landmarks: int, key_like: Float[Array, " d"], value_like: Float[Array, " dv"]
) -> Summary:
    """A summary that has absorbed nothing.

    Args:
      slots: pairs that it may hold.
      landmarks: landmarks of its sketch.
      key_like: any key ``[d]``, of the dtype to keep.
      value_like: any value ``[dv]``.
    """
    dtype = jnp.result_type(jnp.float32, key_like.dtype, value_like.dtype)
    # Made from the pair, so that everything varies over the mesh axes that it does.
    key, value = jnp.zeros_like(key_like, dtype), jnp.zeros_like(value_like, dtype)
    zero = key[0] + value[0]
    none = zero.astype(jnp.int32)
    sums = zero + jnp.zeros(LEVELS, dtype)
    return Summary(
        Pairs(
            jnp.zeros_like(key_like, shape=(slots, *key_like.shape)) + key.astype(key_like.dtype),
            jnp.zeros_like(value_like, shape=(slots, *value_like.shape)),
            zero + jnp.zeros(slots, dtype),
            none + jnp.full(slots, -1, jnp.int32),
        ),
        Sketch(
            jnp.zeros_like(key_like) + jnp.zeros((landmarks, 1), key_like.dtype),
            zero + jnp.zeros((landmarks, value.shape[0] + 1), dtype),
            none,
        ),
        Ledger(key, value, zero, zero, key, sums, sums),
        none,
    )


def of_coreset(
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    count: Int[Array, ""],
    coreset: Coreset,
    offset: int,
    slots: int,
    landmarks: int,
    settings: Settings,
) -> Summary:
    """The summary of a cache that was compressed at once, with the error that this made.

    The ledger knows nothing of that error: it bounds what comes after. Weights may be refitted,
    and values too, but a coreset with normalizers of its own cannot be halved any more.

    Args:
      keys: the cache's keys ``[n, d]``.
      values: its values ``[n, dv]``.
      count: valid pairs; 0 makes an empty summary.
      coreset: what stands for them, in at most ``slots`` slots.
      offset: place in the stream of the cache's first pair.
      slots: pairs that the summary may hold.
      landmarks: landmarks of its sketch.
      settings: what is fixed.

    Raises:
      ValueError: if the coreset carries normalizers.
    """
    if coreset.normalizers is not None:
        raise ValueError("a coreset with normalizers cannot be continued as a stream.")
    dtype = accumulation_dtype(keys, values)
    blank = empty(slots, landmarks, keys[0], values[0])
    room = slots - coreset.indices.shape[0]
    weights = jnp.where(count > 0, jnp.exp(coreset.log_weights).astype(dtype), 0)
    held = jax.tree.map(
        lambda array: jnp.pad(array, [(0, room)] + [(0, 0)] * (array.ndim - 1)),
        Pairs(coreset.keys, coreset.values, weights, coreset.indices + offset),
    )
    pairs = held._replace(positions=jnp.where(held.weights > 0, held.positions, -1))

    inside = jnp.arange(keys.shape[0]) < count
    keys = jnp.where(inside[:, None], keys, 0)
    values = jnp.where(inside[:, None], values, 0).astype(dtype)
    halved = jnp.sum(pairs.weights > 0) < count
    ledger = blank.ledger._replace(key_sum=jnp.sum(keys.astype(dtype), axis=0))
    reduction = errors.unit_problem(pairs, ledger, jnp.ones((), bool), settings)
    marks = errors.landmark_keys(pairs, landmarks)
    geometry = balancing_geometry(reduction)
    solver = errors.solver(geometry, marks, settings)
    # A refit has other values than its source, so that what it holds is a measure of its own.
    given = geometry.moments(
        geometry.keys(marks), keys, errors.measure(inside.astype(dtype), values)
    )
    kept = errors.measure(pairs.weights, pairs.values.astype(dtype))
    kept = geometry.moments(geometry.keys(marks), pairs.keys, kept)
    coefficients = jnp.matmul(solver, kept - given, precision=HIGHEST)
    reached = errors.settled(ledger, reduction)
    full = Summary(
        pairs,
        Sketch(marks, coefficients, count),
        reached,
        count,
    )
    exact = Summary(pairs, blank.sketch, ledger, count)
    return jax.tree.map(lambda new, old: jnp.where(halved, new, old), full, exact)


def absorb(rng: Array, summary: Summary, pairs: Pairs, settings: Settings) -> Summary:
    """The summary after more pairs have joined it.

    Args:
      rng: a JAX random key.
      summary: the summary.
      pairs: the new pairs ``[b]``, of weight one; empty slots are skipped.
      settings: what is fixed.

    Returns:
      The summary, exact as long as everything fits into its slots. Its weights sum to the pairs
      absorbed.
    """
    dtype = summary.pairs.weights.dtype
    inside = pairs.weights > 0
    ledger = summary.ledger._replace(
        key_sum=summary.ledger.key_sum
        + jnp.sum(jnp.where(inside[:, None], pairs.keys.astype(dtype), 0), axis=0)
    )
    count = summary.absorbed + jnp.sum(inside, dtype=jnp.int32)
    slots = summary.pairs.weights.shape[0]
    joined = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), summary.pairs, pairs)
    return reduce_to(rng, slots, Summary(joined, summary.sketch, ledger, count), settings)


def join(rng: Array, left: Summary, right: Summary, settings: Settings) -> Summary:
    """The summary of what two have absorbed, ``left`` first, in the slots of ``left``.

    Args:
      rng: a JAX random key.
      left: the summary of the first stretch.
      right: the summary of what comes behind it, made with the same settings.
      settings: what is fixed.
    """
    slots = left.pairs.weights.shape[0]
    later = jnp.where(right.pairs.weights > 0, right.pairs.positions + left.absorbed, -1)
    moved = right.pairs._replace(positions=later)
    pairs = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), left.pairs, moved)
    count = left.absorbed + right.absorbed
    started = left.sketch.placed > 0
    first, second = left.ledger, right.ledger
    # Bounds of the right half are moved to where the left half measures. A half that was never
    # halved has no center, and no bounds to move.
    halved = right.sketch.placed > 0
    shift = jnp.where(halved, jnp.linalg.norm(first.key_center - second.key_center), 0)
    factor = jnp.exp(settings.scale * settings.query_norm * shift)
    value_shift = jnp.linalg.norm(first.value_center - second.value_center)
    value_shift = jnp.where(halved, value_shift, 0)
    numerator = second.numerator + value_shift * second.denominator
    # The factor may overflow; nothing times it is still nothing.
    numerator = jnp.where(numerator > 0, factor * numerator, numerator)
    denominator = jnp.where(second.denominator > 0, factor * second.denominator, second.denominator)
    ledger = jax.tree.map(
        lambda old, new: jnp.where(started, old, new),
        first._replace(
            numerator=first.numerator + numerator,
            denominator=first.denominator + denominator,
            key_radius=jnp.maximum(first.key_radius, second.key_radius + shift),
            value_radius=jnp.maximum(first.value_radius, second.value_radius + value_shift),
        ),
        second,
    )._replace(key_sum=first.key_sum + second.key_sum)
    # A measure needs no landmarks of its own: both halves' coefficients stand on both's.
    sketch = Sketch(
        jnp.concatenate([left.sketch.landmarks, right.sketch.landmarks]),
        jnp.concatenate([left.sketch.coefficients, right.sketch.coefficients]),
        jnp.where(started, left.sketch.placed, right.sketch.placed),
    )
    reduction = errors.unit_problem(pairs, ledger, sketch.placed == 0, settings)
    landmarks = errors.landmark_keys(pairs, left.sketch.landmarks.shape[0])
    geometry = balancing_geometry(reduction)
    solver = errors.solver(geometry, landmarks, settings)
    projected = errors.projection(
        geometry, landmarks, solver, sketch.landmarks, sketch.coefficients
    )
    placed = jnp.where(sketch.placed > 0, count, 0)
    sketch = Sketch(landmarks, projected, placed)
    return reduce_to(rng, slots, Summary(pairs, sketch, ledger, count), settings)


def reduce_to(rng: Array, slots: int, summary: Summary, settings: Settings) -> Summary:
    """The summary in ``slots`` slots, after as many halvings as that takes."""
    pairs, sketch, ledger, count = summary
    over = jnp.sum(pairs.weights > 0) > slots
    # The geometry is fixed by the first halving, its reach grows with the keys, and new landmarks
    # are chosen whenever the stream has doubled.
    reduction = errors.unit_problem(pairs, ledger, sketch.placed == 0, settings)
    geometry = balancing_geometry(reduction)
    replace = over & (count >= 2 * sketch.placed)
    landmarks = jnp.where(
        replace, errors.landmark_keys(pairs, sketch.landmarks.shape[0]), sketch.landmarks
    )
    solver = errors.solver(geometry, landmarks, settings)
    coefficients = jnp.where(
        replace,
        errors.projection(geometry, landmarks, solver, sketch.landmarks, sketch.coefficients),
        sketch.coefficients,
    )
    sketch = Sketch(landmarks, coefficients, jnp.where(replace, count, sketch.placed))
    settled = errors.settled(ledger, reduction)
    ledger = jax.tree.map(lambda new, old: jnp.where(over, new, old), settled, ledger)

    def crowded(carry: tuple[Array, Pairs, Sketch, Ledger]) -> Array:
        _, pairs, _, _ = carry
        return jnp.sum(pairs.weights > 0) > slots

    def step(
        carry: tuple[Array, Pairs, Sketch, Ledger],
    ) -> tuple[Array, Pairs, Sketch, Ledger]:
        number, pairs, sketch, ledger = carry
        halve = _halve_by_walk if settings.compressor is None else _halve_by_compressor
        places, change, level = halve(
            jax.random.fold_in(rng, number), pairs, sketch, geometry, settings
        )
        keys = pairs.keys[places].astype(change.dtype)
        values = pairs.values[places].astype(change.dtype)
        columns = errors.measure(change, values)
        update = errors.projection(geometry, sketch.landmarks, solver, keys, columns)
        centered = change[:, None] * (values - reduction.value_center)
        # Slots that take no part may lie anywhere, and must not set the scale of the others.
        moved = jnp.where(change[:, None] != 0, unit_keys(reduction, keys), 0)
        added = errors.bounds(reduction, moved, centered, change)
        weights = pairs.weights.at[places].add(change)
        return (
            number + 1,
            pairs._replace(weights=weights, positions=jnp.where(weights > 0, pairs.positions, -1)),
            sketch._replace(coefficients=sketch.coefficients + update),
            ledger._replace(
                numerator=ledger.numerator.at[level].add(added[0]),
                denominator=ledger.denominator.at[level].add(added[1]),
            ),
        )

    number = jnp.zeros_like(count)
    carry = (number, pairs, sketch, ledger)
    _, pairs, sketch, ledger = jax.lax.while_loop(crowded, step, carry)
    # Full slots first, in the order of the stream.
    order = jnp.where(pairs.weights > 0, pairs.positions, jnp.iinfo(jnp.int32).max)
    kept = jnp.argsort(order)[:slots]
    return Summary(jax.tree.map(lambda array: array[kept], pairs), sketch, ledger, count)


def is_sound(summary: Summary) -> Bool[Array, ""]:
    """Whether nothing that the summary has absorbed was a NaN or an infinity.

    Its bounds may be infinite all the same, where a key lies far out, and mean that there is none.
    """
    ledger = summary.ledger
    sound = jnp.ones((), bool)
    for number in (
        ledger.key_sum,
        ledger.key_radius,
        ledger.value_radius,
        summary.sketch.coefficients,
    ):
        sound &= jnp.all(jnp.isfinite(number))
    return sound


def value_reach(summary: Summary, newer: Pairs) -> Float[Array, ""]:
    """How far values lie from the ledger's center, those of newer pairs included."""
    ledger = summary.ledger
    reach = ledger.value_radius
    for pairs in (summary.pairs, newer):
        values = pairs.values.astype(reach.dtype) - ledger.value_center
        norms = jnp.sqrt(jnp.sum(jnp.square(values), axis=-1))
        reach = jnp.maximum(reach, jnp.max(jnp.where(pairs.weights > 0, norms, 0)))
    return reach


def error_bound(
    summary: Summary, value_radius: Float[Array, ""], settings: Settings
) -> Float[Array, ""]:
    r"""A bound on the error of attention over the summary in place of all that it absorbed.

    .. math::
       \sup_{\|q\| \le Q} \|\mathrm{Attn}(q) - \mathrm{Attn}'(q)\| \le
       \frac{\sum_h b_h + \max_i \|v_i - \bar v\| \sum_h b^Z_h}
            {n\, e^{-\mathrm{scale}\, Q\, \|\bar k - c\|}}

    where halving :math:`h` changed the weights by :math:`y` and, by Cauchy and Schwarz in the
    kernel of radius :math:`r`, added at most
    :math:`b_h = e^{(r + \rho^2/r)/2} \sqrt{y^\top (E \circ V V^\top)\, y}`. It adds up what
    every halving did and knows of no cancellation between them: it always holds, and it is loose.

    Args:
      summary: the summary.
      value_radius: largest distance from the ledger's center of any value that stands in the
        answer, see :func:`value_reach`.
      settings: what is fixed.

    Returns:
      The bound, in the units of the values; 0 as long as nothing was halved.
    """
    ledger = summary.ledger
    count = jnp.maximum(summary.absorbed, 1).astype(ledger.key_sum.dtype)
    shift = jnp.linalg.norm(ledger.key_sum / count - ledger.key_center)
    shift = jnp.where(summary.sketch.placed > 0, shift, 0)
    numerator, denominator = jnp.sum(ledger.numerator), jnp.sum(ledger.denominator)
    total = numerator + value_radius * denominator
    return total / count * jnp.exp(settings.scale * settings.query_norm * shift)


def error_estimate(
    summary: Summary, value_radius: Float[Array, ""], settings: Settings
) -> Float[Array, ""]:
    r"""The same quantity from the sketch: with all cancellation, and as the landmarks see it.

    .. math:: e^{(r + \rho^2/r)/2} \left( \sqrt{a_v^\top E_{LL}\, a_v}
              + \max_i \|v_i - \bar v\| \sqrt{a_1^\top E_{LL}\, a_1} \right) / n

    Returns:
      The estimate, in the units of the values. It is no bound: what the landmarks do not see is
      not in it.
    """
    reduction = errors.unit_problem(
        summary.pairs, summary.ledger, summary.sketch.placed == 0, settings
    )
    mass = summary.sketch.coefficients[:, -1]
    columns = summary.sketch.coefficients[:, :-1] - mass[:, None] * reduction.value_center
    landmarks = unit_keys(reduction, summary.sketch.landmarks.astype(mass.dtype))
    numerator, denominator = errors.bounds(reduction, landmarks, columns, mass)
    count = jnp.maximum(summary.absorbed, 1).astype(mass.dtype)
    return (numerator + value_radius * denominator) / count


def _levels(weights: Float[Array, " s"]) -> Int[Array, " s"]:
    """The class of each weight: the nearest power of two; ``LEVELS`` for an empty slot."""
    logarithms = jnp.log2(jnp.where(weights > 0, weights, 1))
    levels = jnp.clip(jnp.round(logarithms).astype(jnp.int32), 0, LEVELS - 1)
    return jnp.where(weights > 0, levels, LEVELS)


def _halve_by_walk(
    rng: Array, pairs: Pairs, sketch: Sketch, geometry: Geometry, settings: Settings
) -> tuple[Int[Array, " b"], Float[Array, " b"], Int[Array, ""]]:
    """Halves the oldest pairs of the lightest class that has two.

    Returns:
      Places of the pairs looked at, the change of their weights, and their class.
    """
    width = min(settings.block_size, pairs.weights.shape[0])
    levels = _levels(pairs.weights)
    populations = jnp.sum(levels[:, None] == jnp.arange(LEVELS), axis=0)
    level = jnp.argmax(populations >= 2)
    # Where every class has at most one pair, the two lightest of all are halved.
    lonely = populations[level] < 2
    count = jnp.where(lonely, 2, jnp.minimum(populations[level] // 2 * 2, width // 2 * 2))
    group = jnp.where(lonely, levels, (levels != level).astype(jnp.int32))
    places = jnp.lexsort((pairs.positions, group))[:width]
    taken = jnp.arange(width) < count

    weights = jnp.where(taken, pairs.weights[places], 0)
    mean = jnp.sum(weights) / count
    # The vectors to be balanced are the weighted ones; within a class weights are nearly equal.
    shares = weights / mean
    keys = jnp.where(taken[:, None], geometry.keys(pairs.keys[places]), 0)
    values = jnp.where(taken[:, None], geometry.values(pairs.values[places]), 0)
    gram = simultaneous_gram(keys, values, keys, values, geometry.radius, 0.0)
    gram = shares[:, None] * gram * shares
    # The pull of the sketch, in the units of the Gram matrix and of a pair's weight.
    reduction, mass = geometry.reduction, sketch.coefficients[:, -1:]
    centered = sketch.coefficients[:, :-1] - mass * reduction.value_center
    columns = geometry.value_gain * centered / reduction.value_radius
    columns = jnp.concatenate([columns, mass], axis=-1) / mean
    kernel = exponential_kernel(keys, geometry.keys(sketch.landmarks), geometry.radius)
    pulls = jnp.matmul(kernel, columns, precision=HIGHEST)
    pull = shares * (jnp.sum(pulls[:, :-1] * values, axis=-1) + pulls[:, -1]) / 2
    signs = settings.walk(rng, gram, pull, count)
    if settings.max_swaps:
        signs = swap_refinement(gram, pull, signs, max_swaps=settings.max_swaps)

    kept = jnp.where(taken & (signs > 0), weights, 0)
    kept = kept * (jnp.sum(weights) / jnp.sum(kept))
    level = jnp.where(lonely, levels[places[0]], level)
    return places, kept - weights, level


def _halve_by_compressor(
    rng: Array, pairs: Pairs, sketch: Sketch, geometry: Geometry, settings: Settings
) -> tuple[Int[Array, " b"], Float[Array, " b"], Int[Array, ""]]:
    """Halves a block of the lightest pairs by a compressor, which does not see their weights."""
    del sketch, geometry
    assert settings.compressor is not None
    width = settings.block_size
    levels = _levels(pairs.weights)
    places = jnp.lexsort((pairs.positions, levels))[:width]
    coreset = settings.compressor(rng, pairs.keys[places], pairs.values[places], size=width // 2)
    multiples = jnp.exp(coreset.log_weights).astype(pairs.weights.dtype)
    chosen = jnp.where(coreset.indices < 0, width, coreset.indices)
    weights = pairs.weights[places]
    kept = jnp.zeros_like(weights).at[chosen].set(multiples, mode="drop") * weights
    kept = kept * (jnp.sum(weights) / jnp.sum(kept))
    return places, kept - weights, jnp.min(levels)
