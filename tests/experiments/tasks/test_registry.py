"""Examples of every task: the same for the same arguments, and as long as fits."""

import subprocess
import sys
import time

import pytest

from experiments.tasks import prompt, registry
from experiments.tasks.fitting import most_units
from experiments.tasks.registry import TASKS, generate
from tests.experiments.tasks.toy import Characters, Words

ROOT = registry.__file__.removesuffix("experiments/tasks/registry.py")


def long_enough(task):
    """A length in words at which a task has room for a haystack."""
    return 2048 if task == "common_words" else 1024


@pytest.mark.parametrize("task", TASKS)
def test_the_same_arguments_give_the_same_example(task):
    made = [
        generate(task, seed=seed, length=long_enough(task), tokenizer=Words())
        for seed in (0, 1, 2, 0, 1, 2)
    ]
    assert made[:3] == made[3:]
    assert len({example.context for example in made}) == 3
    assert len({example.references for example in made}) == 3
    assert {example.task for example in made} == {task}


def test_another_process_gives_the_same_examples_and_loads_no_jax():
    program = (
        "import sys, zlib\n"
        "from experiments.tasks.registry import TASKS, generate\n"
        "from tests.experiments.tasks.toy import Words\n"
        "made = [generate(t, seed=5, length=2048, tokenizer=Words()) for t in TASKS]\n"
        "print(zlib.crc32(repr(made).encode()), 'jax' in sys.modules, 'numpy' in sys.modules)"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert printed[0] == printed[1]
    assert printed[0].split()[1:] == ["False", "False"]


@pytest.mark.parametrize("tokenizer", [Words(), Characters()], ids=["words", "characters"])
@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_used_up_and_never_exceeded(task, tokenizer):
    scale = 6 if isinstance(tokenizer, Characters) else 1
    for length in (2000, 3500):
        example = generate(task, seed=3, length=scale * length, tokenizer=tokenizer)
        context, question = prompt.prompt(example, tokenizer, chat=True)
        used = len(context) + len(question) + example.max_new_tokens
        assert 0.9 * scale * length <= used <= scale * length


@pytest.mark.parametrize("task", TASKS)
def test_one_more_unit_does_not_fit(task):
    length = long_enough(task)
    spec, tokenizer = TASKS[task], Words()
    example = generate(task, seed=4, length=length, tokenizer=tokenizer)
    draft = spec.generator(task, registry.Random(f"{task} 4"), **spec.parameters)
    units = next(n for n in range(draft.least, 2000) if draft.build(n).context == example.context)
    costs = [prompt.num_tokens(draft.build(n), tokenizer) for n in range(units, units + 40)]
    # Of frequent words, a unit more may be no word more.
    assert costs[0] <= length
    assert any(cost > length for cost in costs[1 : 40 if task == "frequent_words" else 2])


@pytest.mark.parametrize("task", TASKS)
def test_the_question_does_not_depend_on_the_length(task):
    short, long = (
        generate(task, seed=6, length=length, tokenizer=Words())
        for length in (long_enough(task), 1000 + long_enough(task))
    )
    assert short.turns == long.turns
    assert len(short.context) < len(long.context)


@pytest.mark.parametrize("task", TASKS)
def test_examples_of_4096_tokens_take_little_time(task):
    tokenizer = Words()
    length = 3500 if task == "common_words" else 4096
    generate(task, seed=0, length=length, tokenizer=tokenizer)
    times = []
    for seed in (1, 2, 3):
        start = time.process_time()
        generate(task, seed=seed, length=length, tokenizer=tokenizer)
        times.append(time.process_time() - start)
    assert min(times) < 0.3


@pytest.mark.parametrize("task", TASKS)
def test_facts_lie_where_they_are_said_to(task):
    example = generate(task, seed=7, length=long_enough(task), tokenizer=Words())
    facts = [example.context[start:end] for start, end in example.facts]
    if task in ("common_words", "frequent_words", "off_context"):
        assert not facts
    else:
        per_fact = zip(facts, example.references, strict=len(facts) > 1)
        assert all(reference in fact for fact, reference in per_fact)
        assert all(len(fact) < 250 and fact.endswith(".") for fact in facts)


@pytest.mark.slow
def test_facts_lie_anywhere_in_the_context():
    examples = [generate("single_1", seed=s, length=600, tokenizer=Words()) for s in range(60)]
    depths = sorted(example.facts[0][0] / len(example.context) for example in examples)
    assert depths[0] < 0.1
    assert depths[-1] > 0.9
    # The mean of 60 uniform numbers has a standard deviation of 0.037.
    assert abs(sum(depths) / 60 - 0.5) < 0.15


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match=r"task must be one of single_1, .*off_context, got 'no'"):
        generate("no", seed=0, length=1000, tokenizer=Words())
    for task in TASKS:
        with pytest.raises(ValueError, match=r"length must be at least \d+ for .* got 20"):
            generate(task, seed=0, length=20, tokenizer=Words())
    with pytest.raises(ValueError, match="length must be below"):
        generate("common_words", seed=0, length=6000, tokenizer=Words())
    with pytest.raises(ValueError, match="parameters of single_1 must be among"):
        generate("single_1", seed=0, length=1000, tokenizer=Words(), hops=2)
    for task in ("single_1", "variable_tracking", "off_context"):
        with pytest.raises(ValueError, match="haystack must be"):
            generate(task, seed=0, length=1000, tokenizer=Words(), haystack="grass")
    for kind in ("key_kind", "value_kind"):
        with pytest.raises(ValueError, match=f"{kind} must be one of words, numbers, uuids"):
            generate("single_1", seed=0, length=1000, tokenizer=Words(), **{kind: "names"})
    for task, name in (
        ("multivalue", "values"),
        ("multikey_1", "queries"),
        ("variable_tracking", "hops"),
        ("common_words", "common"),
        ("frequent_words", "asked"),
        ("question_answering", "questions"),
        ("off_context", "max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=name):
            generate(task, seed=0, length=1000, tokenizer=Words(), **{name: 0})


def test_the_least_length_of_the_message_is_enough():
    for task in TASKS:
        with pytest.raises(ValueError, match="length must be at least") as refusal:
            generate(task, seed=0, length=1, tokenizer=Words())
        least = int(str(refusal.value).split("at least ")[1].split()[0])
        example = generate(task, seed=0, length=least, tokenizer=Words())
        assert prompt.num_tokens(example, Words()) <= least


@pytest.mark.parametrize(
    "cost",
    [
        lambda units: 7 * units + 100,
        lambda units: 3 * units + 40 * (units // 50),
        lambda units: int(units**1.5),
        lambda units: 0 if units < 500 else 10 * (units - 499),
        lambda units: units // 30,
    ],
)
def test_fitting_finds_the_edge(cost):
    for budget in (120, 997, 4096):
        calls = []

        def counted(units, calls=calls):
            calls.append(units)
            return cost(units)

        found = most_units(counted, budget, 1, None)
        assert cost(found) <= budget < cost(found + 1)
        assert len(calls) < 45
        assert most_units(cost, budget, 1, 5) == max(n for n in range(1, 6) if cost(n) <= budget)
