"""Refits: the best fit in the kernel, never a worse one, and far smaller worst errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import refit
from coreset_jax._src.core import driver, turns
from coreset_jax._src.geometry.kernel_geometry import balancing_geometry
from coreset_jax.geometry import standardize
from coreset_jax.guarantees import adversary

RNG = jax.random.key(0)
COUNT, SIZE, WIDTH, VALUE_WIDTH = 60, 12, 5, 4
REFITS = {"nystrom": refit.nystrom, "weights": refit.weights}


def columns(geometry, values):
    scaled = np.asarray(geometry.values(values), np.float64)
    return np.concatenate([scaled, np.ones((len(scaled), 1))], axis=1)


def exact_kernel(geometry, left, right):
    left, right = (np.asarray(geometry.keys(keys), np.float64) for keys in (left, right))
    return np.exp(float(geometry.radius) * (left @ right.T - 1))


def geometry_of(keys, values, radius):
    return balancing_geometry(standardize(keys, values, rho=2.0), jnp.float32(radius))


def energy(geometry, keys, values, coreset):
    """The squared error of a coreset in the kernel, numerator and denominator, in float64."""
    held = np.asarray(coreset.indices) >= 0
    weights = np.exp(np.asarray(coreset.log_weights, np.float64))[held]
    kept = weights[:, None] * columns(geometry, coreset.values[held])
    both = np.concatenate([kept, -columns(geometry, values)])
    places = jnp.concatenate([coreset.keys[held], keys])
    return np.sum(both * (exact_kernel(geometry, places, places) @ both))


def families(seed):
    """Heads of all sorts: plain, clustered, repeated, heavy-tailed, of low rank, of one key."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((6, COUNT, WIDTH))
    values = rng.standard_normal((6, COUNT, VALUE_WIDTH))
    keys[1] = 0.01 * keys[1] + keys[1][rng.integers(0, 4, COUNT)]
    keys[2] = keys[2][rng.integers(0, 5, COUNT)]
    keys[3] *= rng.standard_cauchy((COUNT, 1))
    keys[4] = keys[4][:, :1] * np.ones(WIDTH)
    keys[5] = 1.0
    values[5] *= 1e-3
    return jnp.asarray(keys, jnp.float32), jnp.asarray(values, jnp.float32)


def test_values_and_weights_are_the_projection():
    """With hardly a ridge, what is left of the error is orthogonal to every kept key."""
    keys, values = (array[0] for array in families(1))
    spread = cj.balanced(rho=2.0, block_size=COUNT, landmarks=None)
    compressor = refit.nystrom(spread, kernel_radius=1.5, ridge=1e-6)
    coreset = compressor(RNG, keys, values, size=5)
    geometry = geometry_of(keys, values, 1.5)
    kernel = exact_kernel(geometry, coreset.keys, coreset.keys)
    target = exact_kernel(geometry, coreset.keys, keys) @ columns(geometry, values)
    best = np.linalg.solve(kernel, target)
    assert np.all(best[:, -1] > 0.1 * COUNT / 5)
    weights = np.exp(np.asarray(coreset.log_weights, np.float64))
    np.testing.assert_allclose(weights, best[:, -1], rtol=2e-3)
    found = weights[:, None] * columns(geometry, coreset.values)
    np.testing.assert_allclose(found, best, atol=2e-3 * np.abs(best).max())


def test_weights_alone_are_the_best_weights():
    keys, values = (array[0] for array in families(1))
    compressor = refit.weights(cj.baselines.uniform(), rho=2.0, kernel_radius=1.5, ridge=1e-6)
    coreset = compressor(RNG, keys, values, size=SIZE)
    np.testing.assert_array_equal(coreset.values, values[coreset.indices])
    geometry = geometry_of(keys, values, 1.5)
    kept, every = columns(geometry, coreset.values), columns(geometry, values)
    gram = exact_kernel(geometry, coreset.keys, coreset.keys) * (kept @ kept.T)
    target = (exact_kernel(geometry, coreset.keys, keys) * (kept @ every.T)).sum(axis=1)
    best = np.maximum(np.linalg.solve(gram, target), 0.1 * COUNT / SIZE)
    np.testing.assert_allclose(np.exp(coreset.log_weights), best, rtol=5e-3)


