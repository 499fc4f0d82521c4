"""Texts of three kinds that every Python comes with, and none of which the model was trained on."""

import importlib

import numpy as np

from experiments.model import text

KINDS = ("code", "prose", "tables")

# From here on a code page is nothing but a table.
_TABLE = b"decoding_table = ("


def passages(kind: str, count: int, length: int, seed: int) -> np.ndarray:
    """Some passages of a kind, none of which overlap.

    Args:
      kind: `"code"`, the beginnings of held-out files of the standard library; `"prose"`, the
        topics of Python's own help; `"tables"`, the decoding tables of its code pages.
      count: how many.
      length: bytes of each.
      seed: which.

    Returns:
      int32 `[count, length]`.

    Raises:
      ValueError: the kind is unknown, or there are not so many passages so long.
    """
    if kind == "code":
        return text.beginnings("heldout", count, length, seed)
    if kind == "prose":
        found = _prose(length)
    elif kind == "tables":
        found = _tables(length)
    else:
        raise ValueError(f"kinds must be among {KINDS}, got {kind!r}")
    if len(found) < count:
        raise ValueError(f"{kind} has {len(found)} passages of {length} bytes, {count} asked for")
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return np.stack([np.frombuffer(found[i], np.uint8) for i in order]).astype(np.int32)


def _prose(length: int) -> list[bytes]:
    topics = importlib.import_module("pydoc_data.topics").topics
    joined = "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()
    return [joined[start : start + length] for start in range(0, len(joined) - length + 1, length)]


def _tables(length: int) -> list[bytes]:
    found = []
    for path in sorted((text.stdlib_root() / "encodings").glob("*.py")):
        _, mark, rest = path.read_bytes().partition(_TABLE)
        if len(mark + rest) >= length:
            found.append((mark + rest)[:length])
    return found
