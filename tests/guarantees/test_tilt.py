"""Balls of queries about a mean query: the same problem with other weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax._src.core.coreset import gather
from coreset_jax.guarantees import adversary, certificate
from coreset_jax.guarantees.tilt import tilted
from tests import brute_force
from tests.guarantees.padded import HEADS, padded_heads

COUNT, WIDTH = 60, 6
LENGTHS = np.full(HEADS, COUNT, np.int32)


def instance(seed):
    """Pairs off the origin, some of them kept with uneven weights, and mean queries."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(0.5, 1.0, (*HEADS, COUNT, WIDTH))
    values = rng.normal(-2.0, 1.0, (*HEADS, COUNT, 4))
    rows = np.sort(np.argsort(rng.random((*HEADS, COUNT)), axis=-1)[..., :20], axis=-1)
    weights = rng.choice([1.0, 2.0, 4.0], (*HEADS, 20))
    keys, values, coreset = padded_heads(keys, values, rows, weights, count=COUNT + 4, slots=24)
    return keys, values, coreset, jnp.asarray(rng.normal(size=(*HEADS, WIDTH)), jnp.float32)


def bound(keys, values, coreset, center, rho=1.0):
    known = {"rho": rho, "scale": 1.0, "lengths": LENGTHS}
    return certificate(keys, values, coreset, query_center=center, block_size=128, **known)


@pytest.mark.slow
def test_queries_about_a_mean_see_weighted_pairs():
    keys, values, coreset, center = instance(0)
    masked = (jnp.where(jnp.isfinite(each), each, 0) for each in (keys, values))
    known = {"queries": None, "scale": 1.0, "lengths": LENGTHS, "rho": 1.0}
    seen = tilted(*masked, coreset, center, **known)
    offsets = np.random.default_rng(1).normal(size=(*HEADS, 5, WIDTH))
    queries = offsets + np.asarray(center)[..., None, :]
    plain = brute_force.attention(queries, keys[..., :COUNT, :], values[..., :COUNT, :], scale=1.0)
    source, kept = seen.source, seen.coreset
    found = brute_force.attention(offsets, *source[:3], scale=1.0)
    np.testing.assert_allclose(found, plain, atol=1e-5)
    plain = brute_force.attention(queries, *coreset[:3], scale=1.0)
    np.testing.assert_allclose(
        brute_force.attention(offsets, *kept[:3], scale=1.0), plain, atol=1e-5
    )
    shares = np.exp(np.asarray(source.log_weights, np.float64))
    shares /= shares.sum(axis=-1, keepdims=True)
    mean = np.sum(shares[..., None] * np.asarray(source.keys, np.float64), axis=-2)
    np.testing.assert_allclose(seen.standardization.key_center, mean, atol=1e-5)


@pytest.mark.slow
def test_a_mean_of_zero_promises_the_same():
    keys, values, coreset, center = instance(1)
    plain = certificate(keys, values, coreset, rho=1.0, scale=1.0, lengths=LENGTHS, block_size=128)
    about = bound(keys, values, coreset, 0 * center)
    np.testing.assert_allclose(about.error, plain.error, rtol=1e-3)


@pytest.mark.slow
def test_a_mean_that_is_not_finite_has_no_promise():
    keys, values, coreset, center = instance(2)
    broken = bound(keys, values, coreset, center.at[0, 1, 2].set(jnp.nan)).error
    np.testing.assert_array_equal(jnp.isnan(broken), [[False, True, False], [False] * 3])


def test_samples_count_from_their_mean():
    keys, values, coreset, center = instance(3)
    offsets = jax.random.normal(jax.random.key(0), (*HEADS, 7, WIDTH))
    samples = offsets + 50 * center[..., None, :]
    known = {"queries": None, "scale": 0.5, "lengths": LENGTHS}
    seen = tilted(keys, values, coreset, 50 * center, **(known | {"queries": samples}))
    largest = jnp.max(jnp.linalg.norm(offsets, axis=-1), axis=-1)
    np.testing.assert_allclose(seen.standardization.query_norm, largest, rtol=1e-4)


@pytest.mark.parametrize("function", [certificate, lambda *a, **k: adversary(None, *a, **k)])
def test_a_mean_of_another_shape_is_refused(function):
    keys, values, coreset, center = instance(4)
    for wrong in (center[..., :-1], center[None], center[:, :2]):
        with pytest.raises(ValueError, match=r"query_center .*\(2, 3, 64, 6\)"):
            function(keys, values, coreset, query_center=wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("rho", "factor"), [(1.0, 3.0), (2.0, 7.0), (3.0, 15.0)])
def test_what_is_promised_is_near_to_what_is_found(rho, factor):
    heads, count, size, width = 16, 1024, 256, 16
    keys, values = jax.random.normal(jax.random.key(0), (2, heads, count, width))
    keys, values = (each / jnp.linalg.norm(each, axis=-1, keepdims=True) for each in (keys, values))
    rows = jnp.broadcast_to(jnp.arange(size) * (count // size), (heads, size))
    drawn = gather(keys, values, rows, jnp.zeros((heads, size)))
    chosen = cj.balanced(rho=rho, scale=1.0)(jax.random.key(1), keys, values, size=size)
    center = jax.random.normal(jax.random.key(2), (heads, width))
    for length in (1.0, 4.0, 12.0):
        mean = length * center / jnp.linalg.norm(center, axis=-1, keepdims=True)
        known = {"rho": rho, "scale": 1.0, "query_center": mean}
        for coreset in (drawn, chosen):
            found = adversary(jax.random.key(3), keys, values, coreset, **known)
            promised = certificate(keys, values, coreset, **known)
            assert np.all(found.error <= promised.error)
            assert np.all(promised.error <= factor * found.error)
            # And the query is one of the ball, and answered as badly as that.
            distances = jnp.linalg.norm(found.query - mean, axis=-1)
            radius = jnp.max(jnp.linalg.norm(keys - jnp.mean(keys, -2, keepdims=True), axis=-1), -1)
            assert np.all(distances <= 1.5 * rho / radius)
            query = found.query[:, None]
            exact, read = (
                brute_force.attention(query, *each, scale=1.0)
                for each in ((keys, values), coreset[:3])
            )
            error = np.linalg.norm(exact - read, axis=-1)[:, 0]
            np.testing.assert_allclose(found.error, error, rtol=1e-3)
