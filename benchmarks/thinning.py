"""Subsets by balancing beside full kernel thinning, on caches of the language model.

    python -m benchmarks.thinning                         # the documented figures, minutes
    python -m benchmarks.thinning --length=512 --heads=2  # seconds

``kt.thin`` is that of goodpoints, by the authors of kernel thinning, which ``make test-clients``
installs into ``.venv-clients``; it holds the whole kernel matrix, which is its faster form, and
takes a head at a time. Ours compress all heads in one call. What is thinned are keys and values of
a held-out prompt; errors are those of attention on the queries that the model asks next.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Float, Int

import coreset_jax as cj
from benchmarks.compress import seconds
from coreset_jax._src.core.coreset import gather
from experiments.common.methods import ENTRANTS, Method
from experiments.common.metrics import geometric_mean, relative_error
from experiments.common.progress import track
from experiments.common.tables import print_table, stamp
from experiments.leaderboard.work import read_texts
from experiments.model import lm, text

# Queries that are asked: those of so many bytes behind the prompt.
_ASKED = 512

_LENGTH = flags.DEFINE_integer("length", 4096, "pairs of a head", lower_bound=_ASKED)
_HEADS = flags.DEFINE_integer("heads", None, "how many heads; all of the model's by default")
_DRAWS = flags.DEFINE_integer("draws", 5, "of each of our methods", lower_bound=1)

# Full kernel thinning halves: eight pairs become one.
_HALVINGS = 3


def points_and_bandwidth(
    keys: Float[np.ndarray, "n d"], values: Float[np.ndarray, "n dv"]
) -> tuple[Float[np.ndarray, "n c"], float]:
    """[keys, values], each in units of its spread, and half the square of a median distance."""
    columns = []
    for array in (keys, values):
        centered = np.float64(array) - np.mean(array, axis=0, dtype=np.float64)
        columns.append(centered / np.sqrt(np.mean(np.sum(centered**2, axis=1))))
    points = np.concatenate(columns, axis=1)
    some = points[:1000]
    squares = np.sum(some**2, axis=1)
    squares = squares[:, None] + squares[None] - 2 * some @ some.T
    return points, 0.5 * float(np.median(squares[np.triu_indices(len(some), 1)]))


def thin(
    keys: Float[np.ndarray, "n d"], values: Float[np.ndarray, "n dv"], halvings: int, seed: int = 0
) -> Int[np.ndarray, " m"]:
    """The pairs of one head that full kernel thinning keeps.

    Args:
      keys: the keys.
      values: the values.
      halvings: how often the pairs are halved.
      seed: of its coins.

    Raises:
      ModuleNotFoundError: goodpoints is not installed.
    """
    from goodpoints import kt  # Not among what the other benchmarks need.

    points, bandwidth = points_and_bandwidth(keys, values)

    def kernel(point: np.ndarray, points: np.ndarray) -> np.ndarray:
        return np.exp(-np.sum((points - point) ** 2, axis=1) / bandwidth)

    return kt.thin(points, halvings, kernel, kernel, seed=seed, store_K=True)


def subsets() -> list[Method]:
    """Methods of ours that keep pairs as they are."""
    return [method for method in ENTRANTS if method.ours and method.has("subset")]


def main(arguments: list[str]) -> None:
    """Prints the table."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {arguments[1:]}")
    length, size = _LENGTH.value, _LENGTH.value >> _HALVINGS
    tokens = text.demo_text(length + _ASKED).astype(np.int32)[None]
    texts = read_texts(lm.load()[0], tokens, length, fitting=1)
    # The heads of all layers in one row.
    keys, values, asked, exact = (
        each.reshape(-1, *each.shape[-2:])[: _HEADS.value]
        for each in (texts.keys, texts.values, texts.asked, texts.exact)
    )

    def error(coreset: cj.Coreset) -> float:
        return geometric_mean(np.asarray(relative_error(asked, exact, coreset).mean(axis=-1)))

    thinned: list[np.ndarray] = []

    def thin_next(head: int) -> None:
        thinned.append(thin(np.asarray(keys[head]), np.asarray(values[head]), _HALVINGS))

    slow = sum(
        seconds(lambda head=head: thin_next(head)) for head in track(range(len(keys)), "kt.thin")
    )
    kept = jnp.asarray(np.stack(thinned), jnp.int32)
    theirs = error(gather(keys, values, kept, jnp.zeros(kept.shape)))
    rows = [["kt.thin", f"{theirs:.4f}", "1", f"{slow:.2f}", "1"]]

    def call(compressor: cj.Compressor, draw: int) -> Callable[[], cj.Coreset]:
        return lambda: compressor(jax.random.key(draw), keys, values, size=size)

    for method in subsets():
        compressor = method.compressor(1)
        jax.block_until_ready(call(compressor, 0)())
        draws = range(_DRAWS.value)
        errors = [error(call(compressor, draw)()) for draw in draws]
        times = [seconds(call(compressor, draw)) for draw in draws]
        ours, fast = float(np.mean(errors)), float(np.median(times))
        share, part = f"{ours / theirs:.2f}", f"{fast / slow:.4f}"
        rows.append([method.label, f"{ours:.4f}", share, f"{fast:.3f}", part])
    print_table(
        f"{len(keys)} heads x {length} -> {size}",
        ["method", "error", "over kt.thin's", "seconds", "over kt.thin's"],
        rows,
        left=["method"],
        caption=(
            "Error: relative mean error of attention, geometric mean over heads; ours in the mean "
            f"over {_DRAWS.value} draws, kt.thin's of one a head.\n{stamp(0)}"
        ),
    )


if __name__ == "__main__":
    app.run(main)
