"""Long texts read by a model a chunk at a time: keys, values and queries of all layers.

One program serves all layers and chunks: a chunk attends to itself causally, and to the filled
part of a buffer of pairs that are there already. Nothing behind a chunk is computed and masked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from coreset_jax._src.attention import finish, merge, partial_attention
from experiments.model import lm
from experiments.model.attention import by_head
from experiments.model.decoder import checked
from experiments.model.llama import Llama, check_length
from experiments.model.text import BOUNDARY

# Buffers have a power of two of chunks, this many at least: few sizes make few programs.
_FEWEST_CHUNKS = 4


class Pairs(NamedTuple):
    """What all layers hold after reading a text, float32.

    Attributes:
      keys: after RoPE, `[layers, kv_heads, length, head_dim]`.
      values: `[layers, kv_heads, length, head_dim]`.
    """

    keys: Float[Array, "layers kv_heads length head_dim"]
    values: Float[Array, "layers kv_heads length head_dim"]


class Chunk(NamedTuple):
    """What one layer asked and held in one chunk of a text, float32.

    Attributes:
      layer: the layer.
      start: the first token of the chunk, counted in the text that is read.
      queries: after RoPE, `[query_heads, length, head_dim]`; query head `h` reads key-value head
        `h // (query_heads // kv_heads)`, and scores are scaled by `1 / sqrt(head_dim)`.
      keys: after RoPE, `[kv_heads, length, head_dim]`.
      values: `[kv_heads, length, head_dim]`.
    """

    layer: int
    start: int
    queries: Float[Array, "query_heads length head_dim"]
    keys: Float[Array, "kv_heads length head_dim"]
    values: Float[Array, "kv_heads length head_dim"]


class Reading(NamedTuple):
    """What a model has after reading a text.

    Attributes:
      pairs: keys and values of all layers.
      residual: behind the last block `[length, embed_dim]`; `model.logits(residual[None, i:j])`
        are the logits of the tokens after `i .. j - 1`.
    """

    pairs: Pairs
    residual: Float[Array, "length embed_dim"]


def read(
    model: lm.Model,
    tokens: Any,
    *,
    chunk: int = 512,
    consumer: Callable[[Chunk], None] | None = None,
    behind: Pairs | None = None,
    start: int | None = None,
) -> Reading:
    """Read a text, a layer after another and in it a chunk after another.

    Args:
      model: the model.
      tokens: `[length]`, integers.
      chunk: tokens that are read at once; each chunk is padded to it. The length of the model's
        context where that is less.
      consumer: is called with every chunk of every layer, for their queries.
      behind: pairs from before, which every token attends to. They may have been anywhere.
      start: position of the first token; by default, how many pairs `behind` holds.

    Returns:
      The pairs of these tokens, without those from before, and the last residual stream.

    Raises:
      ValueError: `tokens` is not of integers, of another rank or empty; `behind` does not fit the
        model; or positions do not fit the model's context.
    """
    tokens = np.asarray(checked(np.asarray(tokens), ranks=(1,)))
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    held = _held(model, behind)
    start = held if start is None else start
    if start < 0:
        raise ValueError(f"start must not be negative, got {start}")
    if isinstance(model, Llama):
        check_length(model.config, start + tokens.size)
        chunk = min(chunk, model.config.context_length)
        if tokens.min() < 0 or tokens.max() >= model.config.vocabulary:
            raise ValueError(
                f"tokens must be at least 0 and below {model.config.vocabulary}, got "
                f"{tokens.min()} to {tokens.max()}"
            )
    count = -(-tokens.size // chunk)
    capacity = _FEWEST_CHUNKS * chunk
    while capacity < held + count * chunk:
        capacity *= 2

    streams = _embedded(model, tokens, start, chunk)
    layers = []
    for layer, block in enumerate(model.blocks):
        buffers = _buffers(model, behind, layer, capacity)
        for place, (x, positions) in enumerate(streams):
            filled = jnp.int32(held + place * chunk)
            x, queries, buffers = _read(block, x, positions, buffers, filled)
            streams[place] = x, positions
            if consumer is not None:
                consumer(_chunk(layer, place * chunk, queries, buffers, held, tokens.size))
        layers.append([_part(each, held, held + tokens.size) for each in buffers])
    keys, values = (jnp.stack(each) for each in zip(*layers, strict=True))
    residual = jnp.concatenate([x[0] for x, _ in streams])[: tokens.size]
    return Reading(Pairs(keys, values), residual)


def trace(model: lm.Model, tokens: Any, *, chunk: int = 512) -> lm.Trace:
    """Read a text and keep all queries: `lm.caches` for long texts and many layers.

    Args:
      model: the model.
      tokens: `[length]`, integers.
      chunk: tokens that are read at once.

    Raises:
      ValueError: see `read`.
    """
    queries: list[list[Array]] = [[] for _ in model.blocks]
    found = read(
        model, tokens, chunk=chunk, consumer=lambda each: queries[each.layer].append(each.queries)
    )
    asked = jnp.stack([jnp.concatenate(each, axis=1) for each in queries])
    return lm.Trace(keys=found.pairs.keys, values=found.pairs.values, queries=asked)


def _held(model: lm.Model, behind: Pairs | None) -> int:
    """How many pairs every head holds from before."""
    if behind is None:
        return 0
    layers, heads, held, width = behind.keys.shape
    expected = (len(model.blocks), *_heads(model))
    if (layers, heads, width) != expected or behind.keys.shape != behind.values.shape:
        raise ValueError(
            "behind must be [layers, kv_heads, pairs, head_dim], with "
            f"layers, kv_heads and head_dim {expected} for this model; got keys "
            f"{behind.keys.shape} and values {behind.values.shape}"
        )
    return held


def _heads(model: lm.Model) -> tuple[int, int]:
    attention = model.blocks[0].attention
    return attention.num_kv_heads, attention.head_dim


def _embedded(
    model: lm.Model, tokens: Int[np.ndarray, " length"], start: int, chunk: int
) -> list[tuple[Array, Array]]:
    """The first residual stream and the positions of every chunk, padded to its length."""
    count = -(-tokens.size // chunk)
    padded = np.full(2 + count * chunk, BOUNDARY, np.int32)
    padded[2 : 2 + tokens.size] = tokens
    found = []
    for first in range(0, count * chunk, chunk):
        positions = start + first + np.arange(chunk, dtype=np.int32)[None]
        previous, part = np.split(padded[None, first : first + 2 + chunk], [2], axis=1)
        found.append(_embed(model, *map(jnp.asarray, (part, positions, previous))))
    return found


@nnx.jit
def _embed(
    model: Any, tokens: Array, positions: Array, previous: Array
) -> tuple[Float[Array, "1 length embed_dim"], Int[Array, "1 length"]]:
    return model.embed(tokens, positions, previous)


def _buffers(
    model: lm.Model, behind: Pairs | None, layer: int, capacity: int
) -> tuple[Array, Array]:
    """Room for the keys and values of a layer `[kv_heads, capacity, head_dim]`."""
    if behind is None:
        heads, width = _heads(model)
        return jnp.zeros((heads, capacity, width)), jnp.zeros((heads, capacity, width))
    pad = ((0, 0), (0, capacity - behind.keys.shape[2]), (0, 0))
    return (
        jnp.pad(behind.keys[layer].astype(jnp.float32), pad),
        jnp.pad(behind.values[layer].astype(jnp.float32), pad),
    )


@nnx.jit
def _read(
    block: Any,
    x: Float[Array, "1 length embed_dim"],
    positions: Int[Array, "1 length"],
    buffers: tuple[Array, Array],
    filled: Int[Array, ""],
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Read a chunk with one block; returns the stream, the queries by head, and fuller buffers."""
    queries, keys, values = block.attention.project(block.attention_norm(x), positions)
    queries, keys, values = (by_head(each)[0] for each in (queries, keys, values))
    outputs = _attend(queries, keys, values, buffers, filled)
    x = x + block.attention.merge(by_head(outputs[None]))
    x = x + block.mlp(block.mlp_norm(x))
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    keys, values = (
        write(buffer, new, filled) for buffer, new in zip(buffers, (keys, values), strict=True)
    )
    return x, queries, (keys, values)


