r"""A bake-off of all methods of the library on caches of the language model.

    python -m experiments.leaderboard.leaderboard --config=configs/leaderboard.py
    python -m experiments.leaderboard.leaderboard --config=configs/leaderboard.py:quick

The shipped model reads prompts of three kinds: code, prose and tables, none of which it was trained
on. Every method compresses the cache of every layer and head, all pairs of the prompt, to 1/2 ...
1/32 of its pairs; quantized caches to 1/2 ... 1/32 of its bytes. What is measured:

- *error* of attention on the queries that the model asks next, those of the continuation, in the
  mean over the queries of a head and at their 99th percentile, both relative to the mean norm of
  the head's exact outputs;
- *continuation*: bits a byte of the text that follows, over those of the full cache, when it
  attends to the coreset and, exactly and causally, to itself;
- *repeated*: the same where a passage from inside of the prompt follows, as soon as the model can
  know that it does (see :mod:`experiments.decode.decode`);
- *divergence*, behind either text: bits a byte that one would lose by predicting with the coreset
  where the text comes as the full cache expects (Kullback and Leibler). A held-out text may come as
  it likes, and what is lost there is zero for a method that answers exactly, but less than that for
  one whose errors happen to suit the text; this is never less than zero, and zero only if nothing
  changes;
- *seconds* of a compression whose program is compiled, of all layers and heads of a prompt;
- *bytes* of the coresets: keys, values, log-weights unless they are all equal, and normalizers, in
  float32; codes and ranges of quantized ones.

Query-informed methods are given the queries of the last bytes of the prompt, of all query heads of
a group; they are never asked the same ones. Query-free methods are given none. Methods are compared
in their own class, and the verdict sets ours against the best rival of every cell: a kind of text,
layer, head and ratio. Methods of uneven budgets keep as many pairs of a prompt as all others, but
not of each head, so that they have no part in the verdict. What fails or is not defined is a dash,
with its reason below the tables.

In ``<output>`` are ``leaderboard.jsonl``, a line for every finished cell, with which an interrupted
run goes on, ``leaderboard.png``, the errors over those of uniform, and ``pareto.png``.
"""

import functools
import pathlib

import ml_collections

from experiments.common import command, figures, metrics, results
from experiments.common.methods import chosen, identity
from experiments.common.tables import stamp
from experiments.leaderboard import texts as kinds_of_text
from experiments.leaderboard import work as works
from experiments.leaderboard.figure import draw_errors, draw_pareto
from experiments.leaderboard.tables import Board, gather, print_board
from experiments.leaderboard.verdict import print_verdict
from experiments.leaderboard.work import Cell, Work
from experiments.model import attention, decoder, decoding, lm, text


def check(config: ml_collections.ConfigDict) -> None:
    """Raise `ValueError` if the configuration makes no sense."""
    chosen(config.methods)
    for name in ("ratios", "seeds", "kinds"):
        if not config[name]:
            raise ValueError(f"{name} must not be empty")
    if min(config.ratios) < 2 or config.ratio not in config.ratios:
        raise ValueError(
            f"ratios must be at least 2 and include ratio, got {config.ratios} and {config.ratio}"
        )
    for name, least in (("fitting_bytes", 1), ("continuation_bytes", text.CUE + 2)):
        if not least <= config[name] <= config.prompt_bytes:
            raise ValueError(
                f"{name} must be between {least} and prompt_bytes, "
                f"got {config[name]} and {config.prompt_bytes}"
            )


def cells(config: ml_collections.ConfigDict) -> list[Cell]:
    """The settings of all cells, in the order in which they are measured."""
    shared: Cell = {
        "experiment": "leaderboard",
        "model": results.digest(config.checkpoint or lm.CHECKPOINT),
        # Not that of the table of methods: another line in it changes no finished cell.
        "code": results.source_digest(
            works, kinds_of_text, metrics, attention, decoding, decoder, lm, text
        ),
    }
    for name in ("passages", "text_seed", "prompt_bytes", "continuation_bytes", "fitting_bytes"):
        shared[name] = config[name]
    found: list[Cell] = [{**shared, "method": "exact", "kind": kind} for kind in config.kinds]
    for ratio in config.ratios:
        for method in chosen(config.methods):
            named = {
                **shared,
                "method": method.name,
                "compressor": identity(method.compressor()),
                "category": method.category,
                "ratio": ratio,
            }
            found += [
                {**named, "kind": kind, "seed": seed}
                for kind in config.kinds
                for seed in config.seeds[: None if method.has("draws") else 1]
            ]
    return found


def measure(config: ml_collections.ConfigDict, store: results.Results) -> Board:
    """Measure the cells that the store does not have yet, and gather all of them."""
    work = functools.cache(lambda: Work(config))
    every = cells(config)
    known = store.complete(
        every,
        lambda cell: work().measure(cell),
        "measuring",
        settings=dict,
        label=results.labeled_by("method", "ratio", "kind", "seed"),
    )
    return gather(list(zip(every, known, strict=True)), chosen(config.methods))


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
    print_board(board, config.ratio, texts, stamp(config.seeds))
    print_verdict(board, config.ratio)
    figures.save(output / "leaderboard.png", draw_errors(board, texts))
    figures.save(output / "pareto.png", draw_pareto(board, texts))
    for name in ("leaderboard.jsonl", "leaderboard.png", "pareto.png"):
        print(output / name)
    return board


if __name__ == "__main__":
    command.main(run, "configs/leaderboard.py", OSError, ValueError)
