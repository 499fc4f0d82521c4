"""The tables of the leaderboard."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.common.methods import CATEGORIES, REFERENCE, Method
from experiments.common.metrics import geometric_mean
from experiments.common.tables import Row, print_table

Found = list[tuple[dict[str, Any], dict[str, Any]]]


TASKS = ("continuation", "repeated")

# What is lost in bits, by its name in the results and in the verdict.
LOSSES = {
    "continuation": "continuation",
    "continuation_divergence": "continuation, divergence",
    "repeated": "repeated",
    "repeated_divergence": "repeated, divergence",
}


class Entry(NamedTuple):
    """What one method did at one ratio.

    Attributes:
      mean: mean errors `[kinds, seeds, passages, layers, heads]`.
      tail: 99th percentiles, likewise.
      continuation: bits a byte over those of the full cache `[kinds, seeds, passages]`.
      repeated: likewise.
      continuation_divergence: bits a byte that would be lost if the full cache's predictions were
        the truth, likewise.
      repeated_divergence: likewise.
      seconds: of a compression, in the median.
      bytes: of the coreset of a prompt, in the mean.
    """

    mean: np.ndarray
    tail: np.ndarray
    continuation: np.ndarray
    repeated: np.ndarray
    continuation_divergence: np.ndarray
    repeated_divergence: np.ndarray
    seconds: float
    bytes: float

    def by_cell(self, metric: str) -> np.ndarray:
        """Errors averaged over seeds and passages `[kinds, layers, heads]`.

        One that is not finite is infinite: nothing is worse.
        """
        errors = np.mean(getattr(self, metric), axis=(1, 2))
        return np.where(np.isfinite(errors), errors, np.inf)

    def by_passage(self, loss: str) -> np.ndarray:
        """Bits a byte averaged over seeds `[kinds, passages]`."""
        return np.mean(getattr(self, loss), axis=1)


class Board(NamedTuple):
    """Everything that was measured.

    Attributes:
      methods: in the order of the table.
      ratios: ascending.
      kinds: of texts.
      entries: by name of the method and ratio; those that failed are missing.
      failures: why they did.
      exact: bits a byte of the full cache, by task.
      bytes: of the full cache of a prompt.
    """

    methods: tuple[Method, ...]
    ratios: list[int]
    kinds: list[str]
    entries: dict[tuple[str, int], Entry]
    failures: dict[tuple[str, int], str]
    exact: dict[str, float]
    bytes: int

    def of(self, category: str) -> list[Method]:
        """The methods of a class."""
        return [method for method in self.methods if method.category == category]

    def measured(self, methods: Sequence[Method], ratio: int) -> list[tuple[Method, Entry]]:
        """Those of some methods that have an entry at a ratio, with it."""
        names = [(method, (method.name, ratio)) for method in methods]
        return [(method, self.entries[name]) for method, name in names if name in self.entries]

    def seeds(self, method: Method) -> str:
        """How many seeds a method has, as text; none where it draws nothing."""
        found = [entry for (name, _), entry in self.entries.items() if name == method.name]
        return str(found[0].mean.shape[1]) if found and method.has("draws") else "–"

    def over_reference(self, name: str, ratio: int, metric: str) -> float:
        """A method's error over that of the reference, in the geometric mean over all cells."""
        if (name, ratio) not in self.entries or (REFERENCE, ratio) not in self.entries:
            return np.nan
        reference = self.entries[REFERENCE, ratio].by_cell(metric)
        return geometric_mean(self.entries[name, ratio].by_cell(metric) / reference)


def gather(found: Found, methods: tuple[Method, ...]) -> Board:
    """The board of all cells, given their settings and measurements, and the methods among them."""
    exact = {cell["kind"]: known for cell, known in found if cell["method"] == "exact"}
    grouped: dict[tuple[str, int], Found] = {}
    for cell, known in found:
        if cell["method"] != "exact":
            grouped.setdefault((cell["method"], cell["ratio"]), []).append((cell, known))
    entries, failures = {}, {}
    for place, cells in grouped.items():
        failed = [known["failed"] for _, known in cells if "failed" in known]
        if failed:
            failures[place] = failed[0]
        else:
            entries[place] = _entry(cells, exact)
    means = {task: float(np.mean([known[task] for known in exact.values()])) for task in TASKS}
    ratios, size = sorted({ratio for _, ratio in grouped}), next(iter(exact.values()))["bytes"]
    return Board(methods, ratios, list(exact), entries, failures, means, size)


def _entry(cells: Found, exact: dict[str, dict[str, Any]]) -> Entry:
    """All kinds and seeds of one method at one ratio."""
    known = {(cell["kind"], cell["seed"]): each for cell, each in cells}
    seeds = list(dict.fromkeys(seed for _, seed in known))

    def grid(task: str) -> np.ndarray:
        return np.array([[known[kind, seed][task] for seed in seeds] for kind in exact])

    def loss(task: str) -> np.ndarray:
        return grid(task) - np.array([each[task] for each in exact.values()])[:, None]

    return Entry(
        grid("mean"),
        grid("tail"),
        loss("continuation"),
        loss("repeated"),
        grid("continuation_divergence"),
        grid("repeated_divergence"),
        float(np.median(grid("seconds"))),
        float(np.mean(grid("bytes"))),
    )


def format_number(value: float, style: str) -> str:
    """A figure as text; a dash where there is none."""
    return format(value, style) if np.isfinite(value) else "–"


class _Column(NamedTuple):
    """A column of a table.

    Attributes:
      read: a figure of an entry.
      ratio: that of the entries.
      style: how the figure is written.
      spread: how uncertain it is, if that is known.
    """

    read: Callable[[Entry], float]
    ratio: int
    style: str = ".4f"
    spread: Callable[[Entry], float] | None = None


