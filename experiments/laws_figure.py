"""The figure of `experiments.laws`: a panel for every law."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.figure
import matplotlib.ticker
import ml_collections
import numpy as np
from matplotlib.axes import Axes

from experiments.styles import STYLES, Style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.laws import Measured

_WALKS = {
    "random signs": Style("random signs", "#000000", "--", "s"),
    "self-balancing": Style("self-balancing walk", "#D55E00", ":", "^"),
    "Gram-Schmidt": Style("Gram–Schmidt walk", "#009E73", "-.", "D"),
    "greedy pairs": Style("greedy pairs", "#CC79A7", "--", "P"),
    "greedy pairs, swaps": Style("greedy pairs and swaps", "#0072B2", "-", "o"),
}

_TITLES = {
    "size": "Error falls like $1/m$",
    "width": r"Size grows like $\sqrt{d}$",
    "radius": r"Size grows like $e^{\rho + o(\rho)}$",
    "length": "Length does not matter",
    "walk": "Walks leave a bounded discrepancy",
}


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
        style = _WALKS.get(line.method) or STYLES[line.method]
        medians = np.median(line.heights, axis=1)
        axes.fill_between(
            line.positions,
            line.heights.min(axis=1),
            line.heights.max(axis=1),
            color=style.color,
            alpha=0.15,
            linewidth=0,
        )
        name = f"{style.label}: {line.slope.slope:+.2f} ± {line.slope.half_width:.2f}"
        axes.plot(
            line.positions,
            medians,
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            markersize=5,
            linewidth=1.6,
            label=name,
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
        axes.set_xscale("log", base=2)
        axes.set_xticks(lines[0].positions, [f"{value:g}" for value in lines[0].positions])
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
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
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False, loc="best")


def draw(config: ml_collections.ConfigDict, found: Sequence[Measured]) -> matplotlib.figure.Figure:
    """Draws error or discrepancy against what each law varies."""
    names = list(dict.fromkeys(line.law.name for line in found))
    figure = matplotlib.figure.Figure(figsize=(13, 8.2), layout="constrained", dpi=130)
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
            "exponents with 95 % intervals.\nThick grey: the theory's shape.",
            va="top",
            fontsize=11,
        )
    figure.suptitle("The laws of attention coresets, measured", fontsize=13)
    return figure
