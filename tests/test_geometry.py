"""The geometry of a balance: invisible where keys are alike, and steady where one is far out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import geometry, problem
from tests import brute_force


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    shapes = [(2, 400, width) for width in (8, 5)]
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def test_keys_of_like_norms_are_only_scaled(pairs):
    keys, values = pairs
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    # Symmetric, so that the center is the origin.
    keys = jnp.concatenate([keys, -keys], axis=-2)
    values = jnp.concatenate([values, values], axis=-2)
    reduction = problem.reduce(keys, values, rho=1.5)
    found = geometry.balancing_geometry(reduction)
    np.testing.assert_array_equal(found.reach, 1.0)
    np.testing.assert_allclose(found.keys(keys), keys, atol=1e-6)
    np.testing.assert_allclose(found.radius, 1.5, rtol=1e-6)


def test_keys_far_out_are_drawn_in_and_others_are_not(pairs):
    keys, values = pairs
    keys = keys.at[:, 7].multiply(100)
    reduction = problem.reduce(keys, values)
    found = geometry.balancing_geometry(reduction)
    unit = np.asarray(problem.unit_keys(reduction, keys), np.float64)
    drawn = np.asarray(found.keys(keys), np.float64)
    reach = np.asarray(found.reach)[:, None]
    np.testing.assert_allclose(
        np.linalg.norm(drawn, axis=-1),
        np.minimum(np.linalg.norm(unit, axis=-1) / reach, 1),
        rtol=1e-5,
    )
    inside = np.linalg.norm(unit, axis=-1) <= reach
    assert np.sum(~inside) == 2
    # The kernel of pairs within reach is what it would be without one.
    radius = np.asarray(geometry.default_kernel_radius(reduction), np.float64)
    for head in range(2):
        rows = inside[head]
        expected = radius[head] * unit[head][rows] @ unit[head][rows].T
        exponents = np.asarray(found.radius[head]) * drawn[head][rows] @ drawn[head][rows].T
        np.testing.assert_allclose(exponents, expected, rtol=1e-4, atol=1e-4)


def test_values_weigh_the_same_in_any_units(pairs):
    keys, values = pairs
    for factor in (1.0, 1e-3, 1e4):
        reduction = problem.reduce(keys, factor * values + 3)
        gained = geometry.balancing_geometry(reduction).values(factor * values + 3)
        squares = np.mean(np.sum(np.square(np.asarray(gained, np.float64)), axis=-1), axis=-1)
        np.testing.assert_allclose(squares, 8, rtol=2e-2)


@pytest.mark.parametrize("factor", [10.0, 1e3, 1e6])
def test_one_key_far_out_spoils_nothing_else(pairs, factor):
    """Queries that do not look its way are answered as if it were not there."""
    keys, values = (jnp.tile(array[:1], (1, 5, 1)) for array in pairs)
    keys = keys + 0.3 * jax.random.normal(jax.random.key(3), keys.shape)
    far = jnp.zeros(8).at[0].set(factor)
    keys = keys.at[0, 1000].set(far)
    queries = np.random.default_rng(1).standard_normal((1, 50, 8))
    queries[..., 0] = -np.abs(queries[..., 0])
    queries = jnp.asarray(queries, jnp.float32)
    exact = brute_force.attention(queries, keys, values)

    def mean_error(compressor):
        errors = [
            np.linalg.norm(
                cj.attend(queries, compressor(jax.random.key(seed), keys, values, size=250))
                - exact,
                axis=-1,
            ).mean()
            for seed in range(4)
        ]
        return np.mean(errors)

    assert mean_error(cj.balanced()) < 0.9 * mean_error(cj.baselines.uniform())
