"""The decoder behind `experiments.model.lm`: a plain one in the style of Qwen3, over bytes.

Pre-norm RMSNorm, QK-norm, rotary positions, grouped-query attention, a squared-ReLU MLP. Hashed
embeddings of the last two and three bytes stand beside the byte embedding: they do for a byte model
what a tokenizer does for others, and the blocks know nothing of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from coreset_jax._src.geometry.rotary import turned
from experiments.model import text
from experiments.model.attention import causal_attention

VOCABULARY = 256

DotGeneral = Callable[..., Array]
Residual = Float[Array, "batch length embed_dim"]
Positions = Int[Array, "#batch length"]
Queries = Float[Array, "batch length query_heads head_dim"]
Pairs = Float[Array, "batch length kv_heads head_dim"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the model.

    Attributes:
      num_layers: decoder blocks.
      embed_dim: width of the residual stream.
      num_query_heads: query heads a layer, a multiple of `num_kv_heads`.
      num_kv_heads: key and value heads a layer.
      head_dim: width of a head, even.
      mlp_dim: hidden width of the MLP.
      bigram_buckets: rows of the hashed table of byte pairs, a power of two.
      trigram_buckets: rows of the hashed table of byte triples, a power of two.
      ngram_dim: width of both tables.
      rope_base: base of the rotary frequencies.
    """

    num_layers: int = 4
    embed_dim: int = 256
    num_query_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    mlp_dim: int = 512
    bigram_buckets: int = 8192
    trigram_buckets: int = 16384
    ngram_dim: int = 64
    rope_base: float = 100_000.0

    def __post_init__(self) -> None:
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                "num_query_heads must be a multiple of num_kv_heads, got "
                f"{self.num_query_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        for name in ("bigram_buckets", "trigram_buckets"):
            buckets = getattr(self, name)
            if buckets < 2 or buckets & (buckets - 1):
                raise ValueError(f"{name} must be a power of two, got {buckets}")


def rope(
    x: Float[Array, "batch length heads head_dim"], positions: Positions, base: float
) -> Float[Array, "batch length heads head_dim"]:
    """Rotate queries or keys by their positions (Su et al., RoFormer, 2021).

    Args:
      x: queries or keys; feature `i` is paired with feature `i + head_dim / 2`, as in Llama.
      positions: absolute position of every token.
      base: base of the geometric progression of frequencies.

    Returns:
      The rotated `x`, float32. Norms are kept; inner products depend on distances alone.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return turned(x.astype(jnp.float32), angles)


class Attention(nnx.Module):
    """Grouped-query causal self-attention with rotary positions."""

    def __init__(
        self, config: ModelConfig, *, dot_general: DotGeneral = jax.lax.dot_general, rngs: nnx.Rngs
    ) -> None:
        self.num_query_heads = config.num_query_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.rope_base = config.rope_base
        linear = functools.partial(nnx.Linear, use_bias=False, dot_general=dot_general, rngs=rngs)
        query_dim = config.num_query_heads * config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.query = linear(config.embed_dim, query_dim)
        self.key = linear(config.embed_dim, kv_dim)
        self.value = linear(config.embed_dim, kv_dim)
        # Queries and keys of fixed length (as in Qwen3 and Gemma 3, without their gains) bound the
        # logits by `sqrt(head_dim)`: the small model cannot grow arbitrarily sharp heads.
        norm = functools.partial(nnx.RMSNorm, config.head_dim, use_scale=False, rngs=rngs)
        self.query_norm, self.key_norm = norm(), norm()
        # Zero: every block starts as the identity.
        self.out = linear(query_dim, config.embed_dim, kernel_init=nnx.initializers.zeros)

    def project(self, x: Residual, positions: Positions) -> tuple[Queries, Pairs, Pairs]:
        """Return queries and keys, both after RoPE, and values, all float32."""
        lead = x.shape[:-1]
        queries = self.query(x).reshape(*lead, self.num_query_heads, self.head_dim)
        keys = self.key(x).reshape(*lead, self.num_kv_heads, self.head_dim)
        values = self.value(x).reshape(*lead, self.num_kv_heads, self.head_dim)
        return (
            rope(self.query_norm(queries), positions, self.rope_base),
            rope(self.key_norm(keys), positions, self.rope_base),
            values.astype(jnp.float32),
        )

    def merge(self, heads: Queries) -> Residual:
        """Mix the outputs of all heads back into the residual stream."""
        return self.out(heads.reshape(*heads.shape[:-2], -1))

    def __call__(self, x: Residual, positions: Positions) -> Residual:
        """Project, attend to the past, merge."""
        return self.merge(causal_attention(*self.project(x, positions)))


class MLP(nnx.Module):
    """Two matrices around a squared ReLU (So et al., Primer, 2021)."""

    def __init__(
        self, config: ModelConfig, *, dot_general: DotGeneral = jax.lax.dot_general, rngs: nnx.Rngs
    ) -> None:
        linear = functools.partial(nnx.Linear, use_bias=False, dot_general=dot_general, rngs=rngs)
        self.up = linear(config.embed_dim, config.mlp_dim)
        self.down = linear(config.mlp_dim, config.embed_dim, kernel_init=nnx.initializers.zeros)

    def __call__(self, x: Float[Array, "*lead embed_dim"]) -> Float[Array, "*lead embed_dim"]:
        """Apply to the last axis."""
        return self.down(jnp.square(jax.nn.relu(self.up(x))))


class Block(nnx.Module):
    """Pre-norm attention, then pre-norm MLP, each added to the residual stream."""

    def __init__(
        self, config: ModelConfig, *, dot_general: DotGeneral = jax.lax.dot_general, rngs: nnx.Rngs
    ) -> None:
        self.attention_norm = nnx.RMSNorm(config.embed_dim, rngs=rngs)
        self.attention = Attention(config, dot_general=dot_general, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.embed_dim, rngs=rngs)
        self.mlp = MLP(config, dot_general=dot_general, rngs=rngs)

    def __call__(self, x: Residual, positions: Positions) -> Residual:
        """Return the residual stream behind the block."""
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.mlp(self.mlp_norm(x))


class Embedding(nnx.Module):
    """A byte's own embedding plus hashed embeddings of the pair and the triple that it ends."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        table = functools.partial(
            nnx.Embed, embedding_init=nnx.initializers.normal(stddev=0.3), rngs=rngs
        )
        self.bigram_buckets = config.bigram_buckets
        self.trigram_buckets = config.trigram_buckets
        self.byte = table(VOCABULARY, config.embed_dim)
        self.bigram = table(config.bigram_buckets, config.ngram_dim)
        self.trigram = table(config.trigram_buckets, config.ngram_dim)
        self.ngram_out = nnx.Linear(
            2 * config.ngram_dim, config.embed_dim, use_bias=False, rngs=rngs
        )

    def __call__(
        self, tokens: Int[Array, "batch length"], previous: Int[Array, "batch 2"]
    ) -> Residual:
        """Embed `tokens`, given the two bytes before them."""
        context = jnp.concatenate([previous, tokens], axis=1).astype(jnp.uint32)
        last, second, third = context[:, 2:], context[:, 1:-1], context[:, :-2]
        pairs = second * 256 + last
        bigram = self.bigram(_hash(pairs, self.bigram_buckets))
        trigram = self.trigram(_hash(third * 65536 + pairs, self.trigram_buckets))
        return self.byte(tokens) + self.ngram_out(jnp.concatenate([bigram, trigram], axis=-1))


