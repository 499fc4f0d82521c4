"""Every rival beside its authors' own code: mean and 99th percentile of the error, at two sizes."""

import json
import pathlib

import jax
import numpy as np
import pytest

from coreset_jax import balanced, baselines

HERE = pathlib.Path(__file__).parent
ROWS = json.loads((HERE / "rivals.json").read_text(encoding="utf-8"))["errors"]
THINNED = json.loads((HERE / "goodpoints.json").read_text(encoding="utf-8"))["errors"]

# What stands for the authors' code, and how many coresets are averaged. Beside sums in float64
# stands what does not overflow in float32.
RIVALS = {
    "uniform": (baselines.uniform, 20),
    "top_attention": (baselines.top_attention, 1),
    "balance_kv CLI, as published": (baselines.balance_kv, 8),
    "balance_kv CLI, corrected": (lambda: baselines.balance_kv(corrected=True), 8),
    "balance_kv notebook, as published": (
        lambda: baselines.balance_kv(temperature=0.1, block_size=256),
        8,
    ),
    "balance_kv notebook, corrected": (
        lambda: baselines.balance_kv(corrected=True, temperature=0.1, block_size=256),
        8,
    ),
    "kernel_halving": (baselines.kernel_halving, 12),
    "attention_matching": (baselines.attention_matching, 1),
    "attention_matching, least norm": (baselines.attention_matching, 1),
    "wildcat, 1 bin": (baselines.wildcat, 2),
    "wildcat, 4 bins": (lambda: baselines.wildcat(bins=4), 4),
}
# Where keys repeat, the authors' solver for the weights returns rounding: nothing to agree with.
ROUNDING = {("heavy", "attention_matching"), ("medium", "attention_matching")}
COMPARED = [row for row in ROWS if (row["instance"], row["method"]) not in ROUNDING]
# Spread over seeds, relative to the average, from which on an average says little.
HEAVY_TAIL = 0.12
# The one case in which ours comes out well below the authors' pipeline with another solver.
LOWER = ("heavy", "attention_matching, least norm", 512)


def name_of(row):
    return f"{row['instance']}-{row['method']}-{row['size']}"


def errors_of(instance, coreset):
    """Mean and 99th percentile of each coreset's error, in units of the mean exact norm."""
    exact = answers(instance.queries, instance.keys, instance.values, 0.0, 1.0)
    unit = np.linalg.norm(exact, axis=-1).mean()
    normalizers = coreset.normalizers
    found = []
    for draw in range(len(coreset.keys)):
        z = 1.0 if normalizers is None else normalizers[draw]
        approximate = answers(
            instance.queries, coreset.keys[draw], coreset.values[draw], coreset.log_weights[draw], z
        )
        errors = np.linalg.norm(exact - approximate, axis=-1) / unit
        found.append((errors.mean(), np.quantile(errors, 0.99)))
    return np.array(found).T


def answers(queries, keys, values, log_weights, normalizers):
    """Weighted attention with normalizers, in float64 and apart from the library's."""
    queries, keys, values = (np.asarray(array, np.float64) for array in (queries, keys, values))
    scores = queries @ keys.T / np.sqrt(keys.shape[-1]) + np.asarray(log_weights, np.float64)
    masses = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return masses @ values / np.sum(masses * np.asarray(normalizers, np.float64), axis=-1)[:, None]


def compress(compressor, instance, size, draws, queries=None):
    keys, values = (np.broadcast_to(array, (draws, *array.shape)) for array in instance[:2])
    if queries is not None:
        queries = np.broadcast_to(queries, (draws, *queries.shape))
    return compressor(jax.random.key(0), keys, values, size=size, queries=queries)


def test_every_method_and_size_has_a_figure():
    assert {row["method"] for row in COMPARED} == set(RIVALS)
    for name in ("smooth", "heavy", "medium"):
        here = [row for row in COMPARED if row["instance"] == name]
        methods = set(RIVALS)
        unlike = "attention_matching, least norm" if name == "smooth" else "attention_matching"
        assert sorted((row["method"], row["size"]) for row in here) == sorted(
            (method, size) for method in methods - {unlike} for size in (128, 512)
        )


@pytest.mark.parametrize("row", COMPARED, ids=name_of)
def test_errors_are_those_of_the_authors_code(instances, row):
    make, draws = RIVALS[row["method"]]
    instance = instances[row["instance"]]
    coreset = compress(make(), instance, row["size"], draws, instance.samples)
    means, tails = errors_of(instance, coreset)
    if (row["instance"], row["method"], row["size"]) == LOWER:
        assert np.mean(means) < row["mean"]
        assert np.mean(tails) < row["p99"]
        return
    np.testing.assert_allclose(np.mean(means), row["mean"], rtol=0.15)
    if row["mean_deviation"] > HEAVY_TAIL * row["mean"]:
        np.testing.assert_allclose(np.median(means), row["median"], rtol=0.15)
    if row["p99_deviation"] < HEAVY_TAIL * row["p99"]:
        np.testing.assert_allclose(np.mean(tails), row["p99"], rtol=0.15)


@pytest.mark.parametrize("size", [128, 512])
@pytest.mark.parametrize("name", ["smooth", "medium", "heavy"])
def test_balanced_is_no_worse_than_kernel_thinning(instances, name, size):
    rows = [row for row in THINNED if (row["instance"], row["size"]) == (name, size)]
    assert len(rows) == 7
    instance = instances[name]
    means, tails = errors_of(instance, compress(balanced(), instance, size, 4))
    # On the whole kernel matrix and in buckets, with both bandwidths.
    assert np.mean(means) <= min(row["mean"] for row in rows)
    assert np.mean(tails) <= min(row["p99"] for row in rows)
