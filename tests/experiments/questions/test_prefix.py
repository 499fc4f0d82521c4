"""The command that keeps a compressed document in a file, on a tiny model."""

import pytest

import coreset_jax as cj
from experiments.model.pretrained import Pretrained
from experiments.questions import prefix
from tests.experiments.questions.test_questions import model

__all__ = ["model"]

TEXT = "Keys are kept and values are fitted. " * 6


@pytest.mark.slow
def test_what_was_saved_answers_alike(model: Pretrained, tmp_path) -> None:
    made, document = prefix.compress(model, TEXT, ratio=4, again=False)
    assert made.length == document.length
    pairs = sum(int((layer.indices >= 0).sum()) for layer in made.layers)
    assert pairs <= made.length // 4 * document.keys.shape[0] * document.keys.shape[1] + 128
    cj.prefixes.save(tmp_path / "document", made)
    loaded = cj.prefixes.load(tmp_path / "document", model=model.name)
    questions = ["What is kept?", "And what is fitted?"]
    answers = [prefix.ask(model, each, questions, 5) for each in (made, loaded)]
    assert [text for text, _ in answers[0]] == [text for text, _ in answers[1]]
    assert all(speed > 0 for _, speed in answers[0])


def test_bad_words_are_refused(model: Pretrained, tmp_path) -> None:
    text, folder = tmp_path / "text", str(tmp_path / "nowhere" / "out")
    text.write_text(" \n")
    with pytest.raises(ValueError, match="--text must name"):
        prefix.check_compression(None, 8, "out")
    with pytest.raises(FileNotFoundError, match="names no file"):
        prefix.check_compression(str(tmp_path / "nothing"), 8, "out")
    with pytest.raises(ValueError, match="empty"):
        prefix.check_compression(str(text), 8, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="at least 2"):
        prefix.check_compression(str(text), 1, "out")
    with pytest.raises(FileNotFoundError, match="folder"):
        prefix.check_compression(str(text), 8, folder)
    with pytest.raises(ValueError, match="context"):
        prefix.compress(model, TEXT * 1000, ratio=4, again=False)
    made = cj.prefixes.Prefix((), 10, model.name)
    with pytest.raises(ValueError, match="question"):
        prefix.ask(model, made, [" "], 5)
    with pytest.raises(ValueError, match="context"):
        prefix.ask(model, made, ["Why?"], 10**6)
