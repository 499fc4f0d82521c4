"""Answers of a model over a cache, full or compressed, of what it has read."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import coreset_jax as cj
from coreset_jax._src.core.coreset import whole_cache
from experiments.model.pretrained import Pretrained
from experiments.model.stacked import StackedModel
from experiments.questions.documents import Document

# Tokens that are read at once: powers of two up to this make few programs.
_PIECE = 64

# Slots behind a document are a multiple of this, for the same reason.
_ROOM = 64


@functools.lru_cache(maxsize=1)
def _stacked(model: object) -> StackedModel:
    return StackedModel(model)


class Conversation:
    """A model that has read a document and goes on from there.

    What it reads and says is kept exactly, behind the document's pairs or its coreset.
    """

    def __init__(self, pretrained: Pretrained, coreset: cj.Coreset, length: int, room: int) -> None:
        """Begin behind a document.

        Args:
          pretrained: the model.
          coreset: of the document's cache, leading axes `[layers, kv_heads]`.
          length: tokens of the document.
          room: tokens that may follow.
        """
        self.tokenizer, self.model = pretrained.tokenizer, _stacked(pretrained.model)
        self.caches = self.model.behind(coreset, length, -(-room // _ROOM) * _ROOM)
        self.left = room
        # The last token of an answer that was cut short has been said, and not yet read.
        self._unread: list[int] = []

    @classmethod
    def about(
        cls, pretrained: Pretrained, document: Document, coreset: cj.Coreset | None, room: int
    ) -> Conversation:
        """Begin behind a document that the model has read.

        Args:
          pretrained: the model.
          document: what it has read.
          coreset: of the document's cache, leading axes `[layers, kv_heads]`; `None` for all of it.
          room: tokens that may follow.
        """
        if coreset is None:
            coreset = whole_cache(document.keys, document.values, document.lengths)
        return cls(pretrained, coreset, document.length, room)

    def read(self, tokens: Sequence[int]) -> Float[Array, "length vocabulary"]:
        """Read tokens, and return the logits of the token after each.

        Raises:
          ValueError: there are none, or no room for so many.
        """
        self._take(len(tokens) + len(self._unread))
        before = len(self._unread)
        tokens, self._unread = [*self._unread, *tokens], []
        found, start = [], 0
        while start < len(tokens):
            width = min(_PIECE, 1 << (len(tokens) - start).bit_length() - 1)
            piece = jnp.asarray(tokens[start : start + width], jnp.int32)
            logits, self.caches = self.model.read(self.caches, piece)
            found.append(logits)
            start += width
        return jnp.concatenate(found)[before:]

    def answer(self, tokens: Sequence[int], max_new_tokens: int) -> str:
        """Read tokens, the question, and continue them greedily, up to the end of the turn.

        Raises:
          ValueError: there are no tokens, or no room for them and the answer.
        """
        if len(tokens) + len(self._unread) > 1:
            self.read(tokens[:-1])
        self._take(max_new_tokens)
        end = self.tokenizer.end_of_turn
        said, self.caches = self.model.continued(self.caches, tokens[-1], max_new_tokens, end)
        told = np.asarray(said).tolist()
        if end in told:
            told = told[: told.index(end)]
        else:
            self._unread = told[-1:]
        return self.tokenizer.decode(told)

    def bits(self, question: Sequence[int], answer: Sequence[int]) -> float:
        """Bits a token of an answer behind a question, minus the mean binary log-likelihood."""
        logits = self.read([*question, *answer[:-1]])[-len(answer) :]
        likelihoods = jax.nn.log_softmax(logits)[jnp.arange(len(answer)), jnp.asarray(answer)]
        return -float(jnp.mean(likelihoods)) / math.log(2)

    def predictions(self, tokens: Sequence[int]) -> Float[np.ndarray, "length vocabulary"]:
        """Natural logarithms of the probabilities of the token after each."""
        return np.asarray(jax.nn.log_softmax(self.read(tokens)))

    def _take(self, count: int) -> None:
        if not 0 < count <= self.left:
            raise ValueError(f"tokens must be 1 to {self.left}, the room left, got {count}")
        self.left -= count
