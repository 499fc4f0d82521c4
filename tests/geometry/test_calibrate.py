"""Calibration: which case of the theory a cache is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax.geometry import calibrate, standardize


@pytest.fixture(scope="module")
def heads():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 3, 50, 8)).astype(np.float32)
    queries = 2 * rng.standard_normal((2, 3, 37, 8)).astype(np.float32)
    return keys, queries


def test_against_brute_force(heads):
    keys, queries = heads
    lengths = np.array([[50, 7, 1], [49, 20, 33]])
    padded = np.where(np.arange(50)[:, None] < lengths[..., None, None], keys, np.nan)
    found = calibrate(padded.astype(np.float32), queries, lengths=lengths, mass=0.8)
    for head in np.ndindex(2, 3):
        rows = keys[head][: lengths[head]].astype(np.float64)
        radius = np.linalg.norm(rows - rows.mean(axis=0), axis=1).max() if len(rows) > 1 else 1.0
        norms = np.linalg.norm(queries[head].astype(np.float64), axis=1)
        np.testing.assert_allclose(found.key_radius[head], radius, rtol=1e-5)
        np.testing.assert_allclose(found.rho[head], radius * norms.max() / np.sqrt(8), rtol=1e-5)
        np.testing.assert_allclose(
            found.rho_quantiles[head],
            radius * np.quantile(norms, [0.5, 0.9, 0.99]) / np.sqrt(8),
            rtol=1e-5,
        )
        center = queries[head].astype(np.float64).mean(axis=0)
        offsets = queries[head] - center
        np.testing.assert_allclose(found.query_center[head], center, atol=1e-5)
        far = np.linalg.norm(offsets, axis=1).max()
        np.testing.assert_allclose(found.centered_rho[head], radius * far / np.sqrt(8), rtol=1e-5)
        spectrum = np.linalg.eigvalsh(offsets.T @ offsets)
        np.testing.assert_allclose(
            found.directions[head], spectrum.sum() ** 2 / (spectrum**2).sum(), rtol=1e-4
        )
        scores = queries[head].astype(np.float64) @ rows.T / np.sqrt(8)
        masses = np.exp(scores - scores.max(axis=1, keepdims=True))
        masses = -np.sort(-masses / masses.sum(axis=1, keepdims=True), axis=1)
        needed = 1 + (np.cumsum(masses, axis=1) < 0.8).sum(axis=1)
        np.testing.assert_allclose(
            found.dominating[head], needed.mean() / len(rows), atol=1.01 / len(rows) / 37
        )


@pytest.mark.slow
def test_agrees_with_the_standardization(heads):
    keys, queries = heads
    found = calibrate(keys, queries)
    standardization = standardize(keys, keys, queries=queries)
    np.testing.assert_allclose(found.rho, standardization.rho, rtol=1e-6)
    np.testing.assert_allclose(found.key_spread, standardization.key_spread, rtol=1e-6)
    assert np.all(np.diff(found.rho_quantiles, axis=-1) >= 0)
    assert np.all(found.rho_quantiles <= found.rho[..., None])


def test_sharper_queries_look_at_fewer(heads):
    keys, queries = heads
    shares = [calibrate(keys, scale * queries).dominating for scale in (0.0, 0.5, 2.0, 50.0)]
    assert np.all(np.diff(np.stack(shares), axis=0) < 0)
    np.testing.assert_allclose(shares[0], 0.9, atol=0.03)


def test_half_precision_and_bad_input(heads):
    keys, queries = (jnp.asarray(array, jnp.bfloat16) for array in heads)
    assert calibrate(keys, queries).rho.dtype == jnp.float32
    with pytest.raises(ValueError, match="quantiles must lie"):
        calibrate(keys, queries, quantiles=(0.5, 1.5))
    with pytest.raises(ValueError, match="mass must lie"):
        calibrate(keys, queries, mass=-0.1)
    with pytest.raises(ValueError, match="width"):
        calibrate(keys, jax.tree.map(lambda array: array[..., :4], queries))
