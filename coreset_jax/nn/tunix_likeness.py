"""Whether wrapped attentions compute what the attentions of google-tunix models do.

Their parts are known by their names only; what is done with them may differ between versions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool

from coreset_jax._src import checks
from coreset_jax._src.attention import attention as softmax_attention
from coreset_jax.nn.grouped import by_head
from coreset_jax.nn.tunix_caches import LayerCache, LayerShape
from coreset_jax.nn.tunix_parts import project, takes

# Scores of trained layers reach some tens: the largest one, and that of many pairs below it. No
# rounding to bfloat16 lets those count, but any cap does that is near or below them.
_LARGE, _BELOW, _PAIRS_BELOW = 60.0, 52.0, 64

# A difference that counts, as a share of the largest output. At large scores rounding counts.
_TOLERANCE, _TOLERANCE_OF_LARGE = 0.05, 0.1


def check_likeness(attention: Any, wrapped: Any) -> None:
    """Raises ``ValueError`` unless both compute the same keys, values and outputs of tokens.

    Parameters that are abstract are not looked at.
    """
    leaves = jax.tree.leaves(nnx.state(attention))
    if not all(isinstance(leaf, jax.Array) and not checks.is_traced(leaf) for leaf in leaves):
        return
    # On accelerators, float32 products may be rounded to bfloat16.
    tolerance = max(_TOLERANCE, 16 * float(jnp.finfo(LayerShape.of(wrapped).dtype).eps))
    pairs = _few_tokens(attention, wrapped)
    if not _alike(pairs, tolerance):
        raise ValueError(
            f"attention {type(attention).__name__} does more than the wrapper knows of."
        )
    if not _alike([_large_scores(attention, wrapped)], _TOLERANCE_OF_LARGE):
        raise ValueError(
            f"attention {type(attention).__name__} does more with large scores than the wrapper "
            "knows of, such as capping them."
        )


def _alike(pairs: list[tuple[Array, Array]], tolerance: float) -> bool:
    """Whether the first array of each pair is nearly the second."""
    for one, other in pairs:
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        if float(jnp.max(jnp.abs(one - other))) > tolerance * float(jnp.max(jnp.abs(other))):
            return False
    return True


def _few_tokens(attention: Any, wrapped: Any) -> list[tuple[Array, Array]]:
    """Keys, values and the last output of three tokens, by the wrapped attention and the other."""
    count, positions = 3, jnp.array([[0, 7, 1000]])
    inputs, cache = _inputs(wrapped, count), _empty(wrapped, count)
    queries, keys, values = project(wrapped, inputs, *_places(wrapped, positions))
    # One at a time: whole prompts may take a kernel that is not for this platform.
    for i in range(count):
        visible = (jnp.arange(count) <= i)[None, None]
        one = inputs[:, i : i + 1], positions[:, i : i + 1]
        cache, expected = _call(attention, *one, cache, visible)
    found = _outputs(wrapped, queries[:, -1:], keys, values)
    return [(keys, cache["k"]), (values, cache["v"]), (found, expected)]


def _large_scores(attention: Any, wrapped: Any) -> tuple[Array, Array]:
    """Outputs for keys of large scores, by the wrapped attention and the other.

    The keys are made for the first query head of each group.
    """
    inputs, positions, count = _inputs(wrapped, 1), jnp.array([[7]]), 1 + _PAIRS_BELOW
    queries = project(wrapped, inputs, *_places(wrapped, positions))[0]
    cache = _empty(wrapped, count + 1)
    _, _, kv_heads, width = cache["k"].shape
    first = queries[0, 0].reshape(kv_heads, -1, width)[:, 0].astype(jnp.float32)
    norms = jnp.maximum(jnp.sum(first**2, axis=-1, keepdims=True), 1e-30)
    scores = jnp.where(jnp.arange(count) == 0, _LARGE, _BELOW)[:, None, None]
    keys = scores * (first / (norms * wrapped.coreset_config.scale))[None]
    value = jax.random.normal(jax.random.key(1), (kv_heads, width))
    values = jnp.where(jnp.arange(count) == 0, 1.0, -1.0)[:, None, None] * value[None]
    keys, values = (array[None].astype(cache["k"].dtype) for array in (keys, values))
    filled = {
        name: cache[name].at[:, :count].set(array)
        for name, array in zip("kv", (keys, values), strict=True)
    }
    cache = cache | filled | {"end_index": cache["end_index"] + count}
    # The token's own pair is hidden, whose score may be any.
    visible = (jnp.arange(count + 1) < count)[None, None]
    _, expected = _call(attention, inputs, positions, cache, visible)
    return _outputs(wrapped, queries, keys, values), expected


def _inputs(wrapped: Any, count: int) -> Array:
    """Some tokens ``[1, count, features]``."""
    features = getattr(wrapped, wrapped.coreset_parts.output).shape[-1]
    inputs = jax.random.normal(jax.random.key(0), (1, count, features))
    return inputs.astype(LayerShape.of(wrapped).dtype)


def _empty(wrapped: Any, slots: int) -> LayerCache:
    """A cache for the attention as it was."""
    shape = dataclasses.replace(LayerShape.of(wrapped), config=None)
    return shape.empty(1, slots, None, None)


def _places(attention: Any, positions: Array) -> tuple[Array, ...]:
    """What an attention is told of positions; angles may be any, if both have the same."""
    if not takes(attention, "sin"):
        return (positions,)
    half = attention.head_dim // 2
    angles = positions[..., None] * 0.1 ** (4 * jnp.arange(half) / half)
    dtype = LayerShape.of(attention).dtype
    return jnp.sin(angles).astype(dtype), jnp.cos(angles).astype(dtype)


def _call(
    attention: Any,
    inputs: Array,
    positions: Array,
    cache: LayerCache,
    visible: Bool[Array, "1 tokens slots"],
) -> tuple[LayerCache, Array]:
    """The cache and the outputs of an attention as it was."""
    places = _places(attention, positions)
    if takes(attention, "sin"):
        returned = attention(inputs, cache, visible, *places)
    else:
        returned = attention(inputs, *places, cache, visible)
    return returned[0], returned[1]


def _outputs(wrapped: Any, queries: Array, keys: Array, values: Array) -> Array:
    """What the wrapper makes of queries that see all of some pairs."""
    group, config = queries.shape[2] // keys.shape[2], wrapped.coreset_config
    rows = [by_head(jnp.repeat(array, group, axis=2)) for array in (keys, values)]
    found = softmax_attention(by_head(queries), *rows, scale=config.scale, soft_cap=config.soft_cap)
    return getattr(wrapped, wrapped.coreset_parts.output)(by_head(found).astype(queries.dtype))
