"""A small byte-level language model whose caches the experiments compress.

`load` reads the shipped checkpoint, which `experiments.model.train_lm` made; `caches` reads a text
with it and returns the keys, values and queries of all layers. The architecture is that of
`experiments.model.decoder`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from experiments.common import results
from experiments.model.decoder import Decoder as Decoder
from experiments.model.decoder import ModelConfig as ModelConfig
from experiments.model.decoder import checked
from experiments.model.llama import Llama

Model = Decoder | Llama
"""What `caches` and the costs are taken of: a model of bytes or one of tokens."""

CHECKPOINT = pathlib.Path(__file__).parent / "assets" / "stdlib_lm.safetensors"
"""The shipped checkpoint."""


def parameter_count(model: Model) -> int:
    """Return the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


class Trace(NamedTuple):
    """What the attention layers of a model hold and ask after reading a text, all float32.

    Attributes:
      keys: after RoPE, `[layers, kv_heads, length, head_dim]`.
      values: `[layers, kv_heads, length, head_dim]`.
      queries: after RoPE, `[layers, query_heads, length, head_dim]`; query head `h` reads key-value
        head `h // (query_heads // kv_heads)`, and scores are scaled by `1 / sqrt(head_dim)`.
    """

    keys: Float[Array, "*batch layers kv_heads length head_dim"]
    values: Float[Array, "*batch layers kv_heads length head_dim"]
    queries: Float[Array, "*batch layers query_heads length head_dim"]

    def asked(
        self, start: int, stop: int | None = None
    ) -> Float[Array, "*batch layers kv_heads queries head_dim"]:
        """Return the queries of some positions by the key-value head that they read.

        The query heads that share a key-value head are neighbors: their queries lie behind one
        another.
        """
        queries = self.queries[..., start:stop, :]
        return queries.reshape(*self.keys.shape[:-2], -1, self.keys.shape[-1])


def caches(model: Model, tokens: Any) -> Trace:
    """Read a text and return the key-value caches of all layers with the queries that met them.

    Args:
      model: the model.
      tokens: bytes `[length]` or `[batch, length]`, any integer dtype.

    Returns:
      The trace, with a leading batch axis when `tokens` has one.

    Raises:
      ValueError: `tokens` has another rank, is empty or is not of integers.
    """
    tokens = checked(tokens, ranks=(1, 2))
    trace = _caches(model, jnp.atleast_2d(tokens))
    return trace if tokens.ndim == 2 else jax.tree.map(lambda x: x[0], trace)


@nnx.jit
def _caches(model: Model, tokens: Int[Array, "batch length"]) -> Trace:
    x, positions = model.embed(tokens)
    layers = []
    for block in model.blocks:
        # The block projects again; the compiler merges the two.
        layers.append(block.attention.project(block.attention_norm(x), positions))
        x = block(x, positions)
    queries, keys, values = (
        # [layers, batch, length, heads, head_dim] to [batch, layers, heads, length, head_dim].
        jnp.stack(each).transpose(1, 0, 3, 2, 4)
        for each in zip(*layers, strict=True)
    )
    return Trace(keys=keys, values=values, queries=queries)


def predictions(model: Model, tokens: Any) -> Float[Array, "*batch length-1 vocabulary"]:
    """Return what the model expects of every byte but the first, given all before it.

    Args:
      model: the model.
      tokens: bytes `[length]` or `[batch, length]`, any integer dtype, length at least 2.

    Returns:
      Natural logarithms of the probabilities of byte `i + 1` at index `i`, float32.

    Raises:
      ValueError: `tokens` has another rank, is too short or is not of integers.
    """
    tokens = checked(tokens, ranks=(1, 2))
    if tokens.shape[-1] < 2:
        raise ValueError(f"tokens must hold at least 2 bytes a sequence, got shape {tokens.shape}")
    found = _predictions(model, jnp.atleast_2d(tokens)[:, :-1])
    return found.reshape(*tokens.shape[:-1], *found.shape[1:])


@nnx.jit
def _predictions(
    model: Model, tokens: Int[Array, "batch length"]
) -> Float[Array, "batch length vocabulary"]:
    return jax.nn.log_softmax(model(tokens))


def byte_costs(model: Model, tokens: Any) -> Float[Array, "*batch length-1"]:
    """Return what every byte but the first costs, given all before it, in bits.

    Minus the binary logarithm of the probability of byte `i + 1` at index `i`, float32; arguments
    and errors are those of `predictions`.
    """
    return costs_of(predictions(model, tokens), tokens)


