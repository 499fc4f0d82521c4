"""Gram blocks against float64 brute force and against the features that they stand for."""

import itertools
import math

import jax
import numpy as np
import pytest

from coreset_jax._src.geometry import kernels
from tests import brute_force

LEFT, RIGHT, WIDTH, VALUE_WIDTH = 9, 13, 4, 3
RADII = [0.1, 1.0, 8.0]
KEY_WEIGHTS = [0.0, 1.0, 0.3]


def inside_the_ball(seed, count, width):
    """Points of norm at most one, the first of norm one."""
    points = np.random.default_rng(seed).standard_normal((count, width))
    return (points / np.linalg.norm(points, axis=1).max()).astype(np.float32)


@pytest.fixture(scope="module")
def left():
    return inside_the_ball(0, LEFT, WIDTH), inside_the_ball(1, LEFT, VALUE_WIDTH)


@pytest.fixture(scope="module")
def right():
    return inside_the_ball(2, RIGHT, WIDTH), inside_the_ball(3, RIGHT, VALUE_WIDTH)


# The weight of the keys is static: without one they leave the sum.
GRAM = jax.jit(kernels.simultaneous_gram, static_argnames="key_weight")


def test_kernels_are_brute_force(left, right):
    keys, right_keys = brute_force.double(left[0], right[0])
    exponential = jax.jit(kernels.exponential_kernel)
    for radius in RADII:
        expected = np.exp(radius * (keys @ right_keys.T - 1))
        kernel = exponential(left[0], right[0], radius)
        np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-5 * expected.max())
    squares = np.sum(np.square(keys[:, None] - right_keys), axis=-1)
    gaussian = jax.jit(kernels.gaussian_kernel)
    np.testing.assert_allclose(gaussian(left[0], right[0]), np.exp(-squares / 2), rtol=1e-5)
    # One on equal keys, and never more, though these are long.
    alike = 30 * left[0]
    kernel = gaussian(alike, np.concatenate([alike, right[0][:4]]))
    assert np.max(kernel) <= 1
    np.testing.assert_allclose(np.diagonal(kernel), 1, rtol=1e-3)


def test_without_values_the_denominator_is_left_and_the_values_add_the_numerator(left, right):
    keys, values = brute_force.double(*left)
    right_keys, right_values = brute_force.double(*right)
    nothing = (np.zeros_like(left[1]), np.zeros_like(right[1]))
    for radius in RADII:
        kernel = np.exp(radius * (keys @ right_keys.T - 1))
        denominator = GRAM(left[0], nothing[0], right[0], nothing[1], radius, key_weight=0.0)
        both = GRAM(*left, *right, radius, key_weight=0.0)
        for gram, expected in (
            (2 * np.asarray(denominator), kernel),
            (2 * (np.asarray(both) - denominator), kernel * (values @ right_values.T)),
        ):
            tolerance = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(gram, expected, rtol=1e-5, atol=tolerance)


def test_simultaneous_gram_is_brute_force(left, right):
    for radius, key_weight in itertools.product(RADII, KEY_WEIGHTS):
        gram = GRAM(*left, *right, radius, key_weight=key_weight)
        expected = brute_force.gram(*left, radius, *right, key_weight=key_weight)
        np.testing.assert_allclose(gram, expected, rtol=1e-5, atol=1e-6)


def tensor_powers(keys, degrees):
    """All products of ``degree`` coordinates, for each degree."""
    power = np.ones((len(keys), 1))
    for _ in range(degrees):
        yield power
        power = np.einsum("np,nd->npd", power, keys).reshape(len(keys), -1)


def test_gram_is_that_of_weighted_tensor_powers(left, right):
    def features(keys, values, radius):
        keys, values = brute_force.double(keys, values)
        # The value of the denominator is one; together they have norm at most one.
        values = np.concatenate([values, np.ones((len(values), 1))], axis=1) / math.sqrt(2)
        weighted = [
            math.sqrt(math.exp(-radius) * radius**degree / math.factorial(degree))
            * np.einsum("np,nv->npv", power, values).reshape(len(keys), -1)
            for degree, power in enumerate(tensor_powers(keys, 10))
        ]
        return np.concatenate(weighted, axis=1)

    for radius in (0.1, 1.0, 2.0):
        ours = features(*left, radius)
        expected = ours @ features(*right, radius).T
        gram = GRAM(*left, *right, radius, key_weight=0.0)
        # The Poisson weights beyond the tenth degree: 5e-5 at radius 2.
        tail = 1 - math.exp(-radius) * sum(radius**j / math.factorial(j) for j in range(10))
        np.testing.assert_allclose(gram, expected, rtol=0, atol=tail + 1e-6)
        assert np.all(np.linalg.norm(ours, axis=1) <= 1)


def test_simultaneous_gram_is_semidefinite_with_diagonal_at_most_one(right):
    keys, values = (array[:LEFT] for array in right)
    directions = np.eye(LEFT, WIDTH, dtype=np.float32), np.eye(LEFT, VALUE_WIDTH, dtype=np.float32)
    for radius, key_weight in itertools.product(RADII, KEY_WEIGHTS):
        gram = np.asarray(GRAM(keys, values, keys, values, radius, key_weight=key_weight))
        np.testing.assert_allclose(gram, gram.T, rtol=1e-6, atol=1e-7)
        assert np.linalg.eigvalsh(gram.astype(np.float64)).min() > -1e-6
        assert np.all(np.diagonal(gram) <= 1 + 1e-6)
        # Pairs whose key and value both have norm one.
        longest = np.diagonal(GRAM(*directions, *directions, radius, key_weight=key_weight))
        np.testing.assert_allclose(longest[:VALUE_WIDTH], 1, rtol=1e-6)


def test_double_precision(left, right, x64):
    sides = (*brute_force.double(*left), *brute_force.double(*right))
    gram = GRAM(*sides, 2.0, key_weight=1.0)
    expected = brute_force.gram(*left, 2.0, *right, key_weight=1.0)
    np.testing.assert_allclose(gram, expected, rtol=1e-13)
