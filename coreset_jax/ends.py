"""Both ends of a cache kept as they are: what a text begins with, and what it has just said."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.coreset import Compressor, Coreset, gather, whole_cache

# The first pairs get no more than this part of the slots.
_MOST_SINKS = 8


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
    dtype = middle.log_weights.dtype
    lengths = jnp.broadcast_to(lengths, keys.shape[:-2])[..., None].astype(jnp.int32)
    first = jnp.where(jnp.arange(sinks) < lengths, jnp.arange(sinks), -1)
    last = lengths - recent + jnp.arange(recent)
    last = jnp.where(last >= sinks, last, -1)

    def kept(places: Array) -> Coreset:
        end = gather(keys, values, places, jnp.zeros(places.shape, dtype))
        if middle.normalizers is None:
            return end
        return end._replace(normalizers=jnp.exp(end.log_weights).astype(middle.normalizers.dtype))

    ends = kept(first), kept(last)
    # A short head has nothing between its ends, and what was taken for it is one of them.
    empty = (middle.indices < 0) | (lengths <= sinks + recent)
    middle = middle._replace(
        keys=jnp.where(empty[..., None], 0, middle.keys),
        values=jnp.where(empty[..., None], 0, middle.values),
        log_weights=jnp.where(empty, -jnp.inf, middle.log_weights),
        indices=jnp.where(empty, -1, middle.indices + sinks),
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
        if size >= keys.shape[-2]:
            return whole_cache(keys, values, lengths)
        sinks = min(self.sinks, size // _MOST_SINKS)
        recent = min(int(self.recent * size), size - sinks - 1)
        if lengths is None:
            stop, between = keys.shape[-2] - recent, None
        else:
            stop = keys.shape[-2]
            between = jnp.maximum(jnp.asarray(lengths) - sinks - recent, 1)
        middle = self.compressor(
            rng,
            keys[..., sinks:stop, :],
            values[..., sinks:stop, :],
            size=size - sinks - recent,
            lengths=between,
            queries=queries,
        )
        count = jnp.asarray(keys.shape[-2] if lengths is None else lengths)
        return _join(keys, values, count, middle, sinks=sinks, recent=recent)


def check_share(name: str, value: float) -> float:
    """The static share of a whole that an option is: at least 0 and below 1."""
    share = validation.static_float(name, value, positive=False)
    if share is None or not 0 <= share < 1:
        raise ValueError(f"{name} must be a share, at least 0 and below 1; got {value}.")
    return share


def with_ends(compressor: Compressor, *, sinks: int = 4, recent: float = 0.25) -> Compressor:
    """Keeps the first and the last pairs of a cache as they are, and compresses those between.

    What comes next in a text asks most of what was said last, and many models look at their first
    tokens whatever they ask: an error there is heard by every query, and costs few slots.

    Args:
      compressor: what compresses the pairs between. Its weights have to say how many pairs of the
        cache each of its own stands for, as those of every compressor of this library do.
      sinks: the first pairs that are kept; of few slots no more than an eighth.
      recent: the share of the slots that goes to the last pairs, at least 0 and below 1.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor`. Pairs of both ends are bit-identical to the
      source and have weight one. With ``lengths``, the last pairs are those of each head. A head
      with a NaN or an infinity gets NaN log-weights.

    Raises:
      ValueError: if ``sinks`` is no static count, ``recent`` no static share, or the compressor
        not callable; when called, as the compressor does.

    References:
      Xiao, Tian, Chen, Han, Lewis, *Efficient streaming language models with attention sinks*,
      2023, arXiv 2309.17453.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 512, 16))
    >>> compressor = cj.with_ends(cj.balanced(), sinks=2, recent=0.125)
    >>> coreset = compressor(jax.random.key(1), keys, values, size=32)
    >>> print(coreset.indices[0, :2], coreset.indices[0, -4:])
    [0 1] [508 509 510 511]
    """
    validation.check_count("sinks", sinks, 0)
    share = check_share("recent", recent)
    if not callable(compressor):
        raise ValueError(f"compressor must be callable, got {compressor!r}.")
    return _WithEnds(compressor, int(sinks), share)
