"""Llama and its relatives, as one decoder: the pretrained models whose caches are compressed.

Llama 1 to 3, Mistral without a window, Qwen2 (biases of queries, keys and values) and Qwen3 (norms
of queries and keys): RMSNorm before attention and MLP, rotary positions, grouped-query attention,
SwiGLU. The interface is that of `experiments.model.decoder.Decoder`, and tokens stand for bytes.

References: Touvron et al., arXiv 2302.13971; Grattafiori et al., arXiv 2407.21783 (frequencies of
long contexts); Yang et al., arXiv 2407.10671 (Qwen2) and arXiv 2505.09388 (Qwen3).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from coreset_jax._src.geometry.rotary import turned
from experiments.model import decoder
from experiments.model.decoder import Pairs, Positions, Queries, Residual, checked

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of the model.

    Attributes:
      num_layers: decoder blocks.
      embed_dim: width of the residual stream.
      num_query_heads: query heads a layer, a multiple of `num_kv_heads`.
      num_kv_heads: key and value heads a layer.
      head_dim: width of a head, even.
      mlp_dim: hidden width of the MLP.
      vocabulary: rows of the embedding, at least as many as there are tokens.
      context_length: tokens that the model may read at most.
      rope_base: base of the rotary frequencies.
      rope_divisors: what each of the `head_dim / 2` frequencies is divided by, see
        `linear_divisors` and `llama3_divisors`; `None` for 1.
      norm_epsilon: added to the mean square in every norm.
      qk_norm: whether queries and keys are normed, head by head, before they are rotated.
      attention_bias: whether queries, keys and values have biases.
      tied_embeddings: whether logits are products with the embedding.
    """

    num_layers: int
    embed_dim: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    vocabulary: int
    context_length: int
    rope_base: float = 10_000.0
    rope_divisors: tuple[float, ...] | None = None
    norm_epsilon: float = 1e-5
    qk_norm: bool = False
    attention_bias: bool = False
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "float") and not value > 0:
                raise ValueError(f"{field.name} must be positive, got {value}")
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                "num_query_heads must be a multiple of num_kv_heads, got "
                f"{self.num_query_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.rope_divisors is not None:
            if len(self.rope_divisors) != self.head_dim // 2:
                raise ValueError(
                    f"rope_divisors must be {self.head_dim // 2}, one for every pair of channels, "
                    f"got {len(self.rope_divisors)}"
                )
            if not min(self.rope_divisors) > 0:
                raise ValueError(f"rope_divisors must be positive, got {self.rope_divisors}")


