"""Small models written as GGUF by the package `gguf`."""

import pathlib

import numpy as np
import pytest

from experiments.model import gguf_file
from experiments.model.llama import LlamaConfig
from tests.experiments.model.tiny_llama import tokenizer_fields

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")


def permuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp orders them: channels that rotate together side by side."""
    rows = matrix.reshape(heads, -1, *matrix.shape[1:])
    half = rows.shape[1] // 2
    pairs = [rows[:, [i, i + half]] for i in range(half)]
    return np.concatenate(pairs, axis=1).reshape(matrix.shape)


def write(
    path: pathlib.Path,
    config: LlamaConfig,
    arrays: dict[str, np.ndarray],
    architecture: str = "llama",
    quantization: str = "F32",
    **changed: object,
) -> None:
    """Write a model; `changed` are entries of the architecture, such as `expert_count`."""
    writer = gguf.GGUFWriter(path, architecture)
    entries = {
        "block_count": config.num_layers,
        "context_length": config.context_length,
        "embedding_length": config.embed_dim,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_query_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "rope.freq_base": config.rope_base,
        **{name.replace("__", "."): entry for name, entry in changed.items()},
    }
    for name, entry in entries.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(entry)](f"{architecture}.{name}", entry)
    for name, entry in tokenizer_fields().items():
        if isinstance(entry, list):
            writer.add_array(name, entry)
        elif isinstance(entry, bool):
            writer.add_bool(name, entry)
        else:
            (writer.add_string if isinstance(entry, str) else writer.add_uint32)(name, entry)
    inside = {ours: name for name, ours in gguf_file._OF_BLOCK.items()}
    outside = {ours: name for name, ours in gguf_file._OUTSIDE.items()}
    for ours, array in arrays.items():
        name = outside.get(ours, ours)
        if ours.startswith("blocks."):
            _, layer, rest = ours.split(".", 2)
            name = f"blk.{layer}.{inside[rest]}"
        matrix = array.T if ours.endswith(".kernel") else array
        if architecture == "llama" and ".attention.query." in ours:
            matrix = permuted(matrix, config.num_query_heads)
        if architecture == "llama" and ".attention.key." in ours:
            matrix = permuted(matrix, config.num_kv_heads)
        kind = gguf.GGMLQuantizationType[quantization if matrix.ndim == 2 else "F32"]
        stored = gguf.quantize(np.ascontiguousarray(matrix, np.float32), kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    if config.rope_divisors is not None and "rope__scaling__type" not in changed:
        writer.add_tensor("rope_freqs.weight", np.asarray(config.rope_divisors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
