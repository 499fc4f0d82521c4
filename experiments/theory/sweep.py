r"""The error of a coreset against its size, radius and width, as a supremum over the ball.

    python -m experiments.theory.sweep --config=configs/sweep.py
    python -m experiments.theory.sweep --config=configs/sweep.py:quick

For every radius, width, size, method and seed: a synthetic cache, its coreset, and the largest
error that the adversary finds among queries of norm at most rho. One table has the errors, the
slopes fitted to them, the size at which each method reaches a given error, and beside them the
theory, *Nearly Optimal Attention Coresets*, Theorem 4:

.. math:: \varepsilon = c \, \sqrt d \, e^{\rho} / m

with one constant fitted to all errors of the balanced coresets. Finished cells are kept in
``<output>/cells.jsonl`` and are not computed again; the figures are ``<output>/<name>-d<d>.png``.
"""

import itertools
import math
import pathlib
from collections.abc import Sequence

import ml_collections
import numpy as np

from experiments.common import command, figures, results
from experiments.common.methods import METHODS
from experiments.common.tables import Row, print_table, stamp
from experiments.theory.cells import Cell, Slope, fit_line, measure
from experiments.theory.sweep_figure import Line, draw, fit_constant, theory_error


def grid(config: ml_collections.ConfigDict) -> list[Cell]:
    """All cells of the grid, those of one compiled shape after one another."""
    shared = {name: config[name] for name in ("instance", "count", "starts", "steps")}
    return [
        Cell(width=width, rho=rho, size=size, method=method, seed=seed, **shared)
        for width in config.widths
        for size in config.sizes
        for method in config.methods
        for rho in config.rhos
        for seed in config.seeds
    ]


def compute(config: ml_collections.ConfigDict, store: results.Results) -> list[Line]:
    """Computes the cells that the store lacks and gathers all of the grid into lines."""
    cells = grid(config)
    found = store.complete(cells, measure, "sweep", settings=Cell.settings)
    # In the order of the grid.
    names = ("widths", "sizes", "methods", "rhos", "seeds")
    shape = [len(config[name]) for name in names]
    errors = np.array([known["error"] for known in found]).reshape(shape)
    sizes = np.asarray(config.sizes)
    return [
        Line(rho, width, method, sizes, errors[first, :, third, second])
        for first, width in enumerate(config.widths)
        for second, rho in enumerate(config.rhos)
        for third, method in enumerate(config.methods)
    ]


def fit_slope(line: Line, smallest: int, largest: int) -> Slope:
    """The slope of log error against log size, for sizes between two; see `fit_line`."""
    rows = (line.sizes >= smallest) & (line.sizes <= largest)
    return fit_line(np.log(line.sizes[rows]), line.errors[rows])


def size_to_reach(line: Line, error: float) -> str:
    """The smallest size whose median error is at most ``error``, interpolated in logarithms.

    ``≤`` stands before the smallest of the grid that has it, ``>`` before the largest if none has.
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


def print_report(config: ml_collections.ConfigDict, lines: Sequence[Line]) -> None:
    """Prints the table of errors, slopes and sizes, and the bounds beside what was measured."""
    ours = [line for line in lines if line.method == "balanced"]
    constant = fit_constant(ours) if ours else math.nan
    rows: list[Row] = []
    for (rho, width), group in itertools.groupby(lines, key=lambda line: line[:2]):
        named = f"{rho:g}", str(width)
        for line in group:
            slope = fit_slope(line, *config.slope_sizes)
            row = [
                *named,
                METHODS[line.method].label,
                *(f"{error:.5f}" for error in line.medians),
                f"{slope.slope:+.2f} ± {slope.half_width:.2f}",
                *(size_to_reach(line, error) for error in config.errors),
                f"{fit_constant([line]):.4f}",
            ]
            rows.append(row)
        if ours:
            errors = constant * theory_error(line)
            theory = line._replace(errors=errors[:, None])
            row = [
                *named,
                "theory, c √d e^ρ / m",
                *(f"{error:.5f}" for error in errors),
                "-1",
                *(size_to_reach(theory, error) for error in config.errors),
                f"{constant:.4f}",
            ]
            rows.append(row)
        rows.append(None)
    smallest, largest = config.slope_sizes
    print_table(
        f"Worst error over queries of norm ≤ ρ: {config.instance} keys and values, "
        f"n = {config.count}, median over seeds",
        [
            *("ρ", "d", "method"),
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
            + stamp(config.seeds)
        ),
    )
    bounds = bound_rows(config, lines)
    if bounds:
        print_table(
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


def run(config: ml_collections.ConfigDict) -> list[Line]:
    """Computes what is missing, prints the tables and draws the figures of all lines."""
    output = pathlib.Path(config.output)
    store = results.Results(output / "cells.jsonl", fresh=config.fresh)
    lines = compute(config, store)
    print_report(config, lines)
    for width in config.widths:
        path = output / f"{config.name}-d{width}.png"
        figures.save(path, draw(config, lines, width))
        print(path)
    return lines


if __name__ == "__main__":
    command.main(run, "configs/sweep.py")
