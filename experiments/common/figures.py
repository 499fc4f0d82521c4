"""The parts that the figures of all experiments are made of."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.cm
import matplotlib.colors
import matplotlib.figure
import matplotlib.patches
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from experiments.common import results


class Look(NamedTuple):
    """How a line is drawn; its style and marker tell it apart without color."""

    color: str
    line: str
    marker: str

    @property
    def options(self) -> dict[str, Any]:
        """The look as options of `Axes.plot`."""
        return {"color": self.color, "linestyle": self.line, "marker": self.marker}


def new(width: float, height: float, dpi: int = 150) -> matplotlib.figure.Figure:
    """An empty figure, sizes in inches."""
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained", dpi=dpi)


def save(path: str | os.PathLike[str], figure: matplotlib.figure.Figure) -> None:
    """Writes a figure aside, then renames it into its place."""
    with results.replacing(path) as partial:
        figure.savefig(partial)


def grid(axes: Axes, axis: Any = "both") -> None:
    """Draws faint lines behind the data at the major ticks."""
    axes.grid(visible=True, which="major", axis=axis, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def doubling_axis(axes: Axes, places: Sequence[float], unit: str = "") -> None:
    """Makes the horizontal axis one of powers of two, with ticks at the places alone."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}{unit}" for place in places])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def line_with_range(
    axes: Axes, look: Look, places: np.ndarray, heights: np.ndarray, label: str, **options: Any
) -> None:
    """Draws the medians over seeds, and the range of the seeds as a band.

    Args:
      axes: where to draw.
      look: of the line.
      places: `[points]`.
      heights: `[points, seeds]`.
      label: for the legend.
      options: more options of `Axes.plot`.
    """
    low, high = heights.min(axis=1), heights.max(axis=1)
    axes.fill_between(places, low, high, color=look.color, alpha=0.15, linewidth=0)
    axes.plot(places, np.median(heights, axis=1), label=label, **look.options, **options)


def legend_below(figure: matplotlib.figure.Figure, axes: Axes, columns: int | None = None) -> None:
    """Puts the legend of a panel below the whole figure, in one row by default."""
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if columns is None else columns
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def heat_map(
    axes: Axes,
    values: np.ndarray,
    least: float,
    most: float,
    columns: Sequence[str],
    text: Callable[[float], str],
    void: np.ndarray,
    *,
    void_text: str = "",
    fontsize: float = 8,
    bold: Sequence[bool] = (),
) -> matplotlib.cm.ScalarMappable:
    """Draws a table of colors with its numbers; what is void is hatched.

    Args:
      axes: where to draw.
      values: `[rows, columns]`.
      least: the value of the lightest color.
      most: the value of the darkest color.
      columns: names of the columns.
      text: a value as text.
      void: which values are void `[rows, columns]`.
      void_text: the text of a void value.
      fontsize: of the texts.
      bold: which rows have bold texts; none by default.

    Returns:
      What a color bar can be made for.
    """
    norm = matplotlib.colors.LogNorm(least, most)
    colors = matplotlib.colormaps["viridis_r"]
    image = axes.imshow(np.clip(values, least, most), norm=norm, cmap=colors, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        shown, dark = void_text, False
        if void[row, column]:
            box = matplotlib.patches.Rectangle(
                (column - 0.5, row - 0.5),
                1,
                1,
                facecolor="#eeeeee",
                edgecolor="#999999",
                hatch="///",
            )
            axes.add_patch(box)
        else:
            red, green, blue, _ = colors(norm(np.clip(value, least, most)))
            shown, dark = text(value), 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        if shown:
            axes.text(
                column,
                row,
                shown,
                ha="center",
                va="center",
                fontsize=fontsize,
                fontweight="bold" if bold and bold[row] else "normal",
                color="white" if dark else "black",
            )
    axes.set_xticks(range(len(columns)), columns)
    axes.tick_params(length=0)
    return image
