"""Finished cells on disk, from which an interrupted experiment resumes, and files replaced whole.

A *cell* is one point of an experiment's grid. Its settings, a JSON object, identify it; a line of a
JSON-lines file has them and what was measured there.
"""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging

import coreset_jax
from experiments.common import progress

Cell = TypeVar("Cell")

# JSON has no word for these, and a reader in another language may refuse Python's.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def versions() -> dict[str, str]:
    """The versions and the backend that a figure was made with."""
    return {
        "coreset_jax": coreset_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def _plain(value: Any) -> Any:
    """``value`` in the types that strict JSON knows."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _restored(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_restored(entry) for entry in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


@functools.cache
def digest(*paths: str | os.PathLike[str]) -> str:
    """A short digest of what some files hold, for the settings of cells that depend on it."""
    contents = b"".join(pathlib.Path(path).read_bytes() for path in paths)
    return hashlib.sha256(contents).hexdigest()[:16]


def source_digest(*modules: types.ModuleType) -> str:
    """A digest of the sources of some modules, for cells whose figures depend on their code."""
    return digest(*(str(module.__file__) for module in modules))


@functools.cache
def code_digest() -> str:
    """A digest of the library's sources: figures of other code are other figures."""
    root = pathlib.Path(coreset_jax.__file__).parent
    return digest(*sorted(root.rglob("*.py")))


def cell_key(settings: Mapping[str, Any]) -> str:
    """The name of a cell: a digest of its settings and of the library's code."""
    named = {"coreset_jax": code_digest(), "settings": _plain(settings)}
    text = json.dumps(named, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def labeled_by(*names: str) -> Callable[[Mapping[str, Any]], str]:
    """A label of a cell of settings: the values that it has of these settings."""
    return lambda cell: " ".join(str(cell[name]) for name in names if name in cell)


class Results:
    """An append-only JSON-lines file of finished cells.

    Each line is one object: ``key``, ``settings``, ``measurements``, ``versions``, ``finished``. A
    proper prefix of an object is never an object, so a line that was cut short by an interruption
    cannot be read as a whole one: it does not parse, is passed over, and its cell is computed
    again. Where a cell appears twice the later line wins.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "cells.jsonl"
    >>> Results(path).put({"size": 256}, {"error": 0.02})
    >>> Results(path).get({"size": 256})
    {'error': 0.02}
    >>> Results(path).get({"size": 512}) is None
    True
    """

    def __init__(self, path: str | os.PathLike[str], *, fresh: bool = False):
        """Opens the store, making its folder where needed.

        Args:
          path: the JSON-lines file; it need not exist.
          fresh: forget what the file holds, so that every cell is computed again. The lines stay
            until their cells are finished anew.
        """
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cells: dict[str, dict[str, Any]] = {}
        if fresh or not self.path.exists():
            return
        for line in self.path.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
                self._cells[record["key"]] = _restored(record["measurements"])
            except (ValueError, KeyError, TypeError):
                if line.strip():
                    logging.warning("%s: passing over a broken line", self.path)

    def __len__(self) -> int:
        return len(self._cells)

    def get(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured in the cell with these settings by this version, or ``None``."""
        return self._cells.get(cell_key(settings))

    def put(self, settings: Mapping[str, Any], measurements: Mapping[str, Any]) -> None:
        """Appends a finished cell; it is on the disk when this returns.

        Args:
          settings: the cell's settings, JSON types and arrays.
          measurements: what was measured there, likewise.
        """
        record = {
            "key": cell_key(settings),
            "settings": _plain(settings),
            "measurements": _plain(measurements),
            "versions": versions(),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with open(self.path, "a+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                # After a line that was cut short, start on a fresh one or both are lost.
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
            os.fsync(file.fileno())
        self._cells[record["key"]] = _restored(record["measurements"])

    def complete(
        self,
        cells: Sequence[Cell],
        measure: Callable[[Cell], Mapping[str, Any]],
        description: str,
        *,
        settings: Callable[[Cell], Mapping[str, Any]],
        label: Callable[[Cell], str] = str,
    ) -> list[dict[str, Any]]:
        """Measures the cells that the store lacks, and stores each when it is finished.

        Args:
          cells: all cells; those of equal settings are measured once.
          measure: measures one cell.
          description: the name of the work, for the progress bar.
          settings: the settings of a cell.
          label: a few words for a cell, for the progress bar.

        Returns:
          What was measured in each of the cells, in their order.
        """
        keyed = {cell_key(settings(cell)): cell for cell in cells}
        missing = [cell for key, cell in keyed.items() if key not in self._cells]
        logging.info("%d cells, %d of them finished before", len(keyed), len(keyed) - len(missing))
        for cell in progress.track(missing, description, label=label):
            self.put(settings(cell), measure(cell))
        return [self._cells[cell_key(settings(cell))] for cell in cells]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A temporary path beside ``path`` that takes its place once the block ends without error.

    A reader, or an interrupted run, thus sees the old file or the new one, never a part of it.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
