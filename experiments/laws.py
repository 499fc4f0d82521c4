r"""The paper's laws, one at a time, each with the exponent that was measured.

    python -m experiments.laws --config=configs/laws.py

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
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags

import coreset_jax as cj
from experiments import results, sweep
from experiments.laws_figure import draw
from experiments.styles import STYLES
from experiments.sweep import Cell, Slope


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
    **sweep.METHODS,
    "random signs": lambda rho: cj.baselines.uniform(),
    "self-balancing": functools.partial(_walk_alone, cj.walks.self_balancing, 0),
    "Gram-Schmidt": functools.partial(_walk_alone, cj.walks.gram_schmidt, 0),
    "greedy pairs": functools.partial(_walk_alone, cj.walks.greedy_pairs, 0),
    "greedy pairs, swaps": functools.partial(_walk_alone, cj.walks.greedy_pairs, 4096),
}
_WALKS = tuple(name for name in METHODS if name not in sweep.METHODS)


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


def laws(config: ml_collections.ConfigDict) -> list[Law]:
    """The laws of a configuration."""
    return [
        Law(
            "size",
            "size",
            tuple(config.sizes),
            {"balanced": "−1", "uniform": "−1/2"},
            "pairs kept, $m$",
            "worst error",
        ),
        Law(
            "width",
            "width",
            tuple(config.widths),
            {"balanced": "1/2"},
            "width of keys and values, $d$",
            "worst error × $m$",
        ),
        Law(
            "radius",
            "rho",
            tuple(config.rhos),
            {"balanced": "1 + o(1)"},
            r"radius of the queries, $\rho$",
            "worst error × $m$",
            logarithmic=False,
        ),
        Law(
            "length",
            "count",
            tuple(config.counts),
            {"balanced": "0"},
            "pairs in the cache, $n$",
            "worst error × $m$",
        ),
        Law(
            "walk",
            "count",
            tuple(config.blocks),
            {name: "1/2" if name == "random signs" else "0" for name in _WALKS},
            "pairs in the block",
            "discrepancy",
        ),
    ]


def cells(config: ml_collections.ConfigDict, law: Law, method: str) -> list[list[Cell]]:
    """The cells of a law for a method, ``[points][seeds]``."""
    point = Cell(
        instance="unit_sphere",
        count=config.count,
        width=config.width,
        rho=config.rho,
        size=config.size,
        method=method,
        seed=0,
        starts=config.starts,
        steps=config.steps,
    )
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
    missing = [cell for cell in dict.fromkeys(every) if store.get(_settings(cell)) is None]
    for cell in results.track(missing, "laws"):
        store.put(_settings(cell), sweep.measure(cell, METHODS))

    def height(law: Law, cell: Cell) -> float:
        known = store.get(_settings(cell))
        assert known is not None
        # A halving's error is its discrepancy over the pairs that there were.
        factor = {"worst error": 1, "worst error × $m$": cell.size, "discrepancy": cell.count}
        return float(known["error"]) * factor[law.quantity]

    found = []
    for law in laws(config):
        positions = np.asarray(law.values, float)
        for method in law.expected:
            heights = np.array(
                [[height(law, cell) for cell in row] for row in grids[law.name, method]]
            )
            scale = np.log(positions) if law.logarithmic else positions
            found.append(Measured(law, method, positions, heights, sweep.fit_line(scale, heights)))
    return found


def label(method: str) -> str:
    """What a method is called."""
    return STYLES[method].label if method in STYLES else method


def print_report(config: ml_collections.ConfigDict, found: Sequence[Measured]) -> None:
    """Prints the exponents beside the theory's."""
    rows: list[Sequence[str] | None] = []
    for number, line in enumerate(found):
        medians = np.median(line.heights, axis=1)
        half = max(2, len(line.positions) // 2 + 1)
        scale = np.log(line.positions) if line.law.logarithmic else line.positions
        ends = [
            sweep.fit_line(scale[part], line.heights[part]).slope
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
        if number + 1 == len(found) or found[number + 1].law.name != line.law.name:
            rows.append(None)
    results.print_table(
        "Exponents of the laws, with 95 % intervals",
        ["law", "method", "theory", "measured", "lower half", "upper half", "first", "last"],
        rows,
        left=("law", "method", "theory"),
        caption=(
            f"Unit-norm keys and values; n = {config.count}, d = {config.width}, "
            f"ρ = {config.rho:g}, m = {config.size} ({config.width_size} for the width) where not "
            "varied. First and last: the "
            "medians at the ends of the range.\n" + results.stamp(", ".join(map(str, config.seeds)))
        ),
    )


def run(config: ml_collections.ConfigDict) -> list[Measured]:
    """Measures, prints and draws."""
    output = pathlib.Path(config.output)
    store = results.Results(output / "laws.jsonl", fresh=config.fresh)
    found = measure(config, store)
    print_report(config, found)
    with results.replacing(output / "laws.png") as partial:
        draw(config, found).savefig(partial)
    print(output / "laws.jsonl")
    print(output / "laws.png")
    return found


def main(arguments: Sequence[str]) -> None:
    """Does what the flags describe."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments {arguments[1:]}")
    results.start_logging()
    run(flags.FLAGS.config)


if __name__ == "__main__":
    # Here and not above: another experiment in the same process has a flag of this name.
    config_flags.DEFINE_config_file("config", "configs/laws.py")
    app.run(main)
