"""The sketch and the ledger of a summary against float64 brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import walks
from coreset_jax._src.geometry.kernel_geometry import balancing_geometry, default_kernel_radius
from coreset_jax._src.geometry.standardize import standardize
from coreset_jax._src.stream import sketch

SETTINGS = sketch.Settings(8, 1.5, 0.5, walks.greedy_pairs, 8, 1e-6, None)


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal((40, width)) for width in (4, 3))
    return sketch.Pairs(
        jnp.asarray(keys, jnp.float32),
        jnp.asarray(values, jnp.float32),
        jnp.ones(40),
        jnp.arange(40, dtype=jnp.int32),
    )


@pytest.fixture(scope="module")
def standardization(pairs):
    return standardize(pairs.keys, pairs.values, query_norm=1.5, scale=0.5)


@pytest.fixture(scope="module")
def geometry(standardization):
    return balancing_geometry(standardization)


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_weights_stand_for_repetitions(pairs):
    zeros = jnp.zeros(())
    blank = sketch.Ledger(
        jnp.zeros(4), jnp.zeros(3), zeros, zeros, jnp.zeros(4), *[jnp.zeros(sketch.LEVELS)] * 2
    )
    counts = np.random.default_rng(1).integers(1, 5, 40)
    weighted = pairs._replace(weights=jnp.asarray(counts, jnp.float32))
    found = sketch.weighted_standardization(weighted, blank, jnp.ones((), bool), SETTINGS)
    keys, values = (np.repeat(array, counts, axis=0) for array in (pairs.keys, pairs.values))
    expected = standardize(jnp.asarray(keys), jnp.asarray(values), query_norm=1.5, scale=0.5)
    for name in expected._fields:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4)


def test_a_measure_on_the_landmarks_is_its_own_projection(pairs, geometry):
    landmarks, coefficients = pairs.keys[:6], drawn(2, 6, 4)
    solver = sketch.solver(geometry, landmarks, SETTINGS)
    projected = sketch.projection(geometry, landmarks, solver, landmarks, coefficients)
    np.testing.assert_allclose(projected, coefficients, atol=2e-3)


@pytest.mark.slow
def test_projection_keeps_what_the_landmarks_see(pairs, geometry):
    """Read at a landmark, a measure and its projection agree."""
    landmarks, coefficients = pairs.keys[:10], drawn(3, 40, 4)
    solver = sketch.solver(geometry, landmarks, SETTINGS)
    projected = sketch.projection(geometry, landmarks, solver, pairs.keys, coefficients)
    unit, centers = (
        np.asarray(geometry.keys(array), np.float64) for array in (pairs.keys, landmarks)
    )
    radius = float(geometry.radius)
    seen = np.exp(radius * (centers @ unit.T - 1)) @ np.asarray(coefficients, np.float64)
    kept = np.exp(radius * (centers @ centers.T - 1)) @ np.asarray(projected, np.float64)
    np.testing.assert_allclose(kept, seen, atol=1e-3 * np.abs(seen).max())


def test_bounds_hold_and_are_those_of_the_kernel(pairs, standardization):
    change = np.random.default_rng(4).choice([-1.0, 1.0], 40)
    values = np.asarray(pairs.values - standardization.value_center, np.float64)
    unit = np.asarray(standardization.unit_keys(pairs.keys), np.float64)
    numerator, denominator = sketch.bounds(
        standardization,
        jnp.asarray(unit, jnp.float32),
        jnp.asarray(change[:, None] * values, jnp.float32),
        jnp.asarray(change, jnp.float32),
    )
    radius, rho = float(default_kernel_radius(standardization)), float(standardization.rho)
    kernel = np.exp(radius * (unit @ unit.T - 1)) * np.outer(change, change)
    factor = np.exp((radius + rho**2 / radius) / 2)
    np.testing.assert_allclose(
        numerator, factor * np.sqrt(np.sum(kernel * (values @ values.T))), rtol=1e-4
    )
    np.testing.assert_allclose(denominator, factor * np.sqrt(np.sum(kernel)), rtol=1e-4)
    queries = np.random.default_rng(5).standard_normal((2000, 4))
    queries *= rho / np.linalg.norm(queries, axis=-1, keepdims=True)
    masses = np.exp(queries @ unit.T) * change
    assert np.linalg.norm(masses @ values, axis=-1).max() <= numerator
    assert np.abs(masses.sum(axis=-1)).max() <= denominator


def test_landmarks_are_spread_over_the_stream(pairs):
    order = np.random.default_rng(6).permutation(40)
    mixed = jax.tree.map(lambda array: array[order], pairs)
    np.testing.assert_array_equal(sketch.landmark_keys(mixed, 8), pairs.keys[::5])
    few = mixed._replace(weights=jnp.where(mixed.positions < 3, 1.0, 0.0))
    assert np.all(np.isin(np.asarray(sketch.landmark_keys(few, 8)), np.asarray(pairs.keys[:3])))
