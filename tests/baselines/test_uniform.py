"""Uniform sampling: the law of the subset, and the size of the error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import baselines


@pytest.mark.parametrize("length", [6, 9])
def test_every_subset_is_equally_likely(length):
    draws, count, size = 20_000, 9, 3
    pairs = jnp.zeros((draws, count, 1))
    coreset = baselines.uniform()(
        jax.random.key(0), pairs, pairs, size=size, lengths=jnp.full(draws, length)
    )
    _, frequencies = np.unique(np.asarray(coreset.indices), axis=0, return_counts=True)
    subsets = len(frequencies)
    assert subsets == {6: 20, 9: 84}[length]
    expected = draws / subsets
    chi_square = np.sum((frequencies - expected) ** 2) / expected
    # Four standard deviations of the chi-square law about its mean.
    assert abs(chi_square - (subsets - 1)) < 4 * np.sqrt(2 * (subsets - 1))


@pytest.mark.parametrize("size", [128, 512])
def test_error_is_the_published_one(instances, published_error, mean_error, size):
    instance, draws = instances["smooth"], 12
    keys, values = (jnp.broadcast_to(array, (draws, *array.shape)) for array in instance[:2])
    coreset = baselines.uniform()(jax.random.key(0), keys, values, size=size)
    expected = published_error(instance="smooth", method="uniform", size=size)
    np.testing.assert_allclose(mean_error(instance, coreset), expected, rtol=0.15)
