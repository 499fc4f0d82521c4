"""Texts read in chunks: the same as at once, for both kinds of models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.model import checkpoint, lm, reading
from tests.experiments.model.tiny_llama import CONFIGS, PLAIN, logits, tiny

TOKENS = np.random.default_rng(2).integers(0, 256, 150)


@pytest.fixture(scope="module", params=["llama", "bytes"])
def model(request: pytest.FixtureRequest) -> lm.Model:
    return tiny(CONFIGS["qwen3"]) if request.param == "llama" else lm.load()[0]


@pytest.fixture(scope="module")
def whole(model: lm.Model) -> lm.Trace:
    return lm.caches(model, TOKENS)


def near(found: jax.Array, expected: jax.Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chunk", [32, 50, 512])
def test_trace_is_that_of_one_pass(model: lm.Model, whole: lm.Trace, chunk: int) -> None:
    found = reading.trace(model, TOKENS, chunk=chunk)
    jax.tree.map(near, found, whole)


def test_logits_of_what_was_read(model: lm.Model) -> None:
    found = reading.read(model, TOKENS, chunk=64)
    predicted = jax.nn.log_softmax(model.logits(found.residual[None, :-1]))
    near(predicted[0], lm.predictions(model, TOKENS))


def test_consumer_gets_every_query_once(model: lm.Model, whole: lm.Trace) -> None:
    chunks: list[reading.Chunk] = []
    reading.read(model, TOKENS, chunk=64, consumer=chunks.append)
    layers = len(model.blocks)
    assert [(each.layer, each.start) for each in chunks] == [
        (layer, start) for layer in range(layers) for start in (0, 64, 128)
    ]
    for each in chunks:
        stop = each.start + each.queries.shape[1]
        assert stop == min(each.start + 64, 150)
        for name in ("queries", "keys", "values"):
            near(getattr(each, name), getattr(whole, name)[each.layer, :, each.start : stop])


@pytest.mark.slow
def test_in_two_parts() -> None:
    # Not a model of bytes, which looks at the two bytes before the second part.
    model = tiny(CONFIGS["qwen3"])
    whole = lm.caches(model, TOKENS)
    first = reading.read(model, TOKENS[:70], chunk=32)
    second = reading.read(model, TOKENS[70:], chunk=32, behind=first.pairs)
    near(second.pairs.keys, whole.keys[:, :, 70:])
    near(second.pairs.values, whole.values[:, :, 70:])


def test_order_of_pairs_from_before_is_of_no_matter() -> None:
    model = tiny(PLAIN)
    first = reading.read(model, TOKENS[:70], chunk=32).pairs
    shuffled = jax.tree.map(lambda each: each[:, :, ::-1], first)
    straight, turned = (
        reading.read(model, TOKENS[70:], chunk=32, behind=each) for each in (first, shuffled)
    )
    near(turned.residual, straight.residual)


@pytest.mark.slow
def test_once_more_behind_the_full_cache() -> None:
    """A text that is read again sees all of itself, at the positions that are named."""
    model = tiny(PLAIN)
    pairs = reading.read(model, TOKENS[:60], chunk=32).pairs
    again = reading.read(model, TOKENS[:40], chunk=32, behind=pairs, start=60)
    twice = np.concatenate([TOKENS[:60], TOKENS[:40]])
    expected = logits(PLAIN, checkpoint.parameters(model), twice)[60:]
    near(model.logits(again.residual[None])[0], expected)
    elsewhere = reading.read(model, TOKENS[:40], chunk=32, behind=pairs, start=100)
    assert np.abs(np.asarray(elsewhere.residual - again.residual)).max() > 0.01


@pytest.mark.slow
def test_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(PLAIN)
    compiled = []
    original = reading.partial_attention

    def counted(*arguments: object, **options: object) -> object:
        compiled.append(1)
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(reading, "partial_attention", counted)
    reading.read(model, TOKENS[:100], chunk=31)
    once = len(compiled)
    # Another length and place, the same programs.
    pairs = reading.read(model, TOKENS[:124], chunk=31).pairs
    reading.read(model, TOKENS[:31], chunk=31, behind=jax.tree.map(lambda x: x[:, :, :45], pairs))
    assert once == len(compiled) > 0


def test_inputs_are_refused() -> None:
    model = tiny(PLAIN)
    pairs = reading.read(model, TOKENS[:10], chunk=32).pairs
    with pytest.raises(ValueError, match="context of 400"):
        reading.read(model, np.zeros(401, np.int32))
    with pytest.raises(ValueError, match="context of 400"):
        reading.read(model, TOKENS, start=300)
    with pytest.raises(ValueError, match="below 300"):
        reading.read(model, [1, 300])
    with pytest.raises(ValueError, match="behind must be"):
        reading.read(model, TOKENS, behind=jax.tree.map(lambda x: x[:1], pairs))
    with pytest.raises(ValueError, match="chunk"):
        reading.read(model, TOKENS, chunk=0)
    with pytest.raises(ValueError, match="start"):
        reading.read(model, TOKENS, start=-1)
    with pytest.raises(ValueError, match=r"\[length\]"):
        reading.read(model, jnp.zeros((1, 4), jnp.int32))
