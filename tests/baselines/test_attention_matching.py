"""Attention matching against its authors' code, and what its fit promises."""

import json
import pathlib

import jax
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import baselines
from coreset_jax._src.core.coreset import whole_cache

attend = jax.jit(cj.attend)

FIGURES = json.loads(
    pathlib.Path(__file__).with_name("kernel_methods.json").read_text(encoding="utf-8")
)


def figures(kind, **settings):
    settings = {"method": "attention_matching", **settings}
    (row,) = (row for row in FIGURES[kind] if settings.items() <= row.items())
    return row


def test_reproduces_the_published_code(x64, instances):
    row = figures("checkpoints", instance="smooth")
    keys, values, _, queries = (array.astype(np.float64) for array in instances["smooth"])
    compressor = baselines.attention_matching()
    coreset = compressor(jax.random.key(0), keys, values, size=128, queries=queries)
    places = np.argsort(row["order"])
    np.testing.assert_array_equal(coreset.indices, np.array(row["order"])[places])
    np.testing.assert_allclose(coreset.log_weights, np.array(row["beta"])[places], rtol=1e-9)
    first = np.flatnonzero(places == 0)[0]
    np.testing.assert_allclose(coreset.values[first], row["first_value"], rtol=1e-6)
    error = instances["smooth"].error(*coreset[:3])
    np.testing.assert_allclose(error, row["error"]["mean"], rtol=1e-8)


def test_fit_is_the_best_on_the_samples(x64):
    rng = np.random.default_rng(0)
    keys, values, queries = rng.standard_normal((3, 60, 6))
    compressor = baselines.attention_matching(ridge=1e-14, scale=0.3)
    coreset = compressor(jax.random.key(0), keys, values, size=15, queries=queries)
    scores = 0.3 * queries @ keys.T
    masses = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares = masses / masses.sum(axis=-1, keepdims=True)
    largest = np.sort(np.argsort(-np.sum(shares**2, axis=0))[:15])
    np.testing.assert_array_equal(coreset.indices, largest)
    kept = masses[:, largest] * np.exp(coreset.log_weights)
    kept /= kept.sum(axis=-1, keepdims=True)
    # No values behind these keys and weights answer the samples better.
    best, *_ = np.linalg.lstsq(kept, shares @ values)
    np.testing.assert_allclose(coreset.values, best, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(attend(queries, coreset, scale=0.3), kept @ best, atol=1e-7)


@pytest.mark.parametrize("samples", [1, 150])
def test_any_number_of_samples(samples):
    keys, values = np.random.default_rng(0).standard_normal((2, 64, 8), np.float32)
    queries = np.random.default_rng(1).standard_normal((samples, 8), np.float32)
    compressor = baselines.attention_matching(bound=2.0)
    lengths = np.array(50)
    coreset = compressor(jax.random.key(0), keys, values, size=24, lengths=lengths, queries=queries)
    assert np.all(np.abs(coreset.log_weights) <= 2.0 + 1e-6)
    exact = attend(queries, whole_cache(keys[:50], values[:50]))
    error = np.linalg.norm(attend(queries, coreset) - exact)
    # One sample is answered exactly, but for the ridge.
    assert error < (1e-4 if samples == 1 else 0.3) * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"ridge": 0.0}, "ridge must be positive"),
        ({"bound": -1.0}, "bound must be positive"),
        ({"gradient_steps": 1.5}, "gradient_steps must be a static Python int"),
    ],
)
def test_bad_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        baselines.attention_matching(**option)
