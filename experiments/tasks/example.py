"""An example of a task: a context, a question, and what the answer must contain."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

Span = tuple[int, int]
"""Where a piece of text begins and ends, in characters."""


class FollowUp(NamedTuple):
    """A further question about the same context.

    Attributes:
      question: the question.
      answer_prefix: how the answer begins; given to the model.
      references: strings that the answer must contain.
    """

    question: str
    answer_prefix: str
    references: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Example:
    """One example of a task.

    The context is read and compressed without the question. The question and the beginning of the
    answer follow, and the model continues it greedily.

    Attributes:
      task: the name of the task.
      instruction: what stands before the context.
      context: the text that the question is about.
      question: the question.
      answer_prefix: how the answer begins; given to the model. No blank at its end.
      references: strings that the answer must contain.
      max_new_tokens: tokens that the model may answer with.
      any_reference: whether one of the references is enough.
      follow_ups: further questions about the same context, for conversations of several turns.
      facts: the spans of the context that answer the question, in the order of the references where
        each has its own; empty where the whole context is needed, or none of it.
    """

    task: str
    instruction: str
    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    max_new_tokens: int
    any_reference: bool = False
    follow_ups: tuple[FollowUp, ...] = ()
    facts: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        for turn, asked in enumerate(self.turns):
            if not asked.question.strip():
                raise ValueError(f"question of turn {turn} is empty: {asked.question!r}")
            if not asked.references or not all(text.strip() for text in asked.references):
                raise ValueError(
                    f"references of turn {turn} must be one string or more, none of them empty, "
                    f"got {asked.references}"
                )
        if not self.context.strip():
            raise ValueError(f"context is empty: {self.context!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not all(0 <= start < end <= len(self.context) for start, end in self.facts):
            raise ValueError(
                f"facts must lie in the {len(self.context)} characters of the context, "
                f"got {self.facts}"
            )

    @property
    def turns(self) -> tuple[FollowUp, ...]:
        """The question itself, then the follow-ups."""
        return (FollowUp(self.question, self.answer_prefix, self.references), *self.follow_ups)


class Draft(NamedTuple):
    """An example whose context may still be of any length.

    Attributes:
      build: makes the example from a number of units of the haystack. What is asked, and where in
        the context its facts lie, is the same for any number.
      least: the smallest number of units.
      most: the largest, `None` for no bound.
    """

    build: Callable[[int], Example]
    least: int = 1
    most: int | None = None
