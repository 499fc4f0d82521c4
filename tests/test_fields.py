"""Fields: the pull of a discrepancy, exactly or as landmarks see it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import fields
from coreset_jax.fields import ExactField, LandmarkField, UnitPairs
from tests import brute_force

COUNT, WIDTH, VALUE_WIDTH, RADIUS, RIDGE = 30, 5, 3, 1.5, 1e-2
LANDMARKS = np.array([0, 3, 3, 11, 20, 29])


@pytest.fixture(scope="module")
def cache():
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal((COUNT, width)) for width in (WIDTH, VALUE_WIDTH))
    keys, values = brute_force.unit_problem(keys, values)
    return UnitPairs(jnp.float32(keys), jnp.float32(values), jnp.arange(COUNT))


@pytest.fixture(scope="module")
def signs():
    signs = np.random.default_rng(1).choice([-1.0, 1.0], COUNT)
    signs[-3:] = 0
    return signs.astype(np.float32)


def some(cache, places):
    return UnitPairs(*(array[places] for array in cache))


def exact(cache, radius=RADIUS):
    return ExactField.empty(cache, jnp.asarray(radius, cache.keys.dtype))


def at_landmarks(cache, places=LANDMARKS, radius=RADIUS, ridge=RIDGE):
    radius = jnp.asarray(radius, cache.keys.dtype)
    return LandmarkField.empty(cache.keys[places], radius, VALUE_WIDTH, ridge=ridge)


MAKERS = {"exact": exact, "landmarks": at_landmarks}


@pytest.fixture(params=MAKERS)
def empty(request, cache):
    return MAKERS[request.param](cache)


def assert_close(actual, desired, tolerance=1e-5):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * np.abs(desired).max())


@pytest.mark.parametrize("radius", [0.1, 1.5, 8.0])
@pytest.mark.parametrize("name", MAKERS)
def test_gram_is_brute_force(cache, name, radius):
    gram = MAKERS[name](cache, radius=radius).gram(some(cache, np.arange(4, 17)))
    keys, values = (array[4:17] for array in cache[:2])
    assert_close(gram, brute_force.gram(keys, values, radius))


@pytest.mark.parametrize("read_block", [1, 7, 15, 4096])
def test_exact_reads_are_brute_force(cache, signs, read_block, monkeypatch):
    monkeypatch.setattr(fields, "_READ_BLOCK", read_block)
    field = exact(cache).add(cache, signs)
    assert_close(
        field.read(some(cache, np.arange(4, 17))),
        (brute_force.gram(*cache[:2], RADIUS) @ np.float64(signs))[4:17],
    )


def test_landmark_reads_are_brute_force(cache, signs):
    keys, values = brute_force.double(*cache[:2])
    columns = np.concatenate([values, np.ones((COUNT, 1))], axis=1)
    kernel = np.exp(RADIUS * (keys @ keys[LANDMARKS].T - 1))
    among = kernel[LANDMARKS]
    moments = kernel.T @ (signs[:, None] * columns)
    ridge = RIDGE * np.mean(np.diagonal(among))
    pulls = kernel @ np.linalg.solve(among + ridge * np.eye(len(among)), moments)
    field = at_landmarks(cache).add(cache, signs)
    assert_close(field.moments.T, moments)
    assert_close(field.read(cache), np.sum(columns * pulls, axis=1) / 2)


def test_with_every_key_a_landmark_the_field_is_exact(cache, signs, x64):
    cache = UnitPairs(*brute_force.double(*cache[:2]), cache.indices)
    everywhere = at_landmarks(cache, np.arange(COUNT), ridge=1e-9).add(cache, signs)
    assert_close(everywhere.read(cache), exact(cache).add(cache, signs).read(cache), 1e-6)


def test_landmarks_approximate_the_exact_field_in_float32(cache, signs):
    everywhere = at_landmarks(cache, np.arange(COUNT), ridge=1e-4).add(cache, signs)
    assert_close(everywhere.read(cache), exact(cache).add(cache, signs).read(cache), 1e-2)


def test_repeated_landmarks_are_harmless(cache, signs):
    places = np.resize(LANDMARKS, 4 * len(LANDMARKS))
    few, many = (at_landmarks(cache, np.unique(places)), at_landmarks(cache, places, ridge=1e-3))
    few, many = (field.add(cache, signs).read(cache) for field in (few, many))
    assert_close(many, few, 2e-2)


def test_nothing_pulls_on_nothing(empty, cache):
    assert not np.any(empty.read(cache))
    chex.assert_trees_all_equal(empty.add(cache, jnp.zeros(COUNT)), empty)


def test_discrepancies_add_up(empty, cache, signs):
    together = empty.add(cache, signs)
    one_by_one = empty
    for places in np.array_split(np.arange(COUNT), 4):
        one_by_one = one_by_one.add(some(cache, places), signs[places])
    chex.assert_trees_all_close(one_by_one, together, rtol=1e-5, atol=1e-5)
    taken_back = together.add(some(cache, np.arange(10)), -signs[:10])
    rest = empty.add(some(cache, np.arange(10, COUNT)), signs[10:])
    chex.assert_trees_all_close(taken_back, rest, rtol=1e-5, atol=1e-5)


def test_half_a_discrepancy_pulls_half_as_much(empty, cache, signs):
    field = empty.add(cache, signs)
    np.testing.assert_allclose(field.halve().read(cache), field.read(cache) / 2, rtol=1e-6)


def test_fields_are_pytrees_for_loops(empty, cache, signs):
    def step(field, part):
        places, signs = part
        return field.add(some(cache, places), signs), field.read(some(cache, places))

    parts = (np.arange(COUNT).reshape(5, -1), signs.reshape(5, -1))
    field, pulls = jax.lax.scan(step, empty, parts)
    chex.assert_trees_all_close(field, empty.add(cache, signs), rtol=1e-5, atol=1e-5)
    # What a part feels is what came before it.
    assert not np.any(pulls[0])
    before = empty.add(some(cache, np.arange(24)), signs[:24])
    assert_close(pulls[4], before.read(some(cache, np.arange(24, COUNT))))
