"""Decoding over compressed caches, against the model as it reads the whole text."""

import contextlib
import io
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from configs import decode as decode_config
from experiments.common.methods import METHODS
from experiments.decode import decode
from experiments.model import decoding, lm, text

TOKENS = text.beginnings("heldout", 2, 120, 0)


@pytest.fixture(scope="module")
def model():
    return lm.load()[0]


@pytest.fixture(scope="module")
def prompt(model):
    return decoding.read_prompt(model, TOKENS[:, :80])


def small(method):
    return decoding.cache_config(method, 40, 0.25, 4)


@pytest.mark.slow
def test_full_cache_costs_what_the_model_costs(model, prompt):
    """Prompt and pieces, against one pass over the text."""
    expected = np.asarray(lm.byte_costs(model, TOKENS))[:, 80:]
    caches = decoding.prefilled(prompt, None, 40)
    for piece in (1, 16, 64):
        found = decoding.costs(model, caches, TOKENS[:, 80:], TOKENS[:, 78:80], piece)
        np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.slow
def test_a_cache_with_room_costs_the_same(model, prompt):
    config = decoding.cache_config("fitted", 200, 0.25, 8)
    caches = decoding.prefilled(prompt, config, 0)
    found = decoding.costs(model, caches, TOKENS[:, 80:], TOKENS[:, 78:80], 16)
    expected = np.asarray(lm.byte_costs(model, TOKENS))[:, 80:]
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.slow
def test_an_empty_cache_reads_from_the_start(model):
    config = lm.load()[1]
    for each in (None, decoding.cache_config("fitted", 200, 0.25, 8)):
        caches = decoding.empty(config, 2, each, 120)
        found = decoding.costs(model, caches, TOKENS, piece=40)
        np.testing.assert_allclose(found, lm.byte_costs(model, TOKENS), atol=2e-4)


@pytest.mark.parametrize(
    "method", ["window", "uniform", pytest.param("fitted", marks=pytest.mark.slow)]
)
def test_all_methods_hold_as_many_pairs(prompt, method):
    (cache, *_) = decoding.prefilled(prompt, small(method), 0)
    assert cache.positions.shape[-1] == 40
    assert np.all(np.sum(np.asarray(cache.positions) >= 0, axis=-1) >= 39)


def test_window_is_exact_attention_to_sinks_and_the_newest(prompt):
    (cache, *_) = decoding.prefilled(prompt, small("window"), 0)
    held = np.asarray(cache.positions[0, 0])
    np.testing.assert_array_equal(np.sort(held), [0, 1, 2, 3, *range(44, 80)])


def test_repeats_are_passages_of_the_prompt():
    repeated = text.with_repeats(TOKENS, 80)
    np.testing.assert_array_equal(repeated[:, :80], TOKENS[:, :80])
    for row in repeated:
        assert bytes(row[80:].astype(np.uint8)) in bytes(row[:80].astype(np.uint8))


def test_too_few_files_are_refused():
    with pytest.raises(ValueError, match="files"):
        text.beginnings("heldout", 10_000, 100, 0)


@pytest.mark.slow
def test_job_and_its_resumption(tmp_path: pathlib.Path, monkeypatch):
    config = decode_config.get_config("tiny")
    config.output = str(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = decode.run(config)
    for method in config.methods:
        assert METHODS[method].label in printed.getvalue()
    lines = [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]
    assert len(lines) == len(found) == len(decode.cells(config))
    assert (tmp_path / "decode.png").stat().st_size > 10_000
    for cell, known in found:
        if cell["task"] == "prompts":
            assert np.all(np.isfinite(known["continuation"]))
            assert np.all(np.isfinite(known["repeated"]))
    # Finished cells are not measured again.
    monkeypatch.setattr(decode, "Work", None)
    with contextlib.redirect_stdout(io.StringIO()) as again:
        decode.run(config)
    assert again.getvalue() == printed.getvalue()


@pytest.mark.slow
def test_piece_after_piece_grows_the_cache(model, prompt):
    caches = decoding.prefilled(prompt, small("fitted"), 0)
    tokens = jnp.asarray(TOKENS[:, 80:90], jnp.int32)
    _, caches = decoding.step(model, caches, tokens, jnp.asarray(TOKENS[:, 78:80], jnp.int32))
    assert all(int(cache.lengths[0]) == 90 for cache in caches)
