"""The compressed middle of a cache: one summary a head of each sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax import summary as summaries
from coreset_jax.fitted import moved_pairs
from coreset_jax.nn.config import CacheConfig
from coreset_jax.nn.grouped import grouped
from coreset_jax.nn.stretch import Stretch
from coreset_jax.refit.steps import kernel_entries
from coreset_jax.refit.wrapper import heads_at_once
from coreset_jax.sketch import Pairs
from coreset_jax.summary import Summary


def empty(
    config: CacheConfig,
    key_like: Float[Array, "batch kv_heads head_dim"],
    value_like: Float[Array, "batch kv_heads value_dim"],
) -> Summary:
    """A middle that has absorbed nothing, for pairs like these."""

    def one_head(key: Array, value: Array) -> Summary:
        return summaries.empty(config.middle, config.landmarks, key, value)

    return jax.vmap(jax.vmap(one_head))(key_like, value_like)


def compress(
    config: CacheConfig,
    rng: Array,
    prompt: Stretch,
    counts: Int[Array, " batch"],
    queries: Float[Array, "batch asked heads head_dim"] | None,
) -> Summary:
    """The middle of a prompt: ``counts`` pairs of each sequence, behind the sinks."""
    stop = prompt.keys.shape[2] - config.recent
    if config.middle == 0 or stop <= config.sinks:
        return empty(config, *(array[:, :, 0] for array in prompt))
    keys, values = (array[:, :, config.sinks : stop] for array in prompt)
    kv_heads = keys.shape[1]
    settings = config.settings(keys.shape[-1])
    compressor = config.compressor
    if compressor is None:
        norm, scale = settings.query_norm, settings.scale
        # The cache keeps both ends itself, with weight one.
        compressor = moved_pairs(query_norm=norm, scale=scale)
    sample = None if queries is None else grouped(queries, kv_heads)

    # The same random key for every sequence: what it is batched with must not matter.
    def one_sequence(keys: Array, values: Array, count: Array, sample: Array | None) -> Summary:
        lengths = jnp.full(kv_heads, jnp.maximum(count, 1))
        coreset = compressor(rng, keys, values, size=config.middle, lengths=lengths, queries=sample)
        # Where there is no pair at all, the one that was taken is padding.
        coreset = coreset._replace(
            keys=jnp.where(count > 0, coreset.keys, jnp.zeros_like(coreset.keys)),
            values=jnp.where(count > 0, coreset.values, jnp.zeros_like(coreset.values)),
        )
        summarise = jax.vmap(summaries.of_coreset, (0, 0, None, 0, None, None, None, None))
        return summarise(
            keys,
            values,
            count,
            coreset,
            config.sinks,
            config.middle,
            config.landmarks,
            settings,
        )

    # A few sequences after another: a fit holds kernels of many pairs for every head.
    at_once = max(heads_at_once(kernel_entries(keys.shape[2], config.middle)) // kv_heads, 1)
    if keys.shape[0] <= at_once:
        return jax.vmap(one_sequence)(keys, values, counts, sample)
    sequences = (keys, values, counts, sample)
    return jax.lax.map(lambda each: one_sequence(*each), sequences, batch_size=at_once)


def absorb(
    config: CacheConfig,
    rng: Array,
    middle: Summary,
    block: Stretch,
    first: Int[Array, " batch"],
    counts: Int[Array, " batch"],
) -> Summary:
    """The middle after the first ``counts`` pairs of a block have joined it.

    Args:
      config: the options.
      rng: a JAX random key; every head and place in the sequence gets a fold of its own.
      middle: the middle.
      block: the next pairs of each sequence.
      first: the place in the sequence of the first of them.
      counts: how many of them are meant; 0 changes nothing.
    """
    settings = config.settings(block.keys.shape[-1])
    kv_heads, width = block.keys.shape[1:3]

    def one_head(
        number: Array, summary: Summary, keys: Array, values: Array, first: Array, count: Array
    ) -> Summary:
        inside = jnp.arange(width) < count
        pairs = Pairs(
            keys,
            values,
            inside.astype(summary.pairs.weights.dtype),
            jnp.where(inside, first + jnp.arange(width, dtype=first.dtype), -1),
        )
        fold = jax.random.fold_in(jax.random.fold_in(rng, number), first)
        absorbed = summaries.absorb(fold, summary, pairs, settings)
        return jax.tree.map(lambda new, old: jnp.where(count > 0, new, old), absorbed, summary)

    over_kv_heads = jax.vmap(one_head, (0, 0, 0, 0, None, None))
    over_batch = jax.vmap(over_kv_heads, (None, 0, 0, 0, 0, 0))
    return over_batch(jnp.arange(kv_heads), middle, block.keys, block.values, first, counts)


def log_weights(middle: Summary) -> Float[Array, "batch kv_heads slots"]:
    """Logarithms of the weights; NaN in a head that has absorbed a NaN or an infinity."""
    sound = jax.vmap(jax.vmap(summaries.is_sound))(middle)
    return jnp.where(sound[..., None], jnp.log(middle.pairs.weights), jnp.nan)


def positions(middle: Summary) -> Int[Array, "batch kv_heads slots"]:
    """Places in the sequence of the pairs, -1 in empty slots."""
    return jnp.where(middle.pairs.weights > 0, middle.pairs.positions, -1)
