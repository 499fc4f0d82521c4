"""WildCat against its authors' code, and against the formulas in float64."""

import functools
import json
import math
import pathlib

import jax
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import baselines
from coreset_jax.baselines.wildcat import pivots

attend = jax.jit(cj.attend)

FIGURES = json.loads(
    pathlib.Path(__file__).with_name("kernel_methods.json").read_text(encoding="utf-8")
)


def figures(kind, **settings):
    settings = {"method": "wildcat", **settings}
    return [row for row in FIGURES[kind] if settings.items() <= row.items()]


@functools.partial(jax.jit, static_argnames="bins")
def pivots_of(keys, values, uniforms, bins):
    options = {"bins": bins, "temperature": baselines.wildcat().temperature}
    options |= {"size": 128, "scale": 32**-0.5}
    return pivots(keys, values, lambda *at: uniforms[at], 4096, **options)


@pytest.mark.parametrize("bins", [1, 4])
def test_reproduces_the_published_code(x64, instances, bins):
    rows = figures("checkpoints", bins=bins)
    assert {row["instance"] for row in rows} == set(instances)
    uniforms = np.random.default_rng(7).random((128 // bins, bins, 4096 // bins))
    for row in rows:
        instance = instances[row["instance"]]
        keys, values = (array.astype(np.float64) for array in instance[:2])
        order, fitted, weights = map(np.asarray, pivots_of(keys, values, uniforms, bins))
        # Of copies the checkpoint names the first.
        _, firsts, copies = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        np.testing.assert_array_equal(firsts[copies[order]], row["order"])
        np.testing.assert_allclose(weights, row["weights"], rtol=1e-6, atol=1e-6)
        error = error_of(instance, keys[order], fitted, weights)
        np.testing.assert_allclose(error, row["error"]["mean"], rtol=1e-7)


def error_of(instance, keys, values, normalizers):
    """Mean error of numerators over normalizers, in units of the mean norm of the answer."""
    exact = attention(instance.queries, instance.keys, instance.values, 1.0)
    answer = attention(instance.queries, keys, values, normalizers)
    return np.linalg.norm(exact - answer, axis=-1).mean() / np.linalg.norm(exact, axis=-1).mean()


def attention(queries, keys, values, normalizers):
    queries, keys, values = (np.asarray(array, np.float64) for array in (queries, keys, values))
    scores = queries @ keys.T / math.sqrt(keys.shape[-1])
    masses = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return masses @ values / (masses * normalizers).sum(axis=-1, keepdims=True)


@pytest.mark.slow
def test_values_and_normalizers_are_those_of_nystrom(x64):
    rng = np.random.default_rng(0)
    keys, values, queries = rng.standard_normal((3, 90, 6))
    length, size = 71, 24
    coreset = baselines.wildcat(temperature=1.3)(
        jax.random.key(0), keys, values, size=size, lengths=np.array(length)
    )
    keys, values = keys[:length], values[:length]
    scaled = (keys - keys.mean(axis=0)) / 6**0.25 / 1.3
    kernel = np.exp(scaled @ scaled.T)
    kept = np.asarray(coreset.indices)
    weights = np.linalg.solve(kernel[np.ix_(kept, kept)], kernel[kept])
    factor = size / length
    np.testing.assert_allclose(coreset.normalizers, factor * weights.sum(axis=1), rtol=1e-8)
    np.testing.assert_allclose(coreset.values, factor * weights @ values, rtol=1e-8, atol=1e-10)
    answer = attention(queries, keys[kept], weights @ values, weights.sum(axis=1))
    np.testing.assert_allclose(attend(queries, coreset), answer, rtol=1e-8)


@pytest.mark.slow
def test_copies_are_not_picked_twice():
    # Far-out copies, whose rounding e^|z|^2 would make likelier than any other key.
    rng = np.random.default_rng(1)
    keys, values, queries = rng.standard_normal((3, 96, 8)).astype(np.float32)
    keys[:8] *= 6
    keys[8:16], values[8:16] = keys[:8], values[:8]
    coreset = baselines.wildcat()(jax.random.key(0), keys, values, size=64)
    kept = np.asarray(coreset.indices)
    assert len(np.unique(keys[kept], axis=0)) == 64
    # Fewer keys than pivots: the idle ones weigh nothing, and the answer is the exact one.
    keys, values = np.tile(keys[:12], (8, 1)), np.tile(values[:12], (8, 1))
    coreset = baselines.wildcat()(jax.random.key(0), keys, values, size=32)
    assert np.sum(np.asarray(coreset.normalizers) != 0) <= 12
    exact = attention(queries, keys, values, 1.0)
    np.testing.assert_allclose(attend(queries, coreset), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_weights_stay_bounded_where_few_dimensions_are_exhausted():
    rng = np.random.default_rng(0)
    keys, queries = rng.standard_normal((2, 1024, 4)).astype(np.float32)
    values = rng.standard_normal((1024, 4)).astype(np.float32)
    coreset = baselines.wildcat()(jax.random.key(0), keys, values, size=384)
    exact = attention(queries, keys, values, 1.0)
    error = np.linalg.norm(attend(queries, coreset) - exact) / np.linalg.norm(exact)
    assert error < 0.03
    assert np.max(np.abs(coreset.normalizers)) < 384


@pytest.mark.parametrize("length", [12, 29])
def test_bins_of_any_length(length):
    keys, values = np.random.default_rng(2).standard_normal((2, 40, 8), np.float32)
    compressor = baselines.wildcat(bins=3)
    coreset = compressor(jax.random.key(0), keys, values, size=12, lengths=np.array(length))
    kept = np.asarray(coreset.indices)
    edges = [bin_number * length // 3 for bin_number in range(4)]
    np.testing.assert_array_equal(np.histogram(kept, edges)[0], [4, 4, 4])
    with pytest.raises(ValueError, match="size must be a multiple of bins; got size 10 and bins 3"):
        compressor(jax.random.key(0), keys, values, size=10)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"bins": 0}, "bins must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        baselines.wildcat(**option)
