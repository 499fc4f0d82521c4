"""Variable tracking: chains of assignments in filler, and which variables have a value.

References:
  RULER (Hsieh et al., COLM 2024, arXiv 2404.06654), section 3, "Multi-hop tracing".
"""

import string
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from experiments.tasks import haystack as hay
from experiments.tasks.example import Draft, Example, FollowUp

LENGTH = 5
"""Letters of a variable's name, and digits of a value."""

# Units of filler in the worked example.
_EXAMPLE_UNITS = {"noise": 10, "prose": 80}


class Chain(NamedTuple):
    """Variables of one value, in the order of their assignments."""

    value: str
    names: tuple[str, ...]


def variable_tracking(
    task: str,
    random: Random,
    *,
    haystack: hay.Filler = "noise",
    chains: int = 1,
    hops: int = 4,
    worked_example: bool = True,
    max_new_tokens: int = 30,
) -> Draft:
    """Returns chains `VAR A = 12345`, `VAR B = VAR A`, …, and all variables of a value are asked.

    Args:
      task: the name of the task.
      random: draws everything.
      haystack: `"noise"` or `"prose"`.
      chains: how many. The question asks for the first, follow-ups for the others.
      hops: assignments of a variable to a variable, for each chain.
      worked_example: whether a short text with a chain, its question and its answer come first.
      max_new_tokens: of the answer.

    Raises:
      ValueError: the haystack is unknown, or a number is not positive.
    """
    if chains < 1 or hops < 1:
        raise ValueError(f"chains and hops must be at least 1, got {chains} and {hops}")
    new_names = _distinct(random, string.ascii_uppercase)
    new_values = _distinct(random, string.digits[1:])

    def chain() -> Chain:
        return Chain(next(new_values), tuple(next(new_names) for _ in range(hops + 1)))

    hidden = [chain() for _ in range(chains)]
    inserts = [insert for each in hidden for insert in _scattered(each, random)]
    pieces = hay.filler(haystack, random)
    before = ""
    if worked_example:
        shown = chain()
        text, _ = hay.hide(pieces(_EXAMPLE_UNITS[haystack]), _scattered(shown, random))
        question, prefix, names = _question(shown)
        before = f"{text}\n\n{question}\n{prefix} {', '.join(names)}.\n\n"
    asked, *follow_ups = map(_question, hidden)

    def build(units: int) -> Example:
        text, spans = hay.hide(pieces(units), inserts)
        return Example(
            task=task,
            instruction="Memorize the variables that are assigned in the following text.",
            context=f"{before}{text}",
            question=asked.question,
            answer_prefix=asked.answer_prefix,
            references=asked.references,
            max_new_tokens=max_new_tokens,
            follow_ups=tuple(follow_ups),
            facts=tuple(
                (len(before) + start, len(before) + end) for start, end in spans[: hops + 1]
            ),
        )

    return Draft(build)


def _distinct(random: Random, letters: str) -> Iterator[str]:
    """Yields strings of `LENGTH` letters, none of them twice."""
    seen: set[str] = set()
    while True:
        drawn = "".join(random.choices(letters, k=LENGTH))
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


def _scattered(chain: Chain, random: Random) -> list[hay.Insert]:
    """The assignments of a chain, each behind the one that it needs."""
    sources = [chain.value, *(f"VAR {name}" for name in chain.names)]
    depths = sorted(random.random() for _ in chain.names)
    return [
        hay.Insert(depth, f"VAR {name} = {source}.")
        for depth, name, source in zip(depths, chain.names, sources, strict=False)
    ]


def _question(chain: Chain) -> FollowUp:
    return FollowUp(
        f"Question: Which variables have the value {chain.value} in the text?",
        f"Answer: In the text, {len(chain.names)} variables have the value {chain.value}:",
        chain.names,
    )
