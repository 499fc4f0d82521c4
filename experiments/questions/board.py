r"""Which method still answers: a bake-off on the caches of a pretrained model.

    python -m experiments.questions.board --config=configs/questions.py
    python -m experiments.questions.board --config=configs/questions.py:quick

A pretrained model (SmolLM2-135M-Instruct unless `--config.model` names another) reads a document;
the caches of all its layers and heads are compressed to 1/2 ... 1/16 of their pairs; and only then
comes what is behind it:

- *tasks* of the kinds of RULER: a question about the document, answered greedily. The score is the
  share of the references in the answer. *off context* is a question that the document has nothing
  to do with: bits a token of its answer;
- *texts*: the continuation of prose, code and tables. The divergence is that of what is expected of
  each token from what the full cache expects, in bits (Kullback and Leibler). The error is that of
  attention for the queries of the continuation, relative to the mean norm of the exact outputs of
  a head: its mean and 99th percentile over queries, geometric means over heads.

Methods are compared in classes, by what they are given: nothing but keys and values; the queries of
the prompt; or those of a reconstruction, a second pass of the model over its document. All keep as
many pairs in the mean over heads; bytes are those of the pairs that are kept, with log-weights.

In ``<output>`` are ``questions.jsonl``, a line for every finished cell, with which an interrupted
run goes on, and ``questions.png``.
"""

import functools
import pathlib

import ml_collections

from experiments.common import command, figures, results
from experiments.questions import answers, documents, texts
from experiments.questions import work as works
from experiments.questions.entrants import FULL, chosen
from experiments.questions.figure import draw
from experiments.questions.tables import Found, print_board
from experiments.questions.work import Cell, Work
from experiments.tasks import registry
from experiments.tasks import scoring as scores


def check(config: ml_collections.ConfigDict) -> None:
    """Raise `ValueError` if the configuration makes no sense."""
    chosen(config.methods)
    chosen(config.task_methods)
    for name in ("ratios", "task_ratios"):
        if config[name] and min(config[name]) < 2:
            raise ValueError(f"{name} must be at least 2, got {config[name]}")
    if unknown := sorted(set(config.tasks) - set(registry.TASKS)):
        raise ValueError(f"tasks must be among {', '.join(registry.TASKS)}; unknown: {unknown}")
    if unknown := sorted(set(config.kinds) - set(texts.KINDS)):
        raise ValueError(f"kinds must be among {', '.join(texts.KINDS)}; unknown: {unknown}")
    for name in ("passages", "passage_tokens", "continuation", "examples", "task_tokens"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")


def cells(config: ml_collections.ConfigDict) -> list[Cell]:
    """The settings of all cells, those of a document one after another."""
    shared = {
        "model": config.model or "SmolLM2-135M-Instruct",
        "dtype": config.dtype,
        "seed": config.seed,
        "code": results.source_digest(works, documents, answers, texts, registry, scores),
    }

    def of_document(
        document: Cell, methods: tuple[str, ...] | None, ratios: tuple[int, ...]
    ) -> list[Cell]:
        found = [{**shared, **document, "method": FULL, "ratio": 1}]
        return found + [
            {**shared, **document, "method": entrant.name, "ratio": ratio}
            for entrant in chosen(methods)
            for ratio in ratios
        ]

    found: list[Cell] = []
    for number in range(config.passages):
        for kind in config.kinds:
            document = {
                "kind": kind,
                "split": config.split,
                "passage": number,
                "length": config.passage_tokens,
                "continuation": config.continuation,
                "timed": True,
            }
            found += of_document(document, config.methods, config.ratios)
    for number in range(config.examples):
        for task in config.tasks:
            document = {
                "task": task,
                "example": number,
                "length": config.task_tokens,
                "question_first": config.question_first,
                "follow_ups": config.follow_ups,
            }
            found += of_document(document, config.task_methods, config.task_ratios)
    return found


def run(config: ml_collections.ConfigDict) -> Found:
    """Measure what is missing, print and draw."""
    check(config)
    output = pathlib.Path(config.output)
    store = results.Results(output / "questions.jsonl", fresh=config.fresh)
    every = cells(config)
    work = functools.cache(lambda: Work(config))
    known = store.complete(
        every,
        lambda cell: work().measure(cell),
        "questions",
        settings=dict,
        label=results.labeled_by("kind", "task", "passage", "example", "method", "ratio"),
    )
    found = list(zip(every, known, strict=True))
    print_board(config, found)
    figures.save(output / "questions.png", draw(config, found))
    print(output / "questions.jsonl")
    print(output / "questions.png")
    return found


if __name__ == "__main__":
    command.main(run, "configs/questions.py", OSError, ValueError, ModuleNotFoundError)
