"""Scores of answers.

References:
  RULER (Hsieh et al., COLM 2024, arXiv 2404.06654), section 3 and appendix: recall of the reference
  strings, without regard to case.
"""

from collections.abc import Sequence

from experiments.tasks.example import Example


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Returns the share of the references that the answer contains, without regard to case.

    >>> string_match_all("It is PARIS.", ["Paris", "Rome"])
    0.5

    Raises:
      ValueError: `references` is empty, or has an empty string.
    """
    found = _found(answer, references)
    return sum(found) / len(found)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """Returns 1 if the answer contains any of the references, without regard to case, else 0.

    >>> string_match_part("It is PARIS.", ["Paris", "Rome"])
    1.0

    Raises:
      ValueError: `references` is empty, or has an empty string.
    """
    return float(any(_found(answer, references)))


def score(example: Example, answer: str, turn: int = 0) -> float:
    """Returns the score of an answer, between 0 and 1.

    Args:
      example: what was asked.
      answer: what the model continued the answer's prefix with.
      turn: which question was answered: 0 for the first, then the follow-ups.

    Raises:
      ValueError: the example has no such turn.
    """
    if not 0 <= turn < len(example.turns):
        raise ValueError(f"turn must be between 0 and {len(example.turns) - 1}, got {turn}")
    match = string_match_part if example.any_reference else string_match_all
    return match(answer, example.turns[turn].references)


def _found(answer: str, references: Sequence[str]) -> list[bool]:
    # A string is a sequence of strings too, and would be scored letter by letter.
    if isinstance(references, str) or not references or not all(references):
        raise ValueError(f"references must be non-empty strings, one or more, got {references!r}")
    return [reference.lower() in answer.lower() for reference in references]
