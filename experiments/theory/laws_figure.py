"""The figure of the laws, a panel each, and what was measured of a law."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.figure
import ml_collections
import numpy as np
from matplotlib.axes import Axes

from experiments.common import figures
from experiments.common.figures import Look
from experiments.common.methods import LOOKS, METHODS
from experiments.theory.cells import Slope

_WALKS = {
    "random signs": Look("#000000", "--", "s"),
    "self-balancing": Look("#D55E00", ":", "^"),
    "Gram-Schmidt": Look("#009E73", "-.", "D"),
    "greedy pairs": Look("#CC79A7", "--", "P"),
    "greedy pairs, swaps": Look("#0072B2", "-", "o"),
}

# The walks whose name in the figure is not that in the results.
_WALK_LABELS = {
    "self-balancing": "self-balancing walk",
    "Gram-Schmidt": "Gram–Schmidt walk",
    "greedy pairs, swaps": "greedy pairs and swaps",
}

_TITLES = {
    "size": "Error falls like $1/m$",
    "width": r"Size grows like $\sqrt{d}$",
    "radius": r"Size grows like $e^{\rho + o(\rho)}$",
    "length": "Length does not matter",
    "walk": "Walks leave a bounded discrepancy",
}


class Law(NamedTuple):
    """What one law varies and says.

    Attributes:
      name: the law.
      field: the field of a cell that it varies.
      values: the values that it takes.
      expected: the exponent that theory gives, by method.
      label: of the axis.
      quantity: what is plotted, and its factor: the size kept, or the pairs of the block.
      logarithmic: whether the law is a power of what varies; otherwise it is an exponential.
    """

    name: str
    field: str
    values: tuple[float, ...]
    expected: dict[str, str]
    label: str
    quantity: str
    logarithmic: bool = True

    @property
    def places(self) -> np.ndarray:
        """The values that errors are fitted to, logarithms for a power law `[points]`."""
        values = np.asarray(self.values, float)
        return np.log(values) if self.logarithmic else values


class Measured(NamedTuple):
    """A law and what was measured of it for one method.

    Attributes:
      law: the law.
      method: the method.
      positions: the values of what varies ``[points]``.
      heights: error, or error times size ``[points, seeds]``.
      slope: the exponent.
    """

    law: Law
    method: str
    positions: np.ndarray
    heights: np.ndarray
    slope: Slope


def label(method: str) -> str:
    """What tables call a method; a walk by its name in the results."""
    return METHODS[method].label if method in METHODS else method


def _theory(line: Measured) -> tuple[np.ndarray, str] | None:
    """The shape that theory gives, through the median of the first point or the middle one."""
    positions, medians = line.positions, np.median(line.heights, axis=1)
    middle = len(positions) // 2
    if line.law.name == "radius":
        curve = np.exp(positions)
        return curve * medians[middle] / curve[middle], r"$e^\rho$, slope 1"
    exponents = {"−1": -1.0, "−1/2": -0.5, "1/2": 0.5, "0": 0.0}
    exponent = exponents[line.law.expected[line.method]]
    if line.law.name == "walk" and line.method not in ("random signs", "greedy pairs, swaps"):
        return None
    curve = (positions / positions[middle]) ** exponent * medians[middle]
    return curve, f"slope {line.law.expected[line.method]}"


def _draw_panel(axes: Axes, lines: Sequence[Measured]) -> None:
    law = lines[0].law
    shape, shapes = None, []
    for line in lines:
        name = _WALK_LABELS.get(line.method, label(line.method))
        figures.line_with_range(
            axes,
            _WALKS.get(line.method) or LOOKS[line.method],
            line.positions,
            line.heights,
            f"{name}: {line.slope.slope:+.2f} ± {line.slope.half_width:.2f}",
            markersize=5,
            linewidth=1.6,
        )
        theory = _theory(line)
        if theory is not None:
            shapes.append(theory[1])
            (shape,) = axes.plot(
                line.positions, theory[0], color="#777777", linewidth=4, alpha=0.35
            )
    if shape is not None:
        shape.set_label("theory: " + ", ".join(dict.fromkeys(shapes)))
    if law.logarithmic:
        figures.doubling_axis(axes, lines[0].positions.tolist())
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # A flat law must look flat.
    if high / low < 10:
        middle = np.sqrt(low * high)
        axes.set_ylim(middle / 10**0.5, middle * 10**0.5)
    if len(lines) > 2:
        # Room for the legend.
        axes.set_ylim(low, high * (high / low) ** 0.65)
    axes.set_title(_TITLES[law.name], fontsize=11)
    axes.set_xlabel(law.label)
    axes.set_ylabel(law.quantity)
    figures.grid(axes)
    axes.legend(fontsize=8, frameon=False, loc="best")


def draw(config: ml_collections.ConfigDict, found: Sequence[Measured]) -> matplotlib.figure.Figure:
    """Draws error or discrepancy against what each law varies."""
    names = list(dict.fromkeys(line.law.name for line in found))
    figure = figures.new(13, 8.2, dpi=130)
    panels = figure.subplots(2, 3).ravel()
    for axes, name in zip(panels, names, strict=False):
        _draw_panel(axes, [line for line in found if line.law.name == name])
    for axes in panels[len(names) :]:
        axes.axis("off")
        axes.text(
            0.0,
            0.95,
            "Unit-norm keys and values;\nsuprema found by the adversary.\n\n"
            f"Where not varied: $n = {config.count}$, $d = {config.width}$,\n"
            rf"$\rho = {config.rho:g}$, $m = {config.size}$"
            f"\n($m = {config.width_size}$ where $d$ is varied)."
            f"\n\nMedian and range of {len(config.seeds)} seeds;\n"
            "exponents with 95 % intervals.\nThick gray: the theory's shape.",
            va="top",
            fontsize=11,
        )
    figure.suptitle("The laws of attention coresets, measured", fontsize=13)
    return figure
