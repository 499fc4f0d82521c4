"""Attention matching against its authors' code, and what its fit promises."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coreset_jax.coreset import whole_cache

from coreset_jax import attend, baselines

FIGURES = json.loads(
    pathlib.Path(__file__).with_name("kernel_methods.json").read_text(encoding="utf-8")
)


def figures(kind, **settings):
    settings = {"method": "attention_matching", **settings}
    (row,) = (row for row in FIGURES[kind] if settings.items() <= row.items())
    return row


def match(instance, size, dtype=np.float32):
    keys, values, _, queries = (array.astype(dtype) for array in instance)
    compressor = baselines.attention_matching()
    return compressor(jax.random.key(0), keys, values, size=size, queries=queries)


def test_reproduces_the_published_code(x64, instances):
    row = figures("checkpoints", instance="smooth")
    coreset = match(instances["smooth"], 128, np.float64)
    places = np.argsort(row["order"])
    np.testing.assert_array_equal(coreset.indices, np.array(row["order"])[places])
    np.testing.assert_allclose(coreset.log_weights, np.array(row["beta"])[places], rtol=1e-9)
    first = np.flatnonzero(places == 0)[0]
    np.testing.assert_allclose(coreset.values[first], row["first_value"], rtol=1e-6)
    error = instances["smooth"].error(*coreset[:3])
    np.testing.assert_allclose(error, row["error"]["mean"], rtol=1e-8)


@pytest.mark.parametrize("size", [128, 512])
def test_error_is_the_published_one(instances, size):
    # Theirs varies by less than a part in ten thousand here.
    row = figures("errors", instance="smooth", dtype="float32", size=size)
    error = instances["smooth"].error(*match(instances["smooth"], size)[:3])
    np.testing.assert_allclose(error, row["mean"], rtol=1e-3)


@pytest.mark.parametrize(("name", "least_norm"), [("medium", 0.4147), ("heavy", 0.0415)])
def test_copies_share_where_the_published_solver_rounds(instances, name, least_norm):
    # The figure of the authors' pipeline with a solver of least norm in place of theirs.
    row = figures("errors", instance=name, dtype="float32", size=128)
    error = instances[name].error(*match(instances[name], 128)[:3])
    assert error < row["mean"] + 3 * row["deviation"]
    np.testing.assert_allclose(error, least_norm, rtol=0.02)


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
    keys, values = jax.random.normal(jax.random.key(0), (2, 64, 8))
    queries = jax.random.normal(jax.random.key(1), (samples, 8))
    compressor = baselines.attention_matching(bound=2.0)
    lengths = jnp.array(50)
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
        ({"steps": 1.5}, "steps must be a static Python int"),
        ({"scale": 0.0}, "scale must be positive"),
    ],
)
def test_bad_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        baselines.attention_matching(**option)


def test_no_samples_are_refused():
    keys = np.zeros((8, 4), np.float32)
    for queries, message in [(None, "queries must be given"), (keys[:0], "must not be empty")]:
        with pytest.raises(ValueError, match=message):
            baselines.attention_matching()(jax.random.key(0), keys, keys, size=4, queries=queries)
