r"""A document compressed once and kept in a file, and questions about it later.

    coreset-jax compress --text=FILE --ratio=8 --out=prefix.safetensors
    coreset-jax ask prefix.safetensors "question"

or ``python -m experiments.questions.prefix compress ...``. A pretrained model reads the document
(SmolLM2-135M-Instruct of `make models`, or the GGUF file or Hugging Face folder that `--model`
names). What its caches hold is compressed, one budget for all heads of all layers, and written to a
file (`coreset_jax.prefixes`). With that file the model answers without reading the document again;
further questions of one call are further turns.
"""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Sequence

import jax
from absl import app, flags, logging

import coreset_jax as cj
from coreset_jax.prefixes import Prefix
from experiments.common import command
from experiments.model import pretrained
from experiments.model.llama import DTYPES
from experiments.questions import documents
from experiments.questions.answers import Conversation
from experiments.questions.entrants import EVERY_HEAD

_USAGE = """\
coreset-jax compress --text=FILE [--model=PATH] [--ratio=8] [--out=prefix.safetensors]
coreset-jax ask prefix.safetensors "question" ["further question" ...] [--model=PATH]"""


def check_compression(text: str | None, ratio: int, out: str) -> str:
    """The document, if it and the file to be written make sense.

    Raises:
      ValueError: there is no text, it is empty or not in UTF-8, or `ratio` is below 2.
      FileNotFoundError: the file or the folder of `out` does not exist.
    """
    if text is None:
        raise ValueError("--text must name a file")
    if not pathlib.Path(text).is_file():
        raise FileNotFoundError(f"--text names no file: {text}")
    if ratio < 2:
        raise ValueError(f"--ratio must be at least 2, got {ratio}")
    if pathlib.Path(out).is_dir():
        raise ValueError(f"--out must be a file, not a folder: {out}")
    folder = pathlib.Path(out).absolute().parent
    if not os.access(folder, os.W_OK):
        raise FileNotFoundError(f"--out must be in a folder that can be written to: {folder}")
    try:
        document = pathlib.Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text is not in UTF-8: {text}: {error}") from error
    if not document.strip():
        raise ValueError(f"--text is empty: {text}")
    return document


def compress(
    model: pretrained.Pretrained, text: str, *, ratio: int, again: bool, seed: int = 0
) -> tuple[Prefix, documents.Document]:
    """The prefix of a document, and the document as the model holds it.

    Args:
      model: the model.
      text: the document.
      ratio: pairs of the document over those that are kept, in the mean over heads.
      again: whether the model reads the document twice, which keeps more facts.
      seed: of the compression.

    Raises:
      ValueError: the text is longer than the model's context.
    """
    tokens = model.tokenizer.document(text)
    limit = model.config.context_length
    if len(tokens) >= limit:
        raise ValueError(
            f"the text has {len(tokens)} tokens, and the context of {model.name} is {limit}"
        )
    logging.info("Reading %d tokens%s", len(tokens), ", twice" if again else "")
    document = documents.read(model, tokens, reconstruct=again)
    logging.info("Compressing %.1f MiB to 1/%d", document.nbytes / 2**20, ratio)
    source = "both" if again else "ahead"
    compressor = cj.attended(axes=EVERY_HEAD)
    coreset = document.compressed(compressor, source, ratio=ratio, seed=seed)
    return Prefix.of(coreset, length=document.length, model=model.name), document


def ask(
    model: pretrained.Pretrained, prefix: Prefix, questions: Sequence[str], most: int
) -> list[tuple[str, float]]:
    """Answers to questions about the document of a prefix, a turn after another.

    Args:
      model: the model.
      prefix: the document.
      questions: the questions.
      most: tokens of an answer at most.

    Returns:
      Each answer, and the tokens of question and answer a second, that of compiling included.

    Raises:
      ValueError: a question is empty, or they do not fit into the model's context.
    """
    if not questions or not all(each.strip() for each in questions):
        raise ValueError("a question must not be empty")
    turns = [
        model.tokenizer.question(each, first=number == 0) for number, each in enumerate(questions)
    ]
    room = sum(len(turn) + most + 1 for turn in turns)
    if prefix.length + room > model.config.context_length:
        raise ValueError(
            f"the document's {prefix.length} tokens and {room} of questions and answers exceed the "
            f"context of {model.name}, {model.config.context_length}"
        )
    size = max(int((layer.offsets[1:] - layer.offsets[:-1]).max()) for layer in prefix.layers)
    coresets = [cj.unpack(layer, size=size) for layer in prefix.layers]
    coreset = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *coresets)
    conversation = Conversation(model, coreset, prefix.length, room)
    found = []
    for turn in turns:
        begun = time.perf_counter()
        answer = conversation.answer(turn, most)
        count = len(turn) + len(model.tokenizer.encode(answer))
        found.append((answer.strip(), count / (time.perf_counter() - begun)))
    return found


def _compress(options: flags.FlagValues) -> None:
    text = check_compression(options.text, options.ratio, options.out)
    model = pretrained.load(options.model, options.dtype)
    prefix, document = compress(
        model, text, ratio=options.ratio, again=options.again, seed=options.seed
    )
    cj.prefixes.save(options.out, prefix)
    passes = ", ".join(f"{name} {taken:.0f} s" for name, taken in document.seconds.items())
    print(
        f"{options.out}: {document.length} tokens of {model.name}, "
        f"{document.nbytes / 2**20:.1f} MiB in {prefix.nbytes / 2**20:.1f} ({passes})"
    )


def _ask(path: str, questions: Sequence[str], options: flags.FlagValues) -> None:
    prefix = cj.prefixes.load(path)
    model = pretrained.load(options.model, options.dtype)
    shape = model.config.num_layers, model.config.num_kv_heads
    found = len(prefix.layers), prefix.layers[0].num_heads if prefix.layers else 0
    if prefix.model != model.name or found != shape:
        raise ValueError(
            f"{path} is a prefix of {prefix.model} with {found[0]} layers of {found[1]} heads, not "
            f"of {model.name} with {shape[0]} of {shape[1]}; see --model"
        )
    for question, (answer, speed) in zip(
        questions, ask(model, prefix, questions, options.max_new_tokens), strict=True
    ):
        if questions[1:]:
            print(f"\n{question}")
        print(answer)
        logging.info("%.1f tokens a second", speed)


def job(words: Sequence[str]) -> None:
    """Does what the words of the command line say.

    Raises:
      ValueError: they make no sense.
    """
    options = flags.FLAGS
    if words[:1] == ["compress"] and len(words) == 1:
        return _compress(options)
    if words[:1] == ["ask"] and len(words) > 2:
        return _ask(words[1], words[2:], options)
    raise app.UsageError(f"usage:\n{_USAGE}")


def main() -> None:
    """Runs the command."""
    flags.DEFINE_string("text", None, "a text file, the document")
    flags.DEFINE_string("out", "prefix.safetensors", "the file to write")
    flags.DEFINE_string("model", None, "a GGUF file or a Hugging Face folder; None is SmolLM2-135M")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "of weights and activations")
    flags.DEFINE_integer("ratio", 8, "pairs of the document over those that are kept", 2)
    flags.DEFINE_boolean("again", True, "read the document twice, which keeps more facts")
    flags.DEFINE_integer("max_new_tokens", 64, "tokens of an answer at most", 1)
    flags.DEFINE_integer("seed", 0, "of the compression")
    command.run(job, OSError, ValueError, ModuleNotFoundError)


if __name__ == "__main__":
    main()
