"""The figure of the sweep: error against size for one width, and what theory says of it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.figure
import ml_collections
import numpy as np
from matplotlib.axes import Axes

from experiments.common import figures
from experiments.common.methods import LOOKS, METHODS
from experiments.common.metrics import geometric_mean


class Line(NamedTuple):
    """The errors of one method at one radius and width, over sizes and seeds."""

    rho: float
    width: int
    method: str
    sizes: np.ndarray  # [sizes]
    errors: np.ndarray  # [sizes, seeds]

    @property
    def medians(self) -> np.ndarray:
        """Median over the seeds, by size."""
        return np.median(self.errors, axis=1)


def theory_error(line: Line) -> np.ndarray:
    r"""The error :math:`\sqrt d\, e^\rho / m` at each size, without its constant."""
    return math.sqrt(line.width) * math.exp(line.rho) / line.sizes


def fit_constant(lines: Sequence[Line]) -> float:
    """The constant of the theory: the geometric mean of error over its formula."""
    ratios = [line.errors / theory_error(line)[:, None] for line in lines]
    return geometric_mean(np.concatenate([ratio.ravel() for ratio in ratios]))


def _draw_panel(axes: Axes, lines: Sequence[Line], constant: float) -> None:
    for line in lines:
        look, label = LOOKS[line.method], METHODS[line.method].label
        figures.line_with_range(
            axes, look, line.sizes, line.errors, label, markersize=6, linewidth=1.8
        )
    sizes = lines[0].sizes
    lowest = min(line.errors[0].min() for line in lines)
    if math.isfinite(constant):
        label = rf"theory, ${constant:.3f}\,\sqrt{{d}}\,e^\rho/m$"
        errors = constant * theory_error(lines[0])
        lowest = min(lowest, errors[0])
        axes.plot(sizes, errors, color="#555555", linewidth=4, alpha=0.35, label=label, zorder=0)

    # Guides in the corner that the curves leave free: a line parallel to one has its rate.
    corner = 0.25 * lowest
    reach = np.array([sizes[0], math.sqrt(sizes[0] * sizes[-1])])
    for exponent, text in ((-0.5, "slope −1/2"), (-1.0, "slope −1")):
        heights = corner * (reach / reach[0]) ** exponent
        axes.plot(reach, heights, color="#444444", linewidth=0.9)
        axes.annotate(
            text,
            (reach[1], heights[1]),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="#444444",
        )
    figures.doubling_axis(axes, sizes.tolist())
    axes.set_yscale("log")
    figures.grid(axes)


def draw(
    config: ml_collections.ConfigDict, lines: Sequence[Line], width: int
) -> matplotlib.figure.Figure:
    """Draws error against size for one width, a panel for each radius."""
    constant = math.nan
    if any(line.method == "balanced" for line in lines):
        constant = fit_constant([line for line in lines if line.method == "balanced"])
    figure = figures.new(1.6 + 3.2 * len(config.rhos), 5.2)
    panels = figure.subplots(1, len(config.rhos), sharey=True, squeeze=False)[0]
    for axes, rho in zip(panels, config.rhos, strict=True):
        here = [line for line in lines if line.rho == rho and line.width == width]
        _draw_panel(axes, here, constant)
        axes.set_title(rf"$\rho = {rho:g}$")
        axes.set_xlabel("pairs kept, $m$")
    panels[0].set_ylabel(r"worst error over $\|q\| \leq \rho$  (values have norm 1)")
    columns = None if len(config.rhos) > 3 else 3 if len(config.rhos) > 1 else 2
    figures.legend_below(figure, panels[0], columns)
    figure.suptitle(
        f"{config.instance.replace('_', ' ').capitalize()} keys and values, "
        f"$n = {config.count}$, $d = {width}$\n"
        f"median and range of {len(config.seeds)} seeds",
        fontsize=11,
    )
    return figure
