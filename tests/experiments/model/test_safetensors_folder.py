"""Folders as Hugging Face lays them out, written and read back."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from experiments.model import checkpoint, pretrained, safetensors_folder
from experiments.model.llama import LlamaConfig
from tests.experiments.model.tiny_llama import CONFIGS, PLAIN, logits, tiny, write_tokenizer

pytest.importorskip("tokenizers")

TOKENS = np.random.default_rng(4).integers(0, PLAIN.vocabulary, 50)


def write(
    folder: pathlib.Path,
    config: LlamaConfig,
    kind: str = "llama",
    shards: int = 1,
    dtype: object = np.float32,
    **changed: object,
) -> dict[str, np.ndarray]:
    """Write a model, with entries of `config.json` changed, and return its parameters."""
    arrays = checkpoint.parameters(tiny(config))
    settings = {
        "model_type": kind,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        **changed,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    inside = {ours: name for name, ours in safetensors_folder._OF_BLOCK.items()}
    outside = {ours: name for name, ours in safetensors_folder._OUTSIDE.items()}
    tensors = {}
    for ours, array in arrays.items():
        name = outside.get(ours, ours)
        if ours.startswith("blocks."):
            _, layer, rest = ours.split(".", 2)
            name = f"model.layers.{layer}.{inside[rest]}"
        matrix = array.T if ours.endswith(".kernel") else array
        tensors[name] = np.ascontiguousarray(matrix).astype(dtype)
    names = [f"model-{part}.safetensors" for part in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    parts = {file: dict(list(tensors.items())[i::shards]) for i, file in enumerate(names)}
    for file, part in parts.items():
        safetensors.numpy.save_file(part, folder / file)
    if shards > 1:
        index = {name: file for file, part in parts.items() for name in part}
        file = folder / "model.safetensors.index.json"
        file.write_text(json.dumps({"weight_map": index}))
    write_tokenizer(folder)
    return arrays


@pytest.mark.parametrize(
    ("name", "kind", "shards"),
    [("llama", "llama", 1), ("tied", "mistral", 3), ("qwen2", "qwen2", 1), ("qwen3", "qwen3", 2)],
)
def test_same_logits(name: str, kind: str, shards: int, tmp_path: pathlib.Path) -> None:
    arrays = write(tmp_path, CONFIGS[name], kind, shards)
    model, config, tokenizer, called = pretrained.load(tmp_path)
    assert config == CONFIGS[name]
    assert called == tmp_path.name
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    expected = logits(config, arrays, TOKENS)
    np.testing.assert_allclose(
        model(TOKENS[None])[0], expected, rtol=0, atol=1e-4 * np.std(expected)
    )


def test_bfloat16_weights_are_read_exactly(tmp_path: pathlib.Path) -> None:
    arrays = write(tmp_path, PLAIN, dtype=ml_dtypes.bfloat16)
    found = checkpoint.parameters(pretrained.load(tmp_path).model)
    for name, array in arrays.items():
        rounded = array.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found[name], rounded)
    half = checkpoint.parameters(pretrained.load(tmp_path, "bfloat16").model)
    assert half["head.kernel"].dtype == ml_dtypes.bfloat16
    assert half["final_norm.scale"].dtype == np.float32


@pytest.mark.parametrize("entry", ["rope_scaling", "rope_parameters"])
def test_scaled_positions(entry: str, tmp_path: pathlib.Path) -> None:
    linear = {"rope_type": "linear", "factor": 4.0}
    write(tmp_path, PLAIN, **{entry: {**linear, "rope_theta": 1e4}})
    assert safetensors_folder.read(tmp_path).config == CONFIGS["linear"]
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 100,
    }
    write(tmp_path, PLAIN, **{entry: llama3})
    assert safetensors_folder.read(tmp_path).config == CONFIGS["llama3"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"kind": "gemma3"}, "model_type is 'gemma3'"),
        ({"kind": "deepseek_v3"}, "model_type is 'deepseek_v3'"),
        ({"kind": "mixtral"}, "model_type is 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by 'awq'"),
        ({"sliding_window": 100}, "window of 100"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_scaling": {"type": "yarn"}}, "scaled by 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "part of the channels"),
    ],
)
def test_what_cannot_be_run_is_named(
    changed: dict[str, object], words: str, tmp_path: pathlib.Path
) -> None:
    write(tmp_path, PLAIN, **changed)
    with pytest.raises(ValueError, match=words) as caught:
        safetensors_folder.read(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_window_that_is_switched_off_or_longer_than_any_text(tmp_path: pathlib.Path) -> None:
    write(tmp_path, PLAIN, sliding_window=100, use_sliding_window=False)
    assert safetensors_folder.read(tmp_path).config == PLAIN
    write(tmp_path, PLAIN, sliding_window=400)
    assert safetensors_folder.read(tmp_path).config == PLAIN


def test_damaged_folders(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        pretrained.load(tmp_path)
    write(tmp_path, PLAIN, attention_bias=True)
    with pytest.raises(ValueError, match=r"query\.bias is missing"):
        pretrained.load(tmp_path)
    write(tmp_path, CONFIGS["qwen2"], rms_norm_eps=1e-3)
    with pytest.raises(ValueError, match=r"query\.bias is unknown"):
        pretrained.load(tmp_path)
    write(tmp_path, PLAIN)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        pretrained.load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="lacks the entry 'num_attention_heads'"):
        pretrained.load(tmp_path)
