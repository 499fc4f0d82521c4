"""Aggregation: which words of a list, or of a made-up text, are the most frequent.

References:
  RULER (Hsieh et al., COLM 2024, arXiv 2404.06654), section 3, "Aggregation".
"""

import functools
import itertools
import math
from collections.abc import Sequence
from random import Random

from experiments.tasks import vocabulary
from experiments.tasks.example import Draft, Example

_SYLLABLES = tuple("".join(letters) for letters in itertools.product("bdfgklmnprstvz", "aeiou"))

# The worked example: other words, once each, and how often a common one is among them.
_EXAMPLE_OTHERS, _EXAMPLE_FREQUENCY = 10, 4


def common_words(
    task: str,
    random: Random,
    *,
    common: int = 10,
    common_frequency: int = 30,
    other_frequency: int = 3,
    worked_example: bool = True,
    max_new_tokens: int = 120,
) -> Draft:
    """Returns a numbered list of words in random order, of which some are more frequent.

    The more units, the more other words.

    Args:
      task: the name of the task.
      random: draws everything.
      common: how many words are frequent; they are asked for.
      common_frequency: how often each of them is in the list.
      other_frequency: how often each other word is.
      worked_example: whether a short list of other words with its answer comes first.
      max_new_tokens: of the answer.

    Raises:
      ValueError: common words are not more frequent than others, or a number is not positive.
    """
    if common < 1 or not 1 <= other_frequency < common_frequency:
        raise ValueError(
            "common must be at least 1, and common_frequency above other_frequency, at least 1; "
            f"got {common}, {common_frequency} and {other_frequency}"
        )
    kept = 2 * common + _EXAMPLE_OTHERS if worked_example else common
    if kept >= len(vocabulary.WORDS):
        raise ValueError(
            f"common must leave other words of the vocabulary's {len(vocabulary.WORDS)}, "
            f"got {common}"
        )
    words = random.sample(vocabulary.WORDS, len(vocabulary.WORDS))
    asked, words = words[:common], words[common:]
    question = f"Question: Which {common} words are the most frequent in the list?"
    prefix = f"Answer: The {common} most frequent words in the list are:"
    before = ""
    if worked_example:
        shown, rare, words = (
            words[:common],
            words[common:][:_EXAMPLE_OTHERS],
            words[kept - common :],
        )
        entries = _numbered(shown * _EXAMPLE_FREQUENCY + rare, random)
        before = f"{entries}\n{question}\n{prefix} {', '.join(shown)}.\n\n"
    order = random.getrandbits(64)

    def build(units: int) -> Example:
        entries = asked * common_frequency + words[:units] * other_frequency
        return Example(
            task=task,
            instruction=(
                "Some words of the following list come up more often than others. "
                "Memorize the most frequent ones."
            ),
            context=f"{before}{_numbered(entries, Random(order))}",
            question=question,
            answer_prefix=prefix,
            references=tuple(asked),
            max_new_tokens=max_new_tokens,
        )

    return Draft(build, most=len(words))


def frequent_words(
    task: str,
    random: Random,
    *,
    exponent: float = 2.0,
    asked: int = 3,
    max_new_tokens: int = 50,
) -> Draft:
    """Returns a text of made-up words whose frequencies follow Zipf's law.

    Of a text of `N` words the `k`-th word makes up `⌊N k^-exponent / Σ_j j^-exponent⌋`, and those
    of which that is nothing are left out.

    Args:
      task: the name of the task.
      random: draws everything.
      exponent: of the law, above 1.
      asked: how many of the most frequent words are asked for.
      max_new_tokens: of the answer.

    Raises:
      ValueError: the exponent is not above 1, or `asked` not positive.
    """
    if not 1.0 < exponent < math.inf or asked < 1:
        raise ValueError(
            f"exponent must be above 1 and asked at least 1, got {exponent} and {asked}"
        )
    words: list[str] = []
    seeds = Random(random.getrandbits(64)), random.getrandbits(64)

    def build(units: int) -> Example:
        counts = zipf_counts(units, exponent)
        while len(words) < len(counts):
            word = "".join(seeds[0].choices(_SYLLABLES, k=3))
            if word not in words:
                words.append(word)
        text = [word for word, count in zip(words, counts, strict=False) for _ in range(count)]
        Random(seeds[1]).shuffle(text)
        return Example(
            task=task,
            instruction=(
                "The words of the following coded text are made up. "
                "Memorize which of them appear most often."
            ),
            context=" ".join(text),
            question=f"Question: Which {asked} words appear most often in the coded text?",
            answer_prefix=f"Answer: The {asked} most frequent words in the coded text are:",
            references=tuple(words[:asked]),
            max_new_tokens=max_new_tokens,
        )

    # From here on the last word asked for and the next one differ by one or more.
    difference = asked**-exponent - (asked + 1) ** -exponent
    return Draft(build, least=math.ceil(_zeta(exponent) / difference))


def zipf_counts(total: int, exponent: float) -> list[int]:
    """Returns how often each word appears in a text of so many words, without zeros.

    >>> zipf_counts(100, 2.0)[:4]
    [60, 15, 6, 3]
    """
    whole = _zeta(exponent)
    counts = itertools.takewhile(
        bool, (int(total / (whole * rank**exponent)) for rank in itertools.count(1))
    )
    return list(counts)


@functools.cache
def _zeta(exponent: float, terms: int = 1000) -> float:
    """Riemann's zeta function above 1, by Euler and Maclaurin; relative error below 1e-9."""
    head = math.fsum(rank**-exponent for rank in range(1, terms))
    return head + terms ** (1 - exponent) / (exponent - 1) + 0.5 * terms**-exponent


def _numbered(words: Sequence[str], random: Random) -> str:
    shuffled = random.sample(words, len(words))
    return " ".join(f"{number}. {word}" for number, word in enumerate(shuffled, start=1))
