r"""A bake-off of all methods of the library on caches of the language model.

    python -m experiments.leaderboard --config=configs/leaderboard.py
    python -m experiments.leaderboard --config=configs/leaderboard.py:quick

The shipped model reads prompts of three kinds: code, prose and tables, none of which it was trained
on. Every method compresses the cache of every layer and head, all pairs of the prompt, to 1/2 ...
1/32 of its pairs; quantised caches to 1/2 ... 1/32 of its bytes. What is measured:

- *error* of attention on the queries that the model asks next, those of the continuation, in the
  mean over the queries of a head and at their 99th percentile, both relative to the mean norm of
  the head's exact outputs;
- *continuation*: bits a byte of the text that follows, over those of the full cache, when it
  attends to the coreset and, exactly and causally, to itself;
- *repeated*: the same where a passage from inside of the prompt follows, as soon as the model can
  know that it does (see :mod:`experiments.decode`);
- *divergence*, behind either text: bits a byte that one would lose by predicting with the coreset
  where the text comes as the full cache expects (Kullback and Leibler). A held-out text may come as
  it likes, and what is lost there is zero for a method that answers exactly, but less than that for
  one whose errors happen to suit the text; this is never less than zero, and zero only if nothing
  changes;
- *seconds* of a compression whose program is compiled, of all layers and heads of a prompt;
- *bytes* of the coresets: keys, values, log-weights unless they are all equal, and normalizers, in
  float32; codes and ranges of quantised ones.

Query-informed methods are given the queries of the last bytes of the prompt, of all query heads of
a group; they are never asked the same ones. Query-free methods are given none. Methods are compared
in their own class, and the verdict sets ours against the best rival of every cell: a kind of text,
layer, head and ratio. Methods of uneven budgets keep as many pairs of a prompt as all others, but
not of each head, so that they have no part in the verdict. What fails or is not defined is a dash,
with its reason below the tables.

In ``<output>`` are ``leaderboard.jsonl``, a line for every finished cell, with which an interrupted
run goes on, ``leaderboard.png``, the errors over those of uniform, and ``pareto.png``.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from experiments import (
    decode,
    decoder,
    decoding,
    leaderboard_methods,
    leaderboard_texts,
    leaderboard_work,
    lm,
    programs,
    results,
    text,
)
from experiments.leaderboard_figure import draw_errors, draw_pareto
from experiments.leaderboard_tables import Board, gather, print_board
from experiments.leaderboard_verdict import print_verdict
from experiments.leaderboard_work import Work

Cell = dict[str, Any]


def check(config: ml_collections.ConfigDict) -> None:
    """Raise `ValueError` if the configuration makes no sense."""
    leaderboard_methods.chosen(config.methods)
    for name in ("ratios", "seeds", "kinds"):
        if not config[name]:
            raise ValueError(f"{name} must not be empty")
    if min(config.ratios) < 2 or config.ratio not in config.ratios:
        raise ValueError(
            f"ratios must be at least 2 and include ratio, got {config.ratios} and {config.ratio}"
        )
    if not 1 <= config.fitting_bytes <= config.prompt_bytes:
        raise ValueError(
            "fitting_bytes must be between 1 and prompt_bytes, "
            f"got {config.fitting_bytes} and {config.prompt_bytes}"
        )
    if not decode.CUE + 2 <= config.continuation_bytes <= config.prompt_bytes:
        raise ValueError(
            f"continuation_bytes must be between {decode.CUE + 2} and prompt_bytes, "
            f"got {config.continuation_bytes} and {config.prompt_bytes}"
        )


def cells(config: ml_collections.ConfigDict) -> list[Cell]:
    """The settings of all cells, in the order in which they are measured."""
    shared = {
        "experiment": "leaderboard",
        "model": results.digest(config.checkpoint or lm.CHECKPOINT),
        # Not that of the table of methods: another line in it changes no finished cell.
        "code": results.digest(
            leaderboard_work.__file__,
            leaderboard_texts.__file__,
            decode.__file__,
            decoding.__file__,
            decoder.__file__,
            lm.__file__,
            text.__file__,
        ),
        "passages": config.passages,
        "text_seed": config.text_seed,
        "prompt_bytes": config.prompt_bytes,
        "continuation_bytes": config.continuation_bytes,
        "fitting_bytes": config.fitting_bytes,
    }
    found: list[Cell] = [{**shared, "method": "exact", "kind": kind} for kind in config.kinds]
    for ratio in config.ratios:
        for method in leaderboard_methods.chosen(config.methods):
            named = {
                **shared,
                "method": method.name,
                "compressor": leaderboard_methods.identity(method.compressor(1)),
                "category": method.category,
                "ratio": ratio,
            }
            found += [
                {**named, "kind": kind, "seed": seed}
                for kind in config.kinds
                for seed in config.seeds[: None if method.draws else 1]
            ]
    return found


def measure(config: ml_collections.ConfigDict, store: results.Results) -> Board:
    """Measure the cells that the store does not have yet, and gather all of them."""
    work: Work | None = None
    found = []

    def label(cell: Cell) -> str:
        named = (str(cell[name]) for name in ("method", "ratio", "kind", "seed") if name in cell)
        return " ".join(named)

    for cell in results.track(cells(config), "measuring", label=label):
        known = store.get(cell)
        if known is None:
            work = Work(config) if work is None else work
            if cell["method"] == "exact":
                store.put(cell, work.exact(cell["kind"]))
            else:
                place = (cell[name] for name in ("method", "kind", "ratio", "seed"))
                store.put(cell, work.compressed(*place))
            if programs.forget_if_many():
                work.warm.clear()
            known = store.get(cell)
            assert known is not None
        found.append((cell, known))
    return gather(found, leaderboard_methods.chosen(config.methods))


def run(config: ml_collections.ConfigDict) -> Board:
    """Measure, print and draw."""
    check(config)
    output = pathlib.Path(config.output)
    board = measure(config, results.Results(output / "leaderboard.jsonl", fresh=config.fresh))
    texts = (
        f"{config.passages} passage{'s'[: config.passages != 1]} each of "
        f"{', '.join(config.kinds)}; prompts of {config.prompt_bytes} bytes, "
        f"{config.continuation_bytes} bytes behind each"
    )
    print_board(board, config.ratio, texts, results.stamp(", ".join(map(str, config.seeds))))
    print_verdict(board, config.ratio)
    with results.replacing(output / "leaderboard.png") as partial:
        draw_errors(board, texts).savefig(partial)
    with results.replacing(output / "pareto.png") as partial:
        draw_pareto(board, texts).savefig(partial)
    for name in ("leaderboard.jsonl", "leaderboard.png", "pareto.png"):
        print(output / name)
    return board


def main(arguments: Sequence[str]) -> None:
    """Does what the flags describe."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments {arguments[1:]}")
    results.start_logging()
    try:
        run(flags.FLAGS.config)
    except (OSError, ValueError) as error:
        sys.exit(f"leaderboard: {error}")


if __name__ == "__main__":
    # Here and not above: another experiment in the same process has a flag of this name.
    config_flags.DEFINE_config_file("config", "configs/leaderboard.py")
    app.run(main)
