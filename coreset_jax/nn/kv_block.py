"""Consecutive pairs of a sequence, kept exactly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KVBlock(NamedTuple):
    """Consecutive pairs of a sequence, kept exactly.

    Attributes:
      keys: keys ``[batch, kv_heads, slots, head_dim]``.
      values: values ``[batch, kv_heads, slots, value_dim]``.
    """

    keys: Float[Array, "batch kv_heads slots head_dim"]
    values: Float[Array, "batch kv_heads slots value_dim"]


def numbers(count: int) -> Int[Array, "1 count"]:
    """The numbers from 0 on, a row for a batch of any size; int32 as lengths are."""
    return jnp.arange(count, dtype=jnp.int32)[None]


def empty(
    slots: int,
    key_like: Float[Array, "batch kv_heads head_dim"],
    value_like: Float[Array, "batch kv_heads value_dim"],
) -> KVBlock:
    """Zeros, sharded as the pairs given."""

    def zeros(array: Array) -> Array:
        return jnp.zeros_like(array)[..., None, :] + jnp.zeros((1, 1, slots, 1), array.dtype)

    return KVBlock(zeros(key_like), zeros(value_like))


def cut(
    pairs: KVBlock, slots: int, starts: Int[Array, " batch"], ends: Int[Array, " batch"]
) -> KVBlock:
    """The pairs of each sequence from ``starts`` to ``ends``, at most ``slots``, then zeros."""
    places = starts[:, None] + numbers(slots)
    inside = (places < ends[:, None])[:, None, :, None]
    rows = jnp.clip(places, 0, pairs.keys.shape[2] - 1)[:, None, :, None]

    def take(array: Array) -> Array:
        taken = jnp.take_along_axis(array, rows, axis=2)
        # Padding may hold anything.
        return jnp.where(inside, taken, jnp.zeros_like(taken))

    return KVBlock(*map(take, pairs))


def shift(block: KVBlock, counts: Int[Array, " batch"]) -> KVBlock:
    """Moves the pairs of each sequence ``counts`` slots to the front; the first ones leave."""
    slots = block.keys.shape[2]
    places = jnp.minimum(numbers(slots) + counts[:, None], slots - 1)[:, None, :, None]
    return KVBlock(*(jnp.take_along_axis(array, places, axis=2) for array in block))


def put(
    block: KVBlock,
    pairs: KVBlock,
    places: Int[Array, "batch length"],
    chosen: Bool[Array, "batch length"],
) -> KVBlock:
    """Writes the ``chosen`` among some pairs to their places."""
    slots = block.keys.shape[2]
    if slots == 0:
        return block
    places = jnp.where(chosen, places, slots)
    write = jax.vmap(lambda old, new, at: old.at[:, at].set(new, mode="drop"))
    return KVBlock(*(write(old, new, places) for old, new in zip(block, pairs, strict=True)))


def joined(
    first: KVBlock,
    counts: Int[Array, " batch"],
    second: KVBlock,
    starts: Int[Array, " batch"],
) -> KVBlock:
    """The first ``counts`` pairs of one block, and behind them without a gap those of another.

    Args:
      first: a block.
      counts: how many of its pairs are valid.
      second: the block that follows.
      starts: from where on it counts.
    """
    slots, more = first.keys.shape[2], second.keys.shape[2]
    places = numbers(slots + more)
    before = jnp.minimum(places, slots - 1)[:, None, :, None]
    behind = jnp.clip(places - counts[:, None] + starts[:, None], 0, more - 1)[:, None, :, None]
    old = (places < counts[:, None])[:, None, :, None]

    def join(one: Array, other: Array) -> Array:
        left, right = (jnp.take_along_axis(a, at, 2) for a, at in ((one, before), (other, behind)))
        return jnp.where(old, left, right)

    return KVBlock(*(join(*each) for each in zip(first, second, strict=True)))
