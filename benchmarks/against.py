"""This checkout beside another one: first call, programs, time when compiled, errors.

    git worktree add ../other COMMIT
    python -m benchmarks.against --other=../other
    python -m benchmarks.against --other=../other --what=first   # or time, or errors

Times are ratios of calls in turns within one process; a first call is that of a fresh process
without a cache of programs, in CPU seconds, importing not counted. Errors are those of the default
on caches of the shipped model, as in ``experiments.leaderboard``.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import app, flags
from jax import export

from benchmarks.compress import seconds
from experiments.common.tables import print_table

_OTHER = flags.DEFINE_string("other", None, "folder of the other checkout", required=True)
_WHAT = flags.DEFINE_list("what", "first,time,errors", "which tables")
flags.register_validator(
    "what",
    lambda tables: {"first", "time", "errors"}.issuperset(tables),
    "must be some of first, time and errors",
)
_TURNS = flags.DEFINE_integer("turns", 5, "turns, of both checkouts each", lower_bound=1)
_RATIOS = flags.DEFINE_list("ratios", "4,8,16", "pairs over pairs kept, for errors")
_SEEDS = flags.DEFINE_integer("seeds", 3, "draws, for errors", lower_bound=1)

HERE = pathlib.Path(__file__).resolve().parent.parent

FIRST = """
import json, resource
import jax
import coreset_jax as cj
found = []
event = "/jax/core/compile/backend_compile_duration"
keys, values = jax.block_until_ready(jax.random.normal(jax.random.key(0), (2, 2, 4096, 32)))
rng = jax.block_until_ready(jax.random.key(1))
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: found.append(name) if name == event else None
)
def spent():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
begun = spent()
jax.block_until_ready(cj.compress(rng, keys, values, size=1024))
print(json.dumps([spent() - begun, len(found)]))
"""


def first_call(checkout: pathlib.Path) -> tuple[float, int]:
    """CPU seconds and programs of a first call of the default in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    output = subprocess.check_output(
        [sys.executable, "-c", FIRST], cwd=checkout, env=environment, text=True
    )
    cpu, programs = json.loads(output)
    return cpu, programs


def load(checkout: pathlib.Path) -> Any:
    """The library of a checkout, beside any other that is loaded already."""
    before = {
        name: each for name, each in sys.modules.items() if name.split(".")[0] == "coreset_jax"
    }
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    # Names of types in exported programs are given once a process, and nothing is exported here.
    with (
        mock.patch.object(export, "register_namedtuple_serialization"),
        mock.patch.object(export, "register_pytree_node_serialization"),
    ):
        found = importlib.import_module("coreset_jax")
    sys.path.remove(str(checkout))
    if before:
        for name in [each for each in sys.modules if each.split(".")[0] == "coreset_jax"]:
            del sys.modules[name]
        sys.modules.update(before)
    return found


def print_first(other: pathlib.Path) -> None:
    """The table of first calls."""
    rows, least = [], []
    for name, checkout in (("this", HERE), ("other", other)):
        calls = [first_call(checkout) for _ in range(_TURNS.value)]
        least.append(min(call[0] for call in calls))
        rows.append([name, f"{least[-1]:.1f}", str(calls[0][1])])
    rows.append(["this / other", f"{least[0] / least[1]:.2f}", ""])
    print_table("First call, [2, 4096, 32] to 1024", ["", "CPU seconds", "programs"], rows)


def print_times(here: Any, other: Any) -> None:
    """The table of times when everything is compiled."""
    rows = []
    for heads, length, size in ((8, 4096, 512), (8, 16384, 2048)):
        keys, values = jax.random.normal(jax.random.key(0), (2, heads, length, 32))

        def call(library: Any, size: int = size, cache: Any = (keys, values)) -> Callable[[], Any]:
            compressor = library.fitted()
            return lambda: compressor(jax.random.key(1), *cache, size=size)

        calls = [call(here), call(other)]
        for each in calls:
            jax.block_until_ready(each())
        turns = np.array([[seconds(each) for each in calls] for _ in range(_TURNS.value)])
        share = np.median(turns[:, 0] / turns[:, 1])
        best = turns.min(axis=0)
        row = [f"[{heads}, {length}, 32] to {size}", *(f"{each:.3f}" for each in best)]
        rows.append([*row, f"{share:.2f}"])
    print_table("`fitted`, compiled", ["", "this, s", "other, s", "this / other"], rows)


def print_errors(here: Any, other: Any) -> None:
    """The table of errors on the shipped model's caches."""
    from experiments.common.metrics import relative_error
    from experiments.leaderboard import texts as passages
    from experiments.leaderboard.work import read_texts
    from experiments.model import lm

    model, _ = lm.load(None)
    prompt, fitting = 4096, 1024
    rows, shares = [], []
    for kind in ("code", "prose", "tables"):
        tokens = passages.passages(kind, 1, prompt + 512, 0)
        texts = read_texts(model, tokens, prompt, fitting)
        for ratio in map(int, _RATIOS.value):
            for asks in (False, True):
                found = []
                for library in (here, other):
                    errors = []
                    for seed in range(_SEEDS.value):
                        coreset = library.fitted()(
                            jax.random.fold_in(jax.random.key(seed), 0),
                            texts.keys[0],
                            texts.values[0],
                            size=prompt // ratio,
                            queries=texts.fitting[0] if asks else None,
                        )
                        plain = here.Coreset(*coreset[:4])
                        each = relative_error(texts.asked[0], texts.exact[0], plain)
                        errors.append([each.mean(axis=-1), np.quantile(each, 0.99, axis=-1)])
                    logs = np.log(np.asarray(errors))
                    found.append(np.exp(logs.mean(axis=(0, 2, 3))))
                share = found[0] / found[1]
                shares.append(share)
                row = [kind, f"{ratio}x", "matched" if asks else "fitted"]
                rows.append([*row, f"{found[0][0]:.4f}", f"{found[1][0]:.4f}"])
                rows[-1] += [f"{each:.3f}" for each in share]
    mean = np.exp(np.mean(np.log(shares), axis=0))
    rows.append(["mean", "", "", "", "", *(f"{each:.3f}" for each in mean)])
    columns = ["text", "ratio", "method", "this", "other", "mean, this / other", "99th percentile"]
    print_table("Relative error of attention on the shipped model", columns, rows)


def main(arguments: list[str]) -> None:
    """Prints the tables."""
    del arguments
    other = pathlib.Path(_OTHER.value).resolve()
    if not (other / "coreset_jax").is_dir():
        raise app.UsageError(f"--other must be a checkout of this project, got {other}.")
    if "first" in _WHAT.value:
        print_first(other)
    if {"time", "errors"} & set(_WHAT.value):
        import coreset_jax as here

        libraries = (here, load(other))
        if "time" in _WHAT.value:
            print_times(*libraries)
        if "errors" in _WHAT.value:
            print_errors(*libraries)


if __name__ == "__main__":
    app.run(main)
