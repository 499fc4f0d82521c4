"""Examples as tokens, and scores of answers."""

import dataclasses

import pytest

from experiments.tasks import prompt, scoring
from experiments.tasks.example import Example, FollowUp
from tests.experiments.tasks.toy import Characters

EXAMPLE = Example(
    task="a task",
    instruction="Read.",
    context="The sea is deep.",
    question="What is the sea?",
    answer_prefix="The sea is",
    references=("Deep", "blue"),
    max_new_tokens=4,
    follow_ups=(FollowUp("And who?", "It is", ("you",)),),
    facts=((0, 16),),
)


def text(ids):
    return "".join(map(chr, ids))


def test_prompts_are_wrapped_in_the_markers_of_a_conversation():
    context, question = prompt.prompt(EXAMPLE, Characters(), chat=True)
    assert text(context) == "<|im_start|>user\nRead.\n\nThe sea is deep."
    assert text(question) == ("\n\nWhat is the sea?<|im_end|>\n<|im_start|>assistant\nThe sea is")
    assert prompt.num_tokens(EXAMPLE, Characters()) == len(context) + len(question) + 4
    plain = [text(ids) for ids in prompt.prompt(EXAMPLE, Characters(), chat=False)]
    assert "<|" not in "".join(plain)
    assert plain[1] == "\n\nWhat is the sea?\nThe sea is"


@pytest.mark.parametrize("chat", [True, False])
def test_the_context_knows_the_question_only_if_asked_to(chat):
    agnostic, after = prompt.prompt(EXAMPLE, Characters(), chat)
    aware, still_after = prompt.prompt(EXAMPLE, Characters(), chat, question_first=True)
    assert EXAMPLE.question not in text(agnostic)
    assert text(aware).index(EXAMPLE.question) < text(aware).index(EXAMPLE.context)
    assert after == still_after


def test_follow_ups_open_a_new_turn():
    ids = prompt.follow_up_ids(EXAMPLE, 1, Characters(), chat=True)
    assert text(ids) == (
        "<|im_end|>\n<|im_start|>user\nAnd who?<|im_end|>\n<|im_start|>assistant\nIt is"
    )
    assert "<|" not in text(prompt.follow_up_ids(EXAMPLE, 1, Characters(), chat=False))
    for turn in (0, 2):
        with pytest.raises(ValueError, match="turn must be between 1 and the 1"):
            prompt.follow_up_ids(EXAMPLE, turn, Characters(), chat=True)


def test_references_follow_the_prefix_behind_a_blank():
    assert text(prompt.reference_ids("deep", Characters())) == " deep"


@pytest.mark.parametrize(
    ("answer", "every", "part"),
    [
        ("It is DEEP and bLuE.", 1.0, 1.0),
        ("blueish", 0.5, 1.0),
        ("deep, deep, deep", 0.5, 1.0),
        ("de ep", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_known_answers_have_known_scores(answer, every, part):
    assert scoring.string_match_all(answer, EXAMPLE.references) == every
    assert scoring.string_match_part(answer, EXAMPLE.references) == part
    assert scoring.score(EXAMPLE, answer) == every
    assert scoring.score(dataclasses.replace(EXAMPLE, any_reference=True), answer) == part


def test_turns_are_scored_by_their_own_references():
    assert scoring.score(EXAMPLE, "you and I", turn=1) == 1.0
    assert scoring.score(EXAMPLE, "deep", turn=1) == 0.0
    with pytest.raises(ValueError, match="turn must be between 0 and 1, got 2"):
        scoring.score(EXAMPLE, "deep", turn=2)


@pytest.mark.parametrize("match", [scoring.string_match_all, scoring.string_match_part])
@pytest.mark.parametrize("references", [[], [""], "deep"])
def test_references_must_say_something(match, references):
    with pytest.raises(ValueError, match="references must be"):
        match("deep", references)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "question of turn 0 is empty"),
        ({"follow_ups": (FollowUp("", "It is", ("you",)),)}, "question of turn 1 is empty"),
        ({"references": ()}, "references of turn 0"),
        ({"references": ("deep", "")}, "references of turn 0"),
        ({"context": "\n"}, "context is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"facts": ((3, 17),)}, "facts must lie"),
    ],
)
def test_broken_examples_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EXAMPLE, **change)
