r"""The error of a coreset against its size, radius and width, as a supremum over the ball.

    python -m experiments.sweep --config=configs/sweep.py
    python -m experiments.sweep --config=configs/sweep.py:quick

For every radius, width, size, method and seed: a synthetic cache, its coreset, and the largest
error that the adversary finds among queries of norm at most rho. One table has the errors, the
slopes fitted to them, the size at which each method reaches a given error, and beside them the
theory, *Nearly Optimal Attention Coresets*, Theorem 4:

.. math:: \varepsilon = c \, \sqrt d \, e^{\rho} / m

with one constant fitted to all errors of the balanced coresets. Finished cells are kept in
``<output>/cells.jsonl`` and are not computed again; the figures are ``<output>/<name>-d<d>.png``.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib.figure
import matplotlib.ticker
import ml_collections
import numpy as np
import scipy.stats  # type: ignore[import-untyped]  # a dependency of jax itself
from absl import app, flags, logging
from matplotlib.axes import Axes
from ml_collections import config_flags

import coreset_jax as cj
from experiments import instances, results
from experiments.styles import STYLES

# The methods, given the radius. Their softmax scale is 1 in all of this.
METHODS: dict[str, Callable[[float], cj.Compressor]] = {
    "balanced": lambda rho: cj.balanced(rho=rho, scale=1.0),
    "uniform": lambda rho: cj.baselines.uniform(),
    "balance_kv": lambda rho: cj.baselines.balance_kv(scale=1.0),
    "balance_kv_corrected": lambda rho: cj.baselines.balance_kv(corrected=True, scale=1.0),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid: everything that its error depends on."""

    instance: str
    count: int
    width: int
    rho: float
    size: int
    method: str
    seed: int
    starts: int
    steps: int

    def settings(self) -> dict[str, Any]:
        """The name of the cell in the store."""
        return {"experiment": "sweep", **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return f"ρ {self.rho:g}, d {self.width}, size {self.size}, {self.method}, seed {self.seed}"


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


class Slope(NamedTuple):
    """The exponent of error against size, and half its 95 % confidence interval."""

    slope: float
    half_width: float


def grid(config: ml_collections.ConfigDict) -> list[Cell]:
    """All cells of the grid, those of one compiled shape after one another."""
    return [
        Cell(
            instance=config.instance,
            count=config.count,
            width=width,
            rho=rho,
            size=size,
            method=method,
            seed=seed,
            starts=config.starts,
            steps=config.steps,
        )
        for width in config.widths
        for size in config.sizes
        for method in config.methods
        for rho in config.rhos
        for seed in config.seeds
    ]


def measure(
    cell: Cell, methods: Mapping[str, Callable[[float], cj.Compressor]] = METHODS
) -> dict[str, float]:
    """Compresses the cell's cache and looks for the worst query.

    Args:
      cell: the settings.
      methods: the compressors by the names of the methods, given the radius.

    Returns:
      ``error``, the largest error found, in units of the values' norm 1, and ``median_ascent``,
      the median over the ascents: near ``error`` where the search has nothing more to find.
    """
    instance_rng, method_rng, adversary_rng = jax.random.split(jax.random.key(cell.seed), 3)
    keys, values = instances.INSTANCES[cell.instance](
        instance_rng, cell.count, cell.width, cell.width
    )
    coreset = methods[cell.method](cell.rho)(method_rng, keys, values, size=cell.size)
    worst = cj.guarantees.adversary(
        adversary_rng,
        keys,
        values,
        coreset,
        rho=cell.rho,
        scale=1.0,
        starts=cell.starts,
        steps=cell.steps,
    )
    return {"error": float(worst.error), "median_ascent": float(np.median(worst.errors))}


def compute(config: ml_collections.ConfigDict, store: results.Results) -> list[Line]:
    """Computes the cells that the store lacks and gathers all of the grid into lines."""
    cells = grid(config)
    missing = [cell for cell in cells if store.get(cell.settings()) is None]
    logging.info("%d cells, %d of them finished before", len(cells), len(cells) - len(missing))
    for cell in results.track(missing, "sweep"):
        store.put(cell.settings(), measure(cell))

    errors: dict[tuple[float, int, str, int, int], float] = {}
    for cell in cells:
        measured = store.get(cell.settings())
        assert measured is not None
        errors[cell.rho, cell.width, cell.method, cell.size, cell.seed] = measured["error"]
    return [
        Line(
            rho,
            width,
            method,
            np.asarray(config.sizes),
            np.array(
                [
                    [errors[rho, width, method, size, seed] for seed in config.seeds]
                    for size in config.sizes
                ]
            ),
        )
        for width in config.widths
        for rho in config.rhos
        for method in config.methods
    ]


def fit_slope(line: Line, smallest: int, largest: int) -> Slope:
    r"""Least squares of log error on log size, every seed a point.

    Args:
      line: errors by size and seed.
      smallest: the smallest size that takes part.
      largest: the largest.

    Returns:
      The slope with half its 95 % interval (Student's t); NaN with fewer than three points.
    """
    rows = (line.sizes >= smallest) & (line.sizes <= largest)
    return fit_line(np.log(line.sizes[rows]), line.errors[rows])


def fit_line(positions: np.ndarray, errors: np.ndarray) -> Slope:
    """Least squares of log error on a position, every seed a point.

    Args:
      positions: where the errors were measured ``[points]``.
      errors: ``[points, seeds]``.

    Returns:
      The slope with half its 95 % interval (Student's t); NaN with fewer than three points.
    """
    places = np.repeat(positions, errors.shape[1])
    errors = errors.ravel()
    usable = np.isfinite(errors) & (errors > 0)
    if np.sum(usable) < 3 or np.unique(places[usable]).size < 2:
        return Slope(math.nan, math.nan)
    fit = scipy.stats.linregress(places[usable], np.log(errors[usable]))
    quantile = scipy.stats.t.ppf(0.975, np.sum(usable) - 2)
    return Slope(float(fit.slope), float(quantile * fit.stderr))


def size_to_reach(line: Line, error: float) -> str:
    """The smallest size whose median error is at most ``error``, between sizes on log scales.

    Args:
      line: errors by size and seed.
      error: the error to reach.

    Returns:
      The size as text; ``≤`` before the smallest of the grid that has it already, ``>`` before
      the largest where none has.
    """
    medians = line.medians
    reached = np.flatnonzero(medians <= error)
    if not reached.size:
        return f"> {line.sizes[-1]}"
    first = int(reached[0])
    if first == 0:
        return f"≤ {line.sizes[0]}"
    # log size is linear in log error between the two sizes, and np.interp wants it ascending.
    log_size = np.interp(
        math.log(error), np.log(medians[[first, first - 1]]), np.log(line.sizes[[first, first - 1]])
    )
    return f"{math.exp(log_size):.0f}"


def theory_error(line: Line) -> np.ndarray:
    r"""The error :math:`\sqrt d\, e^\rho / m` at each size, without its constant."""
    return math.sqrt(line.width) * math.exp(line.rho) / line.sizes


def fit_constant(lines: Sequence[Line]) -> float:
    """The constant of the theory: the geometric mean of error over its formula."""
    ratios = [line.errors / theory_error(line)[:, None] for line in lines]
    return float(np.exp(np.mean(np.log(np.concatenate([ratio.ravel() for ratio in ratios])))))


def print_report(config: ml_collections.ConfigDict, lines: Sequence[Line]) -> None:
    """Prints the table of errors, slopes and sizes, and the bounds beside what was measured."""
    ours = [line for line in lines if line.method == "balanced"]
    constant = fit_constant(ours) if ours else math.nan
    seeds = ", ".join(map(str, config.seeds))
    rows: list[Sequence[str] | None] = []
    for number, line in enumerate(lines):
        group = f"{line.rho:g}", str(line.width)
        slope = fit_slope(line, *config.slope_sizes)
        rows.append(
            [
                *group,
                STYLES[line.method].label,
                *(f"{error:.5f}" for error in line.medians),
                f"{slope.slope:+.2f} ± {slope.half_width:.2f}",
                *(size_to_reach(line, error) for error in config.errors),
                f"{fit_constant([line]):.4f}",
            ]
        )
        if number + 1 == len(lines) or lines[number + 1][:2] != line[:2]:
            if ours:
                errors = constant * theory_error(line)
                theory = line._replace(errors=errors[:, None])
                rows.append(
                    [
                        *group,
                        "theory, c √d e^ρ / m",
                        *(f"{error:.5f}" for error in errors),
                        "-1",
                        *(size_to_reach(theory, error) for error in config.errors),
                        f"{constant:.4f}",
                    ]
                )
            rows.append(None)
    smallest, largest = config.slope_sizes
    results.print_table(
        f"Worst error over queries of norm ≤ ρ: {config.instance} keys and values, "
        f"n = {config.count}, median over seeds",
        [
            "ρ",
            "d",
            "method",
            *(f"m = {size}" for size in config.sizes),
            "slope ± 95 %",
            *(f"m for {error:g}" for error in config.errors),
            "c",
        ],
        rows,
        left=("method",),
        caption=(
            f"slope: log error against log m, m from {smallest} to {largest}. "
            "c: geometric mean of error · m / (√d e^ρ); the theory has one c for all.\n"
            + results.stamp(seeds)
        ),
    )
    bounds = bound_rows(config, lines)
    if bounds:
        results.print_table(
            "What balanced is held to",
            ["ρ", "d", "figure", "measured", "at most", "held"],
            bounds,
            left=("figure",),
        )


def bound_rows(config: ml_collections.ConfigDict, lines: Sequence[Line]) -> list[list[str]]:
    """The bounds that the grid can tell of: radius, width, figure, measured, at most, held."""
    ours = {(line.rho, line.width): line for line in lines if line.method == "balanced"}
    rows = []

    def add(line: Line, figure: str, measured: float, bound: float, digits: str) -> None:
        held = "yes" if measured <= bound else "no"
        numbers = f"{measured:{digits}}", f"{bound:{digits}}"
        rows.append([f"{line.rho:g}", str(line.width), figure, *numbers, held])

    for rho, width, size, bound in config.error_bounds:
        line = ours.get((rho, width))
        if line is not None and size in line.sizes:
            median = line.medians[list(line.sizes).index(size)]
            add(line, f"median error at m = {size}", median, bound, ".5f")
    for rho, width, bound in config.slope_bounds:
        line = ours.get((rho, width))
        if line is not None:
            add(line, "slope", fit_slope(line, *config.slope_sizes).slope, bound, "+.2f")
    return rows


def _draw_panel(axes: Axes, lines: Sequence[Line], constant: float) -> None:
    for line in lines:
        style = STYLES[line.method]
        axes.fill_between(
            line.sizes,
            line.errors.min(axis=1),
            line.errors.max(axis=1),
            color=style.color,
            alpha=0.15,
        )
        axes.plot(
            line.sizes,
            line.medians,
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            markersize=6,
            linewidth=1.8,
            label=style.label,
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
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def draw(
    config: ml_collections.ConfigDict, lines: Sequence[Line], width: int
) -> matplotlib.figure.Figure:
    """Draws error against size for one width, a panel for each radius."""
    constant = math.nan
    if any(line.method == "balanced" for line in lines):
        constant = fit_constant([line for line in lines if line.method == "balanced"])
    figure = matplotlib.figure.Figure(
        figsize=(1.6 + 3.2 * len(config.rhos), 5.2), layout="constrained", dpi=150
    )
    panels = figure.subplots(1, len(config.rhos), sharey=True, squeeze=False)[0]
    for axes, rho in zip(panels, config.rhos, strict=True):
        here = [line for line in lines if line.rho == rho and line.width == width]
        _draw_panel(axes, here, constant)
        axes.set_title(rf"$\rho = {rho:g}$")
        axes.set_xlabel("pairs kept, $m$")
    panels[0].set_ylabel(r"worst error over $\|q\| \leq \rho$  (values have norm 1)")
    handles, labels = panels[0].get_legend_handles_labels()
    columns = len(labels) if len(config.rhos) > 3 else 3 if len(config.rhos) > 1 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(
        f"{config.instance.replace('_', ' ').capitalize()} keys and values, "
        f"$n = {config.count}$, $d = {width}$\n"
        f"median and range of {len(config.seeds)} seeds",
        fontsize=11,
    )
    return figure


def run(config: ml_collections.ConfigDict) -> list[Line]:
    """Computes what is missing, prints the tables and draws the figures.

    Args:
      config: as in ``configs/sweep.py``.

    Returns:
      The errors of the grid, a line for each radius, width and method.
    """
    output = pathlib.Path(config.output)
    store = results.Results(output / "cells.jsonl", fresh=config.fresh)
    lines = compute(config, store)
    print_report(config, lines)
    for width in config.widths:
        path = output / f"{config.name}-d{width}.png"
        with results.replacing(path) as partial:
            draw(config, lines, width).savefig(partial)
        print(path)
    return lines


def main(arguments: Sequence[str]) -> None:
    """Runs the sweep that the flags describe."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments {arguments[1:]}")
    results.start_logging()
    run(flags.FLAGS.config)


if __name__ == "__main__":
    # Here and not above: another experiment in the same process has a flag of this name.
    config_flags.DEFINE_config_file("config", "configs/sweep.py")
    app.run(main)
