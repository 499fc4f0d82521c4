"""Examples as tokens."""

from typing import Protocol

from experiments.tasks.example import Example

_USER = "<|im_start|>user\n"
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


class Tokenizer(Protocol):
    """What the tasks need of a tokenizer."""

    def encode(self, text: str, /) -> list[int]:
        """Encodes a text, adding no token of its own; markers of the chat are single tokens."""
        ...


def prompt(
    example: Example, tokenizer: Tokenizer, chat: bool, *, question_first: bool = False
) -> tuple[list[int], list[int]]:
    """Returns the tokens of the context, and those of the question that follow them.

    Args:
      example: what is asked.
      tokenizer: of the model.
      chat: whether to wrap both in the markers of a conversation
        (`<|im_start|>user`, `<|im_start|>assistant`).
      question_first: whether the question also stands before the context, for compression that
        knows it beforehand. It comes on top of the length that the example was generated for.

    Returns:
      The instruction and the context, to be compressed; the question and the beginning of the
      answer, to be read after compression. The tokens are encoded apart, so that the first are the
      same for every question.
    """
    known = f"{example.question}\n" if question_first else ""
    before = f"{example.instruction}\n{known}\n{example.context}"
    after = f"\n\n{example.question}"
    if chat:
        return (
            tokenizer.encode(f"{_USER}{before}"),
            tokenizer.encode(f"{after}{_ASSISTANT}{example.answer_prefix}"),
        )
    return tokenizer.encode(before), tokenizer.encode(f"{after}\n{example.answer_prefix}")


def follow_up_ids(example: Example, turn: int, tokenizer: Tokenizer, chat: bool) -> list[int]:
    """Returns the tokens of a further question, to be read after the answer to the one before it.

    Args:
      example: what is asked.
      turn: which follow-up, from 1 on.
      tokenizer: of the model.
      chat: as in `prompt`.

    Raises:
      ValueError: the example has no such turn.
    """
    if not 1 <= turn <= len(example.follow_ups):
        raise ValueError(
            f"turn must be between 1 and the {len(example.follow_ups)} follow-ups, got {turn}"
        )
    question, prefix, _ = example.turns[turn]
    if chat:
        return tokenizer.encode(f"<|im_end|>\n{_USER}{question}{_ASSISTANT}{prefix}")
    return tokenizer.encode(f"\n\n{question}\n{prefix}")


def reference_ids(reference: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens of a reference as they follow the answer's prefix, for likelihoods."""
    return tokenizer.encode(f" {reference}")


def num_tokens(example: Example, tokenizer: Tokenizer) -> int:
    """Returns the tokens of context, question and answer together, within a conversation."""
    context, question = prompt(example, tokenizer, chat=True)
    return len(context) + len(question) + example.max_new_tokens
