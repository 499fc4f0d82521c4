"""What is measured of methods: scores of answers, and changes of what the model expects."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jaxtyping import Array

import coreset_jax as cj
from experiments.common import programs
from experiments.common.metrics import BLOCK_SIZE, coreset_bytes, divergence, relative_error
from experiments.model import pretrained, reading
from experiments.questions import documents, texts
from experiments.questions.answers import Conversation
from experiments.questions.documents import Document
from experiments.questions.entrants import CLASSES, ENTRANTS, FULL, Setting, chosen
from experiments.tasks import prompt, registry, scoring
from experiments.tasks.example import Example

Cell = dict[str, Any]

OFF_CONTEXT = "off_context"


class Work:
    """The model, and the document at hand with what its full cache says."""

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        self.config = config
        self.pretrained = pretrained.load(config.model, config.dtype)
        self._warm: set[tuple[Any, ...]] = set()
        self._held: tuple[Any, Document] | None = None
        self._exact: tuple[Any, Any] | None = None

    def measure(self, cell: Cell) -> Cell:
        """What belongs to the settings of a cell."""
        found = self.text(cell) if "kind" in cell else self.task(cell)
        if programs.forget_if_many():
            self._warm.clear()
        return found

    def _document(self, cell: Cell, key: Any, tokens: Any) -> Document:
        """The document of these tokens: cells of one document come one after another."""
        if self._held is None or self._held[0] != key:
            self._held = None  # Two of them may not fit into memory.
            asked = self.config.task_methods if "task" in cell else self.config.methods
            again = any(
                source in CLASSES["reconstruction"]
                for source in (each.source for each in chosen(asked))
            )
            self._held = key, documents.read(self.pretrained, tokens, reconstruct=again)
        return self._held[1]

    def _compressed(self, document: Document, cell: Cell) -> tuple[cj.Coreset | None, Cell]:
        """The coreset of a cell, and what can be said of it; `None` for the full cache."""
        if cell["method"] == FULL:
            return None, {"bytes": document.nbytes}
        entrant, size = ENTRANTS[cell["method"]], document.size_at(cell["ratio"])
        compressor = entrant.make(Setting.of(self.pretrained.config, size))

        def compress() -> cj.Coreset:
            return document.compressed(
                compressor, entrant.source, ratio=cell["ratio"], seed=cell["seed"]
            )

        shapes = (cell["method"], size, document.keys.shape)
        if cell.get("timed") and shapes not in self._warm:
            compress()  # The first call compiles.
            self._warm.add(shapes)
        begun = time.perf_counter()
        coreset = compress()
        seconds = time.perf_counter() - begun
        return coreset, {"seconds": seconds, "bytes": coreset_bytes(coreset), "pairs": size}

    def task(self, cell: Cell) -> Cell:
        """The score of a method in one example, and of its follow-ups."""
        tokenizer = self.pretrained.tokenizer
        example = registry.generate(
            cell["task"], seed=cell["example"], length=cell["length"], tokenizer=tokenizer
        )
        context, question = prompt.prompt(
            example, tokenizer, chat=True, question_first=cell["question_first"]
        )
        key = (cell["task"], cell["example"], cell["length"], cell["question_first"])
        document = self._document(cell, key, context)
        try:
            coreset, found = self._compressed(document, cell)
        except Exception as error:  # Whatever it is, the others go on.
            return _failed(cell, error)
        if cell["task"] == OFF_CONTEXT:
            return found | self._off_context(document, coreset, example, question)
        turns = [question]
        if cell["follow_ups"]:
            turns += [
                prompt.follow_up_ids(example, turn, tokenizer, chat=True)
                for turn in range(1, len(example.turns))
            ]
        room = sum(len(turn) + example.max_new_tokens + 1 for turn in turns)
        conversation = Conversation.about(self.pretrained, document, coreset, room)
        answers = [conversation.answer(turn, example.max_new_tokens) for turn in turns]
        scores = [scoring.score(example, answer, turn) for turn, answer in enumerate(answers)]
        if scores[1:]:
            found["later"] = float(np.mean(scores[1:]))
        return found | {
            "score": scores[0],
            "answer": answers[0],
            "references": list(example.references),
        }

    def _off_context(
        self, document: Document, coreset: cj.Coreset | None, example: Example, question: list[int]
    ) -> Cell:
        tokenizer = self.pretrained.tokenizer
        answer = prompt.reference_ids(example.references[0], tokenizer)
        conversation = Conversation.about(
            self.pretrained, document, coreset, len(question) + len(answer)
        )
        return {"bits": conversation.bits(question, answer)}

    def text(self, cell: Cell) -> Cell:
        """What a method changes of what the model expects behind a passage, and of attention."""
        config = self.config
        key = (cell["kind"], cell["split"], cell["passage"], cell["length"])
        length, behind = cell["length"], config.continuation
        tokens = texts.passage(
            cell["kind"], cell["split"], cell["passage"], length + behind, self.pretrained.tokenizer
        )
        document = self._document(cell, key, tokens[:length])
        if self._exact is None or self._exact[0] != key:
            self._exact = key, self._next(document, tokens)
        expected, asked, exact = self._exact[1]
        try:
            coreset, found = self._compressed(document, cell)
        except Exception as error:  # Whatever it is, the others go on.
            return _failed(cell, error)
        if coreset is None:
            costs = expected[np.arange(behind - 1), tokens[length + 1 :]]
            return found | document.seconds | {"bits": -float(costs.mean()) / math.log(2)}
        conversation = Conversation.about(self.pretrained, document, coreset, behind)
        heard = conversation.predictions(tokens[length:-1].tolist())
        errors = np.asarray(relative_error(asked, exact, coreset))
        return found | {
            "divergence": float(divergence(expected, heard)),
            "mean": errors.mean(axis=-1),
            "tail": np.quantile(errors, 0.99, axis=-1),
            "kept": np.asarray((coreset.log_weights != -jnp.inf).sum(axis=-1)),
        }

    def _next(self, document: Document, tokens: np.ndarray) -> tuple[np.ndarray, Array, Array]:
        """What the full cache expects behind a passage, the queries there, and their attention."""
        length, heads = document.length, self.pretrained.config.num_kv_heads
        pairs = reading.Pairs(document.keys[..., :length, :], document.values[..., :length, :])
        queries: list[Array] = []
        found = reading.read(
            self.pretrained.model,
            tokens[length:-1],
            behind=pairs,
            chunk=self.config.continuation,
            consumer=lambda chunk: queries.append(
                chunk.queries.reshape(heads, -1, chunk.queries.shape[-1])
            ),
        )
        asked = jnp.stack(queries)
        expected = np.asarray(
            jax.nn.log_softmax(self.pretrained.model.logits(found.residual[None])[0])
        )
        return expected, asked, cj.attention(asked, *pairs, block_size=BLOCK_SIZE)


def _failed(cell: Cell, error: Exception) -> Cell:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    logging.warning("%s at %d×: %s", cell["method"], cell["ratio"], reason)
    return {"failed": reason}
