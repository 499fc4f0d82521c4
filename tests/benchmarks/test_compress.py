"""The benchmark runs, and its floor does the work that it claims."""

import subprocess
import sys

import pytest

import coreset_jax as cj
from benchmarks import compress


@pytest.mark.slow
def test_quick_run_prints_the_table():
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.compress", "--quick", "--repeats=1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "run/floor" in finished.stdout
    assert "8 x 2048 -> 256" in finished.stdout


def test_floor_visits_every_block_of_every_level():
    # 16384 -> 8192 -> 4096 -> 2048 in blocks of 512, the last level twice.
    assert compress.visits(16384, 2048) == 32 + 16 + 8 * compress.PASSES
    # 600 of 1000: one level halves 800 pairs and leaves the others.
    assert compress.visits(1000, 600) == 2 * compress.PASSES


def test_floor_repeats_the_defaults():
    defaults = cj.balanced()
    assert defaults.block_size == compress.BLOCK_SIZE
    assert defaults.landmarks == compress.LANDMARKS
    assert defaults.passes == compress.PASSES
