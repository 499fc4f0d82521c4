"""What a certificate is worth and what it costs.

    python -m benchmarks.certify                 # the figures of the documentation
    python -m benchmarks.certify --quick         # small shapes, seconds

Worth: the certified error over the largest that the adversary finds, by radius, for balanced
coresets of caches on the unit sphere. The true supremum lies between the two.

Cost: the time of a certificate over that of the compression that it certifies, in turns in one
process; the ratio is the median over the turns, and beside it stands that of processor times, which
a busy machine disturbs less.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

import coreset_jax as cj
from experiments.common.progress import track
from experiments.common.tables import print_table, stamp
from experiments.theory.instances import unit_sphere

_QUICK = flags.DEFINE_bool("quick", False, "small shapes, to see that it runs")
_REPEATS = flags.DEFINE_integer("repeats", 7, "turns of compression and certificate", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "caches a radius", lower_bound=1)

RADII = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)


class Case(NamedTuple):
    """A cache of one head, as wide in keys as in values, and the size of its coreset."""

    length: int
    size: int
    width: int


class Worth(NamedTuple):
    """What was promised for one coreset, and what was found."""

    found: float
    promised: float
    kernel: float


def worth(case: Case, rho: float, seed: int) -> Worth:
    """Compresses one cache, and bounds its error from below and from above."""
    instance_rng, method_rng, adversary_rng = jax.random.split(jax.random.key(seed), 3)
    keys, values = unit_sphere(instance_rng, case.length, case.width, case.width)
    known = {"rho": rho, "scale": 1.0}
    coreset = cj.balanced(**known)(method_rng, keys, values, size=case.size)
    found = cj.guarantees.adversary(adversary_rng, keys, values, coreset, **known)
    bound = cj.guarantees.certificate(keys, values, coreset, **known)
    return Worth(float(found.error), float(bound.error), float(bound.kernel))


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall time and processor time of one call, with its results ready."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    return time.perf_counter() - wall, time.process_time() - processor


def prepare(case: Case) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A compression and its certificate, compiled."""
    keys, values = jax.block_until_ready(unit_sphere(jax.random.key(0), *case[::2], case.width))
    rng = jax.random.key(1)

    def compress() -> cj.Coreset:
        return cj.balanced(rho=1.0, scale=1.0)(rng, keys, values, size=case.size)

    coreset = compress()

    def certify() -> cj.guarantees.Certificate:
        return cj.guarantees.certificate(keys, values, coreset, rho=1.0, scale=1.0)

    jax.block_until_ready(certify())
    return compress, certify


def print_worth(case: Case) -> None:
    """The table of worth."""
    rows = []
    for rho in track(RADII, "radius"):
        caches = [worth(case, rho, seed) for seed in range(_SEEDS.value)]
        ratios = [cache.promised / cache.found for cache in caches]
        rows.append(
            [
                f"{rho:g}",
                f"{statistics.median(cache.found for cache in caches):.5f}",
                f"{statistics.median(cache.promised for cache in caches):.5f}",
                f"{statistics.median(ratios):.2f}",
                f"{max(ratios):.2f}",
                f"{statistics.median(cache.kernel / cache.found for cache in caches):.1f}",
            ]
        )
    print_table(
        f"Certified error over the adversary's: unit sphere, n = {case.length}, d = {case.width}, "
        f"size {case.size}; median of {_SEEDS.value} caches",
        ["ρ", "adversary", "certificate", "ratio", "largest", "kernel alone"],
        rows,
    )


def print_cost(cases: list[Case]) -> None:
    """The table of costs."""
    prepared = [prepare(case) for case in track(cases, "compiling")]
    turns = np.zeros((_REPEATS.value, len(cases), 2, 2))
    for turn in track(range(_REPEATS.value), "turn"):
        for place, pair in enumerate(prepared):
            turns[turn, place] = [seconds(function) for function in pair]
    rows = []
    for place, case in enumerate(cases):
        (compress, _), (certify, _) = np.median(turns[:, place], axis=0)
        wall, processor = np.median(turns[:, place, 1] / turns[:, place, 0], axis=0)
        numbers = f"{compress:.3f}", f"{certify:.3f}", f"{wall:.2f}", f"{processor:.2f}"
        rows.append([f"{case.length} -> {case.size}", f"{case.width}", *numbers])
    print_table(
        f"Time of a certificate over that of its compression; median of {_REPEATS.value} turns",
        ["n -> size", "d", "compress s", "certify s", "ratio", "processor time"],
        rows,
        left=["n -> size"],
        caption=stamp(0),
    )


def main(arguments: list[str]) -> None:
    """Prints both tables."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {arguments[1:]}")
    if _QUICK.value:
        print_worth(Case(1024, 128, 16))
        print_cost([Case(1024, 128, 16), Case(2048, 256, 16)])
        return
    print_worth(Case(16384, 1024, 32))
    print_cost([Case(n, n // 8, d) for n in (4096, 16384, 65536) for d in (32, 64)])


if __name__ == "__main__":
    app.run(main)
