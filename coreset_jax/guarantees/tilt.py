r"""Queries about a mean: the same as queries about zero, of pairs that have other weights.

With :math:`q = \mu + p`

.. math:: \sum_i w_i e^{s\langle q, k_i\rangle} v_i
          = \sum_i w_i e^{s\langle\mu, k_i\rangle} \, e^{s\langle p, k_i\rangle} v_i ,

so whatever holds for weighted pairs and a ball about zero holds for a ball about :math:`\mu`. What
counts is the radius of the queries about their mean.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax._src.attention import default_scale
from coreset_jax._src.core.coreset import Coreset, SignedCoreset, whole_cache
from coreset_jax._src.geometry.standardize import Standardization, standardize
from coreset_jax.guarantees.norms import row_norms


class Tilted(NamedTuple):
    r"""A cache and its coreset as they look to queries about their mean.

    Attributes:
      source: all pairs, with :math:`s\langle\mu, k_i - \bar k\rangle` as log-weights; minus
        infinity on padding.
      coreset: the coreset, with the same added to its log-weights.
      center: the mean query of every head ``[..., d]``; ``None`` where it is zero.
      error: what all log-weights may be wrong by, in unit roundoffs, ``[...]``; ``None`` where
        those of the source are zero.
      standardization: the unit problem about the weighted means of the source.
    """

    source: Coreset
    coreset: Coreset | SignedCoreset
    center: Float[Array, "*heads d"] | None
    error: Float[Array, "*heads"] | None
    standardization: Standardization


def spread_center(
    query_center: Float[Array, "*#heads d"] | None, keys: Float[Array, "*heads n d"]
) -> Float[Array, "*heads d"] | None:
    """The mean query of every head, sharded as the keys are."""
    if query_center is None:
        return None
    return jnp.zeros_like(keys[..., 0, :], query_center.dtype) + query_center


def tilted(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    coreset: Coreset | SignedCoreset,
    query_center: Float[Array, "*#heads d"] | None,
    *,
    queries: Float[Array, "*heads q d"] | None,
    scale: ArrayLike | None,
    lengths: Int[Array, "*heads"] | None,
    **radius: Any,
) -> Tilted:
    """What queries about a center see of a cache and its coreset.

    Args:
      keys: the source's keys, in the dtype of sums.
      values: the source's values, likewise.
      coreset: its coreset.
      query_center: the mean query ``[..., d]``; ``None`` means zero.
      queries: raw sample queries, whose largest distance from the center is the radius.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      lengths: valid pairs of each head.
      **radius: ``rho`` or ``query_norm`` instead of queries, of queries about their center.
    """
    known: dict[str, Any] = {"scale": scale, "lengths": lengths, **radius}
    dtype = keys.dtype
    source = whole_cache(keys, values, lengths)
    if query_center is None:
        standardization = standardize(keys, values, queries=queries, **known)
        return Tilted(source, coreset, None, None, standardization)
    center = jnp.broadcast_to(query_center.astype(dtype), keys[..., 0, :].shape)
    factor = default_scale(keys.shape[-1]) if scale is None else scale
    mean = jnp.broadcast_to(jnp.asarray(factor, dtype), center.shape[:-1])[..., None] * center
    inside = (source.log_weights > -jnp.inf)[..., None]
    # About the mean key, so that a common part of all keys costs no digits.
    rows = jnp.where(inside, keys, 0)
    middle = jnp.sum(rows, axis=-2) / jnp.sum(inside, axis=-2)

    def tilts(keys: Array) -> Array:
        return jnp.sum((keys.astype(dtype) - middle[..., None, :]) * mean[..., None, :], axis=-1)

    def longest(keys: Array) -> Array:
        rows = keys.astype(dtype) - middle[..., None, :]
        return jnp.max(row_norms(rows), axis=-1)

    source = source._replace(log_weights=jnp.where(inside[..., 0], tilts(rows), -jnp.inf))
    taken = ~jnp.isneginf(coreset.log_weights)
    kept = jnp.where(taken[..., None], coreset.keys, jnp.zeros_like(coreset.keys))
    log_weights = coreset.log_weights.astype(dtype)
    coreset = coreset._replace(log_weights=jnp.where(taken, log_weights + tilts(kept), -jnp.inf))
    # A sum of d rounded products of rounded factors, and their sum with a log-weight.
    reach = jnp.maximum(longest(jnp.where(inside, rows, middle[..., None, :])), longest(kept))
    roundings = keys.shape[-1] + 16
    error = roundings * row_norms(mean) * reach + 2 * jnp.max(
        jnp.where(taken, jnp.abs(log_weights), 0), axis=-1
    )
    if queries is not None:
        queries = queries.astype(dtype) - center[..., None, :]
    standardization = standardize(
        keys, values, queries=queries, log_weights=source.log_weights, **known
    )
    return Tilted(source, coreset, center, error, standardization)