@pytest.mark.parametrize("name", REFITS)
def test_never_worse_in_the_kernel_of_the_fit(name):
    uniform = cj.baselines.uniform()
    compressor = REFITS[name](uniform, rho=2.0, kernel_radius=1.5)
    worse = 0
    for seed in range(5):
        keys, values = families(seed)
        before = uniform(jax.random.key(seed), keys, values, size=SIZE)
        after = compressor(jax.random.key(seed), keys, values, size=SIZE)
        assert bool(jnp.all(jnp.isfinite(after.values)))
        assert bool(jnp.all(jnp.isfinite(after.log_weights)))
        np.testing.assert_array_equal(after.keys, before.keys)
        for head in range(len(keys)):
            geometry = geometry_of(keys[head], values[head], 1.5)
            first, second = (
                energy(geometry, keys[head], values[head], cj.Coreset(*(a[head] for a in each)))
                for each in (before, after)
            )
            # Up to the rounding of float32 sums over a cache of this weight.
            assert second <= first * (1 + 1e-4) + 1e-4 * COUNT
            worse += second >= 0.9 * first
    assert worse <= 10


@pytest.mark.parametrize("rho", [1.0, 4.0])
def test_worst_error_is_a_fraction_of_that_of_the_subset(rho):
    pairs = jax.random.normal(jax.random.key(1), (2, 4096, 16))
    keys, values = pairs / jnp.linalg.norm(pairs, axis=-1, keepdims=True)
    subset = cj.balanced(rho=rho)
    errors = [
        float(adversary(RNG, keys, values, coreset, rho=rho, starts=16, steps=20).error)
        for coreset in (
            compressor(RNG, keys, values, size=512)
            for compressor in (subset, refit.nystrom(subset))
        )
    ]
    assert errors[1] < 0.3 * errors[0]


def test_a_bound_on_the_weights_holds():
    keys, values = families(3)
    before = cj.baselines.uniform()(RNG, keys, values, size=SIZE)
    for make in REFITS.values():
        after = make(cj.baselines.uniform())(RNG, keys, values, size=SIZE)
        least = before.log_weights + jnp.log(0.1)
        assert bool(jnp.all(after.log_weights >= least - 1e-5))


@pytest.mark.slow
def test_heads_do_not_retrace_and_transform():
    keys, values = families(0)
    compressor = refit.nystrom(cj.balanced(block_size=8, landmarks=8), rho=2.0)
    expected = compressor(RNG, keys, values, size=SIZE)
    before = driver._compress._cache_size()
    compressor(jax.random.key(5), keys + 1, values, size=SIZE)
    assert driver._compress._cache_size() == before
    jitted = jax.jit(lambda rng, *pairs: compressor(rng, *pairs, size=SIZE))
    found = jitted(RNG, keys, values)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.log_weights, expected.log_weights, atol=1e-4)


def test_heads_may_be_fitted_one_after_another(monkeypatch):
    keys, values = (array.reshape(2, 3, COUNT, -1) for array in families(0))
    compressor = refit.nystrom(cj.baselines.uniform(), rho=2.0)
    expected = compressor(RNG, keys, values, size=SIZE)
    monkeypatch.setattr(turns, "memory_budget", lambda: 1)
    jax.clear_caches()
    found = compressor(RNG, keys, values, size=SIZE)
    jax.clear_caches()
    for name in ("values", "log_weights"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-3
        )


def test_double_precision(x64):
    keys, values = (array.astype(jnp.float64) for array in families(0))
    coreset = refit.nystrom(cj.baselines.uniform())(RNG, keys, values, size=SIZE)
    assert coreset.values.dtype == coreset.log_weights.dtype == jnp.float64


def test_bad_options_are_refused():
    uniform = cj.baselines.uniform()
    for make in REFITS.values():
        with pytest.raises(ValueError, match="compressor must be a Compressor"):
            make(None)
        with pytest.raises(ValueError, match="ridge must be positive"):
            make(uniform, ridge=0.0)
        with pytest.raises(ValueError, match="kernel_radius must be positive"):
            make(uniform, kernel_radius=-1.0)
        with pytest.raises(ValueError, match="give one of them"):
            make(uniform, rho=1.0, query_norm=1.0)
        with pytest.raises(ValueError, match="normalizers"):
            make(cj.baselines.wildcat())


def test_a_projection_falls_back_where_it_is_one_already():
    """The second of two fits can gain nothing but rounding, and says which it did."""
    keys, values = families(0)
    _, once = refit.nystrom(cj.baselines.uniform(), ridge=1e-6).with_info(
        RNG, keys, values, size=SIZE
    )
    np.testing.assert_array_equal(once.fits, 1)
    assert bool(once.accepted[0])
    twice = refit.nystrom(refit.nystrom(cj.baselines.uniform(), ridge=1e-6), ridge=1e3)
    _, info = twice.with_info(RNG, keys, values, size=SIZE)
    np.testing.assert_array_equal(info.fits, 2)
    assert np.all(np.asarray(info.fallbacks) <= 2)
