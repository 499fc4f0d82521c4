"""Needles: what is hidden, how often, and what is asked."""

import itertools
import re

import pytest

from experiments.tasks.haystack import Insert, filler, hide
from experiments.tasks.needles import needles
from experiments.tasks.registry import TASKS, Random, generate
from tests.experiments.tasks.toy import Words

NAMES = [name for name, spec in TASKS.items() if spec.generator is needles]
NEEDLE = re.compile(r"A special magic (number|uuid) for (\S+) is (\S+)\.(?=\s|$)")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", NAMES)
def test_the_context_holds_the_needles_and_answers_every_turn(task, seed):
    parameters = TASKS[task].parameters
    example = generate(task, seed=seed, length=1500, tokenizer=Words())
    found = NEEDLE.findall(example.context)
    assert len(found) == example.context.count("A special magic")
    keys = {key for _, key, _ in found}
    assert len({value for _, _, value in found}) == len(found)
    assert len(keys) * parameters["values"] == len(found)
    hidden = parameters["keys"]
    assert len(keys) > 50 if parameters["haystack"] == "needles" else len(keys) == hidden
    asked = 0
    for question, prefix, references in example.turns:
        inside = {key for key in keys if key in question}
        asked += len(inside)
        assert {key for key in keys if key in prefix} == inside
        assert sorted(references) == sorted(value for _, key, value in found if key in inside)
        assert not any(reference in question + prefix for reference in references)
        assert all(example.context.count(reference) == 1 for reference in references)
    assert asked == hidden
    assert len(example.references) == parameters["queries"] * parameters["values"]


def test_kinds_of_keys_and_values():
    shapes = {
        "words": r"[a-z]+-[a-z]+",
        "numbers": r"[1-9]\d{6}",
        "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    }
    for task in NAMES:
        parameters = TASKS[task].parameters
        example = generate(task, seed=1, length=1500, tokenizer=Words())
        for _, key, value in NEEDLE.findall(example.context):
            assert re.fullmatch(shapes[parameters["key_kind"]], key)
            assert re.fullmatch(shapes[parameters["value_kind"]], value)


@pytest.mark.parametrize("haystack", ["noise", "needles"])
def test_no_value_is_a_key(haystack):
    example = generate(
        "multikey_2",
        seed=1,
        length=1500,
        tokenizer=Words(),
        value_kind="words",
        haystack=haystack,
    )
    found = re.findall(r"A special magic word for (\S+) is (\S+)\.", example.context)
    words = [word for needle in found for word in needle]
    assert len(set(words)) == len(words) >= 8


@pytest.mark.parametrize("kind", ["noise", "prose"])
def test_filler_grows_at_its_end_by_the_unit(kind):
    pieces = filler(kind, Random(0))
    texts = ["".join(pieces(units)) for units in range(120)]
    assert all(long.startswith(short) for short, long in itertools.pairwise(texts))
    words = [len(text.split()) for text in texts]
    if kind == "prose":
        assert words == list(range(120))
    # However long, there is always more of it.
    assert len("".join(pieces(100_000))) > 400_000


def test_facts_are_hidden_between_sentences():
    pieces = ["One. ", "Two.\n\n", "Three"]
    inserts = [Insert(0.99, "d"), Insert(0.0, "a"), Insert(0.5, "b"), Insert(0.5, "c")]
    text, spans = hide(pieces, inserts)
    assert text == "a One. Two.\n\nb c Three d"
    assert [text[start:end] for start, end in spans] == ["d", "a", "b", "c"]
    assert hide([], [Insert(0.7, "a")]) == ("a", ((0, 1),))
