"""The lower bounds as a game: how many hidden bits does a coreset still show?

    python -m experiments.theory.lower_bound --config=configs/lower_bound.py

For every hard instance (Theorems 6 and 7 of *Nearly Optimal Attention Coresets*), size, method and
seed: a cache full of random bits, its coreset, and the share of the bits that attention over the
coreset still shows. Beside them stand the shares that no method can exceed. Finished cells are kept
in ``<output>/cells.jsonl`` and are not computed again; the figure is ``<output>/lower_bound.png``.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from coreset_jax.guarantees import hard_instances
from experiments.common import command, figures, results
from experiments.common.methods import METHODS
from experiments.common.tables import Row, multiple, print_table, stamp
from experiments.theory import cells
from experiments.theory.lower_bound_figure import BOUNDS, Curve, Panel, draw


class Instance(NamedTuple):
    """What an instance is drawn from, but for the seed."""

    theorem: int
    width: int
    rho: float
    eps: float

    @property
    def codewords(self) -> int:
        """N, the number of keys that differ."""
        if self.theorem == 7:
            return hard_instances.coreset_codewords(self.width, self.rho, self.eps)
        return hard_instances.sketch_codewords(self.rho, self.eps)

    @property
    def pairs(self) -> int:
        """n, the number of pairs."""
        return self.codewords * (self.width if self.theorem == 7 else 1)

    @property
    def bits_per_pair(self) -> int:
        """Bits hidden in each pair."""
        return 1 if self.theorem == 7 else self.width

    def size(self, share: float) -> int:
        """A share of the pairs as a number of pairs."""
        return max(1, round(share * self.pairs))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One game: everything that its outcome depends on."""

    theorem: int
    width: int
    rho: float
    eps: float
    size: int
    method: str
    seed: int

    def settings(self) -> dict[str, Any]:
        """The name of the cell in the store."""
        return {"experiment": "lower_bound", **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return (
            f"theorem {self.theorem}, ρ {self.rho:g}, d {self.width}, ε {self.eps:g}, "
            f"size {self.size}, {self.method}, seed {self.seed}"
        )


def grid(config: ml_collections.ConfigDict) -> list[Cell]:
    """All games, those of one compiled shape after one another."""
    found = []
    for instance in map(Instance._make, config.instances):
        games = [("exact", instance.pairs)]
        games += [
            (method, instance.size(share)) for share in config.shares for method in config.methods
        ]
        found += [
            Cell(*instance, size=size, method=method, seed=seed)
            for method, size in games
            for seed in config.seeds
        ]
    return found


# The games of an instance come after one another, a few seeds in turn.
@functools.lru_cache(maxsize=8)
def _instance(theorem: int, width: int, rho: float, eps: float, seed: int) -> Any:
    make = hard_instances.coreset_instance if theorem == 7 else hard_instances.sketch_instance
    return make(jax.random.key(seed), width, rho, eps)


def measure(cell: Cell) -> dict[str, Any]:
    """Plays the game of the cell.

    Returns:
      ``success``, the share of the bits read correctly; ``error``, the largest error of attention
      among the queries asked; ``coherence``, the largest overlap of two codewords; ``key_width``.
    """
    instance = _instance(cell.theorem, cell.width, cell.rho, cell.eps, cell.seed)
    # Any method returns the cache itself where it may keep all of it.
    method = cells.METHODS["uniform" if cell.method == "exact" else cell.method](cell.rho)
    rng = jax.random.fold_in(jax.random.key(cell.seed), 1)
    result = hard_instances.index_game(rng, instance, method, cell.size)
    return {
        "success": float(result.success),
        "error": float(result.error),
        "coherence": float(instance.coherence),
        "key_width": instance.keys.shape[-1],
    }


def compute(config: ml_collections.ConfigDict, store: results.Results) -> list[Panel]:
    """Plays the games that the store lacks and gathers all of them by instance and method."""
    every = grid(config)
    played = store.complete(every, measure, "lower bound", settings=Cell.settings)
    found = dict(zip(every, played, strict=True))

    def measured(instance: Instance, method: str, size: int) -> list[dict[str, Any]]:
        return [
            found[Cell(*instance, size=size, method=method, seed=seed)] for seed in config.seeds
        ]

    panels = []
    for instance in map(Instance._make, config.instances):
        curves = []
        for method in ("exact", *config.methods):
            own = [instance.pairs] if method == "exact" else list(map(instance.size, config.shares))
            games = [measured(instance, method, size) for size in own]
            success, errors = (
                np.array([[game[name] for game in some] for some in games])
                for name in ("success", "error")
            )
            curves.append(Curve(method, np.asarray(own), success, errors))
        panels.append(
            Panel(
                *instance,
                codewords=instance.codewords,
                key_width=measured(instance, "exact", instance.pairs)[0]["key_width"],
                pairs=instance.pairs,
                bits_per_pair=instance.bits_per_pair,
                curves=tuple(curves),
            )
        )
    return panels


def _half(curve: Curve, panel: Panel) -> int:
    """The place of half the pairs among the sizes of a curve."""
    return int(np.argmin(np.abs(curve.sizes - panel.pairs / 2)))


def _named(panel: Panel) -> list[str]:
    return [f"{number:g}" for number in (panel.theorem, panel.rho, panel.width, panel.eps)]


def print_report(config: ml_collections.ConfigDict, panels: Sequence[Panel]) -> None:
    """Prints the table of successes and, in another, what they are held to."""
    rows: list[Row] = []
    for panel in panels:
        numbers = panel.codewords, panel.key_width, panel.pairs
        group = [*_named(panel), *map(str, numbers)]
        for curve in panel.curves:
            means = [f"{mean:.4f}" for mean in curve.success.mean(axis=1)]
            place = _half(curve, panel)
            if curve.method == "exact":
                means, ratio = [""] * len(config.shares) + means, ""
            else:
                means, ratio = [*means, ""], f"{curve.errors[place].mean() / panel.eps:.2f}"
            rows.append([*group, METHODS[curve.method].label, *means, ratio])
        for kind, style in BOUNDS.items():
            bounds = [panel.bound(kind, size) for size in panel.curves[-1].sizes]
            rows.append([*group, style.label, *(f"{bound:.4f}" for bound in bounds), "1.0000", ""])
        rows.append(None)
    print_table(
        "Share of hidden bits read correctly from a coreset of m of the n pairs; 0.5 is guessing. "
        f"Mean over {len(config.seeds)} seeds",
        [
            *("theorem", "ρ", "d", "ε", "N", "dk", "n", "method"),
            *(f"m = {multiple(share, 'n')}" for share in config.shares),
            *("m = n", "error / ε at n/2"),
        ],
        rows,
        left=("method",),
        caption=(
            "error: the largest at the queries asked. At most: what no choice of pairs can exceed "
            "that is blind to\nthe bits, or knows them and gives equal weights, or any weights.\n"
            + stamp(config.seeds)
        ),
    )
    print_table(
        "What the figures are held to",
        ["theorem", "ρ", "d", "ε", "figure", "measured", "bound", "held"],
        check_rows(config, panels),
        left=("figure",),
    )


def check_rows(config: ml_collections.ConfigDict, panels: Sequence[Panel]) -> list[list[str]]:
    """Per instance: bits in the full cache, at half the size, and above the information bound."""
    rows = []
    for panel in panels:
        group = _named(panel)

        def add(figure: str, measured: float, sign: str, bound: float, group: Any = group) -> None:
            held = measured >= bound if sign == "≥" else measured <= bound
            numbers = f"{measured:.4f}", f"{sign} {bound:g}"
            rows.append([*group, figure, *numbers, "yes" if held else "no"])

        exact, *methods = panel.curves
        add("full cache", float(exact.success.mean()), "≥", config.full_success)
        halves = [float(curve.success[_half(curve, panel)].mean()) for curve in methods]
        add("best method at n/2", float(np.max(halves)), "≤", config.half_success)
        # From some size on the bound is 1, and nothing can exceed it.
        excesses = [
            float(success) - bound
            for curve in methods
            for size, success in zip(curve.sizes, curve.success.mean(axis=1), strict=True)
            if (bound := panel.bound("weighted", int(size))) < 1
        ]
        if excesses:
            add("best method over the information bound", float(np.max(excesses)), "≤", 0.0)
    return rows


def run(config: ml_collections.ConfigDict) -> list[Panel]:
    """Computes what is missing, prints the tables and draws the figure of all games."""
    output = pathlib.Path(config.output)
    store = results.Results(output / "cells.jsonl", fresh=config.fresh)
    panels = compute(config, store)
    print_report(config, panels)
    path = output / "lower_bound.png"
    figures.save(path, draw(panels, len(config.seeds)))
    print(path)
    return panels


if __name__ == "__main__":
    command.main(run, "configs/lower_bound.py")
