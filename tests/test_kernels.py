"""Gram blocks against float64 brute force and against the features that they stand for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import kernels, walks
from coreset_jax.guarantees import candidates
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


@pytest.mark.parametrize("radius", RADII)
def test_kernel_is_brute_force(left, right, radius):
    keys, right_keys = brute_force.double(left[0], right[0])
    expected = np.exp(radius * (keys @ right_keys.T - 1))
    kernel = kernels.exponential_kernel(left[0], right[0], radius)
    np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-5 * expected.max())


@pytest.mark.parametrize("radius", RADII)
def test_without_values_the_denominator_is_left_and_the_values_add_the_numerator(
    left, right, radius
):
    keys, values = brute_force.double(*left)
    right_keys, right_values = brute_force.double(*right)
    kernel = np.exp(radius * (keys @ right_keys.T - 1))
    nothing = (np.zeros_like(left[1]), np.zeros_like(right[1]))
    denominator = kernels.simultaneous_gram(
        left[0], nothing[0], right[0], nothing[1], radius, key_weight=0.0
    )
    both = kernels.simultaneous_gram(*left, *right, radius, key_weight=0.0)
    for gram, expected in (
        (2 * denominator, kernel),
        (2 * (both - denominator), kernel * (values @ right_values.T)),
    ):
        np.testing.assert_allclose(gram, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("key_weight", KEY_WEIGHTS)
@pytest.mark.parametrize("radius", RADII)
def test_simultaneous_gram_is_brute_force(left, right, radius, key_weight):
    gram = kernels.simultaneous_gram(*left, *right, radius, key_weight=key_weight)
    expected = brute_force.gram(*left, radius, *right, key_weight=key_weight)
    np.testing.assert_allclose(gram, expected, rtol=1e-5, atol=1e-6)


def tensor_powers(keys, degrees):
    """All products of ``degree`` coordinates, for each degree."""
    power = np.ones((len(keys), 1))
    for _ in range(degrees):
        yield power
        power = np.einsum("np,nd->npd", power, keys).reshape(len(keys), -1)


@pytest.mark.parametrize("radius", [0.1, 1.0, 2.0])
def test_gram_is_that_of_weighted_tensor_powers(left, right, radius):
    def features(keys, values):
        keys, values = brute_force.double(keys, values)
        # The value of the denominator is one; together they have norm at most one.
        values = np.concatenate([values, np.ones((len(values), 1))], axis=1) / math.sqrt(2)
        weighted = [
            math.sqrt(math.exp(-radius) * radius**degree / math.factorial(degree))
            * np.einsum("np,nv->npv", power, values).reshape(len(keys), -1)
            for degree, power in enumerate(tensor_powers(keys, 10))
        ]
        return np.concatenate(weighted, axis=1)

    expected = features(*left) @ features(*right).T
    gram = kernels.simultaneous_gram(*left, *right, radius, key_weight=0.0)
    # The Poisson weights beyond the tenth degree: 5e-5 at radius 2.
    tail = 1 - math.exp(-radius) * sum(radius**j / math.factorial(j) for j in range(10))
    np.testing.assert_allclose(gram, expected, rtol=0, atol=tail + 1e-6)
    norms = np.linalg.norm(features(*left), axis=1)
    assert np.all(norms <= 1)


@pytest.mark.parametrize("key_weight", KEY_WEIGHTS)
@pytest.mark.parametrize("radius", RADII)
def test_simultaneous_gram_is_semidefinite_with_diagonal_at_most_one(right, radius, key_weight):
    gram = np.asarray(kernels.simultaneous_gram(*right, *right, radius, key_weight=key_weight))
    np.testing.assert_allclose(gram, gram.T, rtol=1e-6, atol=1e-7)
    assert np.linalg.eigvalsh(gram.astype(np.float64)).min() > -1e-6
    assert np.all(np.diagonal(gram) <= 1 + 1e-6)


@pytest.mark.parametrize("key_weight", KEY_WEIGHTS)
def test_longest_pairs_have_norm_one(key_weight):
    directions = np.eye(3, dtype=np.float32)
    gram = kernels.simultaneous_gram(
        directions, directions, directions, directions, 3.0, key_weight=key_weight
    )
    np.testing.assert_allclose(np.diagonal(gram), 1, rtol=1e-6)


def test_double_precision(left, right, x64):
    sides = (*brute_force.double(*left), *brute_force.double(*right))
    gram = kernels.simultaneous_gram(*sides, 2.0, key_weight=1.0)
    expected = brute_force.gram(*left, 2.0, *right, key_weight=1.0)
    np.testing.assert_allclose(gram, expected, rtol=1e-13)


@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("ridge", [1e-12, 1e-4, 2.0])
def test_regularized_inverse_of_singular_matrices(rank, ridge):
    """Of (G + lambda I) for some lambda from the ridge on: never NaN, whatever repeats."""
    rows = np.random.default_rng(rank).standard_normal((rank, 40))
    rows = np.repeat(rows, -(-200 // rank), axis=0)[:200]
    gram = rows @ rows.T / 40
    inverse = np.asarray(kernels.regularized_inverse(jnp.asarray(gram, jnp.float32), ridge))
    assert np.all(np.isfinite(inverse))
    # On the complement of the rows the inverse is 1 / lambda.
    complement = np.linalg.svd(rows)[0][:, rank:]
    smallest = np.diagonal(complement.T @ inverse @ complement).mean() * np.mean(np.diagonal(gram))
    assert 1 / smallest > 0.5 * ridge


def test_regularized_inverse_says_what_it_cannot_do():
    assert np.all(np.isnan(kernels.regularized_inverse(jnp.zeros((3, 3)), 1e-4)))
    assert np.any(np.isnan(kernels.regularized_inverse(jnp.full((3, 3), jnp.nan), 1e-4)))


@pytest.mark.parametrize("name", ["solve", "walk", "singular vectors"])
def test_lapack_takes_no_batches(name):
    """Batches of two independent calls would wait for each other for ever on two cores."""
    width, rng = 6, jax.random.key(0)

    def singular(matrix):
        return kernels.one_by_one(candidates._right_singular_vectors)(matrix)

    calls = {
        "solve": lambda gram: kernels.regularized_solve(gram, gram, 1e-3),
        "walk": lambda gram: walks.gram_schmidt(rng, gram, gram[0], jnp.int32(width)),
        "singular vectors": singular,
    }
    batch = jnp.zeros((5, width, width))
    text = jax.jit(jax.vmap(calls[name])).lower(batch).compile().as_text()
    found = [line for line in text.splitlines() if 'custom_call_target="lapack_' in line]
    assert found
    for line in found:
        assert "[5," not in line
