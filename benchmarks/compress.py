"""Time and memory of a compression, beside the matrix products that it cannot do without.

    python -m benchmarks.compress                 # the table of the documentation
    python -m benchmarks.compress --quick         # small shapes, seconds

The *floor* is the same products alone, jitted: the Gram blocks of every level and the reads and
updates of the field, without walks, swaps, gathers or bookkeeping. Compression and floor are timed
in turns in one process, and their ratio is the median over the turns: on shared machines it is the
only figure that means anything.

Memory is what the compiled program holds beside its arguments and results, as XLA plans it, and
what the process or the device really peaked at.
"""

import functools
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Array, Float

import coreset_jax as cj
from experiments.common.progress import track
from experiments.common.tables import print_table, stamp

_QUICK = flags.DEFINE_bool("quick", False, "small shapes, to see that it runs")
_REPEATS = flags.DEFINE_integer("repeats", 7, "turns of compression and floor", lower_bound=1)

# The defaults of `cj.balanced`, which the floor has to repeat.
BLOCK_SIZE, LANDMARKS, PASSES = 512, 512, 2


class Case(NamedTuple):
    """A cache to compress."""

    heads: int
    length: int
    size: int
    width: int


def visits(length: int, size: int) -> int:
    """Blocks that a compression goes through in all its levels and passes."""
    total = 0
    while length > size:
        left = max(-(-length // 2), size)
        blocks = -(-2 * (length - left) // BLOCK_SIZE)
        total += blocks * (PASSES if left == size else 1)
        length = left
    return total


@functools.partial(jax.jit, static_argnames="size")
def floor(
    keys: Float[Array, "heads n d"], values: Float[Array, "heads n dv"], *, size: int
) -> Float[Array, "heads dv1 l"]:
    """The matrix products of a compression, and nothing else."""
    length, width = keys.shape[1], values.shape[-1]
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def one_head(keys: Array, values: Array) -> Array:
        landmarks = keys[:LANDMARKS]
        solver = dot(landmarks, landmarks.T)
        ones = jnp.ones_like(values[:BLOCK_SIZE, :1])

        def visit(number: Array, moments: Array) -> Array:
            start = number * BLOCK_SIZE % (length - BLOCK_SIZE + 1)
            block_keys = jax.lax.dynamic_slice_in_dim(keys, start, BLOCK_SIZE)
            block_values = jax.lax.dynamic_slice_in_dim(values, start, BLOCK_SIZE)
            key_gram = dot(block_keys, block_keys.T)
            value_gram = dot(block_values, block_values.T)
            kernel = dot(block_keys, landmarks.T)
            read = dot(kernel, dot(moments, solver).T)
            update = dot(jnp.concatenate([block_values, ones], axis=-1).T, kernel)
            # Everything has to be computed, and nothing may grow.
            used = jnp.sum(key_gram) + jnp.sum(value_gram) + jnp.sum(read)
            return update + 1e-30 * used

        start = jnp.zeros((width + 1, LANDMARKS), keys.dtype)
        return jax.lax.fori_loop(0, visits(length, size), visit, start)

    return jax.vmap(one_head)(keys, values)


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call, with its results ready."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def peak_bytes() -> int:
    """The most memory that the device, or on a CPU this process, has held so far."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Prepared(NamedTuple):
    """A case, compiled and run once."""

    compress: Callable[[], Any]
    floor: Callable[[], Any]
    compile_seconds: float
    planned_bytes: int
    peak_bytes: int


def prepare(case: Case) -> Prepared:
    """Compiles a case and its floor, and runs each once."""
    rng = jax.random.key(0)
    shape = (case.heads, case.length, case.width)
    keys, values = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    jax.block_until_ready((keys, values))
    before = peak_bytes()

    def compress(rng: Array, keys: Array, values: Array) -> cj.Coreset:
        return cj.balanced()(rng, keys, values, size=case.size)

    start = time.perf_counter()
    compiled = jax.jit(compress).lower(rng, keys, values).compile()
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(compiled(rng, keys, values))
    peak = peak_bytes() - before
    plan = compiled.memory_analysis()
    prepared = Prepared(
        lambda: compiled(rng, keys, values),
        lambda: floor(keys, values, size=case.size),
        compile_seconds,
        0 if plan is None else int(plan.temp_size_in_bytes),
        peak,
    )
    jax.block_until_ready(prepared.floor())
    return prepared


def main(arguments: list[str]) -> None:
    """Measures all cases in turns and prints the table."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {arguments[1:]}")
    short, long = Case(1, 16384, 2048, 64), Case(1, 131072, 16384, 64)
    if _QUICK.value:
        short, long = Case(1, 2048, 256, 32), Case(1, 4096, 512, 32)
    # The widest first: the process's peak only ever rises, so what it adds to the peak shows.
    wide = long._replace(width=2 * long.width)
    cases = [wide, long, short, short._replace(heads=8)]
    prepared = {case: prepare(case) for case in track(cases, "compiling")}
    turns = {case: np.zeros((_REPEATS.value, 2)) for case in cases}
    for turn in track(range(_REPEATS.value), "turn"):
        for case in cases:
            turns[case][turn] = seconds(prepared[case].compress), seconds(prepared[case].floor)
    rows = []
    for case in cases:
        run, least = np.median(turns[case], axis=0)
        rows.append(
            [
                f"{case.heads} x {case.length} -> {case.size}",
                f"{case.width}",
                f"{prepared[case].compile_seconds:.2f}",
                f"{run:.3f}",
                f"{least:.3f}",
                f"{np.median(turns[case][:, 0] / turns[case][:, 1]):.2f}",
                f"{case.heads * case.length / run / 1e3:.0f}",
                f"{prepared[case].planned_bytes / 1e6:.0f}",
                f"{prepared[case].peak_bytes / 1e6:.0f}",
            ]
        )
    growth = np.median(turns[long][:, 0] / turns[short][:, 0])
    lengths = f"n = {short.length} to {long.length}"
    print_table(
        f"cj.balanced, default settings, float32; median of {_REPEATS.value} turns",
        [
            "heads x n -> size",
            "d",
            "compile s",
            "run s",
            "floor s",
            "run/floor",
            "k token heads/s",
            "planned MB",
            "peak MB",
        ],
        rows,
        left=["heads x n -> size"],
        caption=f"time from {lengths}: x {growth:.2f}, linear is {long.length // short.length}\n"
        + stamp(0),
    )


if __name__ == "__main__":
    app.run(main)
