"""What every experiment keeps and shows: finished cells, tables, figures, progress.

A *cell* is one point of an experiment's grid. Its settings, a JSON object, are its name; what was
measured there is kept as one line of a JSON-lines file, so that an interrupted run goes on where
it stopped.
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
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import rich.box
import rich.console
import rich.measure
import rich.progress
import rich.table
from absl import logging

import coreset_jax

Item = TypeVar("Item")

# JSON has no word for these, and a reader in another language may refuse Python's.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# Without a terminal a progress line goes to the log this often, in seconds.
_LOG_EVERY = 15.0


def start_logging() -> None:
    """Shows the log of an experiment, and of JAX only what went wrong."""
    logging.set_verbosity(logging.INFO)
    # JAX tells of every backend that it does not find.
    logging.get_absl_logger().manager.getLogger("jax").setLevel("WARNING")


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


def stamp(seed: object) -> str:
    """One line that names the seed or seeds and the versions, to print under a table."""
    return ", ".join([f"seed {seed}", *(f"{name} {text}" for name, text in versions().items())])


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


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str] | None],
    *,
    left: Sequence[str] = (),
    caption: str | None = None,
    file: Any = None,
) -> None:
    """Prints one aligned table, never folded, whatever the width of the terminal.

    Args:
      title: what the table shows, with units.
      columns: headers.
      rows: cells as text; ``None`` draws a line between groups.
      left: the columns to align left (names); the others, figures, align right.
      caption: a line below the table.
      file: where to print; ``None`` is the standard output.
    """
    # Title and caption stay out of the table, which would fold them to its own width.
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in columns:
        justify: Any = "left" if column in left else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    wide = rich.console.Console(width=10_000)
    width = rich.measure.Measurement.get(wide, wide.options, table).maximum
    console = rich.console.Console(
        file=file or sys.stdout, width=width, highlight=False, markup=False
    )
    console.print(title, style="bold", soft_wrap=True)
    console.print(table)
    if caption is not None:
        console.print(caption, soft_wrap=True)
    console.print()


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


def track(
    items: Sequence[Item], description: str, *, label: Callable[[Item], str] = str
) -> Iterator[Item]:
    """Yields the items while showing how far along they are and what is left.

    A bar on a terminal, lines in the log elsewhere.

    Args:
      items: what is worked through.
      description: the name of the work.
      label: a few words for the item at hand.
    """
    if not sys.stderr.isatty():
        started = shown = time.monotonic()
        for count, item in enumerate(items):
            now = time.monotonic()
            if count == 0 or now - shown > _LOG_EVERY:
                logging.info(
                    "%s %d/%d, %.0f s: %s",
                    description,
                    count,
                    len(items),
                    now - started,
                    label(item),
                )
                shown = now
            yield item
        elapsed = time.monotonic() - started
        logging.info("%s %d/%d, %.0f s: done", description, len(items), len(items), elapsed)
        return
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[label]}"),
        console=rich.console.Console(stderr=True),
    ) as bar:
        task = bar.add_task(description, total=len(items), label="")
        for item in items:
            bar.update(task, label=label(item))
            yield item
            bar.advance(task)
