"""How pairs join a cache: into its sinks and its window, and out of that into its middle.

A cache here is a :class:`~coreset_jax.nn.CoresetCache`, whose methods these are a part of.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from coreset_jax.nn import kv_block
from coreset_jax.nn import middle as middles
from coreset_jax.nn.kv_block import KVBlock


def append_many(
    cache: Any, new: KVBlock, counts: Array, heads: Array, queries: Array | None
) -> Any:
    """The cache after more than a block of pairs: the middle is fitted once for all that leave."""
    config, count = cache.config, new.keys.shape[2]
    spared = jnp.clip(config.sinks - cache.lengths, 0, counts)
    numbers = kv_block.numbers(count)
    to_sinks = numbers < spared[:, None]
    sinks = kv_block.put(cache.sinks, new, cache.lengths[:, None] + numbers, to_sinks)
    pairs = kv_block.joined(cache.recent, cache.filled, new, spared)
    ends = cache.filled + counts - spared
    leaving = jnp.maximum(ends - config.num_recent, 0)
    first, block = cache.lengths - cache.filled + spared, KVBlock(*(e[:, :, :count] for e in pairs))
    absorb = functools.partial(middles.absorb, config, cache.rng)
    middle = absorb(cache.middle, block, first, leaving, heads, queries)
    return dataclasses.replace(
        cache,
        sinks=sinks,
        middle=middle,
        recent=kv_block.cut(pairs, config.num_recent, leaving, ends),
        filled=ends - leaving,
        lengths=cache.lengths + counts,
    )


def flush(cache: Any, full: Array, heads: Array) -> Any:
    """The oldest block of recent pairs joins the middle, in the sequences that are ``full``."""
    width = cache.config.block_size
    leaving = jnp.where(full, jnp.minimum(cache.filled, width), 0)
    middle = cache.middle
    if cache.config.middle:
        block = KVBlock(*(array[:, :, :width] for array in cache.recent))
        first = cache.lengths - cache.filled
        middle = middles.absorb(cache.config, cache.rng, middle, block, first, leaving, heads)
    return dataclasses.replace(
        cache,
        middle=middle,
        recent=kv_block.shift(cache.recent, leaving),
        filled=cache.filled - leaving,
    )


def write(cache: Any, pairs: KVBlock, counts: Array) -> Any:
    """Puts the first ``counts`` of some pairs where they belong; there is room."""
    numbers = kv_block.numbers(pairs.keys.shape[2])
    places = cache.lengths[:, None] + numbers
    inside = numbers < counts[:, None]
    to_sinks = inside & (places < cache.config.sinks)
    spared = jnp.sum(to_sinks, axis=1, dtype=jnp.int32)
    slots = (cache.filled - spared)[:, None] + numbers
    return dataclasses.replace(
        cache,
        sinks=kv_block.put(cache.sinks, pairs, places, to_sinks),
        recent=kv_block.put(cache.recent, pairs, slots, inside & ~to_sinks),
        filled=cache.filled + counts - spared,
        lengths=cache.lengths + counts,
    )


def chosen(rows: Array, new: Any, old: Any) -> Any:
    """Some rows of one cache, and the others of another, behind the prefix of the other."""

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    rows_of = [dataclasses.replace(cache, prefix=None) for cache in (new, old)]
    return dataclasses.replace(jax.tree.map(choose, *rows_of), prefix=old.prefix)
