"""Uniform sampling: the law of the subset."""

import jax
import numpy as np
import pytest

from coreset_jax import baselines


@pytest.mark.parametrize("length", [6, 9])
def test_every_subset_is_equally_likely(length):
    draws, count, size = 20_000, 9, 3
    pairs = np.zeros((draws, count, 1), np.float32)
    coreset = baselines.uniform()(
        jax.random.key(0), pairs, pairs, size=size, lengths=np.full(draws, length)
    )
    _, frequencies = np.unique(np.asarray(coreset.indices), axis=0, return_counts=True)
    subsets = len(frequencies)
    assert subsets == {6: 20, 9: 84}[length]
    expected = draws / subsets
    chi_square = np.sum((frequencies - expected) ** 2) / expected
    # Four standard deviations of the chi-square law about its mean.
    assert abs(chi_square - (subsets - 1)) < 4 * np.sqrt(2 * (subsets - 1))
