"""Compression to a certified error: never more than asked for, and never twice the pairs needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import certified
from coreset_jax.guarantees import adversary, certificate

RNG = jax.random.key(0)
COUNT, WIDTH = 600, 8


@pytest.fixture(scope="module")
def heads():
    pairs = jax.random.normal(jax.random.key(1), (2, 2, COUNT, WIDTH))
    return tuple(pairs / jnp.linalg.norm(pairs, axis=-1, keepdims=True))


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.08])
def test_certified_and_half_of_it_is_not(heads, eps):
    coreset, promise = cj.compress(RNG, *heads, eps=eps, rho=1.0)
    size = coreset.indices.shape[-1]
    assert size in [-(-COUNT // 2**level) for level in range(1, 10)]
    assert float(jnp.max(promise.error)) <= eps
    # The certificate is that of the coreset, and the coreset that of its size.
    again = cj.balanced(rho=1.0)(RNG, *heads, size=size)
    np.testing.assert_array_equal(again.indices, coreset.indices)
    np.testing.assert_array_equal(certificate(*heads, again, rho=1.0).error, promise.error)
    found = adversary(RNG, *heads, coreset, rho=1.0, starts=8, steps=10)
    assert np.all(found.error <= promise.error)
    half = cj.balanced(rho=1.0)(RNG, *heads, size=-(-size // 2))
    assert float(jnp.max(certificate(*heads, half, rho=1.0).error)) > eps


@pytest.mark.slow
def test_out_of_reach_says_what_is_in_reach(heads):
    with pytest.raises(cj.OutOfReachError, match="out of reach") as refused:
        cj.compress(RNG, *heads, eps=1e-5, rho=1.0)
    smallest = refused.value.smallest
    half = cj.balanced(rho=1.0)(RNG, *heads, size=COUNT // 2)
    assert smallest == float(jnp.max(certificate(*heads, half, rho=1.0).error))
    coreset, promise = cj.compress(RNG, *heads, eps=smallest, rho=1.0)
    assert coreset.indices.shape[-1] == COUNT // 2
    assert float(jnp.max(promise.error)) == smallest


@pytest.mark.slow
def test_large_radii_are_out_of_reach_and_not_certified(heads):
    with pytest.raises(cj.OutOfReachError) as refused:
        cj.compress(RNG, *heads, eps=0.1, rho=60.0)
    assert refused.value.smallest > 0.1


@pytest.mark.slow
def test_lengths_and_refits(heads):
    lengths = np.array([COUNT - 100, 90])
    padded = [array.at[:, COUNT - 100 :].set(jnp.nan) for array in heads]
    compressor = cj.refit.nystrom(cj.balanced(rho=1.0), rho=1.0)
    coreset, promise = cj.compress(
        RNG, *padded, eps=0.05, rho=1.0, lengths=lengths, compressor=compressor
    )
    assert np.all(np.max(np.asarray(coreset.indices), axis=-1) < lengths)
    assert float(jnp.max(promise.error)) <= 0.05
    subset, _ = cj.compress(RNG, *padded, eps=0.05, rho=1.0, lengths=lengths)
    assert coreset.indices.shape[-1] < subset.indices.shape[-1] <= (COUNT - 100) // 2


@pytest.mark.parametrize("level", range(6))
@pytest.mark.parametrize("eps", [1.0, 2.5, 4.0, 9.0])
def test_search_ends_where_the_next_half_fails(level, eps):
    """Wherever it begins, and though errors need not grow all the way."""
    halves, errors = [32, 16, 8, 4, 2, 1], [0.5, 1.5, 3.0, 2.0, 5.0, 20.0]

    def attempt(size):
        error = jnp.array(errors[halves.index(size)])
        return certified.Certified(size, jax.tree.map(lambda _: error, PROMISE))

    result = certified._search(attempt, halves, level, eps)
    place = halves.index(result.coreset)
    assert errors[place] <= eps < errors[place + 1]


PROMISE = cj.guarantees.Certificate(*[0.0] * len(cj.guarantees.Certificate._fields))


def test_bad_arguments_are_refused(heads):
    with pytest.raises(ValueError, match="or eps, and not both"):
        cj.compress(RNG, *heads)
    with pytest.raises(ValueError, match="or eps, and not both"):
        cj.compress(RNG, *heads, size=8, eps=0.1)
    with pytest.raises(ValueError, match="eps must be positive"):
        cj.compress(RNG, *heads, eps=0.0)
    with pytest.raises(ValueError, match="must be finite to be"):
        cj.compress(RNG, heads[0].at[0, 3, 1].set(jnp.nan), heads[1], eps=0.1)
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.jit(lambda keys: cj.compress(RNG, keys, heads[1], eps=0.1))(heads[0])
