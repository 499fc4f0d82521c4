"""The picture of the board: scores and divergences over ratios."""

from __future__ import annotations

import matplotlib.figure
import ml_collections
import numpy as np
from matplotlib.axes import Axes

from experiments.common import figures
from experiments.questions.entrants import FULL, chosen
from experiments.questions.tables import Found, values


def draw(config: ml_collections.ConfigDict, found: Found) -> matplotlib.figure.Figure:
    """Scores of answers and divergences of methods, over the ratio of compression."""
    full = values(found, "score", method=FULL)
    # A panel without anything in it would be half of the picture.
    figure = figures.new(10.0 if full else 6.5, 4.2)
    *left, texts = figure.subplots(1, 2 if full else 1, squeeze=False)[0]
    for scores in left:
        _lines(scores, found, "score", config.task_ratios, config.task_methods)
        level = float(np.mean(full))
        scores.axhline(level, color="#888888", linewidth=1)
        scores.annotate(
            "full cache",
            (0.99, level),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color="#555555",
        )
        scores.set_ylim(0, 1.05)
        scores.set_title("Questions about documents", fontsize=10)
        scores.set_ylabel("share of references in the answer")
    _lines(texts, found, "divergence", config.ratios, config.methods)
    texts.set_yscale("log")
    texts.set_title("Continuations of texts", fontsize=10)
    texts.set_ylabel("divergence from the full cache, bits a token")
    figures.legend_below(figure, texts, columns=3 if full else 2)
    return figure


def _lines(
    axes: Axes,
    found: Found,
    entry: str,
    ratios: tuple[int, ...],
    methods: tuple[str, ...] | None,
) -> None:
    """The means of an entry over ratios, a line for every method that has a look."""
    for entrant in chosen(methods):
        if entrant.look is None:
            continue
        points = [
            (ratio, float(np.mean(several)))
            for ratio in ratios
            if (several := values(found, entry, method=entrant.name, ratio=ratio))
        ]
        if points:
            places, heights = zip(*points, strict=True)
            axes.plot(places, heights, label=entrant.title, **entrant.look.options)
    if ratios:
        figures.doubling_axis(axes, ratios, "×")
    axes.set_xlabel("pairs of the cache over pairs kept")
    figures.grid(axes)
