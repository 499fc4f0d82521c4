"""The verdict of the leaderboard: ours against the best rival of every cell."""

from typing import NamedTuple

import numpy as np

from experiments.common.methods import EVEN, Method
from experiments.common.metrics import geometric_mean
from experiments.common.tables import Row, print_table
from experiments.leaderboard.tables import LOSSES, Board, format_number, mean_loss


class Verdict(NamedTuple):
    """One of our methods against its rivals.

    Attributes:
      shares: by metric, ours over the best rival in every cell where both are measured.
      cells: how many cells have a rival.
      losses: by name in `LOSSES`, ours, the best rival's, and its label, at one ratio; `None` if
        either is missing.
    """

    shares: dict[str, np.ndarray]
    cells: int
    losses: dict[str, tuple[float, float, str] | None]


def judge(board: Board, method: Method, ratio: int) -> Verdict:
    """Sets a method of ours against every rival of its class.

    Args:
      board: what was measured.
      method: one of ours.
      ratio: that of the losses.
    """
    rivals = [rival for rival in board.of(method.category) if not rival.ours]
    shares: dict[str, list[np.ndarray]] = {"mean": [], "tail": []}
    cells = 0
    for each in board.ratios:
        entries = [entry for _, entry in board.measured(rivals, each)]
        cells += entries[0].by_cell("mean").size if entries else 0
        ours = board.entries.get((method.name, each))
        if ours is not None and entries:
            for metric, found in shares.items():
                best = np.min([entry.by_cell(metric) for entry in entries], axis=0)
                found.append((ours.by_cell(metric) / best).ravel())
    losses: dict[str, tuple[float, float, str] | None] = {}
    ours = board.entries.get((method.name, ratio))
    for name in LOSSES:
        entered = board.measured(rivals, ratio)
        known = [(mean_loss(name, entry), rival.label) for rival, entry in entered]
        known = [pair for pair in known if np.isfinite(pair[0])]
        losses[name] = (mean_loss(name, ours), *min(known)) if known and ours is not None else None
    joined = {name: np.concatenate([np.zeros(0), *found]) for name, found in shares.items()}
    return Verdict(joined, cells, losses)


def print_verdict(board: Board, ratio: int) -> None:
    """Print ours against the best rival of every cell, and the subsets against uniform.

    Args:
      board: what was measured.
      ratio: that of the losses and the subsets.
    """
    errors: list[Row] = []
    bits: list[Row] = []
    for category in EVEN:
        ours = [method for method in board.of(category) if method.ours]
        errors += [None] if errors else []
        bits += [None] if bits else []
        if not ours:
            errors.append([category, "none of ours", *["–"] * 5])
            bits.append([category, "none of ours", *["–"] * 3 * len(LOSSES)])
        for number, method in enumerate(ours):
            verdict = judge(board, method, ratio)
            row = [category if number == 0 else "", method.label]
            shares: list[str] = []
            for found in verdict.shares.values():
                shares += (
                    [f"{geometric_mean(found):.3f}", f"{np.mean(found <= 1):.0%}"]
                    if found.size
                    else ["–", "–"]
                )
            errors.append([*row, *shares, f"{verdict.shares['mean'].size} of {verdict.cells}"])
            for loss in verdict.losses.values():
                row += (
                    ["–", "–", "–"]
                    if loss is None
                    else [f"{loss[0]:.4f}", f"{loss[1]:.4f} {loss[2]}", _over(*loss[:2])]
                )
            bits.append(row)
    print_table(
        "Verdict: ours over the best rival of its class in every cell, geometric mean",
        ["class", "ours", "mean error", "≤ 1 in", "99th percentile", "≤ 1 in", "cells"],
        errors,
        left=("class", "ours"),
        caption=(
            "A cell: kind of text, layer, head, ratio; errors averaged over seeds and passages."
        ),
    )
    headers = [(label, "best rival", "ratio") for label in LOSSES.values()]
    print_table(
        f"Verdict: bits a byte at {ratio}×, ours and the best rival of its class",
        ["class", "ours", *(each for loss in headers for each in loss)],
        bits,
        left=("class", "ours"),
        caption=(
            "Continuation, repeated: over those of the full cache. divergence: that of the "
            "predictions from those of the full cache.\nratio: – where a loss is not above zero."
        ),
    )
    rows = []
    for method in board.methods:
        if method.has("subset") and method.category in EVEN:
            over = (board.over_reference(method.name, ratio, metric) for metric in ("mean", "tail"))
            numbers = (format_number(share, ".3f") for share in over)
            rows.append([method.category, method.title, *numbers])
    print_table(
        f"Subsets at {ratio}×, nothing refitted: error over that of uniform",
        ["class", "method", "mean", "99th percentile"],
        rows,
        left=("class", "method"),
        caption="Geometric mean over the cells of that ratio.",
    )


def _over(ours: float, rival: float) -> str:
    return f"{ours / rival:.2f}" if ours > 0 and rival > 0 else "–"
