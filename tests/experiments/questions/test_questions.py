"""Documents, sample queries and conversations of a tiny model, against one pass over everything."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from configs import ask as ask_config
from configs import calibration as calibration_config
from configs import questions as questions_config
from experiments.common.metrics import divergence
from experiments.model import llama, reading
from experiments.model.pretrained import Pretrained
from experiments.questions import ask, board, calibration, documents, entrants, texts
from experiments.questions.answers import Conversation
from tests.experiments.model.tiny_llama import PLAIN, tiny

TOKENS = np.random.default_rng(0).integers(0, 256, 140)
LENGTH = 100


@pytest.fixture(scope="module")
def model() -> Pretrained:
    def encode(text: str) -> list[int]:
        return [ord(letter) % 256 for letter in text]

    tokenizer = types.SimpleNamespace(
        encode=encode,
        document=encode,
        question=lambda text, first=True: encode(text),
        decode=lambda ids: "".join(map(chr, ids)),
        end_of_turn=299,
        chat_prefix="",
        chat_suffix="",
    )
    return Pretrained(tiny(PLAIN), PLAIN, tokenizer, "tiny")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def document(model: Pretrained) -> documents.Document:
    return documents.read(model, TOKENS[:LENGTH], reconstruct=True, chunk=64)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_moved_queries_are_scored(model: Pretrained, document: documents.Document) -> None:
    trace = reading.trace(model.model, TOKENS[:LENGTH])
    turns = np.asarray(llama.frequencies(PLAIN))
    keys = np.asarray(trace.keys[0, 0], np.float64)
    most = np.zeros(LENGTH)
    # Three query heads read the first key-value head.
    for queries in np.asarray(trace.queries[0, :3], np.float64):
        angles = LENGTH * turns  # All positions are below the horizon: each moves by the length.
        halves = queries[:, :8] + 1j * queries[:, 8:]
        halves = halves * np.exp(1j * angles)
        moved = np.concatenate([halves.real, halves.imag], axis=1)
        most = np.maximum(most, softmax(moved @ keys.T / 4).max(axis=0))
    found = document.ahead.scores[0, 0]
    np.testing.assert_allclose(found[:LENGTH], most, rtol=2e-3, atol=1e-5)
    np.testing.assert_array_equal(found[LENGTH:], 0)


def test_reconstruction_attends_to_its_own_text(
    model: Pretrained, document: documents.Document
) -> None:
    cue = model.tokenizer.encode("\n\nRepeat the text above, word for word.\n\n")
    # As if document, cue and document were one text.
    whole = np.concatenate([TOKENS[:LENGTH], cue, TOKENS[:LENGTH]])
    trace = reading.trace(model.model, whole)
    start = LENGTH + len(cue)
    keys = np.asarray(trace.keys[1, 1], np.float64)
    most = np.zeros(LENGTH)
    for queries in np.asarray(trace.queries[1, 3:], np.float64):
        scores = queries[start:] @ keys.T / 4
        hidden = np.arange(len(whole)) > np.arange(start, len(whole))[:, None]
        scores[hidden] = -np.inf
        # KVzip's softmax leaves out the cue's own place in nothing: all that was read counts.
        most = np.maximum(most, softmax(scores)[:, :LENGTH].max(axis=0))
    assert document.reconstruction is not None
    found = document.reconstruction.scores[1, 1, :LENGTH]
    np.testing.assert_allclose(found, most, rtol=5e-3, atol=1e-5)


def test_sources(document: documents.Document) -> None:
    assert document.given("nothing") == {}
    both = document.given("both")
    parts = [document.given(name) for name in ("ahead", "reconstruction")]
    assert both["queries"].shape[-2] == sum(part["queries"].shape[-2] for part in parts)
    for part in parts:
        assert bool(jnp.all(both["scores"] >= part["scores"]))
    with pytest.raises(ValueError, match="source must be one of"):
        document.given("oracle")
    for entrant in entrants.ENTRANTS.values():
        assert entrant.category in entrants.CLASSES


@pytest.mark.slow
def test_conversation_over_the_full_cache(model: Pretrained, document: documents.Document) -> None:
    logits = model.model(jnp.asarray(TOKENS)[None])[0]
    expected = jax.nn.log_softmax(logits[LENGTH:])
    conversation = Conversation.about(model, document, None, 40)
    found = conversation.predictions(TOKENS[LENGTH:].tolist())
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert divergence(np.asarray(expected), found) < 1e-5
    with pytest.raises(ValueError, match="room"):
        conversation.read([1])


def test_answer_is_greedy(model: Pretrained, document: documents.Document) -> None:
    question = TOKENS[LENGTH : LENGTH + 5].tolist()
    said: list[int] = []
    for _ in range(4):
        # What stands behind a token changes nothing of it: one length, one program.
        told = [*TOKENS[:LENGTH], *question, *said]
        whole = jnp.asarray([*told, *TOKENS[len(told) :]])[None]
        said.append(int(jnp.argmax(model.model(whole)[0, len(told) - 1])))
    answer = Conversation.about(model, document, None, 16).answer(question, 4)
    expected = said[: said.index(299)] if 299 in said else said
    assert answer == "".join(map(chr, expected))


def test_a_further_question_is_read_behind_the_whole_answer(
    model: Pretrained, document: documents.Document
) -> None:
    question, further = (TOKENS[start : start + 5].tolist() for start in (LENGTH, LENGTH + 5))
    conversation = Conversation.about(model, document, None, 32)
    answer = conversation.answer(question, 4)
    assert len(answer) == 4  # cut short, so that its last token was not read
    said = [*question, *map(ord, answer)]
    second = conversation.answer(further, 4)
    assert second == Conversation.about(model, document, None, 32).answer([*said, *further], 4)


def test_conversation_over_a_whole_coreset(model: Pretrained, document: documents.Document) -> None:
    """A compressor that may keep all pairs changes nothing."""
    coreset = cj.fitted()(
        jax.random.key(0),
        document.keys,
        document.values,
        size=document.keys.shape[-2],
        lengths=document.lengths,
    )
    tokens = TOKENS[LENGTH:].tolist()
    full, same = (
        Conversation.about(model, document, each, 40).predictions(tokens)
        for each in (None, coreset)
    )
    np.testing.assert_allclose(same, full, atol=1e-4)


def test_passages_of_splits_have_no_text_in_common() -> None:
    tokenizer = types.SimpleNamespace(encode=lambda text: list(text.encode()))
    for kind in texts.KINDS:
        several = [
            texts.passage(kind, split, number, 400, tokenizer)  # type: ignore[arg-type]
            for split in texts.SPLITS
            for number in range(3)
        ]
        assert len({each.tobytes() for each in several}) == 6
        assert all(each.shape == (400,) for each in several)
    with pytest.raises(ValueError, match="kind must be one of"):
        texts.passage("poems", "tuning", 0, 10, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens, not"):
        texts.passage("code", "tuning", 99, 10, tokenizer)  # type: ignore[arg-type]


@pytest.mark.slow
def test_calibration_of_all_heads(model: Pretrained, document: documents.Document) -> None:
    found = calibration.measure(document, ratio=2, seed=0)
    assert set(found) == {each.name for each in calibration.QUANTITIES}
    assert all(each.shape == document.keys.shape[:2] for each in found.values())
    keys = np.asarray(document.keys, np.float64)[1, 1, :LENGTH]
    queries = np.asarray(document.ahead.queries, np.float64)[1, 1]
    scores = queries @ keys.T / 4
    assert found["spread"][1, 1] == pytest.approx(scores.std(axis=1).mean(), rel=1e-3)
    assert found["sink"][1, 1] == pytest.approx(softmax(scores)[:, 0].mean(), rel=1e-3)
    assert found["budget"].mean() == pytest.approx(1)
    assert np.all(found["centered_rho"] > 0)
    assert calibration.draw(found).axes
    for change in ({"ratio": 1}, {"passage_tokens": 3}):
        config = calibration_config.get_config("tiny")
        config.update(change)
        with pytest.raises(ValueError, match=next(iter(change))):
            calibration.run(config)


def test_divergence_of_two_laws() -> None:
    one, other = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    expected = 0.5 * np.log2(0.5 / 0.25) + 0.5 * np.log2(0.5 / 0.75)
    assert divergence(one, other) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("entry", "value", "complaint"),
    [
        ("methods", ("magic",), "unknown"),
        ("ratio", 1, "ratio must be at least 2"),
        ("question", " ", "question must not be empty"),
        ("text", "some.txt", "given together"),
    ],
)
def test_bad_questions_are_refused(entry: str, value: object, complaint: str) -> None:
    config = ask_config.get_config("tiny")
    config.update({entry: value})
    with pytest.raises(ValueError, match=complaint):
        ask.check(config)


@pytest.mark.parametrize(
    ("entry", "value", "complaint"),
    [
        ("tasks", ("magic",), "tasks must be among"),
        ("kinds", ("poems",), "kinds must be among"),
        ("ratios", (1,), "ratios must be at least 2"),
        ("task_methods", ("magic",), "unknown"),
    ],
)
def test_bad_boards_are_refused(entry: str, value: object, complaint: str) -> None:
    config = questions_config.get_config("tiny")
    config.update({entry: value})
    with pytest.raises(ValueError, match=complaint):
        board.check(config)


def test_cells_of_a_document_follow_one_another() -> None:
    config = questions_config.get_config("quick")
    names = ("kind", "passage", "task", "example")
    seen = [tuple(cell.get(name) for name in names) for cell in board.cells(config)]
    changes = [each for each, before in zip(seen, [None, *seen], strict=False) if each != before]
    assert len(changes) == len(set(changes))