def _hash(codes: Array, buckets: int) -> Array:
    # Knuth's multiplicative hash: the top bits of the product are the well-mixed ones.
    return ((codes * jnp.uint32(0x9E3779B1)) >> (33 - buckets.bit_length())).astype(jnp.int32)


class Decoder(nnx.Module):
    """The language model: bytes in, logits of the next byte out."""

    def __init__(
        self, config: ModelConfig, *, dot_general: DotGeneral = jax.lax.dot_general, rngs: nnx.Rngs
    ) -> None:
        """Initialize.

        Args:
          config: the shape.
          dot_general: the matrix product of the linear layers inside the blocks, as in
            `nnx.Linear`; float32 by default.
          rngs: an nnx random stream named `params`.
        """
        self.embedding = Embedding(config, rngs=rngs)
        self.blocks = nnx.List(
            [Block(config, dot_general=dot_general, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.final_norm = nnx.RMSNorm(config.embed_dim, rngs=rngs)
        self.head = nnx.Linear(
            config.embed_dim,
            VOCABULARY,
            use_bias=False,
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
        )

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Positions | None = None,
        previous: Int[Array, "batch 2"] | None = None,
    ) -> Float[Array, "batch length 256"]:
        """Return the logits of the byte after every position.

        Args:
          tokens: bytes, any integer dtype.
          positions: absolute positions, `0 .. length - 1` by default.
          previous: the two bytes before `tokens`, `BOUNDARY` by default; for reading in pieces.

        Raises:
          ValueError: `tokens` is not an integer array of rank 2 with at least one byte.
        """
        x, positions = self.embed(tokens, positions, previous)
        for block in self.blocks:
            x = block(x, positions)
        return self.logits(x)

    def embed(
        self,
        tokens: Int[Array, "batch length"],
        positions: Positions | None = None,
        previous: Int[Array, "batch 2"] | None = None,
    ) -> tuple[Residual, Positions]:
        """Return the first residual stream and the positions; arguments as for the call."""
        tokens = checked(tokens, ranks=(2,))
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        if previous is None:
            previous = jnp.full((tokens.shape[0], 2), text.BOUNDARY, tokens.dtype)
        elif previous.shape != (tokens.shape[0], 2):
            raise ValueError(
                f"previous must be [batch, 2] beside tokens {tokens.shape}, got {previous.shape}"
            )
        return self.embedding(tokens, previous), positions

    def logits(self, x: Residual) -> Float[Array, "batch length 256"]:
        """Map the last residual stream to logits."""
        return self.head(self.final_norm(x))


def checked(tokens: Any, ranks: tuple[int, ...]) -> Int[Array, "*batch length"]:
    """Return tokens as int32.

    Args:
      tokens: bytes, any integer dtype.
      ranks: the ranks allowed, among 1 and 2.

    Raises:
      ValueError: `tokens` has another rank, is empty or is not of integers.
    """
    shape, dtype = np.shape(tokens), jnp.result_type(tokens)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, got dtype {dtype}")
    if len(shape) not in ranks or math.prod(shape) == 0:
        wanted = " or ".join("[batch, length]" if each == 2 else "[length]" for each in ranks)
        raise ValueError(f"tokens must be {wanted} and not empty, got shape {shape}")
    return jnp.asarray(tokens, jnp.int32)
