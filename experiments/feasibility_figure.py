"""The map of `experiments.feasibility`: which heads, at which size, for which queries."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import matplotlib
import matplotlib.colors
import matplotlib.figure
import matplotlib.patches
import numpy as np
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from experiments.feasibility import Map

_LEAST, _MOST = 1e-3, 1.0


def radius(share: float) -> str:
    """A share of the radius, as text: `ρ/4`."""
    fraction = Fraction(share).limit_denominator(64)
    numerator = "" if fraction.numerator == 1 else str(fraction.numerator)
    return f"{numerator}ρ" + ("" if fraction.denominator == 1 else f"/{fraction.denominator}")


def error_text(error: float) -> str:
    """An error as text; a dash where it says nothing."""
    if not error < 1:
        return "–"
    return f"{error:.3f}" if error >= _LEAST else "<.001"


def _panel(
    axes: Axes, errors: np.ndarray, columns: list[str], heads: list[str]
) -> matplotlib.cm.ScalarMappable:
    """A heat map with its numbers; what says nothing is hatched."""
    norm = matplotlib.colors.LogNorm(_LEAST, _MOST)
    colors = matplotlib.colormaps["viridis_r"]
    image = axes.imshow(np.clip(errors, _LEAST, _MOST), norm=norm, cmap=colors, aspect="auto")
    for (row, column), error in np.ndenumerate(errors):
        void = not error < 1
        if void:
            box = matplotlib.patches.Rectangle(
                (column - 0.5, row - 0.5),
                1,
                1,
                facecolor="#eeeeee",
                edgecolor="#999999",
                hatch="///",
            )
            axes.add_patch(box)
            continue
        red, green, blue, _ = colors(norm(max(error, _LEAST)))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            column,
            row,
            error_text(error),
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if dark else "black",
        )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(heads)), heads)
    axes.tick_params(length=0)
    return image


def draw(found: Map, ratio: int) -> matplotlib.figure.Figure:
    """Draws certified errors by ball and by size, and measured ones.

    Args:
      found: the map.
      ratio: that of the left panel.
    """
    layers, heads = found.calibration["rho"].shape
    names = [
        f"layer {layer}, head {head}   ρ = {found.calibration['rho'][layer, head]:.1f}"
        for layer in range(layers)
        for head in range(heads)
    ]
    place = found.ratios.index(ratio)
    middle = len(found.shares) // 2
    ratios = [f"{each}×" for each in found.ratios]
    panels = [
        (
            f"certified at {ratio}×,\nby the ball of queries",
            found.certified[:, place],
            [radius(share) for share in found.shares],
        ),
        (
            f"certified for {radius(found.shares[middle])},\nby ratio",
            found.certified[middle],
            ratios,
        ),
        (
            f"predicted by Theorem 4 for\n{radius(found.shares[middle])}, by ratio",
            found.predicted[middle],
            ratios,
        ),
        ("measured on the queries\nasked, by ratio", found.measured, ratios),
    ]
    figure = matplotlib.figure.Figure(
        figsize=(14, 1.8 + 0.42 * len(names)), layout="constrained", dpi=130
    )
    every = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, errors, columns) in zip(every, panels, strict=True):
        image = _panel(axes, errors.reshape(len(columns), -1).T, columns, names)
        axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=every, shrink=0.8, label="error, 1 = the values' largest distance")
    figure.suptitle("What can be promised, and what is measured; hatched: nothing", fontsize=11)
    return figure
