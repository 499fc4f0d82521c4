"""Causal attention of grouped query heads, made of the library's partial attentions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax._src.attention import finish, merge, partial_attention

Held = tuple[Array, Array, Array]
"""Pairs held from before: keys and values `[batch, kv_heads, pairs, width]` and log-weights
`[batch, kv_heads, pairs]`, of which the heads may be one for all."""


def by_head(array: Float[Array, "batch length heads width"]) -> Float[Array, "b heads length w"]:
    """Swap the axes of positions and heads, either way."""
    return array.transpose(0, 2, 1, 3)


def attend(
    queries: Float[Array, "batch length query_heads head_dim"],
    keys: Float[Array, "batch kv_heads n head_dim"],
    values: Float[Array, "batch kv_heads n value_dim"],
    held: Sequence[Held] = (),
) -> Float[Array, "batch length query_heads value_dim"]:
    """Attend to a text causally, and to all pairs held from before it.

    Args:
      queries: after RoPE, those of the last `length` of `n` tokens; query head `h` reads key-value
        head `h // (query_heads // kv_heads)`.
      keys: after RoPE; a token sees those up to its own.
      values: any scale.
      held: pairs that every query sees.

    Returns:
      Attention outputs, float32, with scale `1 / sqrt(head_dim)`.
    """
    batch, length, query_heads, head_dim = queries.shape
    kv_heads, count = keys.shape[1:3]
    group = query_heads // kv_heads
    # Query heads of a group share their keys: as rows of one matrix they make one larger product.
    rows = by_head(queries).reshape(batch, kv_heads, group * length, head_dim)
    visible = jnp.arange(count) <= jnp.arange(count - length, count)[:, None]
    state = partial_attention(rows, keys, values, visible=jnp.tile(visible, (group, 1)))
    for pairs in held:
        state = merge(state, partial_attention(rows, *pairs))
    return by_head(finish(state).reshape(batch, query_heads, length, -1))


def causal_attention(
    queries: Float[Array, "batch length query_heads head_dim"],
    keys: Float[Array, "batch length kv_heads head_dim"],
    values: Float[Array, "batch length kv_heads head_dim"],
) -> Float[Array, "batch length query_heads head_dim"]:
    """Attend to the past, a chunk of queries after another; see `attend`.

    A chunk reads only the keys up to its own end: half of the score matrix is never computed, and
    no more than `max(128, length / 16)` rows of it are held at a time.
    """
    length = queries.shape[1]
    keys, values = by_head(keys), by_head(values)
    chunk = max(128, -(-length // 16))
    # Gradients compute the scores again: those of a long sequence would not fit.
    read = jax.checkpoint(attend)
    ends = [(start, min(start + chunk, length)) for start in range(0, length, chunk)]
    outputs = [
        read(queries[:, start:end], keys[:, :, :end], values[:, :, :end]) for start, end in ends
    ]
    return jnp.concatenate(outputs, axis=1)
