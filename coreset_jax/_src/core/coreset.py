"""The coreset: a few weighted pairs in place of a cache, and what is done with its slots."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Integer

from coreset_jax._src import checks
from coreset_jax._src.core.scale import reading_scale, shared_scale
from coreset_jax._src.precision import accumulation_dtype


class Coreset(NamedTuple):
    """A few weighted key-value pairs that answer like the cache they were taken from.

    Attributes:
      keys: kept keys ``[..., m, d]``, bit-identical to the source for a subset.
      values: kept values ``[..., m, dv]``.
      log_weights: natural logarithm of how many source pairs each stands for ``[..., m]``, so that
        pairs of the sequence can be put behind them with a log-weight of 0; ``-inf`` in an empty
        slot; NaN throughout a head whose source held a NaN or an infinity.
      indices: positions in the source ``[..., m]``, int32, distinct, ascending; -1 in an
        empty slot.
      scale: the softmax scale that it was made for ``[...]``, which :func:`attend` reads it with;
        ``None`` if the compression was given none.
    """

    keys: Float[Array, "*heads m d"]
    values: Float[Array, "*heads m dv"]
    log_weights: Float[Array, "*heads m"]
    indices: Int[Array, "*heads m"]
    scale: Float[Array, "*heads"] | None = None


class SignedCoreset(NamedTuple):
    """A coreset whose pairs enter the denominator with numbers of their own, of any sign.

    Attributes:
      keys: as in a :class:`Coreset`.
      values: what stands for a pair in the numerator, ``[..., m, dv]``.
      log_weights: as in a :class:`Coreset`.
      indices: as in a :class:`Coreset`.
      normalizers: what stands for it in the denominator in place of one, ``[..., m]``.
      scale: as in a :class:`Coreset`.
    """

    keys: Float[Array, "*heads m d"]
    values: Float[Array, "*heads m dv"]
    log_weights: Float[Array, "*heads m"]
    indices: Int[Array, "*heads m"]
    normalizers: Float[Array, "*heads m"]
    scale: Float[Array, "*heads"] | None = None


AnyCoreset = TypeVar("AnyCoreset", Coreset, SignedCoreset)


def normalizers(coreset: Coreset | SignedCoreset) -> Float[Array, "*heads m"]:
    """What pairs enter the denominator with, beside their weights: ones for a plain coreset."""
    if isinstance(coreset, SignedCoreset):
        return coreset.normalizers
    return jnp.ones_like(coreset.log_weights)


def with_normalizers(coreset: Coreset, normalizers: Float[Array, "*heads m"]) -> SignedCoreset:
    """The coreset with numbers of their own for its pairs in the denominator."""
    return SignedCoreset(**coreset._asdict(), normalizers=normalizers)


def scale_of(coreset: Coreset | SignedCoreset, scale: ArrayLike | None = None) -> ArrayLike | None:
    """The softmax scale to read a coreset with: its own, or what the reader gives.

    ``None`` if neither is there. Raises ``ValueError`` where both are and differ; see
    :func:`coreset_jax._src.core.scale.reading_scale`.
    """
    return reading_scale(coreset.scale, scale, coreset.keys.shape[:-2])


def _over_slots(function: Callable[..., Array], *coresets: AnyCoreset) -> AnyCoreset:
    """A function of each array that has slots; the scale, which has none, is that of all."""
    scale: Any = None
    for each in coresets:
        scale = shared_scale("parts of a coreset", scale, each.scale)
    arrays = [each._replace(scale=None) for each in coresets]
    mapped: AnyCoreset = jax.tree.map(function, *arrays)
    return mapped._replace(scale=scale)


def gather(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    indices: Int[Array, "*heads m"],
    log_weights: Float[Array, "*heads m"],
) -> Coreset:
    """The coreset of the pairs at ``indices``.

    Args:
      keys: source keys ``[..., n, d]``.
      values: source values ``[..., n, dv]``.
      indices: positions ``[..., m]``; -1 leaves a slot empty (zeros, weight zero).
      log_weights: natural logarithms of the weights ``[..., m]``.

    Raises:
      ValueError: if ``indices`` are not integers or the shapes do not fit.
    """
    checks.check_cache(keys, values)
    checks.check_indices(indices, keys)
    if log_weights.shape != indices.shape:
        raise ValueError(
            "log_weights must have the shape of indices; "
            f"got log_weights {log_weights.shape} and indices {indices.shape}."
        )
    rows = jnp.maximum(indices, 0)[..., None]
    kept = Coreset(
        jnp.take_along_axis(keys, rows, axis=-2),
        jnp.take_along_axis(values, rows, axis=-2),
        log_weights,
        indices.astype(jnp.int32),
    )
    return emptied(kept, indices < 0)


@jax.custom_jvp
def _rows(
    rows: Float[Array, "m d"], source: Float[Array, "n d"], places: Int[Array, " m"]
) -> Float[Array, "m d"]:
    """Rows with the derivative of rows of the source, none where a place is negative."""
    del source, places
    return rows


@_rows.defjvp
def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    rows, _, places = primals
    moved = tangents[1][jnp.maximum(places, 0)]
    return rows, jnp.where(places[:, None] < 0, 0, moved).astype(rows.dtype)


def like_source(
    coreset: AnyCoreset, keys: Float[Array, "n d"], values: Float[Array, "n dv"]
) -> AnyCoreset:
    """The same coreset; keys and values have the derivatives of the pairs at its indices.

    Whatever they were made by has none. What is rounded, or otherwise a constant almost
    everywhere, can be differentiated so.
    """
    return coreset._replace(
        keys=_rows(coreset.keys, keys, coreset.indices),
        values=_rows(coreset.values, values, coreset.indices),
    )


def emptied(coreset: AnyCoreset, slots: Array) -> AnyCoreset:
    """The coreset with some slots empty.

    Args:
      coreset: any coreset.
      slots: which ones, to be broadcast to ``[..., m]``.
    """
    filling = {"log_weights": -jnp.inf, "indices": -1}

    def empty(name: str, leaf: Array) -> Array:
        mask = slots.reshape(*slots.shape, *(1,) * (leaf.ndim - coreset.indices.ndim))
        return jnp.where(mask, jnp.asarray(filling.get(name, 0), leaf.dtype), leaf)

    fields = coreset._asdict().items()
    return coreset._replace(**{name: empty(name, e) for name, e in fields if name != "scale"})


def whole_cache(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    lengths: Integer[Array, "*heads"] | None = None,
) -> Coreset:
    """The cache itself as a coreset: every valid pair with weight one.

    Args:
      keys: keys ``[..., n, d]``.
      values: values ``[..., n, dv]``.
      lengths: valid pairs of each head ``[...]``; ``None`` means all.
    """
    dtype = accumulation_dtype(keys, values)
    positions = jax.lax.broadcasted_iota(jnp.int32, keys.shape[:-1], keys.ndim - 2)
    whole = Coreset(keys, values, jnp.zeros_like(keys[..., 0], dtype), positions)
    if lengths is None:
        return whole
    return emptied(whole, positions >= jnp.asarray(lengths)[..., None])


def padded(coreset: AnyCoreset, size: int) -> AnyCoreset:
    """The coreset with empty slots behind its own; a head that is NaN has NaN there too.

    Args:
      coreset: any coreset, ``[..., m]``.
      size: slots that it shall have, at least ``m``.
    """
    slots = coreset.indices.shape[-1]
    if slots == size:
        return coreset
    broken = jnp.any(jnp.isnan(coreset.log_weights), axis=-1, keepdims=True)

    def pad(leaf: Array) -> Array:
        widths = [(0, 0)] * leaf.ndim
        widths[coreset.indices.ndim - 1] = (0, size - slots)
        return jnp.pad(leaf, widths)

    wide = emptied(_over_slots(pad, coreset), jnp.arange(size) >= slots)
    return wide._replace(log_weights=jnp.where(broken, jnp.nan, wide.log_weights))


def concatenated(parts: Sequence[AnyCoreset], size: int) -> AnyCoreset:
    """One coreset of those of disjoint parts of a head, one behind the other.

    Args:
      parts: coresets ``[..., m_i]``; their empty slots stay where they are, see :func:`packed`.
      size: slots of the result, at least the sum of the ``m_i``.
    """
    axis = parts[0].indices.ndim - 1
    joined = _over_slots(lambda *leaves: jnp.concatenate(leaves, axis=axis), *parts)
    return padded(joined, size)


def packed(coreset: AnyCoreset) -> AnyCoreset:
    """The coreset with its empty slots last, the others in their order."""
    return _arranged(coreset, jnp.argsort(coreset.indices < 0, axis=-1, stable=True))


def ascending(coreset: AnyCoreset) -> AnyCoreset:
    """The coreset with its pairs in the order of the source, and its empty slots last."""
    places = jnp.where(coreset.indices < 0, jnp.iinfo(jnp.int32).max, coreset.indices)
    return _arranged(coreset, jnp.argsort(places, axis=-1, stable=True))


def _arranged(coreset: AnyCoreset, order: Int[Array, "*heads m"]) -> AnyCoreset:
    def arrange(leaf: Array) -> Array:
        spots = order.reshape(*order.shape, *(1,) * (leaf.ndim - order.ndim))
        return jnp.take_along_axis(leaf, spots, axis=order.ndim - 1)

    return _over_slots(arrange, coreset)
