"""Variable tracking, solved by following the assignments."""

import re

import pytest

from experiments.tasks.registry import generate
from tests.experiments.tasks.toy import Words


def solved(context):
    """The variables of each value, following the assignments from first to last."""
    values = {}
    for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d+)\.", context):
        assert name not in values, "assigned once"
        # A variable is known before it is used.
        values[name] = source if source.isdigit() else values[source]
    return {value: {name for name in values if values[name] == value} for value in values.values()}


@pytest.mark.parametrize("worked_example", [True, False])
@pytest.mark.parametrize("haystack", ["noise", "prose"])
@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (3, 2)])
def test_a_solver_finds_the_references(chains, hops, haystack, worked_example):
    for seed in range(4):
        example = generate(
            "variable_tracking",
            seed=seed,
            length=1200,
            tokenizer=Words(),
            chains=chains,
            hops=hops,
            haystack=haystack,
            worked_example=worked_example,
        )
        found = solved(example.context)
        assert len(found) == chains + worked_example
        assert len(example.turns) == chains
        for question, _, references in example.turns:
            value = re.search(r"\d+", question)[0]
            assert found.pop(value) == set(references)
            assert len(references) == hops + 1
        if worked_example:
            # What is left is the example, with its answer.
            ((value, names),) = found.items()
            answer = re.search(rf"have the value {value}: (.*)\.", example.context)[1]
            assert set(answer.split(", ")) == names


def test_names_and_values_have_five_letters():
    example = generate("variable_tracking", seed=0, length=800, tokenizer=Words())
    assert all(re.fullmatch("[A-Z]{5}", name) for name in example.references)
    assert re.search(r"value [1-9]{5} in", example.question)
