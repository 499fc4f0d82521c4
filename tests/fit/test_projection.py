"""Refits: the best fit in the kernel, never a worse one, and far smaller worst errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import refit
from coreset_jax._src.geometry.kernel_geometry import balancing_geometry
from coreset_jax.geometry import standardize
from coreset_jax.guarantees import adversary
from tests.compressors import heads_of, sampled, signed
from tests.compressors import refit as refitted

RNG = jax.random.key(0)
HEADS, COUNT, SIZE, WIDTH, VALUE_WIDTH = 6, 60, 12, 5, 4
REFITS = {"nystrom": refit.nystrom, "weights": refit.weights}
# The kernel of the tests.
KERNEL = {"rho": 2.0, "kernel_radius": 1.5}


@jax.jit
@jax.vmap
def in_geometry(keys, values, coreset):
    """Pairs of a head and of a coreset in the kernel of the fit, and its radius."""
    geometry = balancing_geometry(standardize(keys, values, rho=2.0), jnp.float32(1.5))
    arrays = [
        (geometry.keys(k), geometry.coefficients(v)) for k, v in ((keys, values), coreset[:2])
    ]
    return *arrays, geometry.radius


def exact_kernel(left, right, radius):
    return np.exp(float(radius) * (np.float64(left) @ np.float64(right).T - 1))


def energies(keys, values, coreset):
    """The squared error of every head in the kernel, numerator and denominator, in float64."""
    for (every, kept, radius), log_weights in heads_of(
        in_geometry(keys, values, coreset), coreset.log_weights
    ):
        weights = np.exp(np.float64(log_weights))[:, None]
        both = np.concatenate([weights * np.float64(kept[1]), -np.float64(every[1])])
        places = np.concatenate([kept[0], every[0]])
        yield np.sum(both * (exact_kernel(places, places, radius) @ both))


def families(seed):
    """Heads of all sorts: plain, clustered, repeated, heavy-tailed, of low rank, of one key."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((HEADS, COUNT, WIDTH))
    values = rng.standard_normal((HEADS, COUNT, VALUE_WIDTH))
    keys[1] = 0.01 * keys[1] + keys[1][rng.integers(0, 4, COUNT)]
    keys[2] = keys[2][rng.integers(0, 5, COUNT)]
    keys[3] *= rng.standard_cauchy((COUNT, 1))
    keys[4] = keys[4][:, :1] * np.ones(WIDTH)
    keys[5] = 1.0
    values[5] *= 1e-3
    return keys.astype(np.float32), values.astype(np.float32)


@pytest.mark.slow
def test_weights_and_values_are_the_projection():
    """With hardly a ridge, what is left of the error is orthogonal to every kept key."""
    keys, values = families(1)
    # Keys far from one another, or the best fit would have masses that are held.
    directions = np.stack([*np.eye(WIDTH), -np.ones(WIDTH)])
    places = np.unique(np.argmax(keys[0] @ directions.T, axis=0))[:5]
    assert len(places) == 5
    before = cj.Coreset(
        keys[:, places],
        values[:, places],
        np.full((HEADS, 5), np.log(COUNT / 5), np.float32),
        np.tile(places.astype(np.int32), (HEADS, 1)),
    )
    after, info = refitted(refit.nystrom(sampled(), ridge=1e-6, **KERNEL), keys, values, before)
    np.testing.assert_array_equal(info.accepted[0], True)
    ((every, kept, radius),) = next(heads_of(in_geometry(keys, values, after)))
    target = exact_kernel(kept[0], every[0], radius) @ np.float64(every[1])
    best = np.linalg.solve(exact_kernel(kept[0], kept[0], radius), target)
    assert np.all(best[:, -1] > 0.1 * COUNT / 5)
    weights = np.exp(np.float64(after.log_weights[0]))
    np.testing.assert_allclose(weights, best[:, -1], rtol=2e-3)
    found = weights[:, None] * kept[1]
    np.testing.assert_allclose(found, best, atol=2e-3 * np.abs(best).max())


