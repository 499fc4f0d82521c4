r"""Which heads of a model can be compressed, and for which of them the error can be promised.

    python -m experiments.caches.feasibility --config=configs/feasibility.py
    python -m experiments.caches.feasibility --config=configs/feasibility.py --config.text=FILE

Reads a text with the shipped model and calibrates every layer and head: the radius :math:`\rho` of
the queries that it really asks, how far its keys lie out, and how many pairs have 90 % of its
attention. Then compresses it, and puts side by side

- *predicted*: the error that Theorem 4 promises at the size, for the radius that was found;
- *certified*: the bound that holds for every query of the ball;
- *measured*: the mean error on the queries that come.

All of them in units of the largest distance of a value from the mean: an error of 1 says nothing.
In ``<output>`` are ``feasibility.jsonl``, a line for every finished cell, with which an interrupted
run goes on, and ``feasibility.png``, the map.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import coreset_jax as cj
from coreset_jax.geometry import calibrate, standardize
from coreset_jax.guarantees.certificate import certificate
from coreset_jax.guarantees.sizes import reachable_error
from experiments.caches.feasibility_figure import Map, draw, error_text, radius
from experiments.caches.passages import Passage, all_ratios, read_passage, workload
from experiments.common import command, figures, results
from experiments.common.tables import Row, print_table, stamp
from experiments.model import lm


def cells(config: ml_collections.ConfigDict, passage: Passage) -> list[dict[str, Any]]:
    """The settings of all cells: the calibration, and one for every ratio and share."""
    shared = {
        "experiment": "feasibility",
        "text": passage.sha256,
        "model": results.digest(config.checkpoint or lm.CHECKPOINT),
        "query_bytes": config.query_bytes,
        "seed": config.seeds[0],
    }
    points = [
        {**shared, "task": "errors", "ratio": ratio, "share": share}
        for ratio in all_ratios(config)
        for share in config.shares
    ]
    return [{**shared, "task": "calibration"}, *points]


class _Work:
    """The caches of the text, read only if a cell is missing."""

    def __init__(self, config: ml_collections.ConfigDict, passage: Passage) -> None:
        model, _ = lm.load(config.checkpoint)
        self.work = workload(model, passage)
        self.seed = config.seeds[0]
        self.norms = jnp.max(jnp.linalg.norm(self.work.queries, axis=-1), axis=-1)

    def measure(self, cell: dict[str, Any]) -> dict[str, Any]:
        """What belongs to the settings of a cell."""
        if cell["task"] == "calibration":
            return self.calibration()
        return self.errors(cell["ratio"], cell["share"])

    def calibration(self) -> dict[str, Any]:
        """The calibration of all heads."""
        found = calibrate(self.work.keys, self.work.queries)
        return {name: np.asarray(array) for name, array in found._asdict().items()}

    def errors(self, ratio: int, share: float) -> dict[str, Any]:
        """Predicted, certified and measured errors of all heads."""
        keys, values, queries, exact = self.work
        norms = share * self.norms
        size = -(-keys.shape[-2] // ratio)
        compressor = cj.refit.nystrom(cj.balanced(query_norm=norms))
        coreset = compressor(jax.random.key(self.seed), keys, values, size=size)
        bound = certificate(keys, values, coreset, query_norm=norms)
        standardization = standardize(keys, values, query_norm=norms)
        asked = jnp.linalg.norm(cj.attend(queries, coreset) - exact, axis=-1).mean(axis=-1)
        width = max(keys.shape[-1], values.shape[-1])
        predicted = [
            reachable_error(width, float(rho), size) for rho in standardization.rho.ravel()
        ]
        return {
            "certified": np.asarray(bound.error / standardization.value_radius),
            "predicted": np.reshape(predicted, norms.shape),
            "measured": np.asarray(asked / standardization.value_radius),
        }


def measure(config: ml_collections.ConfigDict, passage: Passage, store: results.Results) -> Map:
    """Measures the cells that the store lacks, and gathers all."""
    work = functools.cache(lambda: _Work(config, passage))
    every = cells(config, passage)
    known = store.complete(
        every,
        lambda cell: work().measure(cell),
        "mapping",
        settings=dict,
        label=results.labeled_by("task", "ratio", "share"),
    )
    found = {
        (cell.get("share"), cell.get("ratio")): each
        for cell, each in zip(every, known, strict=True)
    }
    ratios, shares = all_ratios(config), tuple(config.shares)

    def grid(name: str) -> np.ndarray:
        return np.array([[found[share, ratio][name] for ratio in ratios] for share in shares])

    calibration = {name: np.asarray(array) for name, array in found[None, None].items()}
    certified, predicted, measured = map(grid, ("certified", "predicted", "measured"))
    return Map(calibration, shares, tuple(ratios), certified, predicted, measured[-1])


def print_report(config: ml_collections.ConfigDict, name: str, found: Map) -> None:
    """Prints the calibration, and the errors at `config.ratio`."""
    ratio = found.ratios.index(config.ratio)
    rows: list[Row] = []
    for layer, head in np.ndindex(*found.calibration["rho"].shape):
        one = {key: array[layer, head] for key, array in found.calibration.items()}
        row = [
            f"{layer}.{head}",
            f"{one['rho']:.1f}",
            f"{one['rho_quantiles'][0]:.1f}",
            f"{one['key_radius']:.1f}",
            f"{one['key_spread']:.2f}",
            f"{one['dominating']:.1%}",
            *(error_text(error) for error in found.certified[:, ratio, layer, head]),
            error_text(found.predicted[-1, ratio, layer, head]),
            error_text(found.measured[ratio, layer, head]),
        ]
        rows.append(row)
    print_table(
        f"{name}: {config.ratio}×, balanced and refitted; errors in units of the values' reach",
        [
            *("head", "ρ", "median", "key radius", "spread", "90 % by"),
            *(f"≤ {radius(share)}" for share in found.shares),
            *("predicted", "measured"),
        ],
        rows,
        left=("head",),
        caption=(
            "ρ: of the longest query asked, and of the median one. 90 % by: the share of the pairs "
            "that have 90 % of a query's attention.\n≤ ρ/k: certified for every query of that "
            "ball; predicted by theory for ρ; measured in the mean over the queries asked. "
            "–: 1 or more.\n" + stamp(config.seeds[0])
        ),
    )


def run(config: ml_collections.ConfigDict) -> Map:
    """Measures, prints and draws."""
    passage = read_passage(config)
    output = pathlib.Path(config.output)
    store = results.Results(output / "feasibility.jsonl", fresh=config.fresh)
    found = measure(config, passage, store)
    print_report(config, passage.name, found)
    figures.save(output / "feasibility.png", draw(found, config.ratio))
    print(output / "feasibility.jsonl")
    print(output / "feasibility.png")
    return found


if __name__ == "__main__":
    command.main(run, "configs/feasibility.py", OSError, ValueError)
