"""Pretrained models in GGUF, the file format of llama.cpp.

Needs the package `gguf`, which `make models` installs. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.model import tokenizer
from experiments.model.checkpoint import Checkpoint, Stored
from experiments.model.llama import LlamaConfig, linear_divisors

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those that `Llama` runs, by their name in `general.architecture`."""

# Our names of a block's parameters, and whether they are transposed.
_OF_BLOCK = {
    "attn_norm.weight": "attention_norm.scale",
    "attn_q.weight": "attention.query.kernel",
    "attn_q.bias": "attention.query.bias",
    "attn_k.weight": "attention.key.kernel",
    "attn_k.bias": "attention.key.bias",
    "attn_v.weight": "attention.value.kernel",
    "attn_v.bias": "attention.value.bias",
    "attn_q_norm.weight": "attention.query_norm.scale",
    "attn_k_norm.weight": "attention.key_norm.scale",
    "attn_output.weight": "attention.out.kernel",
    "ffn_norm.weight": "mlp_norm.scale",
    "ffn_gate.weight": "mlp.gate.kernel",
    "ffn_up.weight": "mlp.up.kernel",
    "ffn_down.weight": "mlp.down.kernel",
}
_OUTSIDE = {
    "token_embd.weight": "embedding.embedding",
    "output_norm.weight": "final_norm.scale",
    "output.weight": "head.kernel",
}


def read(path: pathlib.Path) -> Checkpoint:
    """Open a GGUF file.

    Args:
      path: the file.

    Returns:
      Its model; tensors are dequantized one by one when they are read.

    Raises:
      FileNotFoundError: there is no such file.
      ModuleNotFoundError: the package that reads it is missing.
      ValueError: it is not a whole GGUF file, or of a model that cannot be run.
    """
    gguf = _package()
    if not path.is_file():
        raise FileNotFoundError(f"path names no file: {path}")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(fields, tensors)
        return Checkpoint(
            config, _stored(gguf, fields, tensors, config), tokenizer.from_gguf(fields)
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks the entry {error} of its model") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be run: {error}") from error


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> LlamaConfig:
    name = fields["general.architecture"]
    if name not in ARCHITECTURES:
        raise ValueError(f"its architecture is {name!r}, not one of {ARCHITECTURES}")

    def entry(key: str, default: Any = None) -> Any:
        found = fields.get(f"{name}.{key}", default)
        if found is None:
            raise KeyError(f"{name}.{key}")
        return found

    if entry("expert_count", 0):
        raise ValueError(f"it is a mixture of {entry('expert_count')} experts")
    context_length = entry("context_length")
    if 0 < entry("attention.sliding_window", 0) < context_length:
        raise ValueError(
            f"its attention slides in a window of {entry('attention.sliding_window')} tokens"
        )
    query_heads = entry("attention.head_count")
    kv_heads = entry("attention.head_count_kv", query_heads)
    if isinstance(query_heads, list) or isinstance(kv_heads, list):
        raise ValueError(f"its layers have different numbers of heads: {query_heads}, {kv_heads}")
    head_dim = entry("attention.key_length", entry("embedding_length") // query_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if entry(key, head_dim) != head_dim:
            raise ValueError(f"{key} is {entry(key)}, not the width {head_dim} of a key")
    return LlamaConfig(
        num_layers=entry("block_count"),
        embed_dim=entry("embedding_length"),
        num_query_heads=query_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=entry("feed_forward_length"),
        vocabulary=int(tensors["token_embd.weight"].shape[1]),
        context_length=context_length,
        rope_base=_decimal(entry("rope.freq_base", 10_000.0)),
        rope_divisors=_divisors(entry, tensors, head_dim),
        norm_epsilon=_decimal(entry("attention.layer_norm_rms_epsilon")),
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        tied_embeddings="output.weight" not in tensors,
    )


def _divisors(entry: Any, tensors: Mapping[str, Any], head_dim: int) -> tuple[float, ...] | None:
    kind = entry("rope.scaling.type", "none")
    if kind == "linear":
        return linear_divisors(head_dim, _decimal(entry("rope.scaling.factor")))
    if kind != "none":
        raise ValueError(f"its rotary positions are scaled by {kind!r}, not by 'linear'")
    # The frequencies of Llama 3.1 and later come as a tensor.
    given = tensors.get("rope_freqs.weight")
    return None if given is None else tuple(map(float, np.asarray(given.data, np.float32)))


def _decimal(value: float) -> float:
    """The shortest decimal number that rounds to this float32: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _stored(
    gguf: Any, fields: Mapping[str, Any], tensors: Mapping[str, Any], config: LlamaConfig
) -> dict[str, Stored]:
    heads = {}
    if fields["general.architecture"] == "llama":
        heads = {"attn_q": config.num_query_heads, "attn_k": config.num_kv_heads}
    stored = {}
    for name, tensor in tensors.items():
        if name == "rope_freqs.weight":
            continue
        ours, permuted = _OUTSIDE.get(name, name), 0
        if name.startswith("blk."):
            _, layer, rest = name.split(".", 2)
            ours = f"blocks.{layer}.{_OF_BLOCK.get(rest, rest)}"
            permuted = heads.get(rest.split(".")[0], 0)
        stored[ours] = _one(gguf, tensor, ours.endswith(".kernel"), permuted)
    return stored


def _one(gguf: Any, tensor: Any, transposed: bool, permuted_heads: int) -> Stored:
    """One tensor; GGUF counts axes from the last one."""
    shape = tuple(map(int, tensor.shape if transposed else tensor.shape[::-1]))

    def read() -> np.ndarray:
        array = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if permuted_heads:
            array = unpermuted(array, permuted_heads)
        return array.T if transposed else array

    return Stored(shape, read)


def unpermuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo the order of channels that GGUF gives to queries and keys of Llama.

    The file has the two channels that rotate together side by side; here feature `i` of a head
    rotates with feature `i + head_dim / 2`.

    Args:
      array: `[heads * head_dim, ...]`, of a matrix or a bias.
      heads: how many there are.
    """
    half = array.shape[0] // heads // 2
    split = array.reshape(heads, half, 2, *array.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(array.shape)


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the package gguf is missing, which reads a pretrained model's file; "
            "make models installs it",
            name="gguf",
        ) from error
