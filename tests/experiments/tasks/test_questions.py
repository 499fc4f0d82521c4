"""Questions about paragraphs, and questions that the context does not answer."""

import re

import pytest

from experiments.tasks.haystack import NOISE
from experiments.tasks.off_context import QUESTIONS
from experiments.tasks.registry import generate
from tests.experiments.tasks.toy import Words


@pytest.mark.parametrize("seed", range(8))
def test_one_paragraph_answers_the_question(seed):
    example = generate("question_answering", seed=seed, length=3000, tokenizer=Words())
    paragraphs = example.context.split("\n\n")
    subjects = [re.match(r"(\S+(?: \S+)?) (?:was born|is a small town)", p)[1] for p in paragraphs]
    assert len(set(subjects)) == len(subjects) > 50
    assert example.any_reference
    assert len(example.turns) == 4
    for question, prefix, references in example.turns:
        holding = [p for p in paragraphs if any(r.lower() in p.lower() for r in references)]
        # The paragraph with the answer is the one whose subject the question names.
        (about,) = (p for s, p in zip(subjects, paragraphs, strict=True) if s in question)
        assert holding == [about]
        assert about.count(references[0]) == 1
        assert not any(r.lower() in (question + prefix).lower() for r in references)
    start, end = example.facts[0]
    assert example.context[start:end] in paragraphs


def test_questions_are_of_many_kinds():
    kinds = {
        example.question.split(" ")[0] + example.answer_prefix.split(" ")[-1]
        for example in (
            generate("question_answering", seed=seed, length=500, tokenizer=Words())
            for seed in range(80)
        )
    }
    assert len(kinds) >= 7


def test_questions_off_context_are_distinct_and_short():
    assert len(QUESTIONS) >= 40
    assert len({question for question, _, _ in QUESTIONS}) == len(QUESTIONS)
    for question, prefix, (answer,) in QUESTIONS:
        assert question.endswith("?")
        assert prefix == prefix.strip()
        assert len(answer.split()) <= 2
        said = re.findall(r"\w+", f"{question} {prefix}".lower())
        assert not set(answer.lower().split()) & set(said)
        assert not re.search(rf"\b{answer.lower()}\b", " ".join(NOISE).lower())


@pytest.mark.parametrize("haystack", ["noise", "prose"])
def test_the_context_of_a_question_off_context_is_filler(haystack):
    example = generate("off_context", seed=0, length=900, tokenizer=Words(), haystack=haystack)
    assert len(set(example.turns)) == 4
    assert set(example.turns) <= set(QUESTIONS)
    assert not example.facts
    if haystack == "noise":
        assert example.context.startswith(" ".join(NOISE))
