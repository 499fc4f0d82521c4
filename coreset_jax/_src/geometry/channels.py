r"""Channels in which keys are far wider than in others, and hardly any query looks.

A model that adds a bias to its keys, as Qwen 2.5 does, may have keys of norm 300 in one pair of
channels. Rotary positions turn it, and cached keys lie on a circle whose radius is hundreds of
times what keys spread elsewhere. Scores stay moderate all the same, since queries are small there.
The change of variables :math:`k' = D k`, :math:`q' = D^{-1} q` leaves every score what it is, and
with keys no wider in these channels than in the others a ball of queries :math:`q'` is a fair
guess.

Which channels are such is told by keys alone where two channels turn into one another: the sum of
their squares hardly changes. Of other wide channels only sample queries can tell that nobody looks.
In the caches of SmolLM2-135M, whose keys have no bias, no channel is six times as wide as the
median one, and up to there queries are larger, not smaller, where keys are wide.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coreset_jax._src.precision import matmul

# A channel is wide if keys spread more than so many times as far in it as in the median channel,
# and is made no narrower than so many times that.
_WIDE, _NARROWEST = 6.0, 2.0

# Channels turn into one another if the variance of the sum of their squares is no more than this
# part of that of squares that know nothing of each other.
_TURNING = 0.25

# A channel whose keys differ by less than so many roundings of their mean does not vary.
_ROUNDINGS = 64


def channel_units(
    rows: Float[Array, "*heads n d"],
    center: Float[Array, "*heads d"],
    shares: Float[Array, "*heads n"],
    queries: Float[Array, "*heads q d"] | None,
) -> Float[Array, "*heads d"]:
    r"""Factors that bring wide channels nearer to the width of the others: one for all the rest.

    .. math:: D_j = \min(1,\; t_j\, \bar w / w_j) \text{ rounded to a power of two, where }
              w_j > 6 \bar w

    with :math:`w_j` the mean distance of the keys from their mean in a channel and :math:`\bar w`
    the median of those that are not zero. Without queries :math:`t_j = 2` where the channel turns
    into another one, and :math:`D_j = 1` elsewhere. With them :math:`t_j` is what they make of the
    channel: its part in scores, over that in the median channel, and 2 at least. Products with
    powers of two are exact.

    Args:
      rows: keys, zero in padding ``[..., n, d]``.
      center: their mean ``[..., d]``.
      shares: what each counts, zero in padding and one in sum ``[..., n]``.
      queries: sample queries, or ``None``.

    Returns:
      The factors ``[..., d]``, at most one. Derivatives take them for constants.
    """
    rows, center, shares, queries = jax.lax.stop_gradient((rows, center, shares, queries))
    limits = jnp.finfo(rows.dtype)
    # Not root mean squares: a few keys far out make no channel wide.
    distances = jnp.abs(rows - center[..., None, :])
    widths = jnp.sum(shares[..., None] * distances, axis=-2)
    varies = widths > _ROUNDINGS * limits.eps * jnp.abs(center)
    median = median_channel(widths, varies)
    multiples = widths / median
    turning = _turning(rows, shares)
    if queries is None:
        parts, known = jnp.full_like(widths, _NARROWEST), turning
    else:
        queries = queries.astype(rows.dtype)
        longest = jnp.max(jnp.abs(queries), axis=(-2, -1), keepdims=True)
        squares = jnp.square(queries / jnp.maximum(longest, limits.tiny))
        # As if there was one more sample: it looks where keys say nothing, and nowhere else.
        others = median_channel(jnp.mean(squares, axis=-2), varies)
        more = jnp.where(turning, 0, others)
        count = squares.shape[-2]
        looks = jnp.sqrt((jnp.sum(squares, axis=-2) + more) / (count + 1))
        scores = looks * widths
        parts = jnp.maximum(scores / median_channel(scores, varies), _NARROWEST)
        known = jnp.ones_like(turning)
    units = jax.lax.reduce_precision(jnp.minimum(parts / multiples, 1), limits.nexp, 0)
    return jnp.where(varies & known & (multiples > _WIDE), units, jnp.ones_like(units))


def median_channel(
    numbers: Float[Array, "*heads d"], counted: Bool[Array, "*heads d"]
) -> Float[Array, "*heads 1"]:
    """The lower median of those numbers of a head's channels that are counted."""
    ordered = jnp.sort(jnp.where(counted, numbers, jnp.inf), axis=-1)
    middle = jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True) - 1, 0) // 2
    return jnp.take_along_axis(ordered, middle, axis=-1)


def _turning(
    rows: Float[Array, "*heads n d"], shares: Float[Array, "*heads n"]
) -> Bool[Array, "*heads d"]:
    """Which channels turn into another one: what the square of either lacks the other one has."""
    squares = jnp.square(rows)
    squares -= jnp.sum(shares[..., None] * squares, axis=-2, keepdims=True)
    products = matmul(jnp.swapaxes(shares[..., None] * squares, -1, -2), squares)
    own = jnp.diagonal(products, axis1=-2, axis2=-1)
    apart = own[..., :, None] + own[..., None, :]
    return jnp.any(apart + 2 * products < _TURNING * apart, axis=-1)
