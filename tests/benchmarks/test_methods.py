"""The benchmark of methods runs, and compares what it says."""

import subprocess
import sys

import pytest

from benchmarks import methods


@pytest.mark.slow
def test_quick_run_prints_the_table():
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.methods", "--cases=quick", "--turns=1"],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in methods.METHODS:
        assert name in finished.stdout
    assert "2 heads x 1024 -> 128" in finished.stdout


@pytest.mark.slow
def test_every_method_compresses_the_same_cache():
    case = methods.Case(1, 64, 16, 8, 32)
    for call in methods.calls(case).values():
        coreset = call()
        assert coreset.keys.shape == (1, 16, 8)
