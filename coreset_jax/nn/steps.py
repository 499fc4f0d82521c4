"""What the methods of a cache compute, each in one program.

A cache here is a :class:`~coreset_jax.nn.CoresetCache`, or for :func:`empty` one without arrays.
Everything is compiled here, so that calls that are not under ``jit`` do not compile anew each time.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from coreset_jax._src import meshes
from coreset_jax.nn import grouped, joining, kv_block
from coreset_jax.nn import middle as middles
from coreset_jax.nn.grouped import Part, by_head
from coreset_jax.nn.kv_block import KVBlock
from coreset_jax.nn.placing import for_sequences


@for_sequences
def empty(nothing: Any, keys: Array, values: Array, words: Array) -> Any:
    """An empty cache of some options, for keys and values like these."""
    words = jnp.zeros_like(keys[:, 0, 0, :1], jnp.uint32) + words
    return _emptied(dataclasses.replace(nothing, rng=words), keys, values)


def _emptied(cache: Any, keys: Array, values: Array) -> Any:
    key, value = (by_head(array)[..., 0, :] for array in (keys, values))
    # Two arrays, or they could not both be donated.
    filled, lengths = (jnp.zeros_like(key[:, 0, 0], jnp.int32) for _ in range(2))
    return dataclasses.replace(
        cache,
        sinks=kv_block.empty(cache.config.sinks, key, value),
        middle=middles.empty(cache.config, key, value),
        recent=kv_block.empty(cache.config.num_recent, key, value),
        filled=filled,
        lengths=lengths,
    )


@jax.jit
@functools.partial(for_sequences, like="pairs")
def positions(cache: Any) -> Array:
    """Places in the sequence of the pairs held: sinks, middle, recent."""
    sinks = kv_block.numbers(cache.config.sinks)
    sinks = jnp.where(sinks < cache.lengths[:, None], sinks, -1)
    filled = _filled(cache)[:, None]
    recent = kv_block.numbers(cache.config.num_recent)
    recent = jnp.where(recent < filled, cache.lengths[:, None] - filled + recent, -1)
    outgrown = _outgrown(cache)[:, None, None]
    middle = jnp.where(outgrown, middles.positions(cache.middle), -1)
    zeros = jnp.zeros_like(cache.middle.absorbed)[..., None]
    sinks, recent = (zeros + part[:, None] for part in (sinks, recent))
    return jnp.concatenate([sinks, middle, recent], axis=-1).astype(jnp.int32)


@jax.jit
@for_sequences
def reset(cache: Any, rows: Array) -> Any:
    """The cache with some rows empty."""
    keys, values = map(by_head, cache.recent)
    return joining.chosen(rows, _emptied(cache, keys, values), cache)


def shortest(cache: Any) -> Int[Array, " batch"]:
    """The shortest that each sequence can be made: what has left the window stays."""
    exact = _filled(cache)
    whole = ~_outgrown(cache) | (exact == cache.lengths - cache.config.sinks)
    return jnp.where(whole, 0, cache.lengths - exact)


@jax.jit
@for_sequences
def rolled_back(cache: Any, lengths: Array) -> Any:
    """The cache without its newest pairs; NaN where they are not held exactly."""
    left = jnp.clip(lengths.astype(jnp.int32), 0, cache.lengths)
    lost = left < shortest(cache)
    filled = jnp.maximum(_filled(cache) - (cache.lengths - left), 0)
    broken = jnp.where(lost[:, None, None, None], jnp.nan, cache.recent.keys)
    return dataclasses.replace(
        cache,
        recent=cache.recent._replace(keys=broken),
        # One of the broken keys is read at least.
        filled=jnp.where(lost, jnp.maximum(_filled(cache), 1), filled),
        lengths=jnp.where(lost, jnp.maximum(cache.lengths, cache.config.sinks + 1), left),
    )


@jax.jit
def reordered(cache: Any, order: Array) -> Any:
    """Some rows of a cache, each as often as it is named, behind the documents of theirs."""

    def take(leaf: Array) -> Array:
        # Rows come from any device, and lie as they did.
        sharding = jax.typeof(leaf).sharding if meshes.explicit_mesh(leaf) else None
        return leaf.at[order].get(out_sharding=sharding)

    rows = jax.tree.map(take, dataclasses.replace(cache, prefix=None))
    prefix = cache.prefix
    if prefix is not None and prefix.lengths.shape[0] > 1:
        prefix = jax.tree.map(take, prefix)
    return dataclasses.replace(rows, prefix=prefix)


@jax.jit
@functools.partial(for_sequences, draws=True)
def prefill(
    cache: Any,
    keys: Array,
    values: Array,
    lengths: Array | None,
    queries: Array | None,
    heads: Array,
) -> Any:
    """The cache of a prompt."""
    config = cache.config
    lengths = _counts(cache, keys, lengths)
    spared = jnp.minimum(lengths, config.sinks)
    first = jnp.maximum(lengths - config.num_recent, spared)
    prompt = KVBlock(by_head(keys), by_head(values))
    return dataclasses.replace(
        cache,
        sinks=kv_block.cut(prompt, config.sinks, jnp.zeros_like(lengths), lengths),
        middle=middles.compress(config, cache.rng, prompt, first - spared, heads, queries),
        recent=kv_block.cut(prompt, config.num_recent, first, lengths),
        filled=lengths - first,
        lengths=lengths,
    )


@jax.jit
@functools.partial(for_sequences, draws=True)
def append(
    cache: Any,
    keys: Array,
    values: Array,
    lengths: Array | None,
    queries: Array | None,
    heads: Array,
) -> Any:
    """The cache after the next pairs."""
    counts = _counts(cache, keys, lengths)
    total = keys.shape[1]
    if total > cache.config.block_size and cache.config.middle and cache.config.compressor is None:
        cache = reset(cache, _left(cache))
        new = KVBlock(by_head(keys), by_head(values))
        return joining.append_many(cache, new, counts, heads, queries)
    width = min(total, cache.config.block_size)
    pieces = -(-total // width)
    padding = ((0, 0), (0, 0), (0, pieces * width - total), (0, 0))
    new = KVBlock(*(jnp.pad(by_head(array), padding) for array in (keys, values)))

    def piece(number: Array | int, cache: Any) -> Any:
        start = number * width
        inside = jnp.clip(counts - start, 0, width)
        # A batch decodes in step: as a rule all sequences are full at once, and most steps none.
        full = _filled(cache) + inside > cache.config.num_recent
        left = _left(cache)
        cache = jax.lax.cond(
            jnp.any(full | left),
            lambda: joining.flush(reset(cache, left), full, heads),
            lambda: cache,
        )
        pairs = (jax.lax.dynamic_slice_in_dim(array, start, width, 2) for array in new)
        return joining.write(cache, KVBlock(*pairs), inside)

    return piece(0, cache) if pieces == 1 else jax.lax.fori_loop(0, pieces, piece, cache)


@jax.jit
@functools.partial(for_sequences, like="tokens")
def attend(
    cache: Any,
    queries: Array,
    keys: Array | None,
    values: Array | None,
    lengths: Array | None,
    sink_logits: Array | None,
) -> Array:
    """Attention over the cache, and causally over new pairs."""
    new = None
    if keys is not None and values is not None:
        new = KVBlock(by_head(keys), by_head(values))
        if lengths is not None:
            start, end = jnp.zeros_like(cache.lengths), _counts(cache, keys, lengths)
            new = kv_block.cut(new, keys.shape[1], start, end)
    own_logits = None if sink_logits is None else sink_logits[0, 0, :, 0]
    scale = cache.config.settings(queries.shape[-1]).scale
    soft_cap = cache.config.soft_cap
    outputs = grouped.attend(queries, _held(cache), new, scale, soft_cap, own_logits, cache.prefix)
    return outputs.astype(cache.recent.values.dtype)


@jax.jit
@functools.partial(for_sequences, draws=True)
def extend(
    cache: Any,
    queries: Array,
    keys: Array,
    values: Array,
    lengths: Array | None,
    heads: Array,
) -> Any:
    """The cache after tokens that may be a prompt, with sample queries of theirs."""
    count = keys.shape[1]
    # The last queries of a prompt are the best sample there is of those to come.
    ends = _counts(cache, keys, lengths)
    sample = min(count, max(cache.config.window, 1))
    places = jnp.maximum(ends[:, None] - sample + kv_block.numbers(sample), 0)
    asked = jnp.take_along_axis(queries, places[:, :, None, None], axis=1)
    asked = jnp.where((ends > 0)[:, None, None, None], asked, jnp.zeros_like(asked))
    starts = cache.lengths == 0

    def started() -> Any:
        return joining.chosen(
            starts, prefill(cache, keys, values, lengths, asked, heads=heads), cache
        )

    cache = jax.lax.cond(jnp.any(starts), started, lambda: cache)
    others = jnp.where(starts, 0, ends)
    return jax.lax.cond(
        jnp.all(starts),
        lambda: cache,
        lambda: append(cache, keys, values, others, asked, heads=heads),
    )


def _held(cache: Any) -> list[Part]:
    """All that is held, with its log-weights."""

    def exact(block: KVBlock, counts: Array) -> Part:
        inside = kv_block.numbers(block.keys.shape[2]) < counts[:, None]
        # Weights of the middle are absolute: a pair that is exact stands for itself.
        weights = jnp.where(inside, 0.0, -jnp.inf)[:, None]
        return *block, jnp.broadcast_to(weights, block.keys.shape[:3])

    parts = [exact(cache.recent, _filled(cache))]
    if cache.config.middle:
        pairs, outgrown = cache.middle.pairs, _outgrown(cache)[:, None, None]
        weights = jnp.where(outgrown, middles.log_weights(cache.middle), -jnp.inf)
        parts.append((pairs.keys, pairs.values, weights))
    if cache.config.sinks:
        parts.append(exact(cache.sinks, cache.lengths))
    return parts


def _outgrown(cache: Any) -> Bool[Array, " batch"]:
    """Whether sequences are longer than their sinks; others hold nothing else."""
    return cache.lengths > cache.config.sinks


def _left(cache: Any) -> Bool[Array, " batch"]:
    """Which rows were emptied by their length alone, and hold what must not be appended to."""
    return ~_outgrown(cache) & ((cache.filled > 0) | jnp.any(cache.middle.absorbed > 0, axis=1))


def _filled(cache: Any) -> Int[Array, " batch"]:
    """Number of valid recent pairs, whatever is left of a sequence that was there before."""
    return jnp.where(_outgrown(cache), cache.filled, 0)


def _counts(cache: Any, keys: Array, lengths: Array | None) -> Int[Array, " batch"]:
    """Number of valid ones among some pairs, sharded as the cache."""
    count = keys.shape[1] if lengths is None else jnp.asarray(lengths).astype(jnp.int32)
    return jnp.zeros_like(cache.lengths) + count
