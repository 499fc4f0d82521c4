"""The geometry of a balance: invisible where keys are alike, and steady where one is far out."""

import jax
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax._src.geometry import kernel_geometry
from coreset_jax.geometry import standardize
from tests import brute_force
from tests.compressors import sampled


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((2, 400, width)).astype(np.float32) for width in (8, 5))


@jax.jit
def balancing(keys, values, rho=None):
    """The unit problem, its geometry, and the pairs in both."""
    standardization = standardize(keys, values, rho=rho)
    geometry = kernel_geometry.balancing_geometry(standardization)
    arrays = {
        "unit": standardization.unit_keys(keys),
        "keys": geometry.keys(keys),
        "values": geometry.values(values),
        "restored": geometry.restore_keys(geometry.keys(keys)),
        "restored values": geometry.restore_values(geometry.values(values)),
    }
    return geometry, arrays


def test_keys_of_like_norms_are_only_scaled(pairs):
    keys, values = pairs
    keys = keys[:, :200] / np.linalg.norm(keys[:, :200], axis=-1, keepdims=True)
    # Symmetric, so that the center is the origin.
    keys = np.concatenate([keys, -keys], axis=-2)
    found, arrays = balancing(keys, values, 1.5)
    np.testing.assert_array_equal(found.reach, 1.0)
    np.testing.assert_allclose(arrays["keys"], keys, atol=1e-6)
    np.testing.assert_allclose(arrays["restored"], keys, atol=1e-6)
    np.testing.assert_allclose(arrays["restored values"], values, atol=1e-5)
    np.testing.assert_allclose(found.radius, 1.5, rtol=1e-6)


def test_keys_far_out_are_drawn_in_and_others_are_not(pairs):
    keys, values = (array.copy() for array in pairs)
    keys[:, 7] *= 100
    found, arrays = balancing(keys, values)
    unit, drawn = brute_force.double(arrays["unit"], arrays["keys"])
    reach = np.asarray(found.reach)[:, None]
    norms = np.linalg.norm(unit, axis=-1)
    np.testing.assert_allclose(
        np.linalg.norm(drawn, axis=-1), np.minimum(norms / reach, 1), rtol=1e-5
    )
    inside = norms <= reach
    assert np.sum(~inside) == 2
    # The kernel of pairs within reach is what it would be without one.
    default = kernel_geometry.default_kernel_radius(found.standardization)
    for head, radius in enumerate(np.asarray(default, np.float64)):
        rows = inside[head]
        expected = radius * unit[head][rows] @ unit[head][rows].T
        exponents = np.asarray(found.radius[head]) * drawn[head][rows] @ drawn[head][rows].T
        np.testing.assert_allclose(exponents, expected, rtol=1e-4, atol=1e-4)


def test_values_weigh_the_same_in_any_units(pairs):
    keys, values = pairs
    for factor in (1.0, 1e-3, 1e4):
        _, arrays = balancing(keys, np.float32(factor) * values + 3)
        squares = np.mean(np.sum(np.square(np.float64(arrays["values"])), axis=-1), axis=-1)
        np.testing.assert_allclose(squares, 8, rtol=2e-2)


def test_moments_are_summed_in_blocks(pairs, monkeypatch):
    geometry, arrays = balancing(*pairs)
    geometry, keys, values, unit = jax.tree.map(
        lambda leaf: leaf[0], (geometry, *pairs, arrays["keys"])
    )
    exact = np.float64(unit)
    kernel = np.exp(float(geometry.radius) * (exact[:6] @ exact.T - 1))
    # One block, blocks that divide the pairs, and one that does not.
    for block in (2048, 100, 128):
        monkeypatch.setattr(kernel_geometry, "_MOMENTS_BLOCK", block)
        found = jax.jit(lambda *given: geometry.moments(*given))(unit[:6], keys, values)
        np.testing.assert_allclose(found, kernel @ values, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_one_key_far_out_spoils_nothing_else(pairs):
    """Queries that do not look its way are answered as if it were not there."""
    factors = np.float32([10.0, 1e3, 1e6])
    keys, values = (np.tile(array[:1], (3, 5, 1)) for array in pairs)
    keys = keys + 0.3 * np.random.default_rng(3).standard_normal(keys.shape).astype(np.float32)
    keys[:, 1000] = factors[:, None] * np.eye(8, dtype=np.float32)[0]
    queries = np.random.default_rng(1).standard_normal((3, 50, 8)).astype(np.float32)
    queries[..., 0] = -np.abs(queries[..., 0])
    exact = brute_force.attention(queries, keys, values)

    def mean_errors(compressor):
        """Of every head, in the mean over queries and draws."""

        @jax.jit
        @jax.vmap
        def answer(rng):
            return cj.attend(queries, compressor(rng, keys, values, size=250))

        found = answer(jax.random.split(jax.random.key(0), 8))
        return np.mean(np.linalg.norm(found - exact, axis=-1), axis=(0, 2))

    balanced, uniform = mean_errors(cj.balanced()), mean_errors(sampled())
    assert np.all(balanced < 0.9 * uniform)
