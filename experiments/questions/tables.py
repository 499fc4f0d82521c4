"""Tables of the board: divergence, errors, scores, seconds and bytes by method and ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np

from experiments.common.metrics import geometric_mean
from experiments.common.tables import print_table, stamp
from experiments.questions.entrants import CLASSES, FULL, Entrant, chosen
from experiments.questions.work import OFF_CONTEXT, Cell

Found = list[tuple[Cell, dict[str, Any]]]

DASH = "–"


def values(found: Found, entry: str, **settings: Any) -> list[Any]:
    """An entry of all cells with these settings that have it."""
    return [
        known[entry]
        for cell, known in found
        if entry in known and all(cell.get(name) == value for name, value in settings.items())
    ]


def with_error(numbers: Sequence[float], digits: int = 3) -> str:
    """A mean and its standard error."""
    if not numbers:
        return DASH
    mean = f"{np.mean(numbers):.{digits}f}"
    if len(numbers) < 2:
        return mean
    return f"{mean} ±{np.std(numbers, ddof=1) / len(numbers) ** 0.5:.{digits}f}"


def print_board(config: ml_collections.ConfigDict, found: Found) -> None:
    """Print all tables that there are cells for."""
    if config.passages and config.kinds:
        _print_divergences(config, found)
        _print_errors(config, found)
    if config.examples and config.tasks:
        _print_scores(config, found)
    _print_failures(found)


def _by_class(
    methods: Sequence[Entrant], row: Callable[[Entrant], list[str]]
) -> list[list[str] | None]:
    rows: list[list[str] | None] = []
    for category in CLASSES:
        members = [each for each in methods if each.category == category]
        if members and rows:
            rows.append(None)
        rows += [[category, each.title, *row(each)] for each in members]
    return rows


def _print_divergences(config: ml_collections.ConfigDict, found: Found) -> None:
    methods = chosen(config.methods)
    for kind in (None, *config.kinds):
        only = {} if kind is None else {"kind": kind}

        def row(entrant: Entrant, only: dict[str, str] = only) -> list[str]:
            return [
                with_error(values(found, "divergence", method=entrant.name, ratio=ratio, **only), 4)
                for ratio in config.ratios
            ]

        print_table(
            "Divergence from the full cache, bits a token, "
            f"{'all texts' if kind is None else kind}",
            ["given", "method", *(f"{ratio}×" for ratio in config.ratios)],
            _by_class(methods, row),
            left=("given", "method"),
            caption=(
                f"{config.passages} {config.split} passages of {config.passage_tokens} tokens of "
                f"each kind, {config.continuation} tokens behind each; mean and standard error.\n"
                + stamp(config.seed)
            ),
        )


def _print_errors(config: ml_collections.ConfigDict, found: Found) -> None:
    methods = chosen(config.methods)
    for ratio in config.ratios:
        base = values(found, "mean", method="uniform_ends", ratio=ratio)

        def row(entrant: Entrant, ratio: int = ratio, base: list[Any] = base) -> list[str]:
            def of(entry: str) -> list[Any]:
                return values(found, entry, method=entrant.name, ratio=ratio)

            means, tails, seconds = of("mean"), of("tail"), of("seconds")
            if not means:
                return [DASH] * 6
            worst = DASH
            if len(base) == len(means):
                # Of every head the mean over passages.
                ratios = np.mean(means, axis=0) / np.mean(base, axis=0)
                worst = f"{ratios.max():.2f}"
            kept = of("kept")
            spread = f"{np.min(kept):.0f}–{np.max(kept):.0f}"
            return [
                f"{geometric_mean(np.asarray(means)):.4f}",
                f"{geometric_mean(np.asarray(tails)):.3f}",
                worst,
                f"{np.median(seconds):.1f}",
                f"{np.mean(of('bytes')) / 2**20:.2f}",
                spread,
            ]

        print_table(
            f"Errors of attention at {ratio}×, relative, all texts",
            [
                "given",
                "method",
                "mean",
                "99 %",
                "worst head / uniform",
                "seconds",
                "MiB",
                "pairs a head",
            ],
            _by_class(methods, row),
            left=("given", "method"),
            caption="The worst head is that of the largest error over that of uniform, ends kept.",
        )
    full = [known for cell, known in found if cell["method"] == FULL and "prefill" in known]
    if full:
        passes = [f"prefill {np.median([known['prefill'] for known in full]):.0f} s"]
        again = [known["reconstruction"] for known in full if "reconstruction" in known]
        if again:
            passes.append(f"reconstruction {np.median(again):.0f} s")
        print(
            f"Full cache: {np.mean([known['bytes'] for known in full]) / 2**20:.1f} MiB; "
            f"{', '.join(passes)} in the median."
        )


def _print_scores(config: ml_collections.ConfigDict, found: Found) -> None:
    methods = chosen(config.task_methods)
    scored = [task for task in config.tasks if task != OFF_CONTEXT]
    for ratio in config.task_ratios:

        def row(name: str, ratio: int) -> list[str]:
            of_all = values(found, "score", method=name, ratio=ratio)
            texts = [with_error(of_all, 2)]
            texts += [
                with_error(values(found, "score", method=name, ratio=ratio, task=task), 2)
                for task in scored
            ]
            if config.follow_ups:
                texts.append(with_error(values(found, "later", method=name, ratio=ratio), 2))
            if OFF_CONTEXT in config.tasks:
                texts.append(
                    with_error(values(found, "bits", method=name, ratio=ratio, task=OFF_CONTEXT), 2)
                )
            return texts

        def of_entrant(entrant: Entrant, ratio: int = ratio) -> list[str]:
            return row(entrant.name, ratio)

        rows: list[list[str] | None] = [["", "full cache", *row(FULL, 1)], None]
        rows += _by_class(methods, of_entrant)
        print_table(
            f"Scores at {ratio}×",
            [
                "given",
                "method",
                "all",
                *scored,
                *(["later turns"] if config.follow_ups else []),
                *(["off context, bits"] if OFF_CONTEXT in config.tasks else []),
            ],
            rows,
            left=("given", "method"),
            caption=(
                f"{config.examples} examples of each task, {config.task_tokens} tokens; the share "
                "of references found, mean and standard error.\n" + stamp(config.seed)
            ),
        )


def _print_failures(found: Found) -> None:
    reasons = {(cell["method"], known["failed"]) for cell, known in found if "failed" in known}
    for method, reason in sorted(reasons):
        print(f"{method}: {reason}")
