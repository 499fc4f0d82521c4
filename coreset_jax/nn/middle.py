"""The compressed middle of a cache: one summary a head of each sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from coreset_jax._src.core.compressor import Compressor
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.turns import over_axes
from coreset_jax._src.precision import log
from coreset_jax._src.stream import summary as summaries
from coreset_jax._src.stream.halvings import options_of_heads
from coreset_jax._src.stream.sketch import Pairs
from coreset_jax._src.stream.summary import Summary
from coreset_jax.combinators import chunk_count
from coreset_jax.fitting import fitted
from coreset_jax.nn.config import CacheConfig
from coreset_jax.nn.grouped import by_token
from coreset_jax.nn.kv_block import KVBlock, numbers

# A summary keeps its error for a walk with feedback, which nothing here is.
_LANDMARKS = 1

# Most pairs that are fitted together.
_TOGETHER = 512

# Steps of the keys. What joins in decoding is little beside what is there, which has had its steps.
_STEPS, _STEPS_OF_A_BLOCK = 3, 1


def empty(
    config: CacheConfig,
    key_like: Float[Array, "batch kv_heads head_dim"],
    value_like: Float[Array, "batch kv_heads value_dim"],
) -> Summary:
    """A middle that has absorbed nothing, for pairs like these."""

    def one_head(key: Array, value: Array) -> Summary:
        return summaries.empty(config.middle, _LANDMARKS, key, value)

    return over_axes(one_head, 2)(key_like, value_like)


def compress(
    config: CacheConfig,
    rng: UInt32[Array, "batch words"],
    prompt: KVBlock,
    counts: Int[Array, " batch"],
    heads: Int[Array, " kv_heads"],
    queries: Float[Array, "batch asked heads head_dim"] | None,
) -> Summary:
    """The middle of a prompt: ``counts`` pairs of each sequence, behind the sinks.

    Args:
      config: the options.
      rng: data of each sequence's random key; every head gets a fold of its own.
      prompt: the prompts.
      counts: number of valid pairs behind the sinks.
      heads: the kv heads' numbers, after which their random numbers are named, int32.
      queries: sample queries, or ``None``.
    """
    stop = prompt.keys.shape[2] - config.num_recent
    blank = empty(config, *(array[:, :, 0] for array in prompt))
    if config.middle == 0 or stop <= config.sinks:
        return blank
    pairs = KVBlock(*(array[:, :, config.sinks : stop] for array in prompt))
    places = numbers(pairs.keys.shape[2])
    positions = jnp.where(places < counts[:, None], config.sinks + places, -1)
    return _anew(config, rng, blank, pairs, positions, heads, queries, fresh=True)


def absorb(
    config: CacheConfig,
    rng: UInt32[Array, "batch words"],
    middle: Summary,
    block: KVBlock,
    first: Int[Array, " batch"],
    counts: Int[Array, " batch"],
    heads: Int[Array, " kv_heads"],
    queries: Float[Array, "batch asked heads head_dim"] | None = None,
) -> Summary:
    """The middle after the first ``counts`` pairs of a block have joined it.

    Args:
      config: the options.
      rng: data of each sequence's random key; every head and place gets a fold of its own.
      middle: the middle.
      block: the next pairs of each sequence.
      first: the place in the sequence of the first of them.
      counts: number of valid ones among them; 0 changes nothing.
      heads: the kv heads' numbers, after which their random numbers are named, int32.
      queries: sample queries for fits, or ``None``.
    """
    places = numbers(block.keys.shape[2])
    positions = jnp.where(places < counts[:, None], first[:, None] + places, -1)
    if config.compressor is None:
        return _anew(config, rng, middle, block, positions, heads, queries)
    settings = config.settings(block.keys.shape[-1])
    zeros, dtype = jnp.zeros_like(middle.absorbed), middle.pairs.weights.dtype
    positions = zeros[..., None] + positions[:, None]

    def one_head(
        compressor: Compressor | None,
        words: Array,
        number: Array,
        first: Array,
        summary: Summary,
        pairs: Pairs,
    ) -> Summary:
        fold = jax.random.fold_in(jax.random.fold_in(_key(words, 1), number), first)
        own = settings._replace(compressor=compressor)
        absorbed = summaries.absorb(fold, summary, pairs, own)
        some = jnp.any(pairs.weights > 0)
        return jax.tree.map(lambda new, old: jnp.where(some, new, old), absorbed, summary)

    return over_axes(one_head, 2)(
        options_of_heads(config.compressor, middle.ledger.key_radius),
        _words(rng, zeros),
        zeros + heads[None],
        zeros + first[:, None],
        middle,
        Pairs(*block, (positions >= 0).astype(dtype), positions),
    )


def _compressor(config: CacheConfig, width: int, steps: int) -> Compressor:
    """What compresses: what was asked for, or fits between the ends, which the cache keeps."""
    if config.compressor is not None:
        return config.compressor
    settings = config.settings(width)
    # Old pairs stand for many and new ones for one: only among pairs that are fitted together can
    # slots go to those that need them.
    return fitted(
        query_norm=settings.query_norm,
        scale=settings.scale,
        soft_cap=config.soft_cap,
        chunk_size=_TOGETHER,
        moved_together=_TOGETHER,
        newton_steps=steps,
        sinks=0,
        recent_fraction=0,
    )


def _in_order(pairs: Pairs, chunks: int) -> Pairs:
    """Pairs in the order of the sequence, empty slots last; every chunk with its share of old ones.

    A chunk is every so many-th pair: cut by place, old pairs would get as many slots as new ones
    that stand for far less.
    """
    last = jnp.iinfo(jnp.int32).max
    order = jnp.argsort(jnp.where(pairs.weights == 0, last, pairs.positions))
    if chunks > 1:
        order = order[jnp.argsort(numbers(order.shape[0])[0] % chunks)]
        order = order[jnp.argsort(pairs.weights[order] == 0)]
    return jax.tree.map(lambda each: each[order], pairs)


def _anew(
    config: CacheConfig,
    rng: UInt32[Array, "batch words"],
    middle: Summary,
    block: KVBlock,
    positions: Int[Array, "batch length"],
    heads: Int[Array, " kv_heads"],
    queries: Float[Array, "batch asked heads head_dim"] | None,
    *,
    fresh: bool = False,
) -> Summary:
    """The middle made anew of what it stands for, unless that is nothing, and of more pairs.

    Arguments are those of :func:`absorb`, but for ``positions``, the places of the pairs in the
    sequence and -1 for what is none of them, and ``fresh``, whether the middle has absorbed
    nothing, static.
    """
    settings = config.settings(block.keys.shape[-1])
    steps = _STEPS if fresh or block.keys.shape[2] > config.block_size else _STEPS_OF_A_BLOCK
    compressor = _compressor(config, block.keys.shape[-1], steps)
    sample = None
    if queries is not None and compressor.reads_queries:
        sample = by_token(queries, block.keys.shape[1])

    def one_head(
        compressor: Compressor,
        words: Array,
        number: Array,
        summary: Summary,
        block: KVBlock,
        positions: Array,
        sample: Array | None,
    ) -> Summary:
        dtype = summary.pairs.weights.dtype
        pairs = Pairs(*block, (positions >= 0).astype(dtype), positions)
        if not fresh:
            pairs = jax.tree.map(lambda *each: jnp.concatenate(each), summary.pairs, pairs)
            pairs = _in_order(pairs, chunk_count(config.middle, _TOGETHER))
        count = jnp.sum(pairs.weights != 0, dtype=jnp.int32)
        # A head without pairs has one of zeros: padding may hold anything.
        inside = (jnp.arange(pairs.weights.shape[0]) < count)[:, None]
        keys, values = (jnp.where(inside, each, jnp.zeros_like(each)) for each in pairs[:2])
        head = Head.prepare(
            _key(words, 0 if fresh else positions[0]),
            number,
            keys,
            values,
            jnp.maximum(count, 1),
            sample,
            log_weights=None if fresh else log(pairs.weights),
            ragged=True,
            **compressor.query_ball.at_scale(settings.scale)._asdict(),
        )
        coreset, _ = compressor.on_head(head, config.middle)
        held = _held(coreset, pairs, config.middle)
        sound = jnp.ones((), bool)
        for array in jax.tree.leaves((keys, values, sample)):
            sound &= jnp.all(jnp.isfinite(array))
        # What was not finite is never forgotten: a sum of keys is where summaries look for it.
        ledger = summary.ledger
        ledger = ledger._replace(key_sum=jnp.where(sound, ledger.key_sum, jnp.nan))
        new = jnp.sum(positions >= 0, dtype=jnp.int32)
        made = summary._replace(pairs=held, ledger=ledger, absorbed=summary.absorbed + new)
        return jax.tree.map(lambda one, old: jnp.where(new > 0, one, old), made, summary)

    # Numbers are those of the kv heads: what a sequence is batched with must not matter.
    zeros = jnp.zeros_like(middle.absorbed)
    return over_axes(one_head, 2)(
        options_of_heads(compressor, middle.ledger.key_radius),
        _words(rng, zeros),
        zeros + heads[None],
        middle,
        block,
        zeros[..., None] + positions[:, None],
        sample,
    )


def _held(coreset: Coreset, pairs: Pairs, slots: int) -> Pairs:
    """A coreset of some pairs as such pairs, which weigh as many in all."""
    empty = coreset.indices < 0
    weights = jnp.where(empty, 0, jnp.exp(coreset.log_weights).astype(pairs.weights.dtype))
    # Fits keep the mass nearly. A sequence sees many of them, and "nearly" adds up.
    total = jnp.sum(weights)
    weights = weights * (jnp.sum(pairs.weights) / jnp.where(total == 0, 1, total))
    places = jnp.where(empty, -1, pairs.positions[jnp.maximum(coreset.indices, 0)])
    held = Pairs(coreset.keys, coreset.values, weights, places)
    room = slots - weights.shape[0]
    return jax.tree.map(lambda each: jnp.pad(each, [(0, room)] + [(0, 0)] * (each.ndim - 1)), held)


def log_weights(middle: Summary) -> Float[Array, "batch kv_heads slots"]:
    """Logarithms of the weights; NaN in a head that has absorbed a NaN or an infinity."""
    sound = over_axes(summaries.is_sound, 2)(middle)
    return jnp.where(sound[..., None], log(middle.pairs.weights), jnp.nan)


def positions(middle: Summary) -> Int[Array, "batch kv_heads slots"]:
    """Places in the sequence of the pairs, -1 in empty slots."""
    return jnp.where(middle.pairs.weights > 0, middle.pairs.positions, -1)


def _words(rng: UInt32[Array, "batch words"], like: Array) -> UInt32[Array, "batch kv_heads words"]:
    """The data of each sequence's random key for all of its heads, sharded as they are."""
    return jnp.zeros_like(like, jnp.uint32)[..., None] + rng[:, None]


def _key(words: UInt32[Array, " words"], purpose: Array | int) -> Array:
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    return jax.random.fold_in(key, purpose)
