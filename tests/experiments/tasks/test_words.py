"""Counts of words in the tasks that ask for the most frequent ones."""

import collections
import math
import re

import pytest

from experiments.tasks import vocabulary
from experiments.tasks.registry import TASKS, generate
from experiments.tasks.words import zipf_counts
from tests.experiments.tasks.toy import Words


def entries(text):
    """Numbers and words of a list."""
    found = re.findall(r"(\d+)\. (\w+)", text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [word for _, word in found]


@pytest.mark.parametrize("seed", range(3))
def test_common_words_are_ten_times_as_frequent_as_others(seed):
    example = generate("common_words", seed=seed, length=2500, tokenizer=Words())
    shown, listed = example.context.split("\n\n")
    counts = collections.Counter(entries(listed))
    assert len(example.references) == 10
    assert {counts.pop(word) for word in example.references} == {30}
    assert set(counts.values()) == {3}
    assert len(counts) > 200
    # The worked example has words of its own, and its answer is right.
    before, answer = shown.split(f"\n{example.question}\n{example.answer_prefix} ")
    counts_before = collections.Counter(entries(before))
    assert not set(counts_before) & (set(counts) | set(example.references))
    most = {word for word, count in counts_before.items() if count > 1}
    assert set(answer.rstrip(".").split(", ")) == most
    assert len(most) == 10


def test_common_words_in_other_numbers():
    example = generate(
        "common_words",
        seed=0,
        length=700,
        tokenizer=Words(),
        common=4,
        common_frequency=10,
        other_frequency=2,
        worked_example=False,
    )
    counts = collections.Counter(entries(example.context))
    assert {counts.pop(word) for word in example.references} == {10}
    assert set(counts.values()) == {2}


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.0])
def test_frequencies_follow_zipf_and_the_first_are_asked(exponent):
    example = generate("frequent_words", seed=1, length=3000, tokenizer=Words(), exponent=exponent)
    counts = collections.Counter(example.context.split()).most_common()
    assert tuple(word for word, _ in counts[:3]) == example.references
    assert counts[2][1] > counts[3][1]
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts)
    # f(k) ∝ k^-exponent, up to the rounding of a count.
    first = counts[0][1]
    for rank, (_, count) in enumerate(counts, start=1):
        assert abs(count - first * rank**-exponent) <= 1


def test_zipf_shares_are_those_of_zeta():
    total = 10**6
    counts = zipf_counts(total, 2.0)
    expected = [math.floor(total * 6 / math.pi**2 / rank**2) for rank in range(1, 700)]
    assert counts[:699] == expected
    assert 0.99 * total < sum(counts) <= total


def test_frequent_words_are_the_most_frequent_at_the_shortest_length():
    for asked in (1, 3, 6):
        with pytest.raises(ValueError, match="at least") as refusal:
            generate("frequent_words", seed=2, length=1, tokenizer=Words(), asked=asked)
        least = int(str(refusal.value).split("at least ")[1].split()[0])
        example = generate("frequent_words", seed=2, length=least, tokenizer=Words(), asked=asked)
        counts = collections.Counter(example.context.split())
        lowest = min(counts.pop(word) for word in example.references)
        assert lowest > max(counts.values(), default=0)


def test_no_word_of_the_vocabulary_lies_in_another():
    words = vocabulary.WORDS
    assert len(vocabulary.ADJECTIVES) >= 100
    assert len(vocabulary.NOUNS) >= 100
    assert len(set(words)) == len(words)
    assert not [(short, long) for short in words for long in words if short in long != short]
    assert TASKS["common_words"].parameters["common"] == 10
