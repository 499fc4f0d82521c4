"""Every rival beside its authors' own code: mean and 99th percentile of the error, at two sizes."""

import itertools
import json
import math
import pathlib

import jax
import numpy as np
import pytest

from coreset_jax import balanced, baselines
from coreset_jax._src.core.coreset import normalizers

HERE = pathlib.Path(__file__).parent
ROWS = json.loads((HERE / "rivals.json").read_text(encoding="utf-8"))["errors"]
THINNED = json.loads((HERE / "goodpoints.json").read_text(encoding="utf-8"))["errors"]
NAMES, SIZES = ("smooth", "medium", "heavy"), (128, 512)

# What stands for the authors' code, and how many coresets are averaged. Beside sums in float64
# stands what does not overflow in float32.
RIVALS = {
    "uniform": (baselines.uniform(), 20),
    "top_attention": (baselines.top_attention(), 1),
    "balance_kv CLI, as published": (baselines.balance_kv(), 8),
    "balance_kv CLI, corrected": (baselines.balance_kv(corrected=True), 8),
    "balance_kv notebook, as published": (
        baselines.balance_kv(temperature=0.1, block_size=256),
        8,
    ),
    "balance_kv notebook, corrected": (
        baselines.balance_kv(corrected=True, temperature=0.1, block_size=256),
        8,
    ),
    "kernel_halving": (baselines.kernel_halving(), 8),
    "attention_matching": (baselines.attention_matching(), 1),
    "wildcat, 1 bin": (baselines.wildcat(), 2),
    "wildcat, 4 bins": (baselines.wildcat(bins=4), 4),
}
# Where keys repeat, the authors' solver for the weights returns rounding: nothing to agree with.
# Their pipeline with a solver of least norm in its place has rows of its own.
LEAST_NORM = ", least norm"
ROUNDING = {("heavy", "attention_matching"), ("medium", "attention_matching")}
COMPARED = {
    (row["instance"], row["method"].removesuffix(LEAST_NORM), row["size"]): row
    for row in ROWS
    if (row["instance"], row["method"]) not in ROUNDING
}
# Where nothing is drawn: how near we come.
TIGHT = {"top_attention": 1e-5, "attention_matching": 1e-3}
LEAST_NORM_TIGHT = 0.02
# The one case in which ours comes out well below the authors' pipeline with another solver.
LOWER = ("heavy", "attention_matching", 512)
# Spread over seeds, relative to the average, from which on an average says little.
HEAVY_TAIL = 0.12


def errors_of(instance, coreset):
    """Mean and 99th percentile of each coreset's error, in units of the mean exact norm."""
    exact = answers(instance.queries, instance.keys, instance.values, 0.0, 1.0)
    unit = np.linalg.norm(exact, axis=-1).mean()
    arrays = (*coreset[:3], normalizers(coreset))
    found = []
    for each in zip(*map(np.asarray, arrays), strict=True):
        errors = np.linalg.norm(exact - answers(instance.queries, *each), axis=-1) / unit
        found.append((errors.mean(), np.quantile(errors, 0.99)))
    return np.array(found).T


def answers(queries, keys, values, log_weights, normalizers):
    """Weighted attention with normalizers, in float64 and apart from the library's."""
    queries, keys, values = (np.asarray(array, np.float64) for array in (queries, keys, values))
    scores = queries @ keys.T / np.sqrt(keys.shape[-1]) + np.asarray(log_weights, np.float64)
    masses = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return masses @ values / np.sum(masses * np.asarray(normalizers, np.float64), axis=-1)[:, None]


def compress(compressor, instance, size, draws):
    keys, values, samples = (
        np.broadcast_to(array, (draws, *array.shape))
        for array in (instance.keys, instance.values, instance.samples)
    )
    queries = samples if compressor.needs_queries else None
    return compressor(jax.random.key(0), keys, values, size=size, queries=queries)


def test_every_method_and_size_has_a_figure():
    assert set(COMPARED) == set(itertools.product(NAMES, RIVALS, SIZES))
    assert len(COMPARED) + 4 == len(ROWS)


@pytest.mark.parametrize(
    ("method", "size"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case[1] == SIZES[-1] else ())
        for case in itertools.product(RIVALS, SIZES)
    ],
)
def test_errors_are_those_of_the_authors_code(instances, method, size):
    compressor, draws = RIVALS[method]
    for name in NAMES:
        row = COMPARED[name, method, size]
        means, tails = errors_of(
            instances[name], compress(compressor, instances[name], size, draws)
        )
        if (name, method, size) == LOWER:
            assert np.mean(means) < row["mean"]
            assert np.mean(tails) < row["p99"]
            continue
        if draws == 1:
            rtol = LEAST_NORM_TIGHT if LEAST_NORM in row["method"] else TIGHT[method]
            np.testing.assert_allclose(means, row["mean"], rtol=rtol, err_msg=name)
        spread = row["mean_deviation"] / row["mean"]
        rtol = min(0.15, 3 * spread * math.sqrt(1 / draws + 1 / row["seeds"]) + 0.01)
        np.testing.assert_allclose(np.mean(means), row["mean"], rtol=rtol, err_msg=name)
        if spread > HEAVY_TAIL:
            np.testing.assert_allclose(np.median(means), row["median"], rtol=0.15, err_msg=name)
        if row["p99_deviation"] < HEAVY_TAIL * row["p99"]:
            np.testing.assert_allclose(np.mean(tails), row["p99"], rtol=0.15, err_msg=name)


@pytest.mark.parametrize("size", [SIZES[0], pytest.param(SIZES[-1], marks=pytest.mark.slow)])
def test_balanced_is_no_worse_than_kernel_thinning(instances, size):
    for name in NAMES:
        rows = [row for row in THINNED if (row["instance"], row["size"]) == (name, size)]
        assert len(rows) == 7
        means, tails = errors_of(instances[name], compress(balanced(), instances[name], size, 4))
        # On the whole kernel matrix and in buckets, with both bandwidths.
        assert np.mean(means) <= min(row["mean"] for row in rows), name
        assert np.mean(tails) <= min(row["p99"] for row in rows), name
