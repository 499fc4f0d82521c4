r"""A bounded set of weighted pairs that stands for all the pairs it has absorbed.

Whenever there are more pairs than slots, the lightest of them are halved: a balancing walk drops
every other one and hands its weight to those it keeps. The originals are gone by then, but the
error against them is not forgotten: every halving starts from the pull of its sketch
(:mod:`coreset_jax._src.stream.sketch`) and so cancels earlier error instead of adding to it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src.geometry.kernel_geometry import balancing_geometry
from coreset_jax._src.precision import accumulation_dtype
from coreset_jax._src.stream import sketch as errors
from coreset_jax._src.stream.halvings import halve
from coreset_jax._src.stream.sketch import LEVELS, Ledger, Pairs, Settings, Sketch


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
    dtype = accumulation_dtype(key_like, value_like)
    # Made from the pair, so that everything varies over the mesh axes that it does.
    key, value = jnp.zeros_like(key_like, dtype), jnp.zeros_like(value_like, dtype)
    zero = key[0] + value[0]
    none = zero.astype(jnp.int32)
    sums = zero + jnp.zeros(LEVELS, dtype)
    return Summary(
        Pairs(
            jnp.zeros_like(key_like)[None] + jnp.zeros((slots, 1), key_like.dtype),
            jnp.zeros_like(value_like, shape=(slots, *value_like.shape)),
            zero + jnp.zeros(slots, dtype),
            none + jnp.full(slots, -1, jnp.int32),
        ),
        Sketch(
            jnp.zeros_like(key_like)[None] + jnp.zeros((landmarks, 1), key_like.dtype),
            zero + jnp.zeros((landmarks, value.shape[0] + 1), dtype),
            none,
        ),
        Ledger(key, value, zero, zero, key, sums, sums),
        none,
    )


def absorb(rng: Array, summary: Summary, pairs: Pairs, settings: Settings) -> Summary:
    """The summary after more pairs have joined it.

    Args:
      rng: a JAX random key.
      summary: the summary.
      pairs: the new pairs ``[b]``, of weight one; empty slots are skipped.
      settings: what is fixed.

    Returns:
      The summary, exact as long as everything fits into its slots. The sum of its weights grows by
      the number of new pairs.
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
      left: the summary of the first part.
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
    standardization = errors.weighted_standardization(pairs, ledger, sketch.placed == 0, settings)
    landmarks = errors.landmark_keys(pairs, left.sketch.landmarks.shape[0])
    geometry = balancing_geometry(standardization)
    solver = errors.solver(geometry, landmarks, settings)
    projected = errors.projection(
        geometry, landmarks, solver, sketch.landmarks, sketch.coefficients
    )
    placed = jnp.where(sketch.placed > 0, count, 0)
    sketch = Sketch(landmarks, projected, placed)
    return reduce_to(rng, slots, Summary(pairs, sketch, ledger, count), settings)


def reduce_to(rng: Array, slots: int, summary: Summary, settings: Settings) -> Summary:
    """The summary in ``slots`` slots, after as many halvings as that takes.

    Halvings choose, and have no derivative: keys and values have those that they came with, and so
    have weights, times what they have grown by. What is known of the error counts as constant.
    """
    held = summary.pairs
    pairs, sketch, ledger, count = jax.lax.stop_gradient(summary)
    over = jnp.sum(pairs.weights > 0) > slots
    # The geometry is fixed by the first halving, its reach grows with the keys, and new landmarks
    # are chosen whenever the stream has doubled.
    standardization = errors.weighted_standardization(pairs, ledger, sketch.placed == 0, settings)
    geometry = balancing_geometry(standardization)
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
    recentered = errors.recentered(ledger, standardization)
    ledger = jax.tree.map(lambda new, old: jnp.where(over, new, old), recentered, ledger)

    def crowded(carry: tuple[Array, Pairs, Sketch, Ledger]) -> Array:
        _, pairs, _, _ = carry
        return jnp.sum(pairs.weights > 0) > slots

    def step(
        carry: tuple[Array, Pairs, Sketch, Ledger],
    ) -> tuple[Array, Pairs, Sketch, Ledger]:
        number, pairs, sketch, ledger = carry
        places, change, level = halve(
            jax.random.fold_in(rng, number), pairs, sketch, geometry, settings
        )
        keys = pairs.keys[places].astype(change.dtype)
        values = pairs.values[places].astype(change.dtype)
        added = errors.coefficients(change, values)
        update = errors.projection(geometry, sketch.landmarks, solver, keys, added)
        centered = change[:, None] * (values - standardization.value_center[None])
        # Slots that take no part may lie anywhere, and must not set the scale of the others.
        moved = jnp.where(change[:, None] != 0, standardization.unit_keys(keys), 0)
        numerator, denominator = errors.bounds(standardization, moved, centered, change)
        weights = pairs.weights.at[places].add(change)
        return (
            number + 1,
            pairs._replace(weights=weights, positions=jnp.where(weights > 0, pairs.positions, -1)),
            sketch._replace(coefficients=sketch.coefficients + update),
            ledger._replace(
                numerator=ledger.numerator.at[level].add(numerator),
                denominator=ledger.denominator.at[level].add(denominator),
            ),
        )

    number = jnp.zeros_like(count)
    carry = (number, pairs, sketch, ledger)
    _, pairs, sketch, ledger = jax.lax.while_loop(crowded, step, carry)
    # Full slots first, in the order of the stream.
    order = jnp.where(pairs.weights > 0, pairs.positions, jnp.iinfo(jnp.int32).max)
    kept = jnp.argsort(order)[:slots]
    weights = _grown(pairs.weights, held.weights)
    pairs = pairs._replace(keys=held.keys, values=held.values, weights=weights)
    return Summary(jax.tree.map(lambda array: array[kept], pairs), sketch, ledger, count)


@jax.custom_jvp
def _grown(after: Float[Array, " s"], before: Float[Array, " s"]) -> Float[Array, " s"]:
    """Weights as they are, with the derivative of what they were times a constant factor."""
    del before
    return after


@_grown.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    after, before = primals
    factors = jnp.where(before > 0, after / jnp.where(before > 0, before, 1), 0)
    return after, factors * tangents[1]


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
        values = pairs.values.astype(reach.dtype) - ledger.value_center[None]
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
    standardization = errors.weighted_standardization(
        summary.pairs, summary.ledger, summary.sketch.placed == 0, settings
    )
    mass = summary.sketch.coefficients[:, -1]
    center = standardization.value_center[None]
    centered = summary.sketch.coefficients[:, :-1] - mass[:, None] * center
    landmarks = standardization.unit_keys(summary.sketch.landmarks)
    numerator, denominator = errors.bounds(standardization, landmarks, centered, mass)
    count = jnp.maximum(summary.absorbed, 1).astype(mass.dtype)
    return (numerator + value_radius * denominator) / count
