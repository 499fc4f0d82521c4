"""The store of finished cells, and files that are replaced as a whole."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import results


@pytest.fixture
def store(tmp_path):
    return results.Results(tmp_path / "cells.jsonl")


def test_the_store_keeps_what_strict_json_cannot_say(store):
    measurements = {"error": jnp.float32(0.5), "errors": np.array([1.0, np.inf, -np.inf]), "n": 3}
    store.put({"size": np.int64(4), "rho": 0.5}, measurements | {"none": math.nan})
    json.loads(store.path.read_text(), parse_constant=pytest.fail)
    read = results.Results(store.path).get({"rho": 0.5, "size": 4})
    assert math.isnan(read.pop("none"))
    assert read == {"error": 0.5, "errors": [1.0, math.inf, -math.inf], "n": 3}


def test_a_line_cut_anywhere_is_never_taken_for_a_whole_one(store):
    store.put({"cell": 1}, {"error": 0.25})
    store.put({"cell": 2}, {"error": 0.125, "nested": {"a": [1, {"b": 2}]}})
    text = store.path.read_bytes()
    first = text.index(b"\n") + 1
    for cut in range(first, len(text) - 1):
        store.path.write_bytes(text[:cut])
        reopened = results.Results(store.path)
        assert reopened.get({"cell": 1}) == {"error": 0.25}
        assert reopened.get({"cell": 2}) is None
    # What is written after the stump is whole, and so is what stood before it.
    reopened.put({"cell": 3}, {"error": 1.0})
    again = results.Results(store.path)
    assert again.get({"cell": 1}) == {"error": 0.25}
    assert again.get({"cell": 2}) is None
    assert again.get({"cell": 3}) == {"error": 1.0}
    assert len(again) == 2


def test_cells_are_keyed_by_settings_and_code(store, monkeypatch):
    store.put({"cell": 1, "rho": 1.0}, {"error": 0.25})
    store.put({"rho": 1.0, "cell": 1}, {"error": 0.5})
    reopened = results.Results(store.path)
    assert reopened.get({"rho": 1.0, "cell": 1}) == {"error": 0.5}
    assert reopened.get({"rho": 2.0, "cell": 1}) is None
    assert len(results.Results(store.path, fresh=True)) == 0
    monkeypatch.setattr(results, "code_digest", lambda: "other")
    assert reopened.get({"rho": 1.0, "cell": 1}) is None


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "figure.png"
    with results.replacing(path) as partial:
        partial.write_text("first")

    def interrupted():
        with results.replacing(path) as partial:
            partial.write_text("sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
