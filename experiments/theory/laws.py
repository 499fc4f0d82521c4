r"""The paper's laws, one at a time, each with the exponent that was measured.

    python -m experiments.theory.laws --config=configs/laws.py

Five laws of *Nearly Optimal Attention Coresets*, on unit-norm keys and values:

- *size*: the error falls like 1/m, a sample's like 1/√m (Theorem 4);
- *width*: the size that an error takes, and so error times size, grows like √d;
- *radius*: and like :math:`e^{\rho + o(\rho)}`;
- *length*: at a fixed size the error does not depend on n;
- *walk*: halving one block, the discrepancy that a walk leaves does not grow with the block, where
  that of random signs grows like its root (Banaszczyk's theorem made a program).

Errors are suprema over the ball that the adversary finds. Exponents are least squares on
logarithms, every seed a point, with 95 % intervals. Finished cells are kept in
``<output>/laws.jsonl`` and are not computed again; the figure is ``<output>/laws.png``.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np

import coreset_jax as cj
from experiments.common import command, figures, results
from experiments.common.tables import Row, print_table, stamp
from experiments.theory import cells as theory
from experiments.theory.cells import Cell, fit_line
from experiments.theory.laws_figure import Law, Measured, draw, label


def _walk_alone(walk: cj.walks.Walk, max_swaps: int, rho: float) -> cj.Compressor:
    """One halving of one block, with the paper's own kernel radius."""
    return cj.balanced(
        rho=rho,
        scale=1.0,
        kernel_radius=rho,
        walk=walk,
        block_size=4096,
        landmarks=None,
        max_swaps=max_swaps,
        passes=1,
    )


METHODS: dict[str, Callable[[float], cj.Compressor]] = {
    **theory.METHODS,
    "random signs": lambda rho: cj.baselines.uniform(),
    "self-balancing": functools.partial(_walk_alone, cj.walks.self_balancing, 0),
    "Gram-Schmidt": functools.partial(_walk_alone, cj.walks.gram_schmidt, 0),
    "greedy pairs": functools.partial(_walk_alone, cj.walks.greedy_pairs, 0),
    "greedy pairs, swaps": functools.partial(_walk_alone, cj.walks.greedy_pairs, 4096),
}
_WALKS = tuple(name for name in METHODS if name not in theory.METHODS)


def laws(config: ml_collections.ConfigDict) -> list[Law]:
    """The laws of a configuration."""
    times_size = "worst error × $m$"
    expected = {"balanced": "−1", "uniform": "−1/2"}
    width, rho = "width of keys and values, $d$", r"radius of the queries, $\rho$"
    count, walks = "pairs in the cache, $n$", dict.fromkeys(_WALKS, "0") | {"random signs": "1/2"}
    return [
        Law("size", "size", config.sizes, expected, "pairs kept, $m$", "worst error"),
        Law("width", "width", config.widths, {"balanced": "1/2"}, width, times_size),
        Law("radius", "rho", config.rhos, {"balanced": "1 + o(1)"}, rho, times_size, False),
        Law("length", "count", config.counts, {"balanced": "0"}, count, times_size),
        Law("walk", "count", config.blocks, walks, "pairs in the block", "discrepancy"),
    ]


def cells(config: ml_collections.ConfigDict, law: Law, method: str) -> list[list[Cell]]:
    """The cells of a law for a method, ``[points][seeds]``."""
    named = ("count", "width", "rho", "size", "starts", "steps")
    shared = {name: config[name] for name in named}
    point = Cell(instance="unit_sphere", method=method, seed=0, **shared)
    found = []
    for value in law.values:
        varied: dict[str, Any] = {law.field: value}
        changed = dataclasses.replace(point, **varied)
        if law.name == "width":
            changed = dataclasses.replace(changed, size=config.width_size)
        if law.name == "walk":
            changed = dataclasses.replace(changed, size=changed.count // 2)
        found.append([dataclasses.replace(changed, seed=seed) for seed in config.seeds])
    return found


def _settings(cell: Cell) -> dict[str, object]:
    return {**cell.settings(), "experiment": "laws"}


def measure(config: ml_collections.ConfigDict, store: results.Results) -> list[Measured]:
    """Measures what the store lacks, and fits all laws."""
    grids = {
        (law.name, method): cells(config, law, method)
        for law in laws(config)
        for method in law.expected
    }
    every = [cell for grid in grids.values() for row in grid for cell in row]
    measured = store.complete(
        every, lambda cell: theory.measure(cell, METHODS), "laws", settings=_settings
    )
    errors = {cell: float(known["error"]) for cell, known in zip(every, measured, strict=True)}

    def height(law: Law, cell: Cell) -> float:
        # A halving's error is its discrepancy over the pairs that there were.
        factor = {"worst error": 1, "worst error × $m$": cell.size, "discrepancy": cell.count}
        return errors[cell] * factor[law.quantity]

    found = []
    for law in laws(config):
        for method in law.expected:
            grid = grids[law.name, method]
            heights = np.array([[height(law, cell) for cell in row] for row in grid])
            slope = fit_line(law.places, heights)
            found.append(Measured(law, method, np.asarray(law.values, float), heights, slope))
    return found


def print_report(config: ml_collections.ConfigDict, found: Sequence[Measured]) -> None:
    """Prints the exponents beside the theory's."""
    rows: list[Row] = []
    for _, lines in itertools.groupby(found, key=lambda line: line.law.name):
        for line in lines:
            medians = np.median(line.heights, axis=1)
            half = max(2, len(line.positions) // 2 + 1)
            ends = [
                fit_line(line.law.places[part], line.heights[part]).slope
                for part in (slice(None, half), slice(-half, None))
            ]
            rows.append(
                [
                    line.law.name,
                    label(line.method),
                    line.law.expected[line.method],
                    f"{line.slope.slope:+.2f} ± {line.slope.half_width:.2f}",
                    *(f"{end:+.2f}" for end in ends),
                    f"{medians[0]:.4g}",
                    f"{medians[-1]:.4g}",
                ]
            )
        rows.append(None)
    print_table(
        "Exponents of the laws, with 95 % intervals",
        ["law", "method", "theory", "measured", "lower half", "upper half", "first", "last"],
        rows,
        left=("law", "method", "theory"),
        caption=(
            f"Unit-norm keys and values; n = {config.count}, d = {config.width}, "
            f"ρ = {config.rho:g}, m = {config.size} ({config.width_size} for the width) where not "
            "varied. First and last: the "
            "medians at the ends of the range.\n" + stamp(config.seeds)
        ),
    )


def run(config: ml_collections.ConfigDict) -> list[Measured]:
    """Measures, prints and draws."""
    output = pathlib.Path(config.output)
    store = results.Results(output / "laws.jsonl", fresh=config.fresh)
    found = measure(config, store)
    print_report(config, found)
    figures.save(output / "laws.png", draw(config, found))
    print(output / "laws.jsonl")
    print(output / "laws.png")
    return found


if __name__ == "__main__":
    command.main(run, "configs/laws.py")
