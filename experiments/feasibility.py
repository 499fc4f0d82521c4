r"""Which heads of a model can be compressed, and for which of them the error can be promised.

    python -m experiments.feasibility --config=configs/feasibility.py
    python -m experiments.feasibility --config=configs/feasibility.py --config.text=FILE

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

import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags

import coreset_jax as cj
from coreset_jax.guarantees.certificate import certificate
from coreset_jax.guarantees.sizes import reachable_error
from coreset_jax.problem import calibrate, reduce
from experiments import compress_cache, lm, results
from experiments.feasibility_figure import draw, error_text, radius


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


def cells(
    config: ml_collections.ConfigDict, passage: compress_cache.Passage
) -> list[dict[str, Any]]:
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
        for ratio in compress_cache.all_ratios(config)
        for share in config.shares
    ]
    return [{**shared, "task": "calibration"}, *points]


class _Work:
    """The caches of the text, read only if a cell is missing."""

    def __init__(self, config: ml_collections.ConfigDict, passage: compress_cache.Passage) -> None:
        model, _ = lm.load(config.checkpoint)
        self.work = compress_cache.workload(model, passage)
        self.seed = config.seeds[0]
        self.norms = jnp.max(jnp.linalg.norm(self.work.queries, axis=-1), axis=-1)

    def calibration(self) -> dict[str, Any]:
        """The calibration of all heads."""
        found = calibrate(self.work.keys, self.work.queries)
        return {name: np.asarray(array) for name, array in found._asdict().items()}

    def errors(self, ratio: int, share: float) -> dict[str, Any]:
        """Predicted, certified and measured errors of all heads."""
        keys, values, queries, exact = self.work
        norms = share * self.norms
        size = -(-keys.shape[-2] // ratio)
        compressor = cj.refit.nystrom(cj.balanced(query_norm=norms), query_norm=norms)
        coreset = compressor(jax.random.key(self.seed), keys, values, size=size)
        bound = certificate(keys, values, coreset, query_norm=norms)
        reduction = reduce(keys, values, query_norm=norms)
        asked = jnp.linalg.norm(cj.attend(queries, coreset) - exact, axis=-1).mean(axis=-1)
        width = max(keys.shape[-1], values.shape[-1])
        predicted = [reachable_error(width, float(rho), size) for rho in reduction.rho.ravel()]
        return {
            "certified": np.asarray(bound.error / reduction.value_radius),
            "predicted": np.reshape(predicted, norms.shape),
            "measured": np.asarray(asked / reduction.value_radius),
        }


def measure(
    config: ml_collections.ConfigDict,
    passage: compress_cache.Passage,
    store: results.Results,
) -> Map:
    """Measures the cells that the store lacks, and gathers all."""
    work: _Work | None = None
    found: dict[Any, dict[str, Any]] = {}

    def label(cell: dict[str, Any]) -> str:
        return " ".join(str(cell[name]) for name in ("task", "ratio", "share") if name in cell)

    for cell in results.track(cells(config, passage), "mapping", label=label):
        known = store.get(cell)
        if known is None:
            work = _Work(config, passage) if work is None else work
            if cell["task"] == "calibration":
                store.put(cell, work.calibration())
            else:
                store.put(cell, work.errors(cell["ratio"], cell["share"]))
            known = store.get(cell)
            assert known is not None
        found[cell.get("share"), cell.get("ratio")] = known
    ratios, shares = compress_cache.all_ratios(config), tuple(config.shares)

    def grid(name: str) -> np.ndarray:
        return np.array([[found[share, ratio][name] for ratio in ratios] for share in shares])

    calibration = {name: np.asarray(array) for name, array in found[None, None].items()}
    return Map(
        calibration,
        shares,
        tuple(ratios),
        grid("certified"),
        grid("predicted"),
        grid("measured")[-1],
    )


def print_report(config: ml_collections.ConfigDict, name: str, found: Map) -> None:
    """Prints the calibration, and the errors at `config.ratio`."""
    ratio = found.ratios.index(config.ratio)
    rows: list[Sequence[str] | None] = []
    layers, heads = found.calibration["rho"].shape
    for layer in range(layers):
        for head in range(heads):
            one = {key: array[layer, head] for key, array in found.calibration.items()}
            rows.append(
                [
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
            )
    results.print_table(
        f"{name}: {config.ratio}×, balanced and refitted; errors in units of the values' reach",
        [
            "head",
            "ρ",
            "median",
            "key radius",
            "spread",
            "90 % by",
            *(f"≤ {radius(share)}" for share in found.shares),
            "predicted",
            "measured",
        ],
        rows,
        left=("head",),
        caption=(
            "ρ: of the longest query asked, and of the median one. 90 % by: the share of the pairs "
            "that have 90 % of a query's attention.\n≤ ρ/k: certified for every query of that "
            "ball; predicted by theory for ρ; measured in the mean over the queries asked. "
            "–: 1 or more.\n" + results.stamp(config.seeds[0])
        ),
    )


def run(config: ml_collections.ConfigDict) -> Map:
    """Measures, prints and draws."""
    passage = compress_cache.read_passage(config)
    output = pathlib.Path(config.output)
    store = results.Results(output / "feasibility.jsonl", fresh=config.fresh)
    found = measure(config, passage, store)
    print_report(config, passage.name, found)
    with results.replacing(output / "feasibility.png") as partial:
        draw(found, config.ratio).savefig(partial)
    print(output / "feasibility.jsonl")
    print(output / "feasibility.png")
    return found


def main(arguments: Sequence[str]) -> None:
    """Does what the flags describe."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments {arguments[1:]}")
    results.start_logging()
    try:
        run(flags.FLAGS.config)
    except (OSError, ValueError) as error:
        sys.exit(f"feasibility: {error}")


if __name__ == "__main__":
    # Here and not above: another experiment in the same process has a flag of this name.
    config_flags.DEFINE_config_file("config", "configs/feasibility.py")
    app.run(main)
