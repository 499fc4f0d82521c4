"""Loading of pretrained models; those that read SmolLM2 need `make models`."""

import importlib.metadata
import pathlib
import sys

import jax
import numpy as np
import pytest

from experiments.model import checkpoint, gguf_file, pretrained, reading
from tests.experiments.model.tiny_gguf import write
from tests.experiments.model.tiny_llama import PLAIN, logits, tiny


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(pretrained, "KEPT", tmp_path / "kept")
    return tmp_path


def test_second_load_reads_what_was_kept(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, arrays = folder / "tiny.gguf", checkpoint.parameters(tiny(PLAIN))
    write(path, PLAIN, arrays)
    first = pretrained.load(path)
    assert first.name == "tiny"
    assert pretrained.kept_file(path).is_file()
    with monkeypatch.context() as without:
        without.setattr(gguf_file, "read", None)
        second = pretrained.load(path)
    assert second.config == first.config == PLAIN
    assert second.tokenizer.encode("hello") == first.tokenizer.encode("hello")
    assert second.tokenizer.end_of_turn == first.tokenizer.end_of_turn
    for each in (first, second):
        found = checkpoint.parameters(each.model)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
    # Another file of the same name is another model.
    write(path, PLAIN, checkpoint.parameters(tiny(PLAIN, seed=1)))
    third = checkpoint.parameters(pretrained.load(path).model)
    assert np.abs(third["head.kernel"] - arrays["head.kernel"]).max() > 0.1


def test_damaged_kept_file_is_made_anew(folder: pathlib.Path) -> None:
    path, arrays = folder / "tiny.gguf", checkpoint.parameters(tiny(PLAIN))
    write(path, PLAIN, arrays)
    pretrained.load(path)
    kept = pretrained.kept_file(path)
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    found = checkpoint.parameters(pretrained.load(path).model)
    np.testing.assert_array_equal(found["head.kernel"], arrays["head.kernel"])
    assert len(kept.read_bytes()) == len(whole)


def test_where_nothing_can_be_kept(folder: pathlib.Path) -> None:
    (folder / "kept").touch()
    path = folder / "tiny.gguf"
    write(path, PLAIN, checkpoint.parameters(tiny(PLAIN)))
    assert pretrained.load(path).config == PLAIN


def test_what_is_missing_is_named(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        pretrained.load(folder / "nothing.gguf")
    with pytest.raises(ValueError, match="dtype must be one of"):
        pretrained.load(folder, "float16")

    def nothing(name: str) -> object:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", nothing)
    with pytest.raises(ModuleNotFoundError, match="make models"):
        pretrained.load()


def test_missing_package_is_named(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "tiny.gguf"
    write(path, PLAIN, checkpoint.parameters(tiny(PLAIN)))
    for name in ("gguf", "tokenizers"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            with pytest.raises(ModuleNotFoundError, match=f"{name} is missing.*make models"):
                pretrained.load(path)


@pytest.fixture(scope="module")
def loaded() -> pretrained.Pretrained:
    """The model of the wheel, which `make test-slow` installs: without it these tests fail."""
    return pretrained.load()


@pytest.fixture(scope="module")
def tokens(loaded: pretrained.Pretrained) -> np.ndarray:
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics))
    return np.asarray(loaded.tokenizer.encode(text[:20_000]))


@pytest.mark.slow
def test_cost_of_prose(loaded: pretrained.Pretrained, tokens: np.ndarray) -> None:
    found = reading.read(loaded.model, tokens[:1535])
    predicted = jax.nn.log_softmax(loaded.model.logits(found.residual[None, 511:1535])[0])
    taken = np.take_along_axis(np.asarray(predicted), tokens[512:1536, None], axis=1)
    assert -taken.mean() == pytest.approx(2.235, abs=0.01)


@pytest.mark.slow
def test_logits_are_those_of_float64(loaded: pretrained.Pretrained, tokens: np.ndarray) -> None:
    expected = logits(loaded.config, checkpoint.parameters(loaded.model), tokens[:256])
    found = reading.read(loaded.model, tokens[:256], chunk=128)
    np.testing.assert_allclose(
        loaded.model.logits(found.residual[None])[0], expected, rtol=0, atol=1e-3
    )
    assert np.std(expected) > 1


@pytest.mark.slow
def test_answers_a_question(loaded: pretrained.Pretrained) -> None:
    tokenizer = loaded.tokenizer
    question = "What is the capital of France?"
    prompt = tokenizer.chat_prefix + question + tokenizer.chat_suffix
    tokens = tokenizer.encode(prompt + "The capital of France is")
    found = reading.read(loaded.model, tokens, chunk=32)
    best = int(np.argmax(loaded.model.logits(found.residual[None, -1:])[0, 0]))
    assert tokenizer.decode([best]) == " Paris"
