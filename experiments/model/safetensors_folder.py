"""Pretrained models in a folder as Hugging Face lays them out.

`config.json`, `tokenizer.json`, and `model.safetensors`, or several of its kind with an index.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from experiments.model import tokenizer
from experiments.model.checkpoint import Checkpoint, Stored
from experiments.model.llama import LlamaConfig, linear_divisors, llama3_divisors

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Those that `Llama` runs, by their `model_type`."""

_INDEX = "model.safetensors.index.json"

# Our names of a block's parameters; matrices are transposed.
_OF_BLOCK = {
    "input_layernorm.weight": "attention_norm.scale",
    "self_attn.q_proj.weight": "attention.query.kernel",
    "self_attn.q_proj.bias": "attention.query.bias",
    "self_attn.k_proj.weight": "attention.key.kernel",
    "self_attn.k_proj.bias": "attention.key.bias",
    "self_attn.v_proj.weight": "attention.value.kernel",
    "self_attn.v_proj.bias": "attention.value.bias",
    "self_attn.q_norm.weight": "attention.query_norm.scale",
    "self_attn.k_norm.weight": "attention.key_norm.scale",
    "self_attn.o_proj.weight": "attention.out.kernel",
    "post_attention_layernorm.weight": "mlp_norm.scale",
    "mlp.gate_proj.weight": "mlp.gate.kernel",
    "mlp.up_proj.weight": "mlp.up.kernel",
    "mlp.down_proj.weight": "mlp.down.kernel",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "embedding.embedding",
    "model.norm.weight": "final_norm.scale",
    "lm_head.weight": "head.kernel",
}


def read(folder: pathlib.Path) -> Checkpoint:
    """Open a folder.

    Args:
      folder: where the files are.

    Returns:
      Its model; tensors are read one by one when they are asked for.

    Raises:
      FileNotFoundError: a file is missing.
      ModuleNotFoundError: the package that reads the tokenizer is missing.
      ValueError: a file is damaged, or the model cannot be run.
    """
    settings = _json(folder, "config.json")
    try:
        config = _config(settings)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json lacks the entry {error}") from error
    except ValueError as error:
        raise ValueError(f"{folder} cannot be run: {error}") from error
    return Checkpoint(config, _stored(folder, config), tokenizer.from_folder(folder))


def _config(settings: Mapping[str, Any]) -> LlamaConfig:
    kind = settings["model_type"]
    if kind not in MODEL_TYPES:
        raise ValueError(f"its model_type is {kind!r}, not one of {MODEL_TYPES}")
    if "quantization_config" in settings:
        method = settings["quantization_config"].get("quant_method")
        raise ValueError(f"its weights are quantized by {method!r}")
    if settings.get("hidden_act", "silu") != "silu":
        raise ValueError(f"its hidden_act is {settings['hidden_act']!r}, not 'silu'")
    query_heads = settings["num_attention_heads"]
    head_dim = settings.get("head_dim") or settings["hidden_size"] // query_heads
    context_length = settings["max_position_embeddings"]
    # Qwen's configs have a window that is switched off; Mistral's and Llama's have no switch.
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    if window is not None and window < context_length:
        raise ValueError(f"its attention slides in a window of {window} tokens")
    if set(settings.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"its layer_types are {sorted(set(settings['layer_types']))}")
    # One entry or two, by the version that wrote the file.
    rope = {**(settings.get("rope_scaling") or {}), **(settings.get("rope_parameters") or {})}
    base = float(rope.get("rope_theta", settings.get("rope_theta", 10_000.0)))
    if rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1)) != 1:
        raise ValueError("its rotary positions turn a part of the channels only")
    return LlamaConfig(
        num_layers=settings["num_hidden_layers"],
        embed_dim=settings["hidden_size"],
        num_query_heads=query_heads,
        num_kv_heads=settings.get("num_key_value_heads") or query_heads,
        head_dim=head_dim,
        mlp_dim=settings["intermediate_size"],
        vocabulary=settings["vocab_size"],
        context_length=context_length,
        rope_base=base,
        rope_divisors=_divisors(rope, base, head_dim),
        norm_epsilon=settings["rms_norm_eps"],
        qk_norm=kind == "qwen3",
        attention_bias=kind == "qwen2" or settings.get("attention_bias", False),
        tied_embeddings=settings.get("tie_word_embeddings", False),
    )


def _divisors(rope: Mapping[str, Any], base: float, head_dim: int) -> tuple[float, ...] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return linear_divisors(head_dim, float(rope["factor"]))
    if kind == "llama3":
        return llama3_divisors(
            head_dim,
            base,
            factor=rope["factor"],
            low=rope["low_freq_factor"],
            high=rope["high_freq_factor"],
            original=rope["original_max_position_embeddings"],
        )
    raise ValueError(f"its rotary positions are scaled by {kind!r}, not by 'linear' or 'llama3'")


def _stored(folder: pathlib.Path, config: LlamaConfig) -> dict[str, Stored]:
    stored = {}
    for file in _files(folder):
        try:
            opened = safetensors.safe_open(file, framework="numpy")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
        for name in opened.keys():  # noqa: SIM118
            if name.endswith("rotary_emb.inv_freq"):
                continue  # Older files have the frequencies, which follow from the config.
            if name == "lm_head.weight" and config.tied_embeddings:
                continue
            ours = _OUTSIDE.get(name, name)
            if name.startswith("model.layers."):
                _, _, layer, rest = name.split(".", 3)
                ours = f"blocks.{layer}.{_OF_BLOCK.get(rest, rest)}"
            shape = tuple(opened.get_slice(name).get_shape())
            read = functools.partial(opened.get_tensor, name)
            if ours.endswith(".kernel"):
                stored[ours] = Stored(shape[::-1], functools.partial(_transposed, read))
            else:
                stored[ours] = Stored(shape, read)
    return stored


def _transposed(read: Any) -> np.ndarray:
    return np.asarray(read()).T


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    names = ["model.safetensors"]
    if (folder / _INDEX).is_file():
        names = sorted(set(_json(folder, _INDEX)["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"path names a folder without {name}: {folder}")
    return [folder / name for name in names]


def _json(folder: pathlib.Path, name: str) -> Any:
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"path names a folder without {name}: {folder}")
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
