"""Decoding with the language model over full caches, prompts' coresets and the library's caches."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

import coreset_jax as cj
from coreset_jax import baselines
from coreset_jax.nn import CacheConfig, CoresetCache
from experiments.common.methods import METHODS
from experiments.model import lm, reading
from experiments.model.attention import Held, attend, by_head
from experiments.model.llama import Llama, LlamaConfig
from experiments.model.text import BOUNDARY

Queries = Float[Array, "batch length heads head_dim"]
NewPairs = Float[Array, "batch length kv_heads head_dim"]


class FullCache(NamedTuple):
    """A cache that keeps everything, as large as the longest sequence.

    Attributes:
      keys: `[batch, kv_heads, slots, head_dim]`.
      values: likewise.
      lengths: pairs that have come `[batch]`.
    """

    keys: Float[Array, "batch kv_heads slots head_dim"]
    values: Float[Array, "batch kv_heads slots head_dim"]
    lengths: Int[Array, " batch"]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in self)

    @property
    def held(self) -> Held:
        """The pairs that have come, with log-weight 0, and empty slots with minus infinity."""
        filled = jnp.arange(self.keys.shape[2]) < self.lengths[:, None, None]
        return self.keys, self.values, jnp.where(filled, 0.0, -jnp.inf)

    def attend(self, queries: Queries, keys: NewPairs, values: NewPairs) -> Queries:
        """Attend to the cache and, causally, to the new pairs."""
        return attend(queries, by_head(keys), by_head(values), [self.held])

    def append(self, keys: NewPairs, values: NewPairs) -> FullCache:
        """Write the new pairs behind the others."""
        write = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
        return FullCache(
            write(self.keys, by_head(keys), self.lengths),
            write(self.values, by_head(values), self.lengths),
            self.lengths + keys.shape[1],
        )


class CoresetPrompt(NamedTuple):
    """A prompt's coreset, and behind it every pair that comes, exactly.

    Attributes:
      coreset: any compressor's, with leading axes `[batch, kv_heads]`.
      recent: the pairs behind the prompt.
      lengths: pairs that have come, those of the prompt included `[batch]`.
    """

    coreset: cj.Coreset | baselines.SignedCoreset
    recent: FullCache
    lengths: Int[Array, " batch"]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def attend(self, queries: Queries, keys: NewPairs, values: NewPairs) -> Queries:
        """Attend to the coreset, to the pairs behind it and, causally, to the new ones."""
        keys, values = by_head(keys), by_head(values)
        parts: list[Held] = [self.coreset[:3], self.recent.held]
        if not isinstance(self.coreset, baselines.SignedCoreset):
            return attend(queries, keys, values, parts)
        # One more column of values gives the denominator, to which exact pairs add ones.
        (kept, kept_values, log_weights), (late, late_values, filled) = parts
        parts = [
            (kept, _with_column(kept_values, self.coreset.normalizers), log_weights),
            (late, _with_column(late_values, 1.0), filled),
        ]
        outputs = attend(queries, keys, _with_column(values, 1.0), parts)
        return outputs[..., :-1] / outputs[..., -1:]

    def append(self, keys: NewPairs, values: NewPairs) -> CoresetPrompt:
        """Write the new pairs behind the others."""
        return CoresetPrompt(
            self.coreset, self.recent.append(keys, values), self.lengths + keys.shape[1]
        )


def _with_column(values: Array, column: Array | float) -> Array:
    added = jnp.broadcast_to(column, values.shape[:-1])[..., None]
    return jnp.concatenate([values, added], axis=-1)


Cache = FullCache | CoresetPrompt | CoresetCache


class Prompt(NamedTuple):
    """What a model holds after reading a batch of texts.

    Attributes:
      tokens: the bytes `[batch, length]`.
      keys: after RoPE `[layers, batch, length, kv_heads, head_dim]`.
      values: likewise.
    """

    tokens: np.ndarray
    keys: Float[Array, "layers batch length kv_heads head_dim"]
    values: Float[Array, "layers batch length kv_heads head_dim"]


def read_prompt(model: lm.Model, tokens: np.ndarray) -> Prompt:
    """Let the model read texts exactly, one after another: `tokens [batch, length]`."""
    if isinstance(model, Llama):
        traces: list[reading.Pairs | lm.Trace] = [reading.read(model, row).pairs for row in tokens]
    else:
        traces = [lm.caches(model, row) for row in tokens]
    keys, values = (
        jnp.stack([getattr(trace, name).transpose(0, 2, 1, 3) for trace in traces], axis=1)
        for name in ("keys", "values")
    )
    return Prompt(tokens, keys, values)


def prefilled(prompt: Prompt, config: CacheConfig | None, room: int) -> list[Cache]:
    """Caches of all layers that hold a prompt, or are empty if it has no bytes.

    Args:
      prompt: what was read.
      config: of the caches; `None` for full ones.
      room: bytes to come, for full caches.
    """
    if config is None:
        length = prompt.tokens.shape[1]
        pad = ((0, 0), (0, 0), (0, room), (0, 0))
        lengths = jnp.full(prompt.tokens.shape[0], length, jnp.int32)
        return [
            FullCache(jnp.pad(by_head(keys), pad), jnp.pad(by_head(values), pad), lengths)
            for keys, values in zip(prompt.keys, prompt.values, strict=True)
        ]
    return [
        _prefill(config, keys, values)
        for keys, values in zip(prompt.keys, prompt.values, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _prefill(config: CacheConfig, keys: Array, values: Array) -> CoresetCache:
    return CoresetCache.init(config, jax.random.key(0), keys, values).prefill(keys, values)


def behind_coresets(coresets: cj.Coreset, prompt_length: int, room: int) -> list[Cache]:
    """Caches of all layers that hold the coreset of a prompt and nothing else of it.

    Args:
      coresets: leading axes `[layers, batch, kv_heads]`.
      prompt_length: pairs of the prompt.
      room: bytes to come.
    """
    layers, batch, kv_heads = coresets.keys.shape[:3]

    def slots(like: Array) -> Array:
        return jnp.zeros((batch, kv_heads, room, like.shape[-1]), like.dtype)

    recent = FullCache(slots(coresets.keys), slots(coresets.values), jnp.zeros(batch, jnp.int32))
    lengths = jnp.full(batch, prompt_length, jnp.int32)
    return [
        CoresetPrompt(jax.tree.map(operator.itemgetter(layer), coresets), recent, lengths)
        for layer in range(layers)
    ]


def empty(
    model_config: lm.ModelConfig | LlamaConfig, batch: int, config: CacheConfig | None, room: int
) -> list[Cache]:
    """Caches of all layers before the first byte; arguments as for `prefilled`."""
    like = jnp.zeros((batch, 1, model_config.num_kv_heads, model_config.head_dim))
    if config is None:
        slots = jnp.zeros((batch, model_config.num_kv_heads, room, model_config.head_dim))
        cache: Cache = FullCache(slots, slots, jnp.zeros(batch, jnp.int32))
    else:
        cache = CoresetCache.init(config, jax.random.key(0), like, like)
    return [cache] * model_config.num_layers


@nnx.jit
def _embed(
    model: lm.Model,
    lengths: Int[Array, " batch"],
    tokens: Int[Array, "batch length"],
    previous: Int[Array, "batch 2"] | None,
) -> tuple[Array, Array]:
    return model.embed(tokens, lengths[:, None] + jnp.arange(tokens.shape[1]), previous)


def read_block(block: Any, cache: Any, x: Array, positions: Array) -> tuple[Array, Any]:
    """Read tokens with one block: the residual stream behind it, and its cache behind them."""
    queries, keys, values = block.attention.project(block.attention_norm(x), positions)
    x = x + block.attention.merge(cache.attend(queries, keys, values)).astype(x.dtype)
    return x + block.mlp(block.mlp_norm(x)), cache.append(keys, values)


_read = nnx.jit(read_block)


@nnx.jit
def _logits(model: lm.Model, x: Array) -> Array:
    return model.logits(x)


def step(
    model: lm.Model,
    caches: list[Any],
    tokens: Int[Array, "batch length"],
    previous: Int[Array, "batch 2"] | None = None,
) -> tuple[Float[Array, "batch length vocabulary"], list[Any]]:
    """Read some bytes behind what the caches hold.

    Layers are compiled apart, and so only once for all of them.

    Args:
      model: the model.
      caches: one a layer.
      tokens: the bytes, or the tokens of a model that reads tokens.
      previous: the two bytes before them; `BOUNDARY` by default, and of no use to tokens.

    Returns:
      The logits of the byte after each, and the caches behind them.
    """
    x, positions = _embed(model, caches[0].lengths, tokens, previous)
    extended = []
    for block, cache in zip(model.blocks, caches, strict=True):
        x, cache = _read(block, cache, x, positions)
        extended.append(cache)
    return _logits(model, x), extended


# The same in one program: slower to compile, and as fast as it gets.
fused_step = nnx.jit(step)


def predictions(
    model: lm.Model,
    caches: list[Cache],
    tokens: np.ndarray,
    previous: np.ndarray | None = None,
    piece: int = 64,
) -> Iterator[tuple[Float[Array, "batch part vocabulary"], np.ndarray]]:
    """What the model expects of every byte but the first behind the caches, a piece at a time.

    Args:
      model: the model.
      caches: one a layer.
      tokens: bytes `[batch, length]`.
      previous: the two bytes before them `[batch, 2]`; `BOUNDARY` by default.
      piece: bytes that are read at a time: they attend to each other exactly.

    Yields:
      Natural logarithms of the probabilities of some bytes, and these bytes behind the one before
      them `[batch, part + 1]`.
    """
    if previous is None:
        previous = np.full((tokens.shape[0], 2), BOUNDARY)
    context = np.concatenate([previous, tokens], axis=1).astype(np.int32)
    for start in range(0, tokens.shape[1] - 1, piece):
        stop = min(start + piece, tokens.shape[1] - 1)
        part = jnp.asarray(context[:, start + 2 : stop + 2])
        logits, caches = step(model, caches, part, jnp.asarray(context[:, start : start + 2]))
        yield jax.nn.log_softmax(logits), context[:, start + 2 : stop + 3]


def costs(
    model: lm.Model,
    caches: list[Cache],
    tokens: np.ndarray,
    previous: np.ndarray | None = None,
    piece: int = 64,
) -> Float[np.ndarray, "batch length-1"]:
    """What every byte but the first costs behind the caches, in bits; see `predictions`."""
    found = [lm.costs_of(*each) for each in predictions(model, caches, tokens, previous, piece)]
    return np.concatenate(found, axis=1)


def cache_config(method: str, size: int, share: float, block_size: int) -> CacheConfig | None:
    """The cache of a method: `exact` keeps everything, `window` sinks and the newest pairs.

    Args:
      method: a name in `experiments.common.methods`; `fitted` is the cache's default.
      size: pairs that each head keeps.
      share: how many of them are recent ones, where there is a middle.
      block_size: see `coreset_jax.nn.CacheConfig`.
    """
    sinks = 4
    if method == "exact":
        return None
    if method == "window":
        return CacheConfig(size, sinks, size - sinks - block_size, block_size)
    window = max(int(share * size) - block_size, 0)
    compressor = None if method == "fitted" else METHODS[method].compressor()
    return CacheConfig(size, sinks, window, block_size, compressor=compressor)
