"""The better of two methods, head by head, as samples that neither has seen tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import baselines, better_of
from tests.brute_force import attention

HEADS, COUNT, SIZE, WIDTH, SAMPLES = 4, 48, 8, 6, 24
RNG = jax.random.key(0)
# Of the samples, those that are held back.
JUDGES = slice(4, None, 8)


@pytest.fixture(scope="module")
def cache():
    """Heads of smooth attention, and of sharp attention, by turns."""
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, HEADS, COUNT, WIDTH))
    queries = rng.standard_normal((HEADS, SAMPLES, WIDTH))
    queries *= np.array([0.1, 20.0, 0.1, 20.0])[:, None, None]
    return tuple(jnp.asarray(array, jnp.float32) for array in (keys, values, queries))


def error(cache, coreset):
    keys, values, queries = cache
    judges = queries[:, JUDGES]
    wrong = attention(judges, keys, values) - attention(judges, *coreset[:3])
    return np.square(wrong).sum(axis=(-2, -1))


def test_every_head_has_the_better_one(cache):
    keys, values, queries = cache
    known = {"size": SIZE, "queries": np.delete(queries, np.r_[:SAMPLES][JUDGES], axis=1)}
    one, other = baselines.kmeans(), baselines.top_attention()
    found = better_of(one, other)(RNG, keys, values, size=SIZE, queries=queries)
    parts = [each(RNG, keys, values, **known) for each in (one, other)]
    errors = np.stack([error(cache, part) for part in parts])
    better = np.argmin(errors, axis=0)
    assert set(better) == {0, 1}  # or there would be nothing to choose
    for head, choice in enumerate(better):
        for had, wanted in zip(found[:4], parts[choice][:4], strict=True):
            np.testing.assert_array_equal(had[head], wanted[head])
    np.testing.assert_allclose(error(cache, found), errors.min(axis=0), rtol=1e-4)


def test_the_first_wins_where_both_are_equal(cache):
    keys, values, queries = cache
    twice = better_of(baselines.uniform(), baselines.uniform())
    found = twice(RNG, keys, values, size=SIZE, queries=queries)
    plain = baselines.uniform()(RNG, keys, values, size=SIZE)
    np.testing.assert_array_equal(found.indices, plain.indices)


def test_a_head_that_is_not_finite_stays_one(cache):
    keys, values, queries = cache
    method = better_of(baselines.uniform(), baselines.top_attention())
    found = method(RNG, keys.at[1, 3, 2].set(jnp.nan), values, size=SIZE, queries=queries)
    sick = np.isnan(cj.attend(queries, found)).any(axis=(-2, -1))
    np.testing.assert_array_equal(sick, [False, True, False, False])


def test_wrong_use_is_refused(cache):
    keys, values, queries = cache
    method = better_of(baselines.uniform(), baselines.top_attention())
    with pytest.raises(ValueError, match="queries"):
        method(RNG, keys, values, size=SIZE)
    with pytest.raises(ValueError, match="at least two"):
        method(RNG, keys, values, size=SIZE, queries=queries[:, :1])
    with pytest.raises(ValueError, match="other must be"):
        better_of(baselines.uniform(), "uniform")
    with pytest.raises(ValueError, match="signed"):
        better_of(baselines.uniform(), baselines.wildcat())
