"""The map of the heads: errors certified, predicted and measured, by size and ball of queries."""

from typing import NamedTuple

import matplotlib.figure
import numpy as np

from experiments.common import figures
from experiments.common.tables import multiple

_LEAST, _MOST = 1e-3, 1.0


class Map(NamedTuple):
    """What was found of every head; errors in units of its values' largest distance.

    Attributes:
      calibration: the calibration's fields by name, ``[layers, heads, ...]``.
      shares: radii of the balls, as shares of that of the queries asked.
      ratios: pairs over pairs kept.
      certified: by share and ratio ``[shares, ratios, layers, heads]``.
      predicted: likewise.
      measured: by ratio ``[ratios, layers, heads]``.
    """

    calibration: dict[str, np.ndarray]
    shares: tuple[float, ...]
    ratios: tuple[int, ...]
    certified: np.ndarray
    predicted: np.ndarray
    measured: np.ndarray


def radius(share: float) -> str:
    """A share of the radius, as text: `ρ/4`."""
    return multiple(share, "ρ")


def error_text(error: float) -> str:
    """An error as text; a dash where it says nothing."""
    if not error < 1:
        return "–"
    return f"{error:.3f}" if error >= _LEAST else "<.001"


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
    figure = figures.new(14, 1.8 + 0.42 * len(names), dpi=130)
    every = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, errors, columns) in zip(every, panels, strict=True):
        shown = errors.reshape(len(columns), -1).T
        void = ~(shown < 1)
        image = figures.heat_map(
            axes, shown, _LEAST, _MOST, columns, error_text, void, fontsize=7.5
        )
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=every, shrink=0.8, label="error, 1 = the values' largest distance")
    figure.suptitle("What can be promised, and what is measured; hatched: nothing", fontsize=11)
    return figure
