"""The feasibility map: a tiny run from end to end, and what it prints and draws."""

import contextlib
import io
import pathlib

import numpy as np
import pytest

from configs import feasibility as feasibility_config
from experiments.caches import feasibility
from experiments.caches.feasibility_figure import Map, draw
from experiments.caches.passages import all_ratios, read_passage
from experiments.model import lm


def invented(shares=(0.1, 1.0), ratios=(4, 8), layers=2, heads=2):
    rng = np.random.default_rng(0)
    grid = (len(shares), len(ratios), layers, heads)
    calibration = {name: rng.uniform(1, 5, (layers, heads)) for name in ("rho", "key_radius")}
    calibration |= {
        name: rng.uniform(0, 1, (layers, heads)) for name in ("key_spread", "dominating")
    }
    calibration["rho_quantiles"] = rng.uniform(0, 1, (layers, heads, 3))
    errors = rng.uniform(1e-4, 1.5, (3, *grid))
    errors[0, 0, 0, 0, 0] = np.inf
    return Map(calibration, shares, ratios, errors[0], errors[1], errors[2, 0])


def test_every_head_is_in_the_table_and_the_figure():
    config = feasibility_config.get_config("tiny")
    config.ratio = 8
    found = invented()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        feasibility.print_report(config, "text", found)
    for head in ("0.0", "0.1", "1.0", "1.1"):
        assert f" {head} " in printed.getvalue()
    figure = draw(found, 8)
    shown = [text.get_text() for axes in figure.axes[:4] for text in axes.texts]
    errors = [found.certified[:, 1], found.certified[1], found.predicted[1], found.measured]
    # Numbers where they say something, hatches elsewhere.
    assert len(shown) == sum(np.sum(each < 1) for each in errors)


def test_cells_tell_texts_and_balls_apart():
    config = feasibility_config.get_config("tiny")
    passage = read_passage(config)
    cells = feasibility.cells(config, passage)
    assert len(cells) == 1 + len(config.shares) * len(all_ratios(config))
    assert len({str(cell) for cell in cells}) == len(cells)


@pytest.mark.slow
def test_a_tiny_run_prints_draws_and_resumes(tmp_path: pathlib.Path, monkeypatch):
    config = feasibility_config.get_config("tiny")
    config.output = str(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = feasibility.run(config)
    assert np.all(np.isfinite(found.measured))
    assert np.all(found.certified > 0)
    # A smaller ball is easier to promise for.
    assert np.all(found.certified[0] <= found.certified[-1])
    assert (tmp_path / "feasibility.png").stat().st_size > 10_000
    monkeypatch.setattr(lm, "load", None)
    with contextlib.redirect_stdout(io.StringIO()) as again:
        feasibility.run(config)
    assert again.getvalue() == printed.getvalue()
