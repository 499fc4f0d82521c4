"""Time of the default compressor beside that of the methods it is compared with.

    python -m benchmarks.methods                 # the table of the documentation
    python -m benchmarks.methods --cases=quick   # small shapes, seconds

All methods in turns in one process, on caches of random keys and values; a ratio is the median over
the turns of the default's time over that of the method in the same turn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

import coreset_jax as cj
from benchmarks.compress import seconds
from experiments.common.progress import track
from experiments.common.tables import print_table, stamp

_CASES = flags.DEFINE_enum("cases", "full", ["full", "quick"], "quick: small shapes")
_TURNS = flags.DEFINE_integer("turns", 5, "turns of all methods", lower_bound=1)

# What each is called, how it is made, and whether sample queries are given to it.
METHODS: dict[str, tuple[Callable[[], cj.Compressor], bool]] = {
    "fitted": (cj.fitted, False),
    "fitted and matched": (cj.fitted, True),
    "balanced": (cj.balanced, False),
    "WildCat, 4 bins": (lambda: cj.baselines.wildcat(bins=4), False),
    "k-means": (cj.baselines.kmeans, False),
    "attention matching": (cj.baselines.attention_matching, True),
}


class Case(NamedTuple):
    """A cache to compress."""

    heads: int
    length: int
    size: int
    width: int
    samples: int


def calls(case: Case) -> dict[str, Callable[[], Any]]:
    """A call of every method on one cache."""
    rng = jax.random.key(0)
    shape = (case.heads, case.length, case.width)
    keys, values = jax.random.normal(jax.random.key(1), (2, *shape))
    queries = jax.random.normal(jax.random.key(2), (case.heads, case.samples, case.width))

    def call(make: Callable[[], cj.Compressor], informed: bool) -> Callable[[], Any]:
        compressor, asked = make(), queries if informed else None
        return lambda: compressor(rng, keys, values, size=case.size, queries=asked)

    return {name: call(*method) for name, method in METHODS.items()}


def print_case(case: Case) -> None:
    """The table of one cache."""
    prepared = calls(case)
    for call in prepared.values():
        jax.block_until_ready(call())
    turns = np.array(
        [
            [seconds(call) for call in prepared.values()]
            for _ in track(range(_TURNS.value), f"{case.length} -> {case.size}")
        ]
    )
    rows = [
        [
            name,
            f"{np.median(turns[:, place]):.3f}",
            f"{np.median(turns[:, 0] / turns[:, place]):.2f}",
            f"{np.median(turns[:, 1] / turns[:, place]):.2f}",
        ]
        for place, name in enumerate(prepared)
    ]
    print_table(
        f"{case.heads} heads x {case.length} -> {case.size}, d = {case.width}, {case.samples} "
        f"sample queries; median of {_TURNS.value} turns",
        ["method", "seconds", "fitted / it", "fitted and matched / it"],
        rows,
        left=["method"],
        caption=stamp(0),
    )


def main(arguments: list[str]) -> None:
    """Prints the tables."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {arguments[1:]}")
    if _CASES.value == "quick":
        print_case(Case(2, 1024, 128, 32, 256))
        return
    print_case(Case(8, 4096, 512, 64, 2048))
    print_case(Case(8, 16384, 2048, 64, 4096))


if __name__ == "__main__":
    app.run(main)
