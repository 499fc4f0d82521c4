"""The sweep on a tiny grid, its store of finished cells, and the arithmetic of its table."""

import json
import math
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from configs import sweep as configs
from experiments import results, sweep


@pytest.fixture
def config(tmp_path):
    config = configs.get_config("tiny")
    config.output = str(tmp_path / "sweep")
    return config


@pytest.fixture
def store(tmp_path):
    return results.Results(tmp_path / "cells.jsonl")


def line(sizes, errors, *, rho=1.0, width=32, method="balanced"):
    errors = np.asarray(errors, float)
    errors = errors[:, None] if errors.ndim == 1 else errors
    return sweep.Line(rho, width, method, np.asarray(sizes), errors)


@pytest.mark.slow
def test_a_tiny_sweep_measures_prints_draws_and_resumes(config, capsys, monkeypatch):
    lines = sweep.run(config)
    printed = capsys.readouterr().out

    # The errors: a coreset beats a sample, and more pairs beat fewer.
    errors = {(line.rho, line.method): line.medians for line in lines}
    for rho in config.rhos:
        assert np.all(errors[rho, "balanced"] < errors[rho, "uniform"])
    assert all(np.all(np.diff(line.medians) < 0) for line in lines)

    for text in ("slope ± 95 %", "m for 0.2", "theory", "c √d e^ρ / m", "seed 0, 1", "coreset_jax"):
        assert text in printed
    # One bound of the tiny configuration is meant to hold, one cannot.
    bounds = printed[printed.index("What balanced is held to") :]
    assert bounds.count("yes") == 2
    assert bounds.count("no ") == 1

    path = f"{config.output}/tiny-d4.png"
    assert path in printed
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 400
    assert np.std(image[..., :3]) > 0.05

    # Again: nothing is computed, and the same is printed.
    monkeypatch.setattr(sweep, "measure", lambda cell: pytest.fail(f"computed again: {cell}"))
    again = sweep.run(config)
    np.testing.assert_array_equal(again[0].errors, lines[0].errors)
    assert capsys.readouterr().out == printed

    # As a program: with every cell finished it prints the same once more.
    arguments = ["--config=configs/sweep.py:tiny", f"--config.output={config.output}"]
    program = subprocess.run(
        [sys.executable, "-m", "experiments.sweep", *arguments],
        cwd=pathlib.Path(sweep.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert program.stdout == printed
    assert "16 cells, 16 of them finished before" in program.stderr

    # After an interruption in the middle of a line, only that cell is computed.
    cells = f"{config.output}/cells.jsonl"
    with open(cells) as file:
        whole = file.read()
    with open(cells, "w") as file:
        file.write(whole[:-25])
    computed = []

    def measure(cell):
        computed.append(cell)
        return {"error": 0.5}

    monkeypatch.setattr(sweep, "measure", measure)
    sweep.run(config)
    assert len(computed) == 1
    sweep.run(config)
    assert len(computed) == 1

    # Changed settings are other cells; so is everything where a fresh start is asked for.
    config.steps = 11
    sweep.run(config)
    assert len(computed) == 1 + 16
    config.fresh = True
    sweep.run(config)
    assert len(computed) == 1 + 2 * 16


def test_the_grid_of_quick_is_a_part_of_the_full_one():
    full, quick = (
        {results.cell_key(cell.settings()) for cell in sweep.grid(configs.get_config(variant))}
        for variant in ("full", "quick")
    )
    assert quick < full
    with pytest.raises(ValueError, match="variant"):
        configs.get_config("fast")


def test_slopes_are_fitted_to_the_sizes_asked_for():
    sizes = np.array([64, 256, 1024, 4096, 16384])
    errors = 3.0 * sizes**-0.75
    errors[[0, -1]] = 100.0
    noise = np.exp(np.array([-0.1, 0.0, 0.1]))
    slope = sweep.fit_slope(line(sizes, errors[:, None] * noise), 256, 4096)
    assert slope.slope == pytest.approx(-0.75)
    assert 0 < slope.half_width < 0.1
    assert sweep.fit_slope(line(sizes, errors), 256, 4096).half_width == pytest.approx(0, abs=1e-6)
    assert math.isnan(sweep.fit_slope(line(sizes, errors), 256, 256).slope)


def test_intervals_of_slopes_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    sizes = np.array([256, 512, 1024, 2048, 4096])
    covered = 0
    for _ in range(1000):
        noise = np.exp(0.2 * rng.normal(size=(5, 3)))
        slope = sweep.fit_slope(line(sizes, noise / sizes[:, None]), 256, 4096)
        covered += abs(slope.slope + 1) <= slope.half_width
    assert 0.93 < covered / 1000 < 0.97


def test_the_size_that_reaches_an_error_lies_on_the_line_between_two():
    curve = line([100, 400, 1600], [0.4, 0.1, 0.025])
    assert sweep.size_to_reach(curve, 0.2) == "200"
    assert sweep.size_to_reach(curve, 0.1) == "400"
    assert sweep.size_to_reach(curve, 0.05) == "800"
    assert sweep.size_to_reach(curve, 0.5) == "≤ 100"
    assert sweep.size_to_reach(curve, 0.01) == "> 1600"


def test_the_constant_of_the_theory_is_found():
    lines = [
        line(
            [16, 64], 0.3 * np.sqrt(width) * np.exp(rho) / np.array([16, 64]), rho=rho, width=width
        )
        for rho in (1.0, 2.0)
        for width in (4, 32)
    ]
    assert sweep.fit_constant(lines) == pytest.approx(0.3)


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


def test_tables_are_aligned_and_never_folded(capsys):
    name, title = "a long name " * 20, "a title " * 40
    results.print_table(
        title, ["name", "error"], [[name, "1.0"], None, ["b", "10.25"]], left=["name"]
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].strip() == title.strip()
    rows = [row for row in printed if row.rstrip().endswith(("1.0", "10.25"))]
    assert len({len(row.rstrip()) for row in rows}) == 1
    assert name.strip() in rows[0]
