"""Passages of prose, code and tables, as tokens."""

import functools
import importlib
import pathlib
import sysconfig
from random import Random

import numpy as np
from jaxtyping import Int

from experiments.model.tokenizer import Tokenizer

KINDS = ("prose", "code", "tables")

SPLITS = ("tuning", "reporting")
"""Passages that settings may be chosen on, and those that figures are reported on."""

_CITIES = (
    "Oslo Quito Lagos Perth Turin Osaka Davao Leeds Miami Sofia Tunis Varna Basel Delhi Accra Hanoi"
)

# Large enough, of the standard library of every supported Python, and hand-written.
_FILES = {
    "tuning": ("argparse.py", "difflib.py", "inspect.py", "tarfile.py", "locale.py", "pickle.py"),
    "reporting": ("textwrap.py", "shutil.py", "zipfile.py", "datetime.py", "mailbox.py", "ast.py"),
}


def passage(
    kind: str, split: str, number: int, length: int, tokenizer: Tokenizer
) -> Int[np.ndarray, " n"]:
    """A passage of some tokens.

    Args:
      kind: `"prose"`, parts of the topics of Python's help; `"code"`, files of its standard
        library; `"tables"`, readings of weather stations that are drawn at random.
      split: `"tuning"` or `"reporting"`; the two have no text in common.
      number: which passage.
      length: tokens.
      tokenizer: of the model.

    Raises:
      ValueError: kind or split is unknown, or there is no such passage so long.
    """
    if kind not in KINDS or split not in SPLITS:
        raise ValueError(
            f"kind must be one of {KINDS} and split one of {SPLITS}, got {kind!r} and {split!r}"
        )
    if number < 0 or length < 1:
        raise ValueError(f"number and length must be positive, got {number} and {length}")
    found = {"prose": _prose, "code": _code, "tables": _table}[kind](split, number, length)
    tokens = tokenizer.encode(found)
    if len(tokens) < length:
        raise ValueError(
            f"{split} passage {number} of {kind} has {len(tokens)} tokens, not {length}"
        )
    return np.asarray(tokens[:length], np.int32)


# Characters of prose, code and tables that surely hold a token.
_CHARACTERS = 8


@functools.cache
def _topics() -> str:
    topics = importlib.import_module("pydoc_data.topics").topics
    return " ".join(topics[name] for name in sorted(topics))


def _prose(split: str, number: int, length: int) -> str:
    # The first half of the topics is for tuning.
    half = len(_topics()) // 2
    text = _topics()[:half] if split == "tuning" else _topics()[half:]
    start = number * length * _CHARACTERS
    return text[start : start + length * _CHARACTERS]


def _code(split: str, number: int, length: int) -> str:
    del length
    files = _FILES[split]
    if number >= len(files):
        return ""
    path = pathlib.Path(sysconfig.get_paths()["stdlib"]) / files[number]
    if not path.exists():
        path = path.with_suffix("") / "__init__.py"
    return path.read_text(encoding="utf-8")


def _table(split: str, number: int, length: int) -> str:
    random = Random(f"{split} {number}")
    cities = _CITIES.split()
    lines = ["city,day,temperature,rain,wind,station"]
    while len(lines) * 8 < length * 2:
        lines.append(
            f"{random.choice(cities)},{random.randrange(1, 366)},{random.uniform(-10, 38):.1f},"
            f"{random.choice(('yes', 'no'))},{random.randrange(90)},{random.randrange(100, 999)}"
        )
    return "\n".join(lines)
