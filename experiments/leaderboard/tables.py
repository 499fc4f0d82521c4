"""The tables of the leaderboard."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.common.methods import CATEGORIES, REFERENCE, Method
from experiments.common.metrics import geometric_mean
from experiments.common.tables import Row, print_table

Found = list[tuple[dict[str, Any], dict[str, Any]]]
Column = Callable[[Method], float | None]


class _Shown(NamedTuple):
    """A column of a table.

    Attributes:
      read: a figure of every method.
      style: in which it is written.
      spread: how uncertain it is, if that is known.
    """

    read: Column
    style: str
    spread: Column | None = None


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
    """The board of all cells.

    Args:
      found: settings and measurements of the cells.
      methods: the methods among them.
    """
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
    return Board(
        methods,
        sorted({ratio for _, ratio in grouped}),
        list(exact),
        entries,
        failures,
        {task: float(np.mean([known[task] for known in exact.values()])) for task in TASKS},
        next(iter(exact.values()))["bytes"],
    )


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


def format_number(value: float | None, style: str) -> str:
    """A figure as text; a dash where there is none."""
    return "–" if value is None or not np.isfinite(value) else format(value, style)


def _column(values: Sequence[float | None], style: str) -> list[str]:
    """A column of a class as text, its smallest figures marked."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    least = min(known, default=None)
    return [("*" if value == least else "") + format_number(value, style) for value in values]


def _print_columns(
    board: Board,
    title: str,
    headers: list[str],
    columns: Sequence[_Shown],
    caption: str,
) -> None:
    """Print a row for each method, with the best of each class and column marked."""
    rows: list[Row] = []
    for category in CATEGORIES:
        methods = board.of(category)
        if not methods:
            continue
        cells = []
        for read, style, spread in columns:
            shown = _column([read(method) for method in methods], style)
            if spread is not None:
                known = [format_number(spread(method), style) for method in methods]
                pairs = zip(shown, known, strict=True)
                shown = [f"{text} ± {error}" if text != "–" else text for text, error in pairs]
            cells.append(shown)
        rows += [None] if rows else []
        rows += [
            [category if number == 0 else "", method.title, board.seeds(method), *row]
            for number, (method, *row) in enumerate(zip(methods, *cells, strict=True))
        ]
    print_table(
        title,
        ["class", "method", "seeds", *headers],
        rows,
        left=("class", "method"),
        caption=caption,
    )


def _at(board: Board, ratio: int, read: Callable[[Entry], float]) -> Column:
    """A column: a figure of every method at one ratio."""

    def column(method: Method) -> float | None:
        entry = board.entries.get((method.name, ratio))
        return None if entry is None else read(entry)

    return column


def _kind_error(kind: int, entry: Entry) -> float:
    return geometric_mean(entry.mean[kind])


def _kind_bits(kind: int, entry: Entry) -> float:
    return float(np.mean(entry.continuation[kind]))


def mean_loss(loss: str, entry: Entry) -> float:
    """Bits a byte in the mean over seeds and passages; one of `LOSSES`."""
    return float(np.mean(entry.by_passage(loss)))


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
    geometric = "geometric mean over layers, heads, texts and seeds"
    bits = {task: f"{cost:.4f} bits a byte" for task, cost in board.exact.items()}
    tasks: list[tuple[str, Callable[[Entry], float], str]] = [
        (
            f"Attention error, mean over queries / mean norm of outputs; {geometric}",
            lambda entry: geometric_mean(entry.mean),
            ".4f",
        ),
        (
            f"Attention error, 99th percentile of queries / mean norm of outputs; {geometric}",
            lambda entry: geometric_mean(entry.tail),
            ".4f",
        ),
        (
            f"Continuation: bits a byte over those of the full cache, {bits['continuation']}",
            functools.partial(mean_loss, "continuation"),
            "+.4f",
        ),
        (
            f"A passage repeated: bits a byte over those of the full cache, {bits['repeated']}",
            functools.partial(mean_loss, "repeated"),
            "+.4f",
        ),
        (
            "Continuation: divergence of the predictions from those of the full cache, bits a byte",
            functools.partial(mean_loss, "continuation_divergence"),
            ".4f",
        ),
        (
            "A passage repeated: divergence of the predictions, bits a byte",
            functools.partial(mean_loss, "repeated_divergence"),
            ".4f",
        ),
        (
            "Compression of a prompt, all layers and heads, compiled: seconds, median",
            lambda entry: entry.seconds,
            ".3g",
        ),
        (
            f"Bytes of a prompt, all layers and heads: MB, the full cache {board.bytes / 1e6:.3f}",
            lambda entry: entry.bytes / 1e6,
            ".3f",
        ),
    ]
    caption = f"{texts}.\n*: the best of its class. seeds: – draws nothing. –: see below."
    for title, read, style in tasks:
        columns = [_Shown(_at(board, each, read), style) for each in board.ratios]
        _print_columns(board, title, headers, columns, caption)

    places = range(len(board.kinds))
    _print_columns(
        board,
        f"By kind of text at {ratio}×: mean attention error, and bits a byte of the continuation",
        [f"{kind}, {what}" for what in ("error", "bits") for kind in board.kinds],
        [_Shown(_at(board, ratio, functools.partial(_kind_error, kind)), ".4f") for kind in places]
        + [
            _Shown(_at(board, ratio, functools.partial(_kind_bits, kind)), "+.4f")
            for kind in places
        ],
        f"{caption}\n{stamp}",
    )
    sure: list[_Shown] = []
    for loss in LOSSES:
        mean, error = (functools.partial(read, loss) for read in (mean_loss, standard_error))
        sure.append(_Shown(_at(board, ratio, mean), ".4f", _at(board, ratio, error)))
    sure += [_Shown(_at(board, ratio, functools.partial(_size, task)), ".4f") for task in TASKS]
    _print_columns(
        board,
        f"Bits a byte at {ratio}×: losses, with their standard errors, and how large they are",
        [*LOSSES.values(), *(f"{task}, size" for task in TASKS)],
        sure,
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
