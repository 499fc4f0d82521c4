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
    ("size", "shares"),
    [
        (128, {"smooth": 0.8, "medium": 1, "heavy": 1.05}),
        pytest.param(512, {"smooth": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_default_errs_less_than_the_best_rival(instances, mean_error, size, shares):
    """Than its authors' own code did, on the very same caches."""
    published = {(row["instance"], row["method"], row["size"]): row["mean"] for row in ROWS}
    for name, share in shares.items():
        instance = instances[name]
        keys, values = (np.stack([each] * 3) for each in (instance.keys, instance.values))
        coreset = cj.fitted()(jax.random.key(0), keys, values, size=size)
        error = mean_error(instance, coreset)
        assert error < share * published[name, "wildcat, 1 bin", size], name