@pytest.mark.slow
def test_weights_alone_are_the_best_weights():
    keys, values = families(1)
    compressor = refit.weights(sampled(), ridge=1e-6, **KERNEL)
    coreset = compressor(RNG, keys, values, size=SIZE)
    np.testing.assert_array_equal(coreset.values[0], values[0][coreset.indices[0]])
    ((every, kept, radius),) = next(heads_of(in_geometry(keys, values, coreset)))
    gram = exact_kernel(kept[0], kept[0], radius) * np.float64(kept[1] @ kept[1].T)
    target = exact_kernel(kept[0], every[0], radius) * np.float64(kept[1] @ every[1].T)
    best = np.maximum(np.linalg.solve(gram, target.sum(axis=1)), 0.1 * COUNT / SIZE)
    np.testing.assert_allclose(np.exp(coreset.log_weights[0]), best, rtol=5e-3)


@pytest.mark.parametrize("name", REFITS)
def test_never_worse_in_the_kernel_of_the_fit(name):
    worse = 0
    for seed in range(5):
        keys, values = families(seed)
        before = sampled()(jax.random.key(seed), keys, values, size=SIZE)
        after, info = refitted(REFITS[name](sampled(), **KERNEL), keys, values, before)
        assert np.all(np.isfinite(after.values))
        np.testing.assert_array_equal(after.keys, before.keys)
        # No weight falls below a tenth of what it was.
        assert np.all(after.log_weights >= before.log_weights + np.log(0.1) - 1e-5)
        errors = zip(*(energies(keys, values, each) for each in (before, after)), strict=True)
        for head, (first, second) in enumerate(errors):
            # Up to the rounding of float32 sums over a cache of this weight.
            assert second <= first * (1 + 1e-4) + 1e-4 * COUNT
            worse += second >= 0.9 * first
            if not info.accepted[head]:
                assert first == second
    assert worse <= 10


@pytest.mark.slow
def test_worst_error_is_a_fraction_of_that_of_the_subset():
    pairs = np.random.default_rng(1).standard_normal((2, 4096, 16)).astype(np.float32)
    keys, values = pairs / np.linalg.norm(pairs, axis=-1, keepdims=True)
    for rho in (1.0, 4.0):
        subset = cj.balanced(rho=rho)
        coresets = [
            compressor(RNG, keys, values, size=512)
            for compressor in (subset, refit.nystrom(subset))
        ]
        errors = [
            float(adversary(RNG, keys, values, each, rho=rho, starts=16, steps=20).error)
            for each in coresets
        ]
        assert errors[1] < 0.3 * errors[0]


@pytest.mark.slow
def test_transforms_as_any_other():
    keys, values = families(0)
    compressor = refit.nystrom(cj.balanced(block_size=8, landmarks=8), rho=2.0)
    expected = compressor(RNG, keys, values, size=SIZE)
    found = jax.jit(lambda rng, *pairs: compressor(rng, *pairs, size=SIZE))(RNG, keys, values)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.log_weights, expected.log_weights, atol=1e-4)


def test_double_precision(x64):
    keys, values = (array.astype(np.float64) for array in families(0))
    coreset = refit.nystrom(sampled())(RNG, keys, values, size=SIZE)
    assert coreset.values.dtype == coreset.log_weights.dtype == jnp.float64


def test_bad_options_are_refused():
    for make in REFITS.values():
        with pytest.raises(ValueError, match="compressor must be a Compressor"):
            make(None)
        with pytest.raises(ValueError, match="ridge must be positive"):
            make(sampled(), ridge=0.0)
        with pytest.raises(ValueError, match="kernel_radius must be positive"):
            make(sampled(), kernel_radius=-1.0)
        with pytest.raises(ValueError, match="give one of them"):
            make(sampled(), rho=1.0, query_norm=1.0)
        with pytest.raises(ValueError, match="normalizers"):
            make(signed())
