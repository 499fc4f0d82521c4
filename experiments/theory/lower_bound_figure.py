"""The picture of how many bits are left in a coreset, beside how many there can be."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from coreset_jax.guarantees.sizes import Choice, decoding_bound
from experiments.common import figures
from experiments.common.methods import LOOKS, METHODS


class BoundStyle(NamedTuple):
    """How a bound is called and drawn."""

    label: str
    line: str | tuple[int, tuple[int, int]]
    width: float


BOUNDS: dict[Choice, BoundStyle] = {
    "weighted": BoundStyle("at most, any weights", "-", 2.2),
    "equal": BoundStyle("at most, equal weights", "-", 1.0),
    "blind": BoundStyle("at most, blind choice", (0, (1, 1)), 1.0),
}


class Curve(NamedTuple):
    """The games of one method on one instance.

    Attributes:
      method: a name in `experiments.common.methods`.
      sizes: pairs kept `[sizes]`.
      success: shares of the bits read correctly `[sizes, seeds]`.
      errors: largest errors of attention at the queries asked `[sizes, seeds]`.
    """

    method: str
    sizes: np.ndarray
    success: np.ndarray
    errors: np.ndarray


class Panel(NamedTuple):
    """One instance and all games on it; the first curve is that of the full cache."""

    theorem: int
    width: int
    rho: float
    eps: float
    codewords: int
    key_width: int
    pairs: int
    bits_per_pair: int
    curves: tuple[Curve, ...]

    def bound(self, choice: Choice, size: int) -> float:
        """The largest success that a choice of so many pairs can have."""
        return decoding_bound(self.pairs, size, bits_per_pair=self.bits_per_pair, choice=choice)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    sizes = np.unique(np.geomspace(1, panel.pairs, 200).astype(int))
    for choice, bound in BOUNDS.items():
        heights = [panel.bound(choice, int(size)) for size in sizes]
        axes.plot(
            sizes / panel.pairs,
            heights,
            color="#777777",
            linestyle=bound.line,
            linewidth=bound.width,
            label=bound.label,
            zorder=1,
        )
        if choice == "weighted":
            axes.fill_between(
                sizes / panel.pairs, heights, 1.1, color="#777777", alpha=0.18, linewidth=0
            )
    exact, *curves = panel.curves
    full = float(exact.success.mean())
    for curve in curves:
        look = LOOKS[curve.method]
        axes.plot(
            # With all pairs every method has the cache itself.
            [*curve.sizes / panel.pairs, 1.0],
            [*curve.success.mean(axis=1), full],
            markersize=6,
            linewidth=1.6,
            markerfacecolor="none" if curve.method != "balanced" else look.color,
            label=METHODS[curve.method].label,
            zorder=3,
            **look.options,
        )
    axes.plot(
        [1.0],
        [full],
        color="#000000",
        marker="*",
        markersize=13,
        linestyle="none",
        label=METHODS["exact"].label,
        zorder=4,
        clip_on=False,
    )
    axes.set_title(
        f"Theorem {panel.theorem}: $\\rho = {panel.rho:g}$, $d = {panel.width}$, "
        f"$\\varepsilon = {panel.eps:g}$\n"
        f"{panel.pairs} pairs, {panel.pairs * panel.bits_per_pair} bits",
        fontsize=10,
    )
    figures.grid(axes)


def draw(panels: Sequence[Panel], seeds: int) -> matplotlib.figure.Figure:
    """Draws success against size, a panel for each instance.

    Args:
      panels: the games.
      seeds: how many of them each point is the mean of.
    """
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = figures.new(1.2 + 4.6 * columns, 1.4 + 3.4 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, panel in zip(grid.ravel(), panels, strict=False):
        _draw_panel(axes, panel)
    for axes in grid.ravel()[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("pairs kept, as a share of all, $m/n$")
    for axes in grid[:, 0]:
        axes.set_ylabel("bits read correctly")
    grid[0, 0].set_xlim(0, 1)
    grid[0, 0].set_ylim(0.48, 1.01)
    percent = matplotlib.ticker.PercentFormatter(1.0, decimals=0)
    grid[0, 0].yaxis.set_major_formatter(percent)
    figures.legend_below(figure, grid[0, 0], 4)
    figure.suptitle(
        f"Random bits read from a coreset; 50 % is guessing, mean of {seeds} seeds\n"
        "Gray: what no subset with any weights can hold",
        fontsize=11,
    )
    return figure
