"""Long caches a stretch of the sequence at a time: linear time for what is cubic in the size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.coreset import Compressor, Coreset, whole_cache


def stretch_count(size: int, most: int) -> int:
    """Stretches for ``size`` pairs, so that none keeps more than ``most``.

    The fewest, or up to twice as many if these share the size evenly.
    """
    fewest = -(-size // most)
    even = [count for count in range(fewest, 2 * fewest + 1) if size % count == 0]
    return even[0] if even else fewest


@functools.partial(jax.jit, static_argnames="stretches")
def _split(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    lengths: Int[Array, "*heads"],
    *,
    stretches: int,
) -> tuple[Array, Array, Array, Array]:
    """Keys, values, lengths and first places of all stretches ``[..., stretches, ...]``."""
    count = keys.shape[-2]
    width = -(-count // stretches)
    edges = jnp.arange(stretches + 1, dtype=jnp.int32)
    # In this order the product stays below 2^31.
    whole, rest = lengths[..., None] // stretches, lengths[..., None] % stretches
    stops = edges * whole + edges * rest // stretches
    places = stops[..., :-1, None] + jnp.arange(width, dtype=jnp.int32)
    places = jnp.minimum(places, count - 1).reshape(*keys.shape[:-2], stretches * width, 1)

    def cut(array: Array) -> Array:
        taken = jnp.take_along_axis(array, places, axis=-2)
        return taken.reshape(*keys.shape[:-2], stretches, width, array.shape[-1])

    return cut(keys), cut(values), jnp.diff(stops, axis=-1), stops[..., :-1]


@functools.partial(jax.jit, static_argnames="size")
def _join(
    coreset: Coreset,
    starts: Int[Array, "*heads stretches"],
    lengths: Int[Array, "*heads stretches"] | None,
    *,
    size: int,
) -> Coreset:
    """One coreset a head of those of its stretches, its empty slots last."""
    if lengths is not None:
        # A head of fewer pairs than stretches leaves some of them empty.
        absent = (lengths == 0)[..., None]
        coreset = coreset._replace(
            keys=jnp.where(absent[..., None], jnp.zeros_like(coreset.keys), coreset.keys),
            values=jnp.where(absent[..., None], jnp.zeros_like(coreset.values), coreset.values),
            log_weights=jnp.where(absent, -jnp.inf, coreset.log_weights),
            indices=jnp.where(absent, -1, coreset.indices),
        )
    indices = jnp.where(coreset.indices < 0, -1, coreset.indices + starts[..., None])
    joined: Coreset = jax.tree.map(
        lambda leaf: leaf.reshape(*starts.shape[:-1], -1, *leaf.shape[starts.ndim + 1 :]),
        coreset._replace(indices=indices),
    )
    order = jnp.argsort(joined.indices < 0, axis=-1, stable=True)
    short = size - order.shape[-1]

    def arrange(leaf: Array, empty: float) -> Array:
        spots = order.reshape(*order.shape, *(1,) * (leaf.ndim - order.ndim))
        moved = jnp.take_along_axis(leaf, spots, axis=order.ndim - 1)
        pad = [(0, 0)] * leaf.ndim
        pad[order.ndim - 1] = (0, short)
        return jnp.pad(moved, pad, constant_values=empty)

    # A stretch with a NaN makes one of its head.
    broken = jnp.any(jnp.isnan(joined.log_weights), axis=-1, keepdims=True)
    log_weights = jnp.where(broken, jnp.nan, arrange(joined.log_weights, -jnp.inf))
    normalizers = joined.normalizers
    return Coreset(
        arrange(joined.keys, 0),
        arrange(joined.values, 0),
        log_weights,
        arrange(joined.indices, -1),
        None if normalizers is None else arrange(normalizers, 0),
    )


@dataclasses.dataclass(frozen=True)
class _Stretched:
    compressor: Compressor
    most: int

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
        stretches = stretch_count(size, self.most)
        if stretches == 1:
            return self.compressor(rng, keys, values, size=size, lengths=lengths, queries=queries)
        leading, count = keys.shape[:-2], keys.shape[-2]
        if lengths is None and count % stretches == 0:
            # Nothing is moved.
            parts = [
                array.reshape(*leading, stretches, -1, array.shape[-1]) for array in (keys, values)
            ]
            starts = jnp.arange(stretches, dtype=jnp.int32) * (count // stretches)
            starts = jnp.broadcast_to(starts, (*leading, stretches))
            part_lengths = None
        else:
            full = jnp.full(leading, count) if lengths is None else jnp.asarray(lengths)
            *parts, part_lengths, starts = _split(
                keys, values, full.astype(jnp.int32), stretches=stretches
            )
        if queries is not None:
            shape = (*leading, stretches, *queries.shape[-2:])
            queries = jnp.broadcast_to(queries[..., None, :, :], shape)
        coreset = self.compressor(
            rng,
            *parts,
            size=size // stretches,
            lengths=None if part_lengths is None else jnp.maximum(part_lengths, 1),
            queries=queries,
        )
        return _join(coreset, starts, part_lengths, size=size)


def stretched(compressor: Compressor, *, most: int = 512) -> Compressor:
    """Lets a compressor keep at most so many pairs at a time, of a stretch of the sequence each.

    A refit solves for all pairs of a head at once, in time that grows with the cube of their
    number and memory with its square. Cut into consecutive stretches of nearly equal length, each
    with its share of the size, time and memory are linear in the length.

    Args:
      compressor: what compresses the stretches. Options of its that are one a head do not fit them.
      most: pairs that are kept of a stretch at most; up to that size nothing is cut.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor`. A head's weights sum to what those of its
      stretches sum to. If no number of stretches up to twice the least one divides ``size``, fewer
      slots than there are stretches stay empty.

    Raises:
      ValueError: if ``most`` is no static count or the compressor not callable; when called, as the
        compressor does.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 512, 16))
    >>> compressor = cj.stretched(cj.refit.relocation(cj.pivoted()), most=32)
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64)
    >>> print((coreset.indices < 256).sum(axis=-1))
    [32 32 32 32]
    """
    validation.check_count("most", most)
    if not callable(compressor):
        raise ValueError(f"compressor must be callable, got {compressor!r}.")
    return _Stretched(compressor, int(most))
