"""How coresets answer attention whose scores are soft-capped, as in Gemma 2.

    python -m benchmarks.soft_cap            # the figures of the documentation
    python -m benchmarks.soft_cap --small    # a small shape, seconds

Keys of 32 clusters have a part in common, which the queries ask for: it moves all scores, up to
where the cap bends them, and tells no pair from another. Coresets are read with a cap and without;
only the last row's know of it. The error is that of attention on other queries than were given,
relative to how outputs differ between queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Array

import coreset_jax as cj
from experiments.common.progress import track
from experiments.common.tables import print_table, stamp

_SMALL = flags.DEFINE_bool("small", False, "a small shape, to see that it runs")

SOFT_CAP = 50.0
HEADS, WIDTH, CLUSTERS, COMMON = 4, 64, 32, 8.0

# Whether sample queries are given, by the name of a row.
METHODS = {
    "uniform": (cj.baselines.uniform(), False),
    "balanced": (cj.balanced(), False),
    "fitted": (cj.fitted(), False),
    "fitted, sample queries": (cj.fitted(), True),
    "fitted, sample queries, soft_cap": (cj.fitted(soft_cap=SOFT_CAP), True),
}


class Case(NamedTuple):
    """Heads of keys, values and queries whose scores have a given mean."""

    keys: Array
    values: Array
    queries: Array


class Errors(NamedTuple):
    """Relative errors of attention over a coreset, read without a cap and with it."""

    plain: float
    capped: float


def case(length: int, mean: float, seed: int = 0) -> Case:
    """Keys, values and queries ``[heads, length or 512, width]`` of scores about ``mean``."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((HEADS, CLUSTERS, WIDTH))
    places = rng.integers(0, CLUSTERS, (HEADS, length))
    keys = np.take_along_axis(centers, places[..., None], axis=1)
    keys = (keys + 0.5 * rng.standard_normal(keys.shape)) / np.sqrt(1.25)
    mixing = rng.standard_normal((HEADS, WIDTH, WIDTH)) / np.sqrt(WIDTH)
    values = keys @ mixing + 0.5 * rng.standard_normal(keys.shape)
    common = rng.standard_normal((HEADS, 1, WIDTH))
    common /= np.linalg.norm(common, axis=-1, keepdims=True)
    queries = 1.5 * rng.standard_normal((HEADS, 512, WIDTH))
    queries = queries + mean * np.sqrt(WIDTH) / COMMON * common
    return Case(*(jnp.asarray(a, jnp.float32) for a in (keys + COMMON * common, values, queries)))


def errors(name: str, case: Case, size: int) -> Errors:
    """The errors of a method on one case."""
    compressor, asked = METHODS[name]
    samples, queries = case.queries[:, ::2], case.queries[:, 1::2]
    keys, values, _ = case
    options = {"queries": samples} if asked else {}
    coreset = compressor(jax.random.key(1), keys, values, size=size, **options)
    found = []
    for soft_cap in (None, SOFT_CAP):
        exact = cj.attention(queries, keys, values, soft_cap=soft_cap)
        wrong = cj.attend(queries, coreset, soft_cap=soft_cap) - exact
        spread = exact - jnp.mean(exact, axis=1, keepdims=True)
        found.append(float(jnp.linalg.norm(wrong) / jnp.linalg.norm(spread)))
    return Errors(*found)


def main(arguments: list[str]) -> None:
    """Prints the table."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {arguments[1:]}")
    length, means = (512, [25.0]) if _SMALL.value else (4096, [0.0, 25.0, 50.0])
    cases = {mean: case(length, mean) for mean in means}
    rows = []
    for name in track(list(METHODS), "method"):
        found = [errors(name, each, length // 8) for each in cases.values()]
        rows.append([name, *(f"{error:.3f}" for each in found for error in each)])
    columns = [f"mean {mean:g}, {read}" for mean in means for read in ("plain", "capped")]
    print_table(
        f"Relative error of attention, scores capped at {SOFT_CAP:g} or not; "
        f"{HEADS} heads x {length} -> {length // 8}",
        ["method", *columns],
        rows,
        left=["method"],
        caption=stamp(0),
    )


if __name__ == "__main__":
    app.run(main)