def linear_divisors(head_dim: int, factor: float) -> tuple[float, ...]:
    """Divisors that stretch all positions alike (Chen et al., arXiv 2306.15595).

    Args:
      head_dim: width of a head.
      factor: how many times longer the context becomes.
    """
    return (factor,) * (head_dim // 2)


def llama3_divisors(
    head_dim: int, base: float, factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    """Divisors that stretch low frequencies alone, as in Llama 3.1 (arXiv 2407.21783).

    A frequency that turns at least `high` times in the original context stays; one that turns at
    most `low` times is divided by `factor`; between the two, its inverse divisor is linear in the
    number of turns.

    Args:
      head_dim: width of a head.
      base: base of the rotary frequencies.
      factor: how many times longer the context becomes.
      low: `low_freq_factor`.
      high: `high_freq_factor`.
      original: tokens of the original context.

    Raises:
      ValueError: `high` is not above `low`.
    """
    if not high > low:
        raise ValueError(f"high must be above low, got {high} and {low}")
    half = head_dim // 2
    turns = original * base ** (-np.arange(half) / half) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return tuple((1 / (kept + (1 - kept) / factor)).tolist())


def frequencies(config: LlamaConfig) -> Float[np.ndarray, " half"]:
    """Radians that each pair of channels turns a token: `base ** (-2 i / head_dim) / divisor`."""
    half = config.head_dim // 2
    divisors = 1.0 if config.rope_divisors is None else np.asarray(config.rope_divisors)
    return (config.rope_base ** (-np.arange(half) / half) / divisors).astype(np.float32)


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    positions: Positions,
    frequencies: Float[np.ndarray, " half"],
) -> Float[Array, "batch length heads head_dim"]:
    """Rotate feature `i` with feature `i + head_dim / 2`, as `decoder.rope`, at these frequencies.

    Returns:
      The rotated `x`, float32.
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return turned(x.astype(jnp.float32), angles)


def _linear(
    inputs: int, outputs: int, dtype: DTypeLike, rngs: nnx.Rngs, bias: bool = False
) -> nnx.Linear:
    # Float32 means float32, on accelerators that would take fewer bits as well.
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=dtype,
        param_dtype=dtype,
        precision=jax.lax.Precision.HIGHEST,
        rngs=rngs,
    )


def _norm(width: int, config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=config.norm_epsilon, dtype=jnp.float32, rngs=rngs)


class Attention(decoder.Attention):
    """Grouped-query causal self-attention with rotary positions, of any Llama-like model."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        self.num_query_heads = config.num_query_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        linear = functools.partial(_linear, dtype=dtype, rngs=rngs)
        query_dim = config.num_query_heads * config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.query = linear(config.embed_dim, query_dim, bias=config.attention_bias)
        self.key = linear(config.embed_dim, kv_dim, bias=config.attention_bias)
        self.value = linear(config.embed_dim, kv_dim, bias=config.attention_bias)
        if config.qk_norm:
            self.query_norm = _norm(config.head_dim, config, rngs)
            self.key_norm = _norm(config.head_dim, config, rngs)
        self.out = linear(query_dim, config.embed_dim)

    def project(self, x: Residual, positions: Positions) -> tuple[Queries, Pairs, Pairs]:
        """Return queries and keys, both after RoPE, and values, all float32."""
        lead = x.shape[:-1]
        queries = self.query(x).reshape(*lead, self.num_query_heads, self.head_dim)
        keys = self.key(x).reshape(*lead, self.num_kv_heads, self.head_dim)
        values = self.value(x).reshape(*lead, self.num_kv_heads, self.head_dim)
        if self.config.qk_norm:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        turns = frequencies(self.config)
        return (
            rotate(queries, positions, turns),
            rotate(keys, positions, turns),
            values.astype(jnp.float32),
        )


class MLP(decoder.MLP):
    """SwiGLU (Shazeer, arXiv 2002.05202): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.gate = _linear(config.embed_dim, config.mlp_dim, dtype, rngs)
        self.up = _linear(config.embed_dim, config.mlp_dim, dtype, rngs)
        self.down = _linear(config.mlp_dim, config.embed_dim, dtype, rngs)

    def __call__(self, x: Float[Array, "*lead embed_dim"]) -> Float[Array, "*lead embed_dim"]:
        """Apply to the last axis."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(decoder.Block):
    """Pre-norm attention, then pre-norm MLP, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(config.embed_dim, config, rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = _norm(config.embed_dim, config, rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)


class Llama(nnx.Module):
    """The language model: tokens in, logits of the next token out."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        """Initialize.

        Args:
          config: the shape.
          dtype: of weights and activations, float32 or bfloat16. Norms, scores and logits are
            float32 either way.
          rngs: an nnx random stream named `params`.
        """
        if jnp.dtype(dtype).name not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {jnp.dtype(dtype).name}")
        self.config = config
        self.embedding = nnx.Embed(
            config.vocabulary,
            config.embed_dim,
            dtype=dtype,
            param_dtype=dtype,
            embedding_init=nnx.initializers.normal(stddev=0.02),
            rngs=rngs,
        )
        self.blocks = nnx.List(
            [Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.final_norm = _norm(config.embed_dim, config, rngs)
        if not config.tied_embeddings:
            self.head = _linear(config.embed_dim, config.vocabulary, dtype, rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Positions | None = None,
        previous: Int[Array, "batch 2"] | None = None,
    ) -> Float[Array, "batch length vocabulary"]:
        """Return the logits of the token after every position.

        Args:
          tokens: tokens below `config.vocabulary`, any integer dtype.
          positions: absolute positions, `0 .. length - 1` by default.
          previous: the two tokens before, which only models of bytes look at.

        Raises:
          ValueError: `tokens` is not an integer array of rank 2 with at least one token, or longer
            than the context of the model.
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
        check_length(self.config, tokens.shape[1])
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        return self.embedding(tokens), positions

    def logits(self, x: Residual) -> Float[Array, "batch length vocabulary"]:
        """Map the last residual stream to logits, float32."""
        x = self.final_norm(x)
        if self.config.tied_embeddings:
            matrix = self.embedding.embedding.get_value().T
        else:
            matrix = self.head.kernel.get_value()
        return jnp.matmul(
            x.astype(matrix.dtype),
            matrix,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )


def check_length(config: LlamaConfig, length: int) -> None:
    """Raise `ValueError` if a text of `length` tokens is longer than the context."""
    if length > config.context_length:
        raise ValueError(
            f"tokens must fit the context of {config.context_length} that the model was trained "
            f"for, got {length} of them"
        )
