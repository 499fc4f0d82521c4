"""The tasks by name, and their examples of a given length.

The kinds of RULER under names of our own:

    RULER                                   here
    niah_single_1 … 3                       single_1 … 3
    niah_multikey_1 … 3                     multikey_1 … 3
    niah_multivalue, niah_multiquery        multivalue, multiquery
    vt                                      variable_tracking
    cwe, fwe                                common_words, frequent_words
    qa_1, qa_2                              question_answering
    –                                       off_context
"""

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from experiments.tasks import prompt
from experiments.tasks.example import Draft, Example
from experiments.tasks.fitting import most_units
from experiments.tasks.needles import needles
from experiments.tasks.off_context import off_context
from experiments.tasks.question_answering import question_answering
from experiments.tasks.variable_tracking import variable_tracking
from experiments.tasks.words import common_words, frequent_words


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task.

    Attributes:
      name: its name.
      generator: drafts an example; takes the name, a source of randomness, and parameters.
      defaults: parameters of the generator where they are not its own defaults.
    """

    name: str
    generator: Callable[..., Draft]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any]:
        """All parameters and their values by default."""
        signature = inspect.signature(self.generator).parameters.values()
        own = {each.name: each.default for each in signature if each.kind is each.KEYWORD_ONLY}
        return own | dict(self.defaults)


_PROSE = {"haystack": "prose"}
_OTHERS = {"haystack": "needles", "keys": 4}
_UUIDS = {"key_kind": "uuids", "value_kind": "uuids"}

_SPECS = (
    TaskSpec("single_1", needles),
    TaskSpec("single_2", needles, _PROSE),
    TaskSpec("single_3", needles, {**_PROSE, "value_kind": "uuids"}),
    TaskSpec("multikey_1", needles, {**_PROSE, "keys": 4}),
    TaskSpec("multikey_2", needles, _OTHERS),
    TaskSpec("multikey_3", needles, {**_OTHERS, **_UUIDS}),
    TaskSpec("multivalue", needles, {**_PROSE, "values": 4}),
    TaskSpec("multiquery", needles, {**_PROSE, "keys": 4, "queries": 4}),
    TaskSpec("variable_tracking", variable_tracking),
    TaskSpec("common_words", common_words),
    TaskSpec("frequent_words", frequent_words),
    TaskSpec("question_answering", question_answering),
    TaskSpec("off_context", off_context),
)

TASKS: Mapping[str, TaskSpec] = types.MappingProxyType({spec.name: spec for spec in _SPECS})
"""All tasks by name."""


def generate(
    task: str, *, seed: int, length: int, tokenizer: prompt.Tokenizer, **parameters: Any
) -> Example:
    """Returns an example of a task, as long as fits; the same for the same arguments.

    What is asked depends on the task, the seed and the parameters alone, and not on the length.

    Args:
      task: its name, see `TASKS`.
      seed: which example.
      length: tokens that context, question and answer may have together, within a conversation.
        Follow-ups come on top of it, and so does a question that is repeated before the context.
      tokenizer: measures the length.
      parameters: of the task's generator, in place of its defaults.

    Raises:
      ValueError: the task or a parameter is unknown, or the length is too small for the task, or
        more than it can fill.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    spec = TASKS[task]
    known = spec.parameters
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"parameters of {task} must be among {sorted(known)}, got {unknown}")
    draft = spec.generator(task, Random(f"{task} {seed}"), **(known | parameters))

    def cost(units: int) -> int:
        return prompt.num_tokens(draft.build(units), tokenizer)

    shortest = cost(draft.least)
    if shortest > length:
        raise ValueError(f"length must be at least {shortest} for this {task}, got {length}")
    units = most_units(cost, length, draft.least, draft.most)
    if units == draft.most:
        raise ValueError(f"length must be below {cost(units)} for this {task}, got {length}")
    return draft.build(units)
