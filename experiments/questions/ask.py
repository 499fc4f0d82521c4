r"""A document compressed to an eighth of its cache, and then a question about it.

    python -m experiments.questions.ask
    python -m experiments.questions.ask --config.text=FILE --config.question="What is ...?"

A pretrained model (SmolLM2-135M-Instruct unless `--config.model` names another) reads a document.
The caches of all its layers and heads are compressed before anybody asks. Then the same question is
read behind each, and the answers are printed side by side: over the full cache, and over what some
methods have left of it. Behind them, a table: how far the model's expectations of each token of the
question and of the full cache's answer are from those over the full cache, in bits a token, and the
bytes of the caches.

Without a file, the document is Python's help with a number hidden in it. In ``<output>`` are
``ask.jsonl`` and ``ask.png``.
"""

from __future__ import annotations

import itertools
import pathlib
import textwrap
import time
from typing import Any, NamedTuple

import matplotlib.figure
import ml_collections
import numpy as np
from absl import logging

from experiments.common import command, figures, progress, results
from experiments.common.metrics import coreset_bytes, divergence
from experiments.common.tables import print_table, stamp
from experiments.model import pretrained
from experiments.model.tokenizer import Tokenizer
from experiments.questions import documents
from experiments.questions.answers import Conversation
from experiments.questions.documents import Document
from experiments.questions.entrants import CLASSES, Entrant, Setting, chosen
from experiments.tasks import prompt, registry
from experiments.tasks.example import Example

_LINE = 96
"""Characters of an answer on one line."""


class Asked(NamedTuple):
    """What a question is asked about.

    Attributes:
      document: its tokens.
      question: the tokens of the question and of how the answer begins.
      shown: the question as text.
      expected: what the answer should contain; empty if nobody knows.
    """

    document: list[int]
    question: list[int]
    shown: str
    expected: tuple[str, ...]


class Answer(NamedTuple):
    """What a model said over a cache.

    Attributes:
      title: of the method.
      text: the answer.
      bits: divergence from the full cache over the question and its answer, bits a token.
      nbytes: bytes of the cache.
      seconds: of the compression, that of its program included.
    """

    title: str
    text: str
    bits: float
    nbytes: int
    seconds: float


class Full(NamedTuple):
    """What the full cache says and expects.

    Attributes:
      tokens: the question and the answer.
      expected: natural logarithms of the probabilities of the token after each of them.
    """

    tokens: list[int]
    expected: np.ndarray


