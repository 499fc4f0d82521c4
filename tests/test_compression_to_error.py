"""Compression by the default, and to a certified error: never more, and never twice the pairs.

Nearly all of the time goes into compilation, so that tests share shapes: sizes 48 and 24.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import attend, balancing, compression, fitting
from coreset_jax.baselines import uniform
from coreset_jax.guarantees import Certificate, certificate
from tests import brute_force

RNG = jax.random.key(0)
COUNT, WIDTH = 96, 4
LENGTHS = np.array([COUNT, COUNT - 8])


@pytest.fixture(scope="module")
def heads():
    """Two heads on the unit sphere, the second with a little padding that holds NaN."""
    pairs = jax.random.normal(jax.random.key(1), (2, 2, COUNT, WIDTH))
    pairs = pairs / jnp.linalg.norm(pairs, axis=-1, keepdims=True)
    return tuple(pairs.at[:, 1, LENGTHS[1] :].set(jnp.nan))


compress_to_error = functools.partial(compression.compress_to_error, RNG, rho=1.0, lengths=LENGTHS)


def certified(compressor, heads, size):
    coreset = compressor(RNG, *heads, size=size, lengths=LENGTHS)
    return compression.Certified(coreset, certificate(*heads, coreset, rho=1.0, lengths=LENGTHS))


def worst(result):
    return float(jnp.max(result.certificate.error))


@pytest.mark.slow
def test_certified_and_half_of_it_is_not(heads):
    compressor = uniform()
    whole, half = (certified(compressor, heads, size) for size in (48, 24))
    assert worst(whole) < worst(half)
    for eps in (worst(whole), (worst(whole) + worst(half)) / 2):
        found = compress_to_error(*heads, eps=eps, compressor=compressor)
        # The certificate is that of the coreset, and the coreset that of its size.
        chex.assert_trees_all_equal(found, whole)
        assert worst(found) <= eps
    assert np.all(np.max(found.coreset.indices, axis=-1) < LENGTHS)


@pytest.mark.slow
def test_a_scale_is_carried_by_coresets_of_methods_that_know_of_none(heads):
    found = compress_to_error(*heads, eps=100.0, compressor=uniform(), scale=0.3)
    np.testing.assert_allclose(found.coreset.scale, [0.3, 0.3], rtol=1e-6)
    queries = np.random.default_rng(0).standard_normal((2, 5, WIDTH)).astype(np.float32)
    expected = brute_force.attention(queries, *found.coreset[:3], scale=0.3)
    np.testing.assert_allclose(attend(queries, found.coreset), expected, rtol=1e-5, atol=1e-5)
    promise = certificate(*heads, found.coreset, rho=1.0, lengths=LENGTHS)
    np.testing.assert_allclose(promise.error, found.certificate.error, rtol=1e-5)


def test_another_scale_than_the_compressors_is_refused(heads):
    with pytest.raises(ValueError, match=r"must have one softmax scale, got 0\.5 and 0\.3"):
        compress_to_error(*heads, eps=1.0, scale=0.3, compressor=balancing.balanced(scale=0.5))


@pytest.mark.slow
def test_out_of_reach_says_what_is_in_reach(heads):
    half = certified(balancing.balanced(rho=1.0), heads, 48)
    # Of the default method, and of any other.
    for compressor, expected in ((None, half), (uniform(), certified(uniform(), heads, 48))):
        with pytest.raises(compression.OutOfReachError, match="out of reach: 48 pairs") as refused:
            compress_to_error(*heads, eps=1e-5, compressor=compressor)
        assert refused.value.smallest == worst(expected)
    assert worst(half) < worst(expected)


def test_large_radii_are_out_of_reach_and_not_certified(heads):
    with pytest.raises(compression.OutOfReachError) as refused:
        compress_to_error(*heads, eps=0.1, rho=60.0, compressor=uniform())
    assert refused.value.smallest > 0.1


def test_search_ends_where_the_next_half_fails():
    """Wherever it begins, and though errors need not grow all the way."""
    halves, errors = [32, 16, 8, 4, 2, 1], [0.5, 1.5, 3.0, 2.0, 5.0, 20.0]

    def attempt(size):
        error = jnp.array(errors[halves.index(size)])
        promise = Certificate(*[error] * len(Certificate._fields))
        return compression.Certified(size, promise)

    for level in range(6):
        for eps in (1.0, 2.5, 4.0, 9.0):
            result = compression._search(attempt, halves, level, eps)
            place = halves.index(result.coreset)
            assert errors[place] <= eps < errors[place + 1]


def test_bad_arguments_are_refused(heads):
    keys, values = heads
    for eps, message in ((0.0, "eps must be positive"), (None, "eps must be a number")):
        with pytest.raises(ValueError, match=message):
            compress_to_error(*heads, eps=eps)
    with pytest.raises(ValueError, match="give one of them"):
        compress_to_error(*heads, eps=0.1, query_norm=1.0)
    with pytest.raises(ValueError, match="must be finite to be"):
        compress_to_error(keys.at[0, 3, 1].set(jnp.nan), values, eps=0.1, compressor=uniform())
    method = functools.partial(compression.compress_to_error, RNG, eps=0.1)
    for traced in (lambda x: method(x * keys, values), lambda x: method(*heads, rho=x)):
        with pytest.raises(ValueError, match="cannot be traced"):
            jax.jit(traced)(1.0)


def test_compress_is_the_default_method():
    """As programs, with all they are given: what comes of them is tested with the method."""
    keys, values, queries = (jnp.zeros((2, 40, WIDTH)) for _ in range(3))
    for radius in ({"rho": 2.0}, {"query_norm": 3.0}, {}):
        options = {**radius, "scale": 0.5}
        ours, default = (
            jax.make_jaxpr(functools.partial(method, size=8, lengths=np.array([40, 30])))
            for method in (
                functools.partial(compression.compress, **options),
                fitting.fitted(**options),
            )
        )
        pairs = RNG, keys, values
        assert str(ours(*pairs, queries=queries)) == str(default(*pairs, queries=queries))
