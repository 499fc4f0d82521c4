"""The sketch and the ledger of a summary against float64 brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import problem, sketch, walks
from coreset_jax.geometry import balancing_geometry, default_kernel_radius

SETTINGS = sketch.Settings(8, 1.5, 0.5, walks.greedy_pairs, 8, 1e-6)


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal((40, width)) for width in (4, 3))
    return sketch.Pairs(
        jnp.asarray(keys, jnp.float32),
        jnp.asarray(values, jnp.float32),
        jnp.ones(40),
        jnp.arange(40, dtype=jnp.int32),
    )


def blank(pairs):
    zeros = jnp.zeros(())
    return sketch.Ledger(
        jnp.zeros(4), jnp.zeros(3), zeros, zeros, jnp.zeros(4), *[jnp.zeros(sketch.LEVELS)] * 2
    )


def test_unit_problem_is_that_of_the_cache(pairs):
    found = sketch.unit_problem(pairs, blank(pairs), jnp.ones((), bool), SETTINGS)
    expected = problem.reduce(pairs.keys, pairs.values, query_norm=1.5, scale=0.5)
    for name in expected._fields:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5)


def test_weights_stand_for_repetitions(pairs):
    counts = np.random.default_rng(1).integers(1, 5, 40)
    weighted = pairs._replace(weights=jnp.asarray(counts, jnp.float32))
    found = sketch.unit_problem(weighted, blank(pairs), jnp.ones((), bool), SETTINGS)
    keys, values = (np.repeat(array, counts, axis=0) for array in (pairs.keys, pairs.values))
    expected = problem.reduce(jnp.asarray(keys), jnp.asarray(values), query_norm=1.5, scale=0.5)
    for name in expected._fields:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4)


def test_a_measure_on_the_landmarks_is_its_own_projection(pairs):
    reduction = problem.reduce(pairs.keys, pairs.values, query_norm=1.5, scale=0.5)
    found = balancing_geometry(reduction)
    landmarks = pairs.keys[:6]
    columns = jnp.asarray(np.random.default_rng(2).standard_normal((6, 4)), jnp.float32)
    solver = sketch.solver(found, landmarks, SETTINGS)
    projected = sketch.projection(found, landmarks, solver, landmarks, columns)
    np.testing.assert_allclose(projected, columns, atol=2e-3)


def test_projection_keeps_what_the_landmarks_see(pairs):
    """Read at a landmark, a measure and its projection agree."""
    reduction = problem.reduce(pairs.keys, pairs.values, query_norm=1.5, scale=0.5)
    found = balancing_geometry(reduction)
    landmarks = pairs.keys[:10]
    columns = jnp.asarray(np.random.default_rng(3).standard_normal((40, 4)), jnp.float32)
    solver = sketch.solver(found, landmarks, SETTINGS)
    projected = sketch.projection(found, landmarks, solver, pairs.keys, columns)
    projected = np.asarray(projected, np.float64)
    unit, marks = (np.asarray(found.keys(array), np.float64) for array in (pairs.keys, landmarks))
    radius = float(found.radius)
    seen = np.exp(radius * (marks @ unit.T - 1)) @ np.asarray(columns, np.float64)
    kept = np.exp(radius * (marks @ marks.T - 1)) @ projected
    np.testing.assert_allclose(kept, seen, atol=1e-3 * np.abs(seen).max())


def test_bounds_hold_and_are_those_of_the_kernel(pairs):
    reduction = problem.reduce(pairs.keys, pairs.values, query_norm=1.5, scale=0.5)
    change = np.random.default_rng(4).choice([-1.0, 1.0], 40)
    values = np.asarray(pairs.values - reduction.value_center, np.float64)
    unit = np.asarray(problem.unit_keys(reduction, pairs.keys), np.float64)
    numerator, denominator = sketch.bounds(
        reduction,
        jnp.asarray(unit, jnp.float32),
        jnp.asarray(change[:, None] * values, jnp.float32),
        jnp.asarray(change, jnp.float32),
    )
    radius, rho = float(default_kernel_radius(reduction)), float(reduction.rho)
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
