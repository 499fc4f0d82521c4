"""GGUF files, written by the package `gguf` and read back."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.model import checkpoint, gguf_file
from tests.experiments.model.tiny_gguf import write
from tests.experiments.model.tiny_llama import CONFIGS, PLAIN, logits, tiny

TOKENS = np.random.default_rng(3).integers(0, PLAIN.vocabulary, 40)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama", "llama"),
        ("tied", "llama"),
        ("llama3", "llama"),
        ("qwen2", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
    ],
)
def test_model_comes_back(name: str, architecture: str, tmp_path: pathlib.Path) -> None:
    config, arrays = CONFIGS[name], checkpoint.parameters(tiny(CONFIGS[name]))
    write(tmp_path / "tiny.gguf", config, arrays, architecture)
    found = gguf_file.read(tmp_path / "tiny.gguf")
    assert found.tokenizer.decode(found.tokenizer.encode("hello")) == "hello"
    if config.rope_divisors is not None:
        np.testing.assert_allclose(found.config.rope_divisors, config.rope_divisors, rtol=1e-6)
        config = dataclasses.replace(config, rope_divisors=found.config.rope_divisors)
    assert found.config == config
    for ours, stored in found.stored.items():
        np.testing.assert_array_equal(stored.read(), arrays[ours], err_msg=ours)


def test_scaled_positions(tmp_path: pathlib.Path) -> None:
    arrays = checkpoint.parameters(tiny(PLAIN))
    scaling = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    write(tmp_path / "tiny.gguf", PLAIN, arrays, **scaling)
    assert gguf_file.read(tmp_path / "tiny.gguf").config == CONFIGS["linear"]


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantized_model_is_close(quantization: str, tmp_path: pathlib.Path) -> None:
    arrays = checkpoint.parameters(tiny(PLAIN))
    write(tmp_path / "tiny.gguf", PLAIN, arrays, quantization=quantization)
    found = gguf_file.read(tmp_path / "tiny.gguf")
    model = checkpoint.build(found.config, found.stored, jnp.float32, "tiny")
    expected = logits(PLAIN, arrays, TOKENS)
    error = logits(PLAIN, checkpoint.parameters(model), TOKENS) - expected
    share = np.std(error) / np.std(expected)
    assert 0 < share < {"Q8_0": 0.05, "Q4_1": 0.6, "F16": 0.01, "BF16": 0.05}[quantization]


@pytest.mark.parametrize(
    ("architecture", "changed", "words"),
    [
        ("gemma3", {}, "architecture is 'gemma3'"),
        ("deepseek2", {}, "architecture is 'deepseek2'"),
        ("llama", {"expert_count": 8}, "mixture of 8 experts"),
        ("llama", {"attention__sliding_window": 100}, "window of 100"),
        ("llama", {"rope__scaling__type": "yarn"}, "scaled by 'yarn'"),
        ("llama", {"rope__dimension_count": 8}, "rope.dimension_count is 8"),
        ("llama", {"attention__value_length": 8}, "attention.value_length is 8"),
    ],
)
def test_what_cannot_be_run_is_named(
    architecture: str, changed: dict[str, object], words: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, PLAIN, checkpoint.parameters(tiny(PLAIN)), architecture, **changed)
    with pytest.raises(ValueError, match=words) as caught:
        gguf_file.read(path)
    assert str(path) in str(caught.value)


def test_part_of_a_file_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tiny.gguf"
    with pytest.raises(FileNotFoundError, match="no file"):
        gguf_file.read(path)
    write(path, PLAIN, checkpoint.parameters(tiny(PLAIN)))
    content = path.read_bytes()
    for length in (0, 3, 20, 500, 9000, len(content) - 100):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="not a whole GGUF file"):
            gguf_file.read(path)
    path.write_bytes(b"PK" + content[2:])
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        gguf_file.read(path)
