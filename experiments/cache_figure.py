"""What a compression did to the caches of a model, and its picture."""

from typing import NamedTuple

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from experiments.styles import STYLES, Style

# The method that others are divided by.
REFERENCE = "uniform"


class Measured(NamedTuple):
    """What one method did at one ratio.

    Attributes:
      method: a key of `experiments.styles.STYLES`.
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


def _drawn(table: Table) -> list[tuple[str, Style]]:
    """The methods in a table, with their styles."""
    present = {name for name, _ in table}
    return [(name, style) for name, style in STYLES.items() if name in present]


def _draw_ratios(axes: Axes, table: Table) -> None:
    """Error against ratio: medians over the heads, and bars over the middle half of them."""
    ratios = sorted({ratio for _, ratio in table})
    for number, (name, style) in enumerate(_drawn(table)):
        heads = np.stack([table[name, ratio].means.ravel() for ratio in ratios])
        low, median, high = np.quantile(heads, (0.25, 0.5, 0.75), axis=1)
        # Side by side, or the bars would hide one another.
        places = np.asarray(ratios) * 2.0 ** (0.06 * (number - (len(_drawn(table)) - 1) / 2))
        axes.errorbar(
            places,
            median,
            yerr=(median - low, high - median),
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            markersize=6,
            linewidth=1.6,
            elinewidth=0.9,
            capsize=2.5,
            label=style.label,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ratios, [f"{ratio}×" for ratio in ratios])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.set_xlabel("compression, pairs / pairs kept")
    axes.set_ylabel("relative attention error")
    axes.set_title("Median over the heads, bars: the middle half of them", fontsize=10)


def _draw_heads(axes: Axes, table: Table, ratio: int) -> None:
    """Error over that of uniform at one ratio, head by head."""
    reference = table[REFERENCE, ratio].means
    layers, heads = reference.shape
    places = np.arange(layers * heads)
    for name, style in _drawn(table):
        share = table[name, ratio].means / reference
        axes.plot(
            places,
            share.ravel(),
            color=style.color,
            linestyle=style.line if name == REFERENCE else "none",
            marker="none" if name == REFERENCE else style.marker,
            markersize=7,
        )
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
    figure = matplotlib.figure.Figure(figsize=(11, 5), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_ratios(left, table)
    _draw_heads(right, table, ratio)
    for axes in (left, right):
        axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.grid(visible=True, which="major", axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"The model's own caches and queries: {source}, {layers} layers × {heads} heads",
        fontsize=11,
    )
    return figure
