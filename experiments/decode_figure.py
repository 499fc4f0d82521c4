"""The picture of what a model loses when it decodes over compressed caches."""

from typing import Any

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from experiments.styles import STYLES

Found = list[tuple[dict[str, Any], dict[str, Any]]]


def _draw_losses(axes: Axes, found: Found, task: str) -> None:
    """Bits a byte over those of the full cache, against the ratio."""
    prompts = [pair for pair in found if pair[0]["task"] == "prompts"]
    exact = np.mean(next(known for cell, known in prompts if cell["method"] == "exact")[task])
    ratios = sorted({cell["ratio"] for cell, _ in prompts if cell["method"] != "exact"})
    for method, style in STYLES.items():
        points = {
            cell["ratio"]: np.mean(known[task]) - exact
            for cell, known in prompts
            if cell["method"] == method
        }
        if method == "exact" or not points:
            continue
        axes.plot(
            ratios,
            [points[ratio] for ratio in ratios],
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            label=style.label,
        )
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"{ratio}×" for ratio in ratios])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel("compression, pairs / pairs kept")
    axes.set_ylabel("loss, bits a byte over the full cache")


def _draw_stream(axes: Axes, found: Found) -> None:
    """Bits a byte along a stream."""
    for cell, known in found:
        if cell["task"] != "stream":
            continue
        style = STYLES[cell["method"]]
        places = (np.arange(len(known["curve"])) + 0.5) * cell["stream_bytes"] / len(known["curve"])
        axes.plot(
            places,
            known["curve"],
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            markersize=4,
            label=style.label,
        )
    axes.set_xlabel("bytes read")
    axes.set_ylabel("bits a byte")
    axes.set_title("Streams under a fixed budget", fontsize=10)


def draw(found: Found) -> matplotlib.figure.Figure:
    """Draw the losses behind prompts and, where measured, the costs of streams.

    Args:
      found: cells with what was measured, as `experiments.decode` has them.
    """
    streams = any(cell["task"] == "stream" for cell, _ in found)
    figure = matplotlib.figure.Figure(
        figsize=(14 if streams else 9.5, 4.4), layout="constrained", dpi=150
    )
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
        axes.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    named = panels[2 if streams else 0]
    handles, labels = named.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
