"""Text to tokens and back."""

import json
import pathlib

import pytest

from experiments.model import tokenizer
from tests.experiments.model.tiny_llama import (
    SPECIAL,
    tokenizer_fields,
    vocabulary,
    write_tokenizer,
)

pytest.importorskip("tokenizers")

TEXT = "he said: hello \n\n  12345 naïve 語 <|im_end|>\n it's"


def pieces(made: tokenizer.Tokenizer, text: str) -> list[str]:
    return [made.decode([each]) for each in made.encode(text)]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_text_comes_back(pre: str) -> None:
    made = tokenizer.from_gguf(tokenizer_fields(pre))
    assert made.decode(made.encode(TEXT)) == TEXT
    assert made.encode("") == []


def test_merges_and_digits() -> None:
    hello = ["hell", "o", " ", "1", "2", "3", "4"]
    for pre in ("smollm", "qwen2"):
        assert pieces(tokenizer.from_gguf(tokenizer_fields(pre)), "hello 1234") == hello
    for pre in ("gpt-2", "llama-bpe"):
        assert pieces(tokenizer.from_gguf(tokenizer_fields(pre)), "hello 1234")[3:] == ["123", "4"]
    # Blanks at the end of a line belong to the newline in the newer models.
    assert pieces(tokenizer.from_gguf(tokenizer_fields("gpt-2")), "a   b") == ["a", "  ", " ", "b"]


def test_special_tokens_are_found() -> None:
    made = tokenizer.from_gguf(tokenizer_fields())
    tokens = made.encode(made.chat_prefix + "hi" + made.chat_suffix)
    assert tokens[0] == SPECIAL.index("<|im_start|>")
    assert tokens.count(made.end_of_turn) == 1
    assert made.end_of_turn == SPECIAL.index("<|im_end|>")
    assert made.chat_prefix == "<|im_start|>user\n"
    assert made.chat_suffix == "<|im_end|>\n<|im_start|>assistant\n"
    assert made.vocabulary == len(vocabulary())


def test_first_token_of_a_text() -> None:
    made = tokenizer.from_gguf(tokenizer_fields(add_bos_token=True))
    assert made.beginning == "<|endoftext|>"
    assert made.chat_prefix.startswith("<|endoftext|>")


def test_model_without_a_chat() -> None:
    tokens = [token.replace("im_", "") for token in vocabulary()]
    made = tokenizer.from_gguf(tokenizer_fields(tokens=tokens))
    assert (made.chat_prefix, made.chat_suffix) == ("", "")
    assert made.end_of_turn == tokens.index("<|end|>")


def test_folder_and_gguf_agree(tmp_path: pathlib.Path) -> None:
    write_tokenizer(tmp_path)
    read, made = tokenizer.from_folder(tmp_path), tokenizer.from_gguf(tokenizer_fields())
    assert read.encode(TEXT) == made.encode(TEXT)
    assert read.end_of_turn == made.end_of_turn
    assert read.beginning == ""


def test_folder_says_whether_a_text_has_a_first_token(tmp_path: pathlib.Path) -> None:
    write_tokenizer(tmp_path)
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer.from_folder(tmp_path).beginning == "<|endoftext|>"
    del settings["add_bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer.from_folder(tmp_path).beginning == ""
    file = tmp_path / "tokenizer.json"
    inside = json.loads(file.read_text("utf-8"))
    inside["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [2], "tokens": ["<|endoftext|>"]}
        },
    }
    file.write_text(json.dumps(inside))
    made = tokenizer.from_folder(tmp_path)
    assert made.beginning == "<|endoftext|>"
    # It is the caller's to write.
    assert made.encode("he") == [vocabulary().index("he")]


def test_what_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="'gpt2', a byte-level BPE, got 'llama'"):
        tokenizer.from_gguf(tokenizer_fields(model="llama"))
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre must be one of .*'deepseek'"):
        tokenizer.from_gguf(tokenizer_fields("deepseek"))
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer"):
        tokenizer.from_folder(tmp_path)
