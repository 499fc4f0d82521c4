"""The instances on which the authors' own code was measured, and the measure itself."""

import json
import pathlib
from typing import NamedTuple

import numpy as np
import pytest

# Seed, norm of the keys, factor of the outlying keys, and whether there are outliers at all.
INSTANCES = {
    "smooth": (20261, 4.0, 1.0, False),
    "heavy": (20262, 11.0, 3.0, True),
    "medium": (20263, 7.0, 2.0, True),
}


class Instance(NamedTuple):
    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    samples: np.ndarray

    def error(self, keys, values, log_weights):
        """Mean over the queries of the error, in units of the mean norm of the exact answer."""
        exact = attention(self.queries, self.keys, self.values, np.zeros(len(self.keys)))
        errors = np.linalg.norm(exact - attention(self.queries, keys, values, log_weights), axis=-1)
        return errors.mean() / np.linalg.norm(exact, axis=-1).mean()


def attention(queries, keys, values, log_weights):
    """Weighted softmax attention, in float64 and apart from the library's."""
    queries, keys, values = (np.asarray(array, np.float64) for array in (queries, keys, values))
    scores = queries @ keys.T / np.sqrt(keys.shape[-1]) + np.asarray(log_weights, np.float64)
    masses = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return masses @ values / masses.sum(axis=-1, keepdims=True)


def build(name):
    seed, norm, factor, heavy = INSTANCES[name]
    rng = np.random.default_rng(seed)
    count, width = 4096, 32
    centers = rng.standard_normal((16, width))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    labels = rng.integers(0, 16, size=count)
    directions = centers[labels] + 0.15 * rng.standard_normal((count, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    keys = norm * directions
    mixing = rng.standard_normal((width, width)) / np.sqrt(width)
    values = rng.standard_normal((count, width)) + (4.0 * directions) @ mixing
    queries = 1.2 * rng.standard_normal((512, width))
    samples = 1.2 * rng.standard_normal((1024, width))
    if heavy:
        keys[rng.choice(count, size=81, replace=False)] *= factor
        values[rng.choice(count, size=40, replace=False)] *= 8.0
        places = rng.permutation(count)
        keys[places[:204]] = keys[places[204:408]]
        values[places[:204]] = values[places[204:408]]
    return Instance(*(array.astype(np.float32) for array in (keys, values, queries, samples)))


@pytest.fixture(scope="session")
def instances():
    return {name: build(name) for name in INSTANCES}


@pytest.fixture(scope="session")
def balance_kv_figures():
    path = pathlib.Path(__file__).with_name("balance_kv.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def published_error(balance_kv_figures):
    """Looks up the mean error of a method, given the settings that tell it from the others."""

    def look_up(**settings):
        (row,) = (row for row in balance_kv_figures["errors"] if settings.items() <= row.items())
        return row["mean"]

    return look_up


@pytest.fixture(scope="session")
def mean_error():
    """The error of a compressor on an instance, averaged over the heads that share it."""

    def measure(instance, coreset):
        heads = zip(*map(np.asarray, coreset[:3]), strict=True)
        return np.mean([instance.error(*head) for head in heads])

    return measure
