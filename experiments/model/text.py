"""The corpus: the source of Python's own standard library, split by file.

Every machine that runs this code already holds the corpus, so nothing is downloaded. A file is held
out when a hash of its relative path says so: the split is the same on every platform and for every
version of Python that has the file.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import sysconfig
from typing import Literal

import numpy as np
from jaxtyping import Int32, UInt8

Split = Literal["train", "heldout"]

BOUNDARY = 0
"""The byte that stands before every file; no Python source contains it."""

HELDOUT_DIVISOR = 25
"""One path in this many is held out."""

CUE = 32
"""Bytes of a repeated passage from which the model cannot yet know that it is one."""

DEMO_PATH = "pdb.py"
"""A held-out file of more than 60 kB, in every standard library, outside of its `test` package."""

# Generated files: near-twins of one another (the code pages), tables, or bulk text. To hold some of
# them out would measure memory of the others.
_EXCLUDED_DIRECTORIES = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "encodings",
        "pydoc_data",
        "lib2to3/tests/data",
    }
)
_EXCLUDED_FILES = frozenset({"stringprep.py"})
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


def split_of(relative_path: str) -> Split:
    """Return the split of a file, a function of its path alone.

    Args:
      relative_path: path below the standard library, with `/` between its parts.

    Returns:
      `"heldout"` for about one path in `HELDOUT_DIVISOR`, else `"train"`.
    """
    digest = hashlib.sha256(relative_path.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_DIVISOR == 0 else "train"


def stdlib_root() -> pathlib.Path:
    """Return the folder that holds the running interpreter's standard library."""
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


@functools.cache
def stdlib_files(split: Split) -> tuple[pathlib.Path, ...]:
    """List the corpus files of one split, sorted by relative path.

    Args:
      split: `"train"` or `"heldout"`.

    Returns:
      Absolute paths of non-empty `.py` files. A standard library without `test/`, as Debian
      packages it, gives fewer of them.

    Raises:
      ValueError: `split` is neither of the two.
      FileNotFoundError: the standard library has no source files, as in a zipped installation.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    root = stdlib_root()
    found: list[tuple[str, pathlib.Path]] = []
    for directory, folders, names in os.walk(root):
        parent = pathlib.Path(directory).relative_to(root)
        folders[:] = [name for name in folders if not _excluded_folder((parent / name).as_posix())]
        for name in names:
            relative = (parent / name).as_posix()
            if not name.endswith(".py") or name.startswith(_EXCLUDED_PREFIXES):
                continue
            if relative in _EXCLUDED_FILES or split_of(relative) != split:
                continue
            path = root / relative
            if path.stat().st_size > 0:
                found.append((relative, path))
    if not found:
        raise FileNotFoundError(f"no {split} .py files below the standard library at {root}")
    return tuple(path for _, path in sorted(found))


def _excluded_folder(relative: str) -> bool:
    name = relative.rsplit("/", 1)[-1]
    return bool({relative, name} & _EXCLUDED_DIRECTORIES) or name.startswith(_EXCLUDED_PREFIXES)


def read_tokens(path: str | os.PathLike[str]) -> UInt8[np.ndarray, " length"]:
    """Read a file as byte tokens.

    Args:
      path: any file.

    Returns:
      Its bytes, uint8 `[length]`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is empty.
    """
    tokens = np.frombuffer(pathlib.Path(path).read_bytes(), dtype=np.uint8)
    if tokens.size == 0:
        raise ValueError(f"path names an empty file: {os.fspath(path)!r}")
    return tokens


@functools.cache
def stream(split: Split) -> UInt8[np.ndarray, " length"]:
    """Join all files of a split into one stream, each behind a `BOUNDARY` byte.

    Args:
      split: `"train"` or `"heldout"`.

    Returns:
      uint8 `[length]`, ordered by relative path, so that neighbors in a package stay neighbors.
    """
    boundary = np.array([BOUNDARY], dtype=np.uint8)
    return np.concatenate(
        [part for path in stdlib_files(split) for part in (boundary, read_tokens(path))]
    )


def demo_text(length: int | None = None) -> UInt8[np.ndarray, " length"]:
    """Return a text that the shipped model has never seen, for demonstrations and benchmarks.

    Args:
      length: how many bytes to return from the start of the file, the whole of it by default.

    Returns:
      The bytes of `DEMO_PATH`, a held-out file; uint8 `[length]`.

    Raises:
      ValueError: `length` is not between 1 and the size of the file.
    """
    tokens = read_tokens(stdlib_root() / DEMO_PATH)
    if length is None:
        return tokens
    if not 1 <= length <= tokens.size:
        raise ValueError(
            f"length must be between 1 and {tokens.size} for {DEMO_PATH}, got {length}"
        )
    return tokens[:length]


def windows(
    tokens: UInt8[np.ndarray, " length"], count: int, width: int
) -> Int32[np.ndarray, "count width"]:
    """Cut `count` evenly spaced windows out of a stream: a fixed sample for estimates.

    Args:
      tokens: bytes `[length]`.
      count: number of windows, at least 1.
      width: bytes a window, at most `length`.

    Returns:
      int32 `[count, width]`.

    Raises:
      ValueError: `tokens` is not of rank 1 or is shorter than a window.
    """
    if tokens.ndim != 1 or count < 1 or not 1 <= width <= tokens.size:
        raise ValueError(
            "tokens must be [length] with length >= width >= 1 and count >= 1, got shape "
            f"{tokens.shape}, width {width}, count {count}"
        )
    starts = np.linspace(0, tokens.size - width, count).astype(np.int64)
    return np.stack([tokens[start : start + width] for start in starts]).astype(np.int32)


def beginnings(
    split: Split, count: int, length: int, seed: int
) -> Int32[np.ndarray, "count length"]:
    """Read the beginnings of some files that are long enough.

    Args:
      split: `"train"` or `"heldout"`.
      count: how many files.
      length: bytes of each.
      seed: which files.

    Returns:
      int32 `[count, length]`.

    Raises:
      ValueError: there are not so many files so long.
    """
    files = [path for path in stdlib_files(split) if path.stat().st_size >= length]
    if len(files) < count:
        raise ValueError(f"{split} has {len(files)} files of {length} bytes, {count} are asked for")
    order = np.random.default_rng(seed).permutation(len(files))[:count]
    return np.stack([read_tokens(files[i])[:length] for i in order]).astype(np.int32)


def with_repeats(
    tokens: Int32[np.ndarray, "count length"], prompt: int
) -> Int32[np.ndarray, "count length"]:
    """Replace what follows the prompts of some texts by passages of these prompts.

    The passages are spread over the prompts, from a fifth to four fifths of them. What they cost is
    told of the bytes from `CUE` on.
    """
    length = tokens.shape[1] - prompt
    last = max(prompt - length, 0)
    starts = np.linspace(prompt // 5, min(4 * prompt // 5, last), tokens.shape[0]).astype(int)
    copies = [row[start : start + length] for row, start in zip(tokens, starts, strict=True)]
    return np.concatenate([tokens[:, :prompt], np.stack(copies)], axis=1)
