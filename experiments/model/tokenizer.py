"""Text to tokens and back: byte-level BPE out of a GGUF file, or a Hugging Face `tokenizer.json`.

Needs the package `tokenizers`, which `make models` installs.
"""

from __future__ import annotations

import importlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Chat(NamedTuple):
    """What stands around a user's words.

    Attributes:
      prefix: before them.
      suffix: behind them; the model's answer follows.
      end: the token that ends the answer.
    """

    prefix: str
    suffix: str
    end: str


# By the token that tells which of them a model was taught.
_CHATS = {
    "<|im_start|>": Chat("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "<|start_header_id|>": Chat(
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}

# Words of Llama 3 and Qwen2, which differ in how many digits make one.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"llama-bpe": "{1,3}", "qwen2": ""}
_PRE_TOKENIZERS = ("gpt-2", "smollm", *_DIGITS)

# `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4


class Tokenizer:
    """Text to tokens and back.

    Attributes:
      json: what `tokenizers.Tokenizer.from_str` reads.
      end_of_text: the token that ends a text, if there is one.
      beginning: the token that every text begins with, empty if none; see `chat_prefix`.
      vocabulary: one more than the largest token.
      chat_prefix: what stands before a user's words, `beginning` included; empty for a model
        without a chat that is known here.
      chat_suffix: what stands behind them, before the answer.
      end_of_turn: the token at which an answer ends.
    """

    def __init__(self, json: str, *, end_of_text: str | None = None, beginning: str = "") -> None:
        """Make a tokenizer.

        Args:
          json: what `tokenizers.Tokenizer.from_str` reads.
          end_of_text: the token that ends a text, if there is one.
          beginning: the token that every text begins with, if there is one.

        Raises:
          ValueError: `json` is no tokenizer, or none of the tokens ends a turn.
        """
        tokenizers = _package()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # The package raises nothing narrower.
            raise ValueError(f"json is no tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.json, self.end_of_text, self.beginning = json, end_of_text, beginning
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = max(known.values()) + 1
        chat = next((chat for token, chat in _CHATS.items() if token in known), None)
        self.chat_prefix = beginning + chat.prefix if chat else ""
        self.chat_suffix = chat.suffix if chat else ""
        end = chat.end if chat else end_of_text
        if end not in known:
            raise ValueError(f"json must hold the token that ends a turn, but not {end!r}")
        self.end_of_turn: int = known[end]
        # Behind an answer and before a user's further words.
        self._next_turn = f"{chat.end}\n{chat.prefix}" if chat else "\n\n"

    def document(self, text: str) -> list[int]:
        """The tokens of a text that a conversation begins with, and questions follow."""
        return self.encode(f"{self.chat_prefix}Read this text.\n\n{text}")

    def question(self, text: str, *, first: bool = True) -> list[int]:
        """The tokens of a question behind a document or, further ones, behind an answer.

        Args:
          text: the question.
          first: whether it is the first one behind the document.
        """
        before = "\n\n" if first else self._next_turn
        return self.encode(f"{before}{text}{self.chat_suffix}")

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; special tokens in it, such as `<|im_start|>`, are found.

        No token is added: `beginning` is the caller's to write.
        """
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included; broken UTF-8 becomes U+FFFD."""
        return str(self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=False))


def from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """Make the tokenizer that a GGUF file describes.

    Args:
      fields: the file's metadata, of which the names that begin with `tokenizer.ggml.` are read.

    Raises:
      KeyError: an entry is missing.
      ValueError: it is another than byte-level BPE, or splits words in a way not known here.
    """
    tokenizers = _package()
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model must be 'gpt2', a byte-level BPE, got {kind!r}")
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre must be one of {_PRE_TOKENIZERS}, got {pre!r}")
    tokens, merges, kinds = (
        fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type")
    )
    special = [
        tokenizers.AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: place for place, token in enumerate(tokens)},
            [tuple(merge.split(" ")) for merge in merges],
            ignore_merges=pre == "llama-bpe",
        )
    )
    parts = tokenizers.pre_tokenizers
    if pre in _DIGITS:
        words = tokenizers.Regex(_WORDS % _DIGITS[pre])
        split = parts.Split(words, behavior="isolated")
        in_bytes = parts.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = parts.Sequence([split, in_bytes])
    else:
        in_bytes = parts.ByteLevel(add_prefix_space=False)
        digits = [parts.Digits(individual_digits=True)] if pre == "smollm" else []
        made.pre_tokenizer = parts.Sequence([*digits, in_bytes])
    if pre == "qwen2":
        made.normalizer = tokenizers.normalizers.NFC()
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_tokens(special)
    end, first = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "bos"))
    return Tokenizer(
        made.to_str(),
        end_of_text=None if end is None else tokens[end],
        beginning=tokens[first]
        if first is not None and fields.get("tokenizer.ggml.add_bos_token")
        else "",
    )


def from_folder(folder: pathlib.Path) -> Tokenizer:
    """Make the tokenizer of a Hugging Face folder.

    Args:
      folder: holds `tokenizer.json`, and `tokenizer_config.json` where the ends are named.

    Raises:
      FileNotFoundError: there is no `tokenizer.json`.
      ValueError: it is no tokenizer.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"path names a folder without tokenizer.json: {folder}")
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text("utf-8")) if settings_file.is_file() else {}
    text = file.read_text("utf-8")
    end, beginning = _content(settings.get("eos_token")), _content(settings.get("bos_token"))
    # Llama's file adds its first token after the words are split, and says so here only.
    added = f'"{beginning}"' in json.dumps(json.loads(text).get("post_processor"))
    starts = settings.get("add_bos_token", added)
    return Tokenizer(text, end_of_text=end, beginning=beginning if starts and beginning else "")


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _package() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the package tokenizers is missing, which reads a pretrained model's text; "
            "make models installs it",
            name="tokenizers",
        ) from error
