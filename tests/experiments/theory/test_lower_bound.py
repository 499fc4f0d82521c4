"""The game of the lower bounds on tiny instances, and what its figures are held to."""

import pathlib
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from configs import lower_bound as configs
from experiments.theory import lower_bound
from experiments.theory.lower_bound_figure import Curve, Panel


@pytest.fixture
def config(tmp_path):
    config = configs.get_config("tiny")
    config.output = str(tmp_path / "lower_bound")
    return config


@pytest.mark.slow
def test_a_tiny_game_is_played_printed_drawn_and_resumed(config, capsys, monkeypatch):
    panels = lower_bound.run(config)
    printed = capsys.readouterr().out
    for panel in panels:
        exact, *methods = panel.curves
        assert exact.method == "exact"
        assert exact.success.mean() > 0.97
        np.testing.assert_allclose(exact.errors, 0, atol=1e-6)
        for curve in methods:
            assert curve.success.shape == (1, 2)
            assert 0.6 < curve.success.mean() < 0.85
            # The theorem: half the pairs cannot have a small error.
            assert curve.errors.mean() > panel.eps

    for text in ("m = n/2", "full cache", "at most, equal weights", "error / ε", "seed 0, 1"):
        assert text in printed
    checks = printed[printed.index("What the figures are held to") :]
    assert "best method at n/2" in checks
    path = f"{config.output}/lower_bound.png"
    assert path in printed
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 400
    assert np.std(image[..., :3]) > 0.05

    # As a program, with every game finished: nothing is played, and the same is printed.
    arguments = ["--config=configs/lower_bound.py:tiny", f"--config.output={config.output}"]
    program = subprocess.run(
        [sys.executable, "-m", "experiments.theory.lower_bound", *arguments],
        cwd=pathlib.Path(lower_bound.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert program.stdout == printed
    assert "12 cells, 12 of them finished before" in program.stderr

    # Another seed is another game, and only that one is played.
    played = []

    def measure(cell):
        played.append(cell)
        return {"success": 1.0, "error": 0.5, "coherence": 0.1, "key_width": 7}

    monkeypatch.setattr(lower_bound, "measure", measure)
    config.seeds = (0, 1, 2)
    lower_bound.run(config)
    assert {cell.seed for cell in played} == {2}
    assert len(played) == 6
    # Who reads all bits from half of the pairs is found out.
    config.methods = ("balanced",)
    config.seeds = (2,)
    lower_bound.run(config)
    checks = capsys.readouterr().out
    checks = checks[checks.rindex("What the figures are held to") :]
    assert checks.count("yes") == 2
    assert checks.count("no ") == 3


def panel(success):
    """Sixteen pairs of 64 bits, with one method at two sizes."""
    exact = Curve("exact", np.array([16]), np.ones((1, 1)), np.zeros((1, 1)))
    curve = Curve("uniform", np.array([4, 8]), np.array(success)[:, None], np.ones((2, 1)))
    return Panel(6, 64, 4.0, 0.1, 16, 300, 16, 64, (exact, curve))


def test_a_method_above_its_bound_is_found_out():
    config = configs.get_config("tiny")

    def held(success):
        return [row[-1] for row in lower_bound.check_rows(config, [panel(success)])]

    bounds = [panel([0, 0]).bound("weighted", size) for size in (4, 8)]
    assert 0.625 < bounds[0] < bounds[1] < 0.9
    assert held([0.6, 0.75]) == ["yes", "yes", "yes"]
    assert held([bounds[0] + 0.001, 0.75]) == ["yes", "yes", "no"]
    assert held([0.6, 0.95]) == ["yes", "no", "no"]
    # A game that gave no number is no success.
    assert held([np.nan, 0.75])[-1] == "no"
    assert held([0.6, np.nan]) == ["yes", "no", "no"]


def test_the_default_instances_leave_room_for_their_bits():
    for theorem, width, rho, eps in configs.get_config().instances:
        instance = lower_bound.Instance(theorem, width, rho, eps)
        assert instance.codewords >= 25
        assert instance.pairs * instance.bits_per_pair == instance.codewords * width
    assert 0.5 in configs.get_config().shares
    with pytest.raises(ValueError, match="variant"):
        configs.get_config("fast")
