"""Needles: facts of the form key and value in a haystack, some of which are asked for.

References:
  RULER (Hsieh et al., COLM 2024, arXiv 2404.06654), section 3, "Retrieval".
"""

import uuid
from collections.abc import Iterator
from random import Random
from typing import Literal

from experiments.tasks import haystack as hay
from experiments.tasks import vocabulary
from experiments.tasks.example import Draft, Example, FollowUp

Kind = Literal["words", "numbers", "uuids"]

_NOUNS = {"words": "word", "numbers": "number", "uuids": "uuid"}


def needles(
    task: str,
    random: Random,
    *,
    haystack: hay.Haystack = "noise",
    key_kind: Kind = "words",
    value_kind: Kind = "numbers",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    max_new_tokens: int = 128,
) -> Draft:
    """Returns needles in a haystack: `{key}` has `{value}`, and what are the values of some keys.

    Args:
      task: the name of the task.
      random: draws everything.
      haystack: `"noise"`; `"prose"`; or `"needles"`, other needles of the same kind.
      key_kind: `"words"`, an adjective and a noun; `"numbers"`, of seven digits; `"uuids"`.
      value_kind: likewise.
      keys: how many are hidden, beside those that the haystack is made of.
      values: of each key.
      queries: how many of the keys the question asks for. Follow-ups ask for the others, one each.
      max_new_tokens: of the answer.

    Raises:
      ValueError: a kind is unknown, or a number is not positive, or more is asked than is hidden.
    """
    if not 1 <= queries <= keys or values < 1:
        raise ValueError(
            "keys, values and queries must be at least 1, and queries at most keys, "
            f"got {keys}, {values} and {queries}"
        )
    for name, kind in (("key_kind", key_kind), ("value_kind", value_kind)):
        if kind not in _NOUNS:
            raise ValueError(f"{name} must be one of {', '.join(_NOUNS)}, got {kind!r}")
    if haystack not in ("noise", "prose", "needles"):
        raise ValueError(f"haystack must be 'noise', 'prose' or 'needles', got {haystack!r}")
    new_keys = _distinct(key_kind, Random(random.getrandbits(64)))
    # Out of one source, so that no value is a key.
    same = key_kind == value_kind
    new_values = new_keys if same else _distinct(value_kind, Random(random.getrandbits(64)))
    noun = _NOUNS[value_kind]
    hidden = {next(new_keys): [next(new_values) for _ in range(values)] for _ in range(keys)}
    inserts = [
        hay.Insert(random.random(), _needle(noun, key, value))
        for key in hidden
        for value in hidden[key]
    ]
    if haystack == "needles":
        pieces, gap = _others(noun, new_keys, new_values), "\n"
    else:
        pieces, gap = hay.filler(haystack, random), " "
    asked, *follow_ups = [
        _question(noun, group, [value for key in group for value in hidden[key]])
        for group in (list(hidden)[:queries], *([key] for key in list(hidden)[queries:]))
    ]

    def build(units: int) -> Example:
        context, spans = hay.hide(pieces(units), inserts, gap)
        return Example(
            task=task,
            instruction=(
                f"The following text contains special magic {noun}s. Memorize them. "
                "You will be asked about them afterwards."
            ),
            context=context,
            question=asked.question,
            answer_prefix=asked.answer_prefix,
            references=asked.references,
            max_new_tokens=max_new_tokens,
            follow_ups=tuple(follow_ups),
            facts=spans[: len(asked.references)],
        )

    # Of words there are only so many pairs, and a needle may take two.
    bounded = haystack == "needles" and "words" in (key_kind, value_kind)
    return Draft(build, most=_num_pairs() // 2 - keys * (values + 1) if bounded else None)


def _others(noun: str, keys: Iterator[str], values: Iterator[str]) -> hay.Pieces:
    """Returns what makes a haystack of needles, one a unit."""
    made: list[str] = []

    def pieces(units: int) -> list[str]:
        while len(made) < units:
            made.append(f"{_needle(noun, next(keys), next(values))}\n")
        return made[:units]

    return pieces


def _needle(noun: str, key: str, value: str) -> str:
    return f"A special magic {noun} for {key} is {value}."


def _question(noun: str, keys: list[str], answers: list[str]) -> FollowUp:
    names = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    if len(answers) == 1:
        question = f"What is the special magic {noun} for {names} in the text?"
        prefix = f"The special magic {noun} for {names} in the text is"
    else:
        question = f"What are all the special magic {noun}s for {names} in the text?"
        prefix = f"The special magic {noun}s for {names} in the text are"
    return FollowUp(question, prefix, tuple(answers))


def _num_pairs() -> int:
    return len(vocabulary.ADJECTIVES) * len(vocabulary.NOUNS)


def _distinct(kind: Kind, random: Random) -> Iterator[str]:
    """Yields strings of a kind, none of them twice."""
    if kind == "words":
        nouns = len(vocabulary.NOUNS)
        for pair in random.sample(range(_num_pairs()), _num_pairs()):
            yield f"{vocabulary.ADJECTIVES[pair // nouns]}-{vocabulary.NOUNS[pair % nouns]}"
        return
    seen: set[int] = set()
    while True:
        drawn = random.getrandbits(128) if kind == "uuids" else random.randrange(10**6, 10**7)
        if drawn not in seen:
            seen.add(drawn)
            yield str(uuid.UUID(int=drawn, version=4)) if kind == "uuids" else str(drawn)
