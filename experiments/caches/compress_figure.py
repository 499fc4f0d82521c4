"""What a compression did to the caches of a model, and its picture."""

from typing import NamedTuple

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from experiments.common import figures
from experiments.common.methods import LOOKS, METHODS, REFERENCE


class Measured(NamedTuple):
    """What one method did at one ratio.

    Attributes:
      method: a name in `experiments.common.methods`.
      ratio: pairs of the cache over pairs kept.
      size: pairs kept.
      errors: relative errors `[seeds, layers, heads]`.
    """

    method: str
    ratio: int
    size: int
    errors: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """The errors averaged over the seeds `[layers, heads]`."""
        return np.mean(self.errors, axis=0)


Table = dict[tuple[str, int], Measured]
"""What was measured, by method and ratio."""


def _drawn(table: Table) -> list[tuple[str, figures.Look]]:
    """The methods in a table, with their looks."""
    present = {name for name, _ in table}
    return [(name, look) for name, look in LOOKS.items() if name in present]


def _draw_ratios(axes: Axes, table: Table) -> None:
    """Error against ratio: medians over the heads, and bars over the middle half of them."""
    ratios = sorted({ratio for _, ratio in table})
    for number, (name, look) in enumerate(_drawn(table)):
        heads = np.stack([table[name, ratio].means.ravel() for ratio in ratios])
        low, median, high = np.quantile(heads, (0.25, 0.5, 0.75), axis=1)
        # Side by side, or the bars would hide one another.
        places = np.asarray(ratios) * 2.0 ** (0.06 * (number - (len(_drawn(table)) - 1) / 2))
        axes.errorbar(
            places,
            median,
            yerr=(median - low, high - median),
            markersize=6,
            linewidth=1.6,
            elinewidth=0.9,
            capsize=2.5,
            label=METHODS[name].label,
            **look.options,
        )
    figures.doubling_axis(axes, ratios, "×")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.set_xlabel("compression, pairs / pairs kept")
    axes.set_ylabel("relative attention error")
    axes.set_title("Median over the heads, bars: the middle half of them", fontsize=10)


def _draw_heads(axes: Axes, table: Table, ratio: int) -> None:
    """Error over that of uniform at one ratio, head by head."""
    reference = table[REFERENCE, ratio].means
    layers, heads = reference.shape
    places = np.arange(layers * heads)
    for name, look in _drawn(table):
        shares = (table[name, ratio].means / reference).ravel()
        kept = {"marker": "none"} if name == REFERENCE else {"linestyle": "none"}
        axes.plot(places, shares, markersize=7, **{**look.options, **kept})
    for boundary in range(1, layers):
        axes.axvline(boundary * heads - 0.5, color="#bbbbbb", linewidth=0.8)
    axes.set_yscale("log")
    # Less than a decade: round numbers, not powers of ten.
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.set_xlim(-0.5, layers * heads - 0.5)
    labels = [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
    axes.set_xticks(places, labels)
    axes.set_xlabel("layer.head")
    axes.set_ylabel("error / error of uniform")
    axes.set_title(f"Head by head at {ratio}×", fontsize=10)


def draw(table: Table, ratio: int, source: str) -> matplotlib.figure.Figure:
    """Draw the errors against the ratio, and head by head at one ratio.

    Args:
      table: what was measured.
      ratio: the ratio of the second panel.
      source: what was compressed, for the title.
    """
    layers, heads = table[REFERENCE, ratio].means.shape
    figure = figures.new(11, 5)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_ratios(left, table)
    _draw_heads(right, table, ratio)
    for axes in (left, right):
        axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        figures.grid(axes, "y")
    figures.legend_below(figure, left)
    figure.suptitle(
        f"The model's own caches and queries: {source}, {layers} layers × {heads} heads",
        fontsize=11,
    )
    return figure
