"""The sweep on a tiny grid, its store of finished cells, and the arithmetic of its table."""

import math
import pathlib
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from configs import sweep as configs
from experiments.common import results
from experiments.theory import sweep
from experiments.theory.sweep_figure import Line, fit_constant


@pytest.fixture
def config(tmp_path):
    config = configs.get_config("tiny")
    config.output = str(tmp_path / "sweep")
    return config


def line(sizes, errors, *, rho=1.0, width=32, method="balanced"):
    errors = np.asarray(errors, float)
    errors = errors[:, None] if errors.ndim == 1 else errors
    return Line(rho, width, method, np.asarray(sizes), errors)


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
        [sys.executable, "-m", "experiments.theory.sweep", *arguments],
        cwd=pathlib.Path(sweep.__file__).parents[2],
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
    assert fit_constant(lines) == pytest.approx(0.3)