def _attend(
    queries: Float[Array, "query_heads length head_dim"],
    keys: Float[Array, "kv_heads length head_dim"],
    values: Float[Array, "kv_heads length head_dim"],
    buffers: tuple[Array, Array],
    filled: Int[Array, ""],
) -> Float[Array, "query_heads length head_dim"]:
    """Attend to the chunk causally, and to as many blocks of the buffers as are filled."""
    heads, length, width = keys.shape
    group = queries.shape[0] // heads
    # Query heads of a group share their keys: as rows of one matrix they make one larger product.
    rows = queries.reshape(heads, group * length, width)
    visible = jnp.tile(jnp.tri(length, dtype=bool), (group, 1))
    state = partial_attention(rows, keys, values, visible=visible)

    def more(block: Array, state: Any) -> Any:
        kept, theirs = (
            jax.lax.dynamic_slice_in_dim(each, block * length, length, 1) for each in buffers
        )
        inside = block * length + jnp.arange(length) < filled
        log_weights = jnp.where(inside, 0.0, -jnp.inf)[None]
        return merge(state, partial_attention(rows, kept, theirs, log_weights))

    state = jax.lax.fori_loop(0, (filled + length - 1) // length, more, state)
    return finish(state).reshape(queries.shape)


def _chunk(
    layer: int,
    start: int,
    queries: Array,
    buffers: tuple[Array, Array],
    held: int,
    count: int,
) -> Chunk:
    """A chunk without its padding."""
    length = min(queries.shape[1], count - start)
    keys, values = (_part(each, held + start, held + start + length) for each in buffers)
    return Chunk(layer, start, queries[:, :length], keys, values)


def _part(buffer: Array, start: int, stop: int) -> Array:
    return jax.lax.slice_in_dim(buffer, start, stop, axis=1)
