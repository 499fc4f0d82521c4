"""Both ends of a cache kept as they are: what a text begins with, and what it has just said."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.coreset import Compressor, Coreset, gather, whole_cache

# Slots for every sink: of a few, sinks would leave nothing for all the rest.
_SLOTS_A_SINK = 8

# A middle of many pairs is a multiple of a power of two, at most the first of these and at most its
# own number over the second: cut into equal stretches it then leaves no slot empty.
_ROUNDEST, _ROUNDING = 32, 64


def end_counts(size: int, sinks: int, recent: float) -> tuple[int, int]:
    """How many of ``size`` slots go to the first pairs, and how many to the last."""
    sinks = min(sinks, size // _SLOTS_A_SINK)
    middle = max(size - sinks - int(recent * size), 1)
    if recent:
        middle -= middle % min(_ROUNDEST, 1 << max(middle // _ROUNDING, 1).bit_length() - 1)
    return sinks, size - sinks - middle


@functools.partial(jax.jit, static_argnames=("sinks", "recent"))
def _join(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    lengths: Int[Array, "*heads"],
    middle: Coreset,
    *,
    sinks: int,
    recent: int,
) -> Coreset:
    """The ends on either side of a coreset of the pairs ``sinks..length - recent``."""
    dtype, normalizers = middle.log_weights.dtype, middle.normalizers
    leading = keys.shape[:-2]
    lengths = jnp.broadcast_to(lengths.reshape(*lengths.shape, 1), (*leading, 1))

    def numbers(count: int) -> Array:
        return jax.lax.broadcasted_iota(jnp.int32, (*leading, count), len(leading))

    first, last = numbers(sinks), lengths - recent + numbers(recent)
    first = jnp.where(first < lengths, first, -1)
    last = jnp.where(last >= sinks, last, -1)

    def kept(places: Array) -> Coreset:
        end = gather(keys, values, places, jnp.zeros(places.shape, dtype))
        if normalizers is None:
            return end
        return end._replace(normalizers=jnp.exp(end.log_weights).astype(normalizers.dtype))

    ends = kept(first), kept(last)
    # A short head has nothing between its ends, and what was taken for it is one of them.
    empty = (middle.indices < 0) | (lengths <= sinks + recent)
    middle = middle._replace(
        keys=jnp.where(empty[..., None], 0, middle.keys),
        values=jnp.where(empty[..., None], 0, middle.values),
        log_weights=jnp.where(empty, -jnp.inf, middle.log_weights),
        indices=jnp.where(empty, -1, middle.indices + sinks),
        normalizers=None if normalizers is None else jnp.where(empty, 0, normalizers),
    )
    # Those of a broken head, which may have ends alone, are all NaN.
    sound = ~jnp.any(jnp.isnan(middle.log_weights), axis=-1, keepdims=True)
    for end in ends:
        sound &= jnp.all(jnp.isfinite(end.keys), axis=(-2, -1))[..., None]
        sound &= jnp.all(jnp.isfinite(end.values), axis=(-2, -1))[..., None]
    parts = (ends[0], middle, ends[1])
    axis = keys.ndim - 2
    joined: Coreset = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=axis), *parts)
    order = jnp.argsort(joined.indices < 0, axis=-1, stable=True)

    def arrange(leaf: Array) -> Array:
        spots = order.reshape(*order.shape, *(1,) * (leaf.ndim - order.ndim))
        return jnp.take_along_axis(leaf, spots, axis=axis)

    joined = jax.tree.map(arrange, joined)
    return joined._replace(log_weights=jnp.where(sound, joined.log_weights, jnp.nan))


@dataclasses.dataclass(frozen=True)
class _WithEnds:
    compressor: Compressor
    sinks: int
    recent: float

    def __call__(
        self,
        rng: Array,
        keys: Float[Array, "*heads n d"],
        values: Float[Array, "*heads n dv"],
        *,
        size: int,
        lengths: Int[Array, "*heads"] | None = None,
        queries: Float[Array, "*heads q d"] | None = None,
    ) -> Coreset:
        validation.check_cache(keys, values)
        validation.check_size(size)
        validation.check_lengths(lengths, keys)
        if queries is not None:
            validation.check_queries(queries, keys)
        if size >= keys.shape[-2]:
            return whole_cache(keys, values, lengths)
        sinks, recent = end_counts(size, self.sinks, self.recent)
        count = jnp.asarray(keys.shape[-2] if lengths is None else lengths).astype(jnp.int32)
        if lengths is None:
            stop, between = keys.shape[-2] - recent, None
        else:
            stop, between = keys.shape[-2], jnp.maximum(count - sinks - recent, 1)
        middle = self.compressor(
            rng,
            keys[..., sinks:stop, :],
            values[..., sinks:stop, :],
            size=size - sinks - recent,
            lengths=between,
            queries=queries,
        )
        return _join(keys, values, count, middle, sinks=sinks, recent=recent)


def with_ends(compressor: Compressor, *, sinks: int = 4, recent: float = 0.125) -> Compressor:
    r"""Keeps the first and the last pairs of a cache as they are, and compresses those between.

    .. math:: S = \{1, \dots, s\} \cup S' \cup \{n - r + 1, \dots, n\}, \qquad
              w_i = 1 \text{ at both ends}

    with :math:`S'` what the compressor makes of :math:`m - s - r` slots. What comes next in a text
    asks most of what was said last, and many models look at their first tokens whatever they ask:
    an error there is heard by every query, and costs few slots to avoid.

    Args:
      compressor: what compresses the pairs between. Its weights have to say how many pairs of the
        cache each of its own stands for, as those of every compressor of this library do.
      sinks: :math:`s`, the first pairs that are kept; of few slots no more than an eighth.
      recent: the part of the slots that goes to the last pairs, at least 0 and below 1. It is
        rounded down to a number of slots, and up to where the others are a round number.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor`. Pairs of both ends are bit-identical to the
      source and have weight one. With ``lengths``, the last pairs are those of each head. A head
      with a NaN or an infinity gets NaN log-weights.

    Raises:
      ValueError: if ``sinks`` is no static count, ``recent`` no static part of a whole, or the
        compressor not callable; when called, as the compressor does.

    References:
      Xiao, Tian, Chen, Han, Lewis, *Efficient Streaming Language Models with Attention Sinks*,
      ICLR 2024, arXiv 2309.17453.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 512, 16))
    >>> compressor = cj.with_ends(cj.balanced(), sinks=2, recent=0.125)
    >>> coreset = compressor(jax.random.key(1), keys, values, size=32)
    >>> print(coreset.indices[0, :2], coreset.indices[0, -4:])
    [0 1] [508 509 510 511]
    """
    validation.check_count("sinks", sinks, 0)
    recent = validation.static_part("recent", recent)
    if not callable(compressor):
        raise ValueError(f"compressor must be callable, got {compressor!r}.")
    return _WithEnds(compressor, int(sinks), recent)