@jax.jit
def costs_of(
    predictions: Float[Array, "*batch length-1 vocabulary"], tokens: Int[Array, "*batch length"]
) -> Float[Array, "*batch length-1"]:
    """Return what every byte of some tokens but the first costs under predictions, in bits."""
    taken = jnp.take_along_axis(predictions, tokens[..., 1:, None].astype(jnp.int32), axis=-1)
    return -taken[..., 0] / math.log(2)


def bits_per_byte(model: Model, tokens: Any) -> float:
    """Return the mean of `byte_costs`; a large batch is read a few sequences at a time."""
    tokens = checked(tokens, ranks=(1, 2))
    if tokens.ndim == 1:
        tokens = tokens[None]
    rows = max(1, 8192 // tokens.shape[1])  # Bounds the memory of scores and logits.
    pieces = [
        byte_costs(model, tokens[start : start + rows]) for start in range(0, tokens.shape[0], rows)
    ]
    return float(np.mean(np.concatenate([np.asarray(piece) for piece in pieces]), dtype=np.float64))


def stream_bits_per_byte(model: Model, stream: UInt8[np.ndarray, " length"], width: int) -> float:
    """Return the mean cost of the bytes of a long stream, read in windows that know nothing before.

    Args:
      model: the model.
      stream: bytes `[length]`, length at least 2.
      width: bytes predicted a window. Every byte of the stream but the first is predicted once.

    Raises:
      ValueError: `stream` is not of rank 1 or too short, or `width` is below 1.
    """
    if stream.ndim != 1 or stream.size < 2 or width < 1:
        raise ValueError(
            f"stream must be [length >= 2] and width >= 1, got shape {stream.shape}, width {width}"
        )
    count = (stream.size - 1) // width
    rest = stream[count * width :]
    bits = 0.0
    if count:
        starts = np.arange(count)[:, None] * width
        bits += bits_per_byte(model, stream[starts + np.arange(width + 1)]) * count * width
    if rest.size > 1:
        bits += bits_per_byte(model, rest) * (rest.size - 1)
    return bits / (stream.size - 1)


def load(path: str | os.PathLike[str] | None = None) -> tuple[Decoder, ModelConfig]:
    """Load a model.

    Args:
      path: a file written by `save`; the shipped `CHECKPOINT` by default.

    Returns:
      The model, float32, and its config.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a checkpoint of this model.
    """
    file = CHECKPOINT if path is None else pathlib.Path(path)
    header = metadata(file)
    if "model" not in header:
        raise ValueError(
            f"{file} has no 'model' in its metadata: not a checkpoint of experiments.model.lm"
        )
    config = ModelConfig(**json.loads(header["model"]))
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0))))
    tensors = safetensors.numpy.load_file(file)
    expected = {name: leaf.shape for name, leaf in _flat(state).items()}
    check_shapes(f"{file} does not fit its own config", expected, tensors)
    filled = [
        (path, leaf.replace(jnp.asarray(tensors[_name(path)], jnp.float32)))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled)), config


def metadata(path: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Return the header of a checkpoint: model config, seed, steps, bits per byte.

    Args:
      path: a file written by `save`; the shipped `CHECKPOINT` by default.

    Raises:
      FileNotFoundError: there is no such file.
    """
    file = CHECKPOINT if path is None else pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"path names no checkpoint: {file}; python -m experiments.model.train_lm makes one"
        )
    with safetensors.safe_open(file, framework="numpy") as opened:
        return opened.metadata() or {}


def save(
    path: str | os.PathLike[str], model: Decoder, config: ModelConfig, metadata: dict[str, str]
) -> None:
    """Write a model as bfloat16 safetensors, atomically.

    Args:
      path: the file.
      model: the model.
      config: its config, kept in the header.
      metadata: further entries of the header.
    """
    flat = _flat(nnx.state(model, nnx.Param))
    tensors = {name: np.asarray(value.astype(jnp.bfloat16)) for name, value in flat.items()}
    header = {**metadata, "model": json.dumps(dataclasses.asdict(config))}
    with results.replacing(path) as partial:
        safetensors.numpy.save_file(tensors, partial, metadata=header)


def check_shapes(
    complaint: str, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray]
) -> None:
    """Raise `ValueError` with a complaint if tensors are not of the names and shapes expected."""
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if not expected or expected != found:
        differing = sorted(set(expected.items()) ^ set(found.items()))
        raise ValueError(f"{complaint}; differing tensors: {differing[:4]}")


def _flat(state: nnx.State[Any, Any]) -> dict[str, Any]:
    return {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