def check(config: ml_collections.ConfigDict) -> None:
    """Raise `ValueError` or `FileNotFoundError` if the configuration makes no sense."""
    chosen(config.methods)
    if config.ratio < 2:
        raise ValueError(f"ratio must be at least 2, got {config.ratio}")
    for name in ("tokens", "max_new_tokens"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    if config.question is not None and not config.question.strip():
        raise ValueError("question must not be empty")
    if (config.text is None) != (config.question is None):
        raise ValueError("text and question must be given together")
    if config.text is not None and not pathlib.Path(config.text).is_file():
        raise FileNotFoundError(f"text names no file: {config.text}")


def _hidden_inside(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> Example:
    """An example whose fact lies near neither end, where every method keeps all pairs."""
    for seed in itertools.count(config.seed):
        example = registry.generate(
            "single_2", seed=seed, length=config.tokens, tokenizer=tokenizer
        )
        if 0.25 < example.facts[0][0] / len(example.context) < 0.75:
            break
    return example


def question_of(config: ml_collections.ConfigDict, model: pretrained.Pretrained) -> Asked:
    """The document and the question that a configuration asks for.

    Raises:
      ValueError: the file is empty, is not text, or is longer than the model's context.
    """
    tokenizer, limit = model.tokenizer, model.config.context_length
    if config.text is None:
        example = _hidden_inside(config, tokenizer)
        document, question = prompt.prompt(example, tokenizer, chat=True)
        shown = f"{example.question} {example.answer_prefix} …"
        return Asked(document, question, shown, example.references)
    try:
        text = pathlib.Path(config.text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text is not in UTF-8: {config.text}: {error}") from error
    if not text.strip():
        raise ValueError(f"text is empty: {config.text}")
    document = tokenizer.document(text)
    question = tokenizer.question(config.question)
    longest = limit - len(question) - config.max_new_tokens
    if len(document) > longest:
        raise ValueError(
            f"text has {len(document)} tokens, and {longest} fit the model's context of {limit} "
            "with the question and the answer"
        )
    return Asked(document, question, config.question, ())


def ask(
    model: pretrained.Pretrained,
    document: Document,
    asked: Asked,
    entrant: Entrant | None,
    config: ml_collections.ConfigDict,
    full: Full | None,
) -> tuple[Answer, Full]:
    """The answer over one cache, and what the full cache says and expects.

    Args:
      model: the model.
      document: what it has read.
      asked: the question.
      entrant: the method; `None` for the full cache.
      config: the configuration.
      full: what the full cache says and expects; `None` if this is it.
    """
    begun = time.perf_counter()
    coreset, nbytes = None, document.nbytes
    if entrant is not None:
        compressor = entrant.make(Setting.of(model.config, document.size_at(config.ratio)))
        coreset = document.compressed(
            compressor, entrant.source, ratio=config.ratio, seed=config.seed
        )
        nbytes = coreset_bytes(coreset)
    seconds = time.perf_counter() - begun
    room = len(asked.question) + config.max_new_tokens
    conversation = Conversation.about(model, document, coreset, room)
    said = conversation.answer(asked.question, config.max_new_tokens)
    told = [*asked.question, *model.tokenizer.encode(said)] if full is None else full.tokens
    again = Conversation.about(model, document, coreset, len(told))
    heard = again.predictions(told)
    full = Full(told, heard) if full is None else full
    title = "full cache" if entrant is None else entrant.title
    bits = float(divergence(full.expected, heard))
    return Answer(title, said.strip(), bits, nbytes, seconds), full


def print_answers(asked: Asked, found: list[tuple[str, Answer]], ratio: int) -> None:
    """Print the question and the answers side by side, then what they cost."""
    print(f"\nQuestion: {asked.shown}")
    if asked.expected:
        print(f"Expected: {', '.join(asked.expected)}")
    rows: list[list[str] | None] = []
    last = None
    for given, answer in found:
        if rows and given != last:
            rows.append(None)
        last = given
        shown = textwrap.shorten(answer.text, _LINE, placeholder=" …") or "(nothing)"
        right = all(each.lower() in answer.text.lower() for each in asked.expected)
        rows.append([given, answer.title, shown, ("yes" if right else "no") * bool(asked.expected)])
    print_table(
        f"Answers, caches compressed {ratio}× before the question",
        ["given", "cache", "answer", "right"],
        rows,
        left=("given", "cache", "answer"),
    )


def print_costs(found: list[tuple[str, Answer]], document: Document, seed: int) -> None:
    """Print divergences, bytes and seconds."""
    passes = ", ".join(f"{name} {taken:.0f} s" for name, taken in document.seconds.items())
    print_table(
        "What compression changes of the model's expectations, and what it costs",
        ["given", "cache", "divergence, bits/token", "MiB", "seconds"],
        [
            [
                given,
                answer.title,
                f"{answer.bits:.4f}",
                f"{answer.nbytes / 2**20:.2f}",
                f"{answer.seconds:.1f}",
            ]
            for given, answer in found
        ],
        left=("given", "cache"),
        caption=(
            f"{document.length} tokens; {passes}, compiling included. Seconds of the compression "
            "with that of its program.\n" + stamp(seed)
        ),
    )


def draw(found: list[tuple[str, Answer]], ratio: int) -> matplotlib.figure.Figure:
    """Divergences as bars, hatched for rivals."""
    figure = figures.new(7.5, 0.45 * len(found) + 1.2)
    axes = figure.subplots()
    shown = [answer for _, answer in found[1:]]
    for place, answer in enumerate(shown):
        ours = answer.title.endswith("(ours)")
        axes.barh(
            place,
            answer.bits,
            color="#0072B2" if ours else "#dddddd",
            edgecolor="#333333",
            hatch=None if ours else "//",
            linewidth=0.6,
        )
        axes.annotate(
            f"{answer.bits:.3f}",
            (answer.bits, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(shown)), [answer.title for answer in shown], fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    bits = [answer.bits for answer in shown]
    axes.set_xlim(min(bits) / 3, 2 * max(bits))
    axes.set_xlabel(f"divergence from the full cache at {ratio}×, bits a token (log scale)")
    figures.grid(axes, "x")
    return figure


def run(config: ml_collections.ConfigDict) -> list[tuple[str, Answer]]:
    """Read, compress, ask, print and draw."""
    check(config)
    logging.info("Loading the model")
    model = pretrained.load(config.model, config.dtype)
    asked = question_of(config, model)
    methods = chosen(config.methods)
    again = any(each.source in CLASSES["reconstruction"] for each in methods)
    logging.info("Reading %d tokens%s", len(asked.document), ", twice" if again else "")
    document = documents.read(model, asked.document, reconstruct=again)
    found: list[tuple[str, Answer]] = []
    full: Full | None = None
    entrants: list[Entrant | None] = [None, *methods]
    for entrant in progress.track(
        entrants, "answers", label=lambda each: each.label if each else "full cache"
    ):
        answer, full = ask(model, document, asked, entrant, config, full)
        found.append((entrant.category if entrant else "", answer))
    print_answers(asked, found, config.ratio)
    print_costs(found, document, config.seed)
    output = pathlib.Path(config.output)
    store = results.Results(output / "ask.jsonl", fresh=True)
    settings: dict[str, Any] = {name: config[name] for name in ("model", "text", "ratio", "seed")}
    for given, answer in found:
        store.put(settings | {"given": given, "method": answer.title}, answer._asdict())
    figures.save(output / "ask.png", draw(found, config.ratio))
    print(output / "ask.png")
    return found


if __name__ == "__main__":
    command.main(run, "configs/ask.py", OSError, ValueError, ModuleNotFoundError)