def _texts(board: Board, methods: Sequence[Method], column: _Column) -> list[str]:
    """A column of the methods of a class as text, its smallest figures marked."""
    entries = [board.entries.get((method.name, column.ratio)) for method in methods]
    values = [np.nan if entry is None else column.read(entry) for entry in entries]
    least = min(filter(np.isfinite, values), default=None)
    texts = []
    for entry, value in zip(entries, values, strict=True):
        text = ("*" if value == least else "") + format_number(value, column.style)
        if entry is not None and column.spread is not None and np.isfinite(value):
            text += f" ± {format_number(column.spread(entry), column.style)}"
        texts.append(text)
    return texts


def _print_columns(
    board: Board, title: str, headers: list[str], columns: Sequence[_Column], caption: str
) -> None:
    """Print a row for each method, with the best of each class and column marked."""
    rows: list[Row] = []
    for category in CATEGORIES:
        methods = board.of(category)
        if not methods:
            continue
        cells = [_texts(board, methods, column) for column in columns]
        rows += [None] if rows else []
        rows += [
            [category if number == 0 else "", method.title, board.seeds(method), *row]
            for number, (method, *row) in enumerate(zip(methods, *cells, strict=True))
        ]
    named = ["class", "method", "seeds", *headers]
    print_table(title, named, rows, left=("class", "method"), caption=caption)


def mean_loss(loss: str, entry: Entry) -> float:
    """Bits a byte in the mean over seeds and passages; one of `LOSSES`."""
    return float(np.mean(entry.by_passage(loss)))


def _loss(loss: str) -> Callable[[Entry], float]:
    return functools.partial(mean_loss, loss)


def standard_error(loss: str, entry: Entry) -> float:
    """Of the mean over passages, with the kinds of text given; NaN for one passage of each."""
    found = entry.by_passage(loss)
    kinds, passages = found.shape
    if passages < 2:
        return np.nan
    return float(np.sqrt(np.sum(np.var(found, axis=1, ddof=1)) / passages) / kinds)


def _size(task: str, entry: Entry) -> float:
    return float(np.mean(np.abs(entry.by_passage(task))))


def print_board(board: Board, ratio: int, texts: str, stamp: str) -> None:
    """Print a table for each task, one by kind of text, and why there are dashes.

    Args:
      board: what was measured.
      ratio: that of the tables by kind of text.
      texts: what was read, for the captions.
      stamp: seeds and versions.
    """
    headers = [f"{each}×" for each in board.ratios]
    norm = "mean norm of outputs; geometric mean over layers, heads, texts and seeds"
    over = "bits a byte over those of the full cache"
    bits = {task: f"{cost:.4f} bits a byte" for task, cost in board.exact.items()}
    changed = "divergence of the predictions"
    tasks: list[tuple[str, str, Callable[[Entry], float]]] = [
        (
            f"Attention error, mean over queries / {norm}",
            ".4f",
            lambda entry: geometric_mean(entry.mean),
        ),
        (
            f"Attention error, 99th percentile of queries / {norm}",
            ".4f",
            lambda entry: geometric_mean(entry.tail),
        ),
        (f"Continuation: {over}, {bits['continuation']}", "+.4f", _loss("continuation")),
        (f"A passage repeated: {over}, {bits['repeated']}", "+.4f", _loss("repeated")),
        (
            f"Continuation: {changed} from those of the full cache, bits a byte",
            ".4f",
            _loss("continuation_divergence"),
        ),
        (f"A passage repeated: {changed}, bits a byte", ".4f", _loss("repeated_divergence")),
        (
            "Compression of a prompt, all layers and heads, compiled: seconds, median",
            ".3g",
            lambda entry: entry.seconds,
        ),
        (
            f"Bytes of a prompt, all layers and heads: MB, the full cache {board.bytes / 1e6:.3f}",
            ".3f",
            lambda entry: entry.bytes / 1e6,
        ),
    ]
    caption = f"{texts}.\n*: the best of its class. seeds: – draws nothing. –: see below."
    for title, style, read in tasks:
        columns = [_Column(read, each, style) for each in board.ratios]
        _print_columns(board, title, headers, columns, caption)

    def error_of(kind: int) -> Callable[[Entry], float]:
        return lambda entry: geometric_mean(entry.mean[kind])

    def bits_of(kind: int) -> Callable[[Entry], float]:
        return lambda entry: float(np.mean(entry.continuation[kind]))

    kinds = range(len(board.kinds))
    _print_columns(
        board,
        f"By kind of text at {ratio}×: mean attention error, and bits a byte of the continuation",
        [f"{kind}, {what}" for what in ("error", "bits") for kind in board.kinds],
        [_Column(error_of(kind), ratio) for kind in kinds]
        + [_Column(bits_of(kind), ratio, "+.4f") for kind in kinds],
        f"{caption}\n{stamp}",
    )
    _print_columns(
        board,
        f"Bits a byte at {ratio}×: losses, with their standard errors, and how large they are",
        [*LOSSES.values(), *(f"{task}, size" for task in TASKS)],
        [
            _Column(_loss(loss), ratio, spread=functools.partial(standard_error, loss))
            for loss in LOSSES
        ]
        + [_Column(functools.partial(_size, task), ratio) for task in TASKS],
        "±: standard error of the mean over passages; – if there is one of each kind.\n"
        "size: mean over passages of the loss without its sign.",
    )
    labels = {method.name: method.label for method in board.methods}
    for (name, each), reason in board.failures.items():
        print(f"–: {labels[name]} at {each}×: {reason}")
    for (name, each), entry in board.entries.items():
        if not all(np.all(np.isfinite(part)) for part in entry):
            print(f"–: {labels[name]} at {each}×: not all figures are finite")
    print()
