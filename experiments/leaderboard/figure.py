"""The figures of the leaderboard: errors by method and ratio, and what they cost."""

from collections.abc import Callable
from typing import NamedTuple

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from experiments.common import figures
from experiments.common.methods import CATEGORIES, FREE, INFORMED, QUANTIZED, UNEVEN
from experiments.common.metrics import geometric_mean
from experiments.leaderboard.tables import Board, Entry

# Errors over that of uniform, from the lightest color to the darkest.
_LEAST, _MOST = 0.1, 10.0

_MARKERS = "osD^v<>phX*dP8H"


class _Class(NamedTuple):
    """How the methods of a class are drawn."""

    color: str
    line: str
    face: str | None


# Lighter and darker ones in gray as well. Faces tell them apart again: full, open, gray.
_CLASSES = {
    FREE: _Class("#0072B2", "-", None),
    INFORMED: _Class("#D55E00", "--", "white"),
    QUANTIZED: _Class("#777777", ":", "#cccccc"),
    UNEVEN: _Class("#117733", "-.", "#ddcc77"),
}


def draw_errors(board: Board, texts: str) -> matplotlib.figure.Figure:
    """Draw the errors of every method and ratio over uniform's; the title names the texts."""
    methods = [method for category in CATEGORIES for method in board.of(category)]
    figure = figures.new(5 + 1.3 * len(board.ratios), 2.2 + 0.34 * len(methods), dpi=130)
    panels = figure.subplots(1, 2)
    titles = {"mean": "mean over queries", "tail": "99th percentile of queries"}
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        shares = [
            [board.over_reference(method.name, ratio, metric) for ratio in board.ratios]
            for method in methods
        ]
        image = figures.heat_map(
            *(axes, np.array(shares), _LEAST, _MOST),
            [f"{ratio}×" for ratio in board.ratios],
            "{:.2f}".format,
            ~np.isfinite(shares),
            void_text="–",
            bold=[method.ours for method in methods],
        )
        axes.set_yticks([])
        axes.set_title(title, fontsize=10)
        row = 0
        for category in CATEGORIES:
            count = len(board.of(category))
            if row and count:
                axes.axhline(row - 0.5, color="black", linewidth=1.5)
            if count and metric == "tail":
                axes.text(
                    1.02,
                    row + (count - 1) / 2,
                    category.replace("-", "-\n").replace(" ", "\n"),
                    transform=axes.get_yaxis_transform(),
                    va="center",
                    fontsize=9,
                )
            row += count
    panels[0].set_yticks(range(len(methods)), [method.label for method in methods])
    for label, method in zip(panels[0].get_yticklabels(), methods, strict=True):
        label.set_fontweight("bold" if method.ours else "normal")
    figure.supxlabel(
        "compression: pairs / pairs kept; for quantized caches bytes / most bytes kept", fontsize=9
    )
    bar = figure.colorbar(image, ax=panels, shrink=0.8, label="error / error of uniform", pad=0.04)
    bar.ax.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    figure.suptitle(
        f"Attention error over that of uniform, geometric mean; ours in bold\n{texts}", fontsize=10
    )
    return figure


def _cloud(axes: Axes, board: Board, cost: Callable[[Entry], float]) -> None:
    """Errors against a cost: a line for each method, and those that nothing beats in both."""
    points = []
    for category in CATEGORIES:
        look = _CLASSES[category]
        for number, method in enumerate(board.of(category)):
            entries = [
                each for ratio in board.ratios for _, each in board.measured([method], ratio)
            ]
            places = np.array([cost(entry) for entry in entries])
            errors = np.array([geometric_mean(entry.mean) for entry in entries])
            kept = np.isfinite(errors)
            points += list(zip(places[kept], errors[kept], strict=True))
            axes.plot(
                places[kept],
                errors[kept],
                color=look.color,
                linestyle=look.line,
                linewidth=2.2 if method.ours else 0.7,
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=9 if method.ours else 6,
                markerfacecolor=look.face or look.color,
                markeredgecolor="black" if method.ours else look.color,
                label=method.title,
                zorder=3 if method.ours else 2,
            )
    front, best = [], np.inf
    for place, error in sorted(points):
        if error < best:
            front.append((place, error))
            best = error
    if front:
        places, errors = np.array(front).T
        # As far as the panel goes: nothing there is better than the last.
        places = np.append(places, max(place for place, _ in points))
        axes.step(
            places,
            np.append(errors, errors[-1]),
            where="post",
            color="black",
            alpha=0.18,
            linewidth=9,
            solid_joinstyle="miter",
            label="the best of all, at no higher cost",
            zorder=1,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    figures.grid(axes)


def draw_pareto(board: Board, texts: str) -> matplotlib.figure.Figure:
    """Draw the errors against bytes, and against seconds. `texts` are named in the title."""
    figure = figures.new(15, 7.5, dpi=130)
    left, right = figure.subplots(1, 2, sharey=True)
    _cloud(left, board, lambda entry: entry.bytes / 1e6)
    _cloud(right, board, lambda entry: entry.seconds)
    left.set_xlabel(f"coreset of a prompt, MB (full cache: {board.bytes / 1e6:.2f})")
    right.set_xlabel("compression of a prompt, seconds")
    left.set_ylabel("relative attention error, mean over queries")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        title=(
            "full: query-free, open: query-informed,\n"
            "gray: quantized, yellow: uneven budgets; thick: ours"
        ),
        title_fontsize=9,
    )
    figure.suptitle(f"What an error costs, a point for each ratio\n{texts}", fontsize=10)
    return figure
