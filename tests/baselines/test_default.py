"""The default on caches with heavy tails and in no order: the worst that it is made for."""

import json
import pathlib

import jax
import numpy as np
import pytest

import coreset_jax as cj

FIGURES = pathlib.Path(__file__).with_name("rivals.json")
ROWS = json.loads(FIGURES.read_text(encoding="utf-8"))["errors"]


@pytest.mark.parametrize(
    ("name", "size", "share"),
    [
        ("smooth", 128, 0.8),
        pytest.param("smooth", 512, 0.9, marks=pytest.mark.slow),
        ("medium", 128, 1),
        ("heavy", 128, 1.05),
    ],
)
def test_default_errs_less_than_the_best_rival(instances, mean_error, name, size, share):
    """Than its authors' own code did, on the very same caches."""
    published = {(row["instance"], row["method"], row["size"]): row["mean"] for row in ROWS}
    instance = instances[name]
    keys, values = (np.stack([each] * 3) for each in (instance.keys, instance.values))
    coreset = cj.fitted()(jax.random.key(0), keys, values, size=size)
    assert mean_error(instance, coreset) < share * published[name, "wildcat, 1 bin", size]
