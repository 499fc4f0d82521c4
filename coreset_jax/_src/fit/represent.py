r"""Few pairs that answer for all that are not kept, as far as sample queries can tell.

The attention weights :math:`p_{qi}` that the samples give a pair are its features: what it adds to
the answer of each of them. Their kernel knows where queries lie, how they spread and what else they
attend to. In it pivots are drawn among the pairs that are not kept, and least squares put weights
and values behind these. Samples are few: the fit is held to weights that are all alike and to the
pivots' own values, and is judged by samples that it has not seen.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.fit.pivots import KernelRows, draw_pivots, first_places
from coreset_jax._src.fit.query_targets import pairs_in_blocks, sampled_attention
from coreset_jax._src.geometry.solves import (
    cholesky_factor,
    identity_like,
    one_by_one,
    solve_factored,
)
from coreset_jax._src.precision import inner_products, matmul, root

# One sample of so many is held back, to judge the fit.
_HELD_BACK = 8

# How much a change of a pair's part counts beside the samples, in the mean over pairs.
_STRENGTH = 0.1

# No weight falls below this part of the common one.
_LEAST_WEIGHT = 0.02

# No value lies further out than so many times the farthest of the cache.
_FARTHEST_VALUE = 4.0


class _Rest(NamedTuple):
    """What is not kept, as the samples see it.

    Attributes:
      queries: unit samples ``[q, d]``, to be read with scale 1.
      log_totals: logarithms of their denominators over the whole head ``[q]``.
      outputs: their exact attention, of unit values ``[q, dv]``.
      missing: what the rest adds to it: shares times ``[unit value, 1]``, ``[q, dv + 1]``.
      log_norms: logarithms of the root mean square share of each pair ``[n]``.
    """

    queries: Float[Array, "q d"]
    log_totals: Float[Array, " q"]
    outputs: Float[Array, "q dv"]
    missing: Float[Array, "q dv1"]
    log_norms: Float[Array, " n"]

    def shares(self, unit_keys: Float[Array, "m d"]) -> Float[Array, "q m"]:
        """Attention weights of some pairs, among all of the head."""
        return jnp.exp(inner_products(self.queries, unit_keys) - self.log_totals[:, None])


def _rest_of(head: Head, rest: Bool[Array, " n"]) -> _Rest:
    """What samples see of some pairs of a head, a block of pairs at a time."""
    unit, cache = sampled_attention(head)
    log_totals = cache.maximum + jnp.log(cache.total)
    zeros = jnp.zeros_like(log_totals)
    seen = _Rest(unit, log_totals, cache.output / cache.total[:, None], zeros[:, None], zeros)

    def add(missing: Array, block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        keys, values, marks = block
        shares = seen.shares(head.standardization.unit_keys(keys))
        shares = jnp.where(marks[None], shares, 0)
        return missing + matmul(shares, _columns(head, values)), jnp.mean(
            jnp.square(shares), axis=0
        )

    start = jnp.zeros_like(_columns(head, head.values[:1])) + zeros[:, None]
    missing, squares = jax.lax.scan(add, start, pairs_in_blocks(head, unit.shape[0], rest, False))
    log_norms = jnp.log(squares.reshape(-1)[: head.count]) / 2
    return seen._replace(missing=missing, log_norms=log_norms)


def _columns(head: Head, values: Float[Array, "b dv"]) -> Float[Array, "b dv1"]:
    unit = head.standardization.unit_values(values)
    return jnp.concatenate([unit, jnp.ones_like(unit[:, :1])], axis=-1)


def _pivots(
    head: Head, rest: Bool[Array, " n"], seen: _Rest, slots: int
) -> tuple[Int[Array, " slots"], Int[Array, ""]]:
    """Pivots among the pairs that are not kept, ``n`` in empty slots, and the rounds it took."""
    spread = head.standardization.value_spread
    gains = jnp.square(1 / jnp.where(spread > 0, spread, 1))
    masses = jnp.sum(jnp.square(head.standardization.unit_values(head.values)), axis=-1)
    importance = jnp.where(rest, seen.log_norms + jnp.log1p(gains * masses) / 2, -jnp.inf)

    def kernel_of(places: Array) -> tuple[KernelRows, Array]:
        features = seen.shares(head.standardization.unit_keys(head.keys[places]))
        lengths = jnp.sqrt(jnp.sum(jnp.square(features), axis=0))
        features = features * jnp.where(lengths > 0, 1 / lengths, 0)[None]
        kernel = matmul(features.T, features)
        return lambda drawn: kernel[drawn], jnp.where(lengths > 0, 0, -jnp.inf)

    target = jnp.minimum(slots, jnp.sum(rest))
    picked, rounds = draw_pivots(head.key, importance, target, kernel_of, size=slots, power=1.0)
    # Where few pairs are left, or what samples see leaves nothing to draw, slots go to any of them.
    chosen = jnp.zeros_like(rest).at[picked].set(True, mode="drop")
    return first_places(chosen, rest, slots), rounds


def represent(head: Head, rest: Bool[Array, " n"], slots: int) -> tuple[Coreset, Info]:
    r"""Some pairs of a head in place of all that are not kept.

    With :math:`p` the samples' attention weights, :math:`o` their exact outputs and :math:`R` the
    rest, weights and numerators of the pivots :math:`S` solve

    .. math:: \sum_{s} p_{qs} w_s \approx \sum_{i \in R} p_{qi}, \qquad
              \sum_{s} p_{qs} u_s \approx \sum_{i \in R} p_{qi} v_i
              + \Bigl( \sum_s p_{qs} w_s - \sum_{i \in R} p_{qi} \Bigr) o_q

    with a ridge about one weight for all and each pivot's own value. The second line has the answer
    right with the denominator that the first one leaves.

    Args:
      head: a head with sample queries.
      rest: the pairs that are not kept ``[n]``, all of them valid.
      slots: pairs that are to stand for them, static, at least 1. If there are no more than that,
        these are they, with weight one.
    """
    seen = _rest_of(head, rest)
    # A choice has no derivative.
    fixed, shown = jax.lax.stop_gradient((head, seen))
    places, rounds = _pivots(fixed, rest, shown, slots)
    held = places < head.count
    rows = jnp.minimum(places, head.count - 1)
    keys, values = head.keys[rows], head.values[rows]
    # A fit looks at most of the samples, and is judged by the others.
    turns = jnp.arange(seen.queries.shape[0]) % _HELD_BACK
    judging = (turns == _HELD_BACK // 2).astype(head.dtype)
    shares = jnp.where(held[None], seen.shares(head.standardization.unit_keys(keys)), 0)
    own = jnp.where(held[:, None], _columns(head, values), 0)
    common, fitted = _solved(shares * (1 - judging)[:, None], own, seen, 1 - judging)

    def error(columns: Array) -> Array:
        """Squared error over the samples that were held back."""
        told = matmul(shares, columns) - seen.missing
        wrong = (told[:, :-1] - told[:, -1:] * seen.outputs) / (1 + told[:, -1:])
        return jnp.sum(judging[:, None] * jnp.square(wrong))

    plain = common * own
    before, after = error(plain), error(fitted)
    better = after < before
    few = jnp.sum(rest) <= slots
    columns = jnp.where(better, fitted, plain)
    weights = jnp.where(held & ~few, columns[:, -1], 1)
    divided = head.standardization.restore_values(columns[:, :-1] / weights[:, None])
    changed = (better & ~few) & held[:, None]
    values = jnp.where(changed, divided.astype(values.dtype), values)
    coreset = Coreset(
        jnp.where(held[:, None], keys, jnp.zeros_like(keys)),
        jnp.where(held[:, None], values, jnp.zeros_like(values)),
        jnp.where(held, jnp.log(weights), -jnp.inf),
        jnp.where(held, places, -1).astype(jnp.int32),
    )
    unit = head.standardization.value_radius
    judged = jnp.maximum(jnp.sum(judging), 1)
    info = Info(rounds=rounds, heavy=jnp.sum(head.inside & ~rest, dtype=jnp.int32)).with_fit(
        better,
        matched=better.astype(jnp.int32),
        sample_error_before=unit * root(before / judged),
        sample_error_after=unit * root(jnp.minimum(before, after) / judged),
    )
    return coreset, info


def _solved(
    shares: Float[Array, "q m"],
    own: Float[Array, "m dv1"],
    seen: _Rest,
    counted: Float[Array, " q"],
) -> tuple[Float[Array, ""], Float[Array, "m dv1"]]:
    """The common weight of a plain answer, and the columns of the least squares.

    Args:
      shares: of the pivots, zero for samples that do not count ``[q, m]``.
      own: the pivots' own ``[unit value, 1]``, zero in empty slots.
      seen: what is to be answered.
      counted: one for samples that count, else zero ``[q]``.
    """
    missing = counted[:, None] * seen.missing
    together = jnp.sum(shares, axis=-1)
    square = jnp.sum(jnp.square(together))
    common = jnp.sum(missing[:, -1] * together) / jnp.where(square > 0, square, 1)
    common = jnp.maximum(common, jnp.finfo(common.dtype).tiny)
    lengths = root(jnp.sum(jnp.square(shares), axis=0))
    scales = jnp.where(lengths > 0, 1 / lengths, 0)
    features = shares * scales[None]
    normal = matmul(features.T, features)
    factor = one_by_one(cholesky_factor)(normal + _STRENGTH * identity_like(normal))

    def change(wanted: Array) -> Array:
        return scales[:, None] * solve_factored(factor, matmul(features.T, wanted))

    weights = own[:, -1] * common
    weights = weights + change((missing[:, -1] - matmul(shares, weights))[:, None])[:, 0]
    weights = jnp.maximum(weights, _LEAST_WEIGHT * common)
    excess = matmul(shares, weights) - missing[:, -1]
    numerators = weights[:, None] * own[:, :-1]
    wanted = missing[:, :-1] + excess[:, None] * seen.outputs
    numerators = numerators + change(wanted - matmul(shares, numerators))
    sizes = root(jnp.sum(jnp.square(numerators), axis=-1)) / weights
    numerators = numerators * jnp.minimum(1, _FARTHEST_VALUE / jnp.maximum(sizes, 1))[:, None]
    return common, jnp.concatenate([numerators, weights[:, None]], axis=-1)
