"""Text that facts are hidden in."""

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Literal, NamedTuple

from experiments.tasks.example import Span

Filler = Literal["noise", "prose"]
Haystack = Literal["noise", "prose", "needles"]

NOISE = (
    "The road is long.",
    "Leaves drift over the water.",
    "Someone has left the gate open.",
    "We walk on and then we rest.",
    "The clouds pass, and others come.",
)
"""The sentences of the noise, repeated in this order."""

Pieces = Callable[[int], list[str]]
"""Makes a number of units of filler: sentences, each with the blanks behind it."""

# A sentence with the blanks behind it.
_SENTENCE = re.compile(r"\S.*?(?:[.!?]\s+|\Z)", re.DOTALL)


class Insert(NamedTuple):
    """A fact to hide.

    Attributes:
      depth: where among the pieces, from 0, before all of them, up to but not including 1.
      text: the fact.
    """

    depth: float
    text: str


def filler(kind: Filler, random: Random) -> Pieces:
    """Returns what makes filler of any length; longer filler begins with the shorter.

    Args:
      kind: `"noise"`, five sentences over and over, a unit each; `"prose"`, the topics of Python's
        own help from some sentence on, a word a unit.
      random: draws the first sentence of the prose.

    Raises:
      ValueError: the kind is neither of the two.
    """
    if kind == "noise":
        return lambda units: [f"{NOISE[unit % len(NOISE)]} " for unit in range(units)]
    if kind == "prose":
        first = random.randrange(len(_prose()))
        return lambda units: _words(first, units)
    raise ValueError(f"haystack must be 'noise' or 'prose', got {kind!r}")


def hide(
    pieces: Sequence[str], inserts: Sequence[Insert], gap: str = " "
) -> tuple[str, tuple[Span, ...]]:
    """Returns the pieces joined, with the facts between them, and where the facts lie.

    Args:
      pieces: the haystack, each piece with the blanks behind it.
      inserts: the facts. Those of the same place stay in their order.
      gap: what follows a fact.

    Returns:
      The text, without blanks at its end, and the span of each fact.
    """
    behind: list[list[int]] = [[] for _ in range(len(pieces) + 1)]
    for number, insert in enumerate(inserts):
        behind[int(insert.depth * len(behind))].append(number)
    parts: list[str] = []
    spans: list[Span] = [(0, 0)] * len(inserts)
    end = 0
    for place, numbers in enumerate(behind):
        for number in numbers:
            fact = inserts[number].text
            if parts and not parts[-1][-1].isspace():
                parts.append(gap)  # a piece of prose may end in the middle of a sentence
                end += len(gap)
            parts.extend((fact, gap))
            spans[number] = (end, end + len(fact))
            end += len(fact) + len(gap)
        if place < len(pieces):
            parts.append(pieces[place])
            end += len(pieces[place])
    return "".join(parts).rstrip(), tuple(spans)


@functools.cache
def _prose() -> tuple[tuple[str, int], ...]:
    """The sentences of Python's help, sorted by topic, and how many words each has."""
    topics = importlib.import_module("pydoc_data.topics").topics
    joined = " ".join(topics[name] for name in sorted(topics))
    sentences = _SENTENCE.findall(joined + " ")
    return tuple((sentence, len(sentence.split())) for sentence in sentences)


def _words(first: int, count: int) -> list[str]:
    """Words of the prose from a sentence on, as sentences of which the last may be cut short."""
    found: list[str] = []
    sentences, number = _prose(), first
    while count > 0:
        sentence, words = sentences[number % len(sentences)]
        if words > count:
            sentence = "".join(re.findall(r"\S+\s*", sentence)[:count])
        found.append(sentence)
        count -= words
        number += 1
    return found
