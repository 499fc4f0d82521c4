"""The picture of what a model loses when it decodes over compressed caches."""

from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

from experiments.common import figures
from experiments.common.methods import LOOKS, METHODS

Found = list[tuple[dict[str, Any], dict[str, Any]]]


def _draw_losses(axes: Axes, found: Found, task: str) -> None:
    """Bits a byte over those of the full cache, against the ratio."""
    prompts = [pair for pair in found if pair[0]["task"] == "prompts"]
    exact = np.mean(next(known for cell, known in prompts if cell["method"] == "exact")[task])
    ratios = sorted({cell["ratio"] for cell, _ in prompts if cell["method"] != "exact"})
    for method, look in LOOKS.items():
        points = {
            cell["ratio"]: np.mean(known[task]) - exact
            for cell, known in prompts
            if cell["method"] == method
        }
        if method == "exact" or not points:
            continue
        losses = [points[ratio] for ratio in ratios]
        axes.plot(ratios, losses, label=METHODS[method].label, **look.options)
    axes.axhline(0, color="#888888", linewidth=0.8)
    figures.doubling_axis(axes, ratios, "×")
    axes.set_xlabel("compression, pairs / pairs kept")
    axes.set_ylabel("loss, bits a byte over the full cache")


def _draw_stream(axes: Axes, found: Found) -> None:
    """Bits a byte along a stream."""
    for cell, known in found:
        if cell["task"] != "stream":
            continue
        label, look = METHODS[cell["method"]].label, LOOKS[cell["method"]]
        places = (np.arange(len(known["curve"])) + 0.5) * cell["stream_bytes"] / len(known["curve"])
        axes.plot(places, known["curve"], markersize=4, label=label, **look.options)
    axes.set_xlabel("bytes read")
    axes.set_ylabel("bits a byte")
    axes.set_title("Streams under a fixed budget", fontsize=10)


def draw(found: Found) -> matplotlib.figure.Figure:
    """Draw the losses behind prompts and, where measured, the costs of streams.

    Args:
      found: cells with what was measured, as `experiments.decode.decode` has them.
    """
    streams = any(cell["task"] == "stream" for cell, _ in found)
    figure = figures.new(14 if streams else 9.5, 4.4)
    panels = figure.subplots(1, 3 if streams else 2)
    for axes, task, title in (
        (panels[0], "continuation", "Continuation behind a compressed prompt"),
        (panels[1], "repeated", "A passage of the prompt repeated"),
    ):
        _draw_losses(axes, found, task)
        axes.set_title(title, fontsize=10)
    if streams:
        _draw_stream(panels[2], found)
    for axes in panels:
        figures.grid(axes, "y")
    figures.legend_below(figure, panels[2 if streams else 0])
    return figure
