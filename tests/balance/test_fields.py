"""Fields: the pull of a discrepancy, exactly or as landmarks see it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax._src.balance import fields
from coreset_jax._src.balance.fields import ExactField, LandmarkField, UnitPairs
from tests import brute_force

COUNT, WIDTH, VALUE_WIDTH, RADIUS, RIDGE = 30, 5, 3, 1.5, 1e-2
LANDMARKS = np.array([0, 3, 3, 11, 20, 29])
SOME = np.arange(4, 17)


@pytest.fixture(scope="module")
def cache():
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal((COUNT, width)) for width in (WIDTH, VALUE_WIDTH))
    keys, values = brute_force.unit_problem(keys, values)
    return UnitPairs(np.float32(keys), np.float32(values), np.arange(COUNT, dtype=np.int32))


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
def maker(request):
    return MAKERS[request.param]


def assert_close(actual, desired, tolerance=1e-5):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * np.abs(desired).max())


def test_gram_is_brute_force(maker, cache):
    pairs = some(cache, SOME)
    gram = jax.jit(lambda radius: maker(cache, radius=radius).gram(pairs))
    for radius in (0.1, 1.5, 8.0):
        assert_close(gram(radius), brute_force.gram(pairs.keys, pairs.values, radius))


def test_exact_reads_are_brute_force(cache, signs, monkeypatch):
    def read(signs):
        return exact(cache).add(cache, signs).read(some(cache, SOME))

    expected = (brute_force.gram(*cache[:2], RADIUS) @ np.float64(signs))[SOME]
    # Blocks that divide the cache, one that does not, and one for all of it.
    for block in (7, 15, 4096):
        monkeypatch.setattr(fields, "_READ_BLOCK", block)
        assert_close(jax.jit(lambda signs: read(signs))(signs), expected)


def test_landmark_reads_are_brute_force(cache, signs):
    keys, values = brute_force.double(*cache[:2])
    columns = np.concatenate([values, np.ones((COUNT, 1))], axis=1)
    kernel = np.exp(RADIUS * (keys @ keys[LANDMARKS].T - 1))
    among = kernel[LANDMARKS]
    moments = kernel.T @ (signs[:, None] * columns)
    ridge = RIDGE * np.mean(np.diagonal(among))
    pulls = kernel @ np.linalg.solve(among + ridge * np.eye(len(among)), moments)

    @jax.jit
    def read(signs):
        field = at_landmarks(cache).add(cache, signs)
        return field.moments.T, field.read(cache)

    found = read(signs)
    assert_close(found[0], moments)
    assert_close(found[1], np.sum(columns * pulls, axis=1) / 2)


def test_with_every_key_a_landmark_the_field_is_exact(cache, signs, x64):
    everywhere = np.arange(COUNT)

    @functools.partial(jax.jit, static_argnames="ridge")
    def both(cache, *, ridge):
        near = at_landmarks(cache, everywhere, ridge=ridge).add(cache, signs).read(cache)
        return near, exact(cache).add(cache, signs).read(cache)

    wide = UnitPairs(*brute_force.double(*cache[:2]), cache.indices)
    assert_close(*both(wide, ridge=1e-9), 1e-6)
    # In float32 as well as rounding lets it.
    assert_close(*both(cache, ridge=1e-4), 1e-2)


def test_repeated_landmarks_are_harmless(cache, signs):
    places = np.resize(LANDMARKS, 4 * len(LANDMARKS))

    @jax.jit
    def reads(signs):
        few = at_landmarks(cache, np.unique(places))
        many = at_landmarks(cache, places, ridge=1e-3)
        return [field.add(cache, signs).read(cache) for field in (many, few)]

    assert_close(*reads(signs), 2e-2)


def test_fields_add_up_and_halve(maker, cache, signs):
    parts = np.array_split(np.arange(COUNT), 4)

    @jax.jit
    def build(signs):
        empty = maker(cache)
        field, one_by_one = empty.add(cache, signs), empty
        for places in parts:
            one_by_one = one_by_one.add(some(cache, places), signs[places])
        pulls = {
            "nothing": empty.read(cache),
            "all": field.read(cache),
            "half": field.halve().read(cache),
        }
        return {
            "empty": empty,
            "still empty": empty.add(cache, 0 * signs),
            "together": field,
            "one by one": one_by_one,
            "taken back": field.add(some(cache, parts[0]), -signs[parts[0]]),
            "the rest": empty.add(some(cache, np.arange(8, COUNT)), signs[8:]),
        }, pulls

    found, pulls = build(signs)
    chex.assert_trees_all_equal(found["still empty"], found["empty"])
    for ours, expected in (("one by one", "together"), ("taken back", "the rest")):
        chex.assert_trees_all_close(found[ours], found[expected], rtol=1e-5, atol=1e-5)
    assert not np.any(pulls["nothing"])
    assert np.all(pulls["all"] != 0)
    np.testing.assert_allclose(pulls["half"], pulls["all"] / 2, rtol=1e-6)


def test_fields_are_pytrees_for_loops(maker, cache, signs):
    arrays = UnitPairs(*map(jnp.asarray, cache))

    @jax.jit
    def scan(signs):
        def step(field, part):
            places, signs = part
            return field.add(some(arrays, places), signs), field.read(some(arrays, places))

        parts = (np.arange(COUNT).reshape(5, -1), signs.reshape(5, -1))
        empty = maker(arrays)
        before = empty.add(some(cache, np.arange(24)), signs[:24])
        expected = empty.add(cache, signs), before.read(some(cache, np.arange(24, COUNT)))
        return jax.lax.scan(step, empty, parts), expected

    (field, pulls), expected = scan(signs)
    chex.assert_trees_all_close(field, expected[0], rtol=1e-5, atol=1e-5)
    # What a part feels is what came before it.
    assert not np.any(pulls[0])
    assert_close(pulls[4], expected[1])
