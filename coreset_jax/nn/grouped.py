"""Grouped queries: attention of several query heads over the pairs of one key-value head."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax._src.attention import (
    PartialAttention,
    finish,
    merge,
    partial_attention,
    sink_state,
)
from coreset_jax.nn import prefix as documents
from coreset_jax.nn.prefix import LayerPrefix

# Keys and values ``[batch, kv_heads, slots, width]`` and log-weights ``[batch, kv_heads, slots]``.
Part = tuple[Array, Array, Array]

# Scores that are held at a time.
_SCORES = 2**24


def by_head(array: Array) -> Array:
    """``[batch, length, heads, width]`` to ``[batch, heads, length, width]``."""
    return array.transpose(0, 2, 1, 3)


def grouped(queries: Array, kv_heads: int) -> Array:
    """Queries ``[batch, length, heads, width]`` as rows ``[batch, kv_heads, rows, width]``.

    The queries of one head lie behind each other.
    """
    batch, length, heads, width = queries.shape
    split = queries.reshape(batch, length, kv_heads, heads // kv_heads, width)
    return split.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width)


def by_token(queries: Array, kv_heads: int) -> Array:
    """The rows of :func:`grouped` in another order: the queries of one token behind each other.

    So samples are wanted, of which the last ones judge.
    """
    batch, length, heads, width = queries.shape
    split = queries.reshape(batch, length, kv_heads, heads // kv_heads, width)
    return split.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, width)


def ungrouped(rows: Array, shape: tuple[int, ...]) -> Array:
    """Rows back to ``[batch, length, heads, width]``, the shape of the queries but for width."""
    batch, length, heads, _ = shape
    kv_heads, width = rows.shape[1], rows.shape[-1]
    split = rows.reshape(batch, kv_heads, heads // kv_heads, length, width)
    return split.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def attend(
    queries: Float[Array, "batch length heads head_dim"],
    parts: Sequence[Part],
    new: tuple[Array, Array] | None,
    scale: float,
    soft_cap: float | None = None,
    sink_logits: Float[Array, " heads"] | None = None,
    prefix: LayerPrefix | None = None,
) -> Float[Array, "batch length heads value_dim"]:
    """Attention over the parts of a cache, and causally over the pairs that come with the queries.

    As many queries at a time as their scores allow, whatever the length.

    Args:
      queries: queries ``[batch, length, heads, head_dim]``.
      parts: what all of them see.
      new: keys and values ``[batch, kv_heads, length, width]`` of which query ``i`` sees the first
        ``i + 1``, or ``None``.
      scale: the softmax scale.
      soft_cap: the cap of scores, see :func:`coreset_jax.attention`.
      sink_logits: logits of the denominator, one a query head ``[heads]``.
      prefix: documents that all queries see, or ``None``.

    Returns:
      Outputs in float32 or wider; zero where there is nothing to attend to.
    """
    batch, length, heads, _ = queries.shape
    kv_heads = parts[0][0].shape[1]

    def read(queries: Array, places: Array) -> Array:
        rows = grouped(queries, kv_heads)
        read_part = functools.partial(partial_attention, rows, scale=scale, soft_cap=soft_cap)
        states = [_nothing_where_empty(read_part(*part), part) for part in parts]
        if prefix is not None:
            states.append(documents.partial_attention(rows, prefix, scale, soft_cap))
        if new is not None:
            places = jnp.tile(places, heads // kv_heads)
            visible = jnp.arange(length)[None] <= places[:, None]
            states.append(read_part(*new, visible=visible))
        if sink_logits is not None:
            # Rows hold the queries of one head behind those of another.
            logits = jnp.repeat(sink_logits.reshape(kv_heads, -1), queries.shape[1], axis=1)
            states.append(sink_state(logits[None], states[0]))
        return ungrouped(finish(functools.reduce(merge, states)), queries.shape)

    seen = sum(part[0].shape[2] for part in parts) + (0 if new is None else length)
    if prefix is not None:
        seen += prefix.pairs.keys.shape[1]
    at_once = max(_SCORES // (batch * heads * seen), 1)
    if length <= at_once:
        return read(queries, jnp.arange(length))
    chunks = -(-length // at_once)
    # Chunks of nearly one length: little padding.
    chunk = -(-length // chunks)
    padded = jnp.pad(queries, ((0, 0), (0, chunks * chunk - length), (0, 0), (0, 0)))

    def read_chunk(number: Int[Array, ""]) -> Array:
        start = number * chunk
        part = jax.lax.dynamic_slice_in_dim(padded, start, chunk, axis=1)
        return read(part, start + jnp.arange(chunk))

    outputs = jnp.moveaxis(jax.lax.map(read_chunk, jnp.arange(chunks)), 0, 1)
    return outputs.reshape(batch, chunks * chunk, heads, -1)[:, :length]


def _nothing_where_empty(state: PartialAttention, part: Part) -> PartialAttention:
    """The state of a part that is nothing in heads without a pair, whatever their slots hold."""
    empty = jnp.all(jnp.isneginf(part[2]), axis=-1)[..., None]
    return PartialAttention(
        jnp.where(empty, -jnp.inf, state.maximum),
        jnp.where(empty, 0, state.total),
        jnp.where(empty[..., None], 0, state.output),
    )
