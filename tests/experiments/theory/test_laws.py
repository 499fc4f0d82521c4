"""The laws: their cells, their fits, and a tiny run from end to end."""

import contextlib
import io
import pathlib

import numpy as np
import pytest

from configs import laws as laws_config
from experiments.theory import cells, laws
from experiments.theory.laws_figure import Measured, draw, label


def test_every_law_goes_through_the_same_point():
    config = laws_config.get_config()
    for law in laws.laws(config):
        for method in law.expected:
            rows = laws.cells(config, law, method)
            assert [getattr(row[0], law.field) for row in rows] == list(law.values)
            assert all(len(row) == len(config.seeds) >= 5 for row in rows)
            fixed = {"count", "width", "rho", "size"} - {law.field}
            for row in rows:
                for cell in row:
                    if law.name == "walk":
                        assert cell.size == cell.count // 2
                    else:
                        if law.name == "width":
                            fixed -= {"size"}
                            assert cell.size == config.width_size
                        assert all(getattr(cell, name) == config[name] for name in fixed)


def test_exponents_are_found():
    rng = np.random.default_rng(0)
    positions = np.array([1.0, 2.0, 4.0, 8.0])
    noise = np.exp(0.01 * rng.standard_normal((4, 5)))
    power = cells.fit_line(np.log(positions), 3 * positions[:, None] ** -0.75 * noise)
    assert abs(power.slope + 0.75) < power.half_width < 0.02
    exponential = cells.fit_line(positions, np.exp(1.5 * positions)[:, None] * noise)
    assert abs(exponential.slope - 1.5) < exponential.half_width < 0.02


def measured(config, height):
    """What a run finds where a cell's height is known."""
    found = []
    for law in laws.laws(config):
        for method in law.expected:
            rows = laws.cells(config, law, method)
            heights = np.array([[height(law, cell) for cell in row] for row in rows])
            positions = np.asarray(law.values, float)
            scale = np.log(positions) if law.logarithmic else positions
            line = Measured(law, method, positions, heights, cells.fit_line(scale, heights))
            found.append(line)
    return found


def test_table_and_figure_show_every_law():
    config = laws_config.get_config("tiny")
    found = measured(config, lambda law, cell: (1 + 0.1 * cell.seed) / getattr(cell, law.field))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        laws.print_report(config, found)
    for law in laws.laws(config):
        assert law.name in printed.getvalue()
        for method in law.expected:
            assert label(method) in printed.getvalue()
    figure = draw(config, found)
    assert sum(axes.has_data() for axes in figure.axes) == len(laws.laws(config))


@pytest.mark.slow
def test_a_tiny_run_prints_draws_and_resumes(tmp_path: pathlib.Path, monkeypatch):
    config = laws_config.get_config("tiny")
    config.output = str(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = laws.run(config)
    assert all(np.all(np.isfinite(line.heights)) for line in found)
    assert (tmp_path / "laws.png").stat().st_size > 10_000

    def refuse(*arguments):
        raise AssertionError("a finished cell was measured again")

    monkeypatch.setattr(cells, "measure", refuse)
    with contextlib.redirect_stdout(io.StringIO()) as again:
        laws.run(config)
    assert again.getvalue() == printed.getvalue()
