"""What happened on the way: errors against float64 brute force, fallbacks, heavy pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import refit
from coreset_jax._src.geometry.kernel_geometry import fitting_geometry
from coreset_jax.geometry import standardize
from tests.compressors import heads_of, newest, sampled
from tests.compressors import refit as refitted

RNG = jax.random.key(0)
HEADS, COUNT, SIZE, WIDTH = 3, 40, 10, 4
LENGTHS = np.array([COUNT, 25, 6])


@pytest.fixture(scope="module")
def cache():
    return np.random.default_rng(0).standard_normal((2, HEADS, COUNT, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def moved(cache):
    """A ragged cache with its keys moved, without and with what happened."""
    compressor = refit.move_keys(sampled(), query_norm=2.0)
    options = {"size": SIZE, "lengths": LENGTHS}
    before = sampled()(RNG, *cache, **options)
    return before, compressor(RNG, *cache, **options), compressor.with_info(RNG, *cache, **options)


def test_information_changes_no_bit(moved):
    _, plain, (coreset, _) = moved
    jax.tree.map(np.testing.assert_array_equal, plain, coreset)


@jax.jit
def in_geometry(keys, values, kept):
    """The geometry of a fit, and all pairs scaled in it."""
    geometry = fitting_geometry(standardize(keys, values, query_norm=2.0))
    pairs = [(geometry.scaled(keys), geometry.coefficients(values), jnp.zeros(len(keys)))]
    pairs.append((geometry.scaled(kept.keys), geometry.coefficients(kept.values), kept.log_weights))
    scale = geometry.standardization.scale * geometry.standardization.key_radius
    return pairs, geometry.level, 2.0 * scale, geometry.radius / geometry.reach**2


def squared_norm(parts, level):
    """Of signed measures on keys, in the kernel of the fit, in float64."""
    keys = np.concatenate([np.float64(each[0]) for each in parts])
    columns = np.concatenate(
        [
            sign * np.exp(np.float64(weights))[:, None] * np.float64(columns)
            for sign, (_, columns, weights) in zip((1, -1), parts, strict=False)
        ]
    )
    # Features at the root mean square have norm one.
    kernel = np.exp(keys @ keys.T - 2 * float(level))
    return np.sum(columns * (kernel @ columns))


def test_errors_in_the_kernel_are_those_of_brute_force(cache, moved):
    before, _, (after, info) = moved
    assert info.sample_error_before is None
    for head in (0, 1):
        keys, values = (array[head, : LENGTHS[head]] for array in cache)
        found = {}
        for name, coreset in (("before", before), ("after", after)):
            kept = jax.tree.map(lambda leaf, head=head: leaf[head], coreset)
            pairs, level, rho, _ = in_geometry(keys, values, kept)
            found[name] = squared_norm(pairs, level)
            np.testing.assert_allclose(info.rho[head], rho, rtol=1e-5)
        energy = squared_norm(pairs[:1], level)
        np.testing.assert_allclose(info.kernel_energy[head], energy, rtol=1e-4)
        for name, error in found.items():
            measured = getattr(info, f"kernel_error_{name}")[head]
            np.testing.assert_allclose(measured, error, rtol=2e-3, atol=1e-4 * energy)


def test_no_fit_makes_an_error_larger(moved):
    _, _, (_, info) = moved
    assert np.all(info.kernel_error_after <= info.kernel_error_before)
    # Those that lack some pairs are improved by far, and that is no fallback.
    assert np.all(info.kernel_error_after[:2] < 0.5 * info.kernel_error_before[:2])
    assert np.all(info.kernel_error_before <= info.kernel_energy)
    np.testing.assert_array_equal(info.fits, 1)
    np.testing.assert_array_equal(info.accepted[:2], True)
    np.testing.assert_array_equal(info.accepted, info.fallbacks == 0)
    # The last one is kept whole: nothing is wrong with it, and nothing can be better.
    np.testing.assert_allclose(info.kernel_error_after[2], 0, atol=1e-4 * info.kernel_energy[2])


def test_a_fit_that_cannot_improve_is_a_fallback(cache):
    """The whole of a head, a projection that was projected, and samples that are answered."""
    full = cj.Coreset(
        *cache, np.zeros((HEADS, COUNT), np.float32), np.tile(np.arange(COUNT), (HEADS, 1))
    )
    for compressor in (refit.weights(sampled()), refit.nystrom(sampled())):
        after, info = refitted(compressor, *cache, full)
        jax.tree.map(np.testing.assert_array_equal, after, full)
        np.testing.assert_array_equal(info.fits, 1)

    part = newest()(RNG, *cache, size=SIZE)
    compressor = refit.weights(sampled(), ridge=1e-6)
    once, first = refitted(compressor, *cache, part)
    np.testing.assert_array_equal(first.accepted, True)
    # Rounding is all that is left of the error, so that sooner or later nothing is gained.
    again, fallbacks = once, []
    for _ in range(8):
        again, info = refitted(compressor, *cache, again)
        fallbacks.append(np.asarray(info.fallbacks))
    np.testing.assert_allclose(again.log_weights, once.log_weights, atol=2e-3)
    assert np.any(fallbacks)

    # Attention of the samples over the whole is exact, whatever it is fitted to.
    queries = np.random.default_rng(1).standard_normal((HEADS, 12, WIDTH)).astype(np.float32)
    single = jax.tree.map(lambda leaf: leaf[:, :1], (*cache, full))
    keys, values, alone = single
    for compressor in (refit.matching(sampled()), refit.attention_matching(sampled())):
        after, info = refitted(compressor, keys, values, alone, queries)
        np.testing.assert_array_equal(info.accepted, False)
        np.testing.assert_array_equal(info.sample_error_after, info.sample_error_before)
        jax.tree.map(np.testing.assert_array_equal, after, alone)


def test_errors_of_samples_are_those_of_attention(cache):
    queries = np.random.default_rng(1).standard_normal((HEADS, 12, WIDTH)).astype(np.float32)
    before = newest()(RNG, *cache, size=SIZE)
    after, info = refitted(refit.matching(sampled()), *cache, before, queries)
    exact = cj.attention(queries, *cache)
    for name, coreset in (("before", before), ("after", after)):
        missed = np.linalg.norm(cj.attend(queries, coreset) - exact, axis=-1)
        expected = np.sqrt(np.mean(np.square(missed), axis=-1))
        np.testing.assert_allclose(getattr(info, f"sample_error_{name}"), expected, rtol=1e-3)
    assert np.all(info.sample_error_after < info.sample_error_before)
    np.testing.assert_array_equal(info.accepted, True)


def test_heavy_pairs_and_rounds_are_counted():
    keys, values = np.random.default_rng(2).standard_normal((2, HEADS, COUNT, WIDTH))
    keys[1, [3, 17]] *= 8
    keys[2, 5] *= 8
    compressor = cj.keep_ends(cj.pivoted(), sinks=0, recent_fraction=0)
    coreset, info = compressor.with_info(RNG, np.float32(keys), np.float32(values), size=SIZE)
    weights = np.exp(coreset.log_weights)
    np.testing.assert_array_equal(info.heavy[1:], [2, 1])
    for each, indices, heavy in heads_of(weights, coreset.indices, info.heavy):
        assert np.sum(each == 1) == heavy
        np.testing.assert_allclose(each.sum(), COUNT, rtol=1e-5)
        assert len(set(np.asarray(indices).tolist())) == SIZE
    assert {3, 17} <= set(np.asarray(coreset.indices[1]).tolist())
    assert np.all(info.rounds >= 1)
    assert np.all(info.kernel_radius > 0)
    assert info.fits is None
    assert info.accepted is None


def test_halvings_are_counted(cache):
    small = cj.balanced(block_size=8, landmarks=8, max_swaps=4, rho=2.0)
    _, info = small.with_info(RNG, *cache, size=SIZE, lengths=LENGTHS)
    # 40 -> 20 -> 10, 25 -> 13 -> 10, and 6 that stay.
    np.testing.assert_array_equal(info.rounds, [2, 2, 0])
    np.testing.assert_array_equal(info.rho, 2.0)


def test_parts_are_summed_and_the_worst_of_them_is_kept():
    numbers = jnp.arange(1.0, 4.0)
    info = cj.Info(
        kernel_radius=numbers,
        rounds=jnp.arange(3),
        heavy=jnp.arange(3),
        kernel_energy=numbers,
        sample_error_after=numbers,
    )
    parts = jax.jit(lambda info: info.of_parts())(info)
    expected = {"kernel_radius": 3, "rounds": 2, "heavy": 3, "kernel_energy": 6}
    expected |= {"sample_error_after": 3}
    for name, value in parts._asdict().items():
        assert value == expected.get(name), name
    _, found = cj.chunked(cj.balanced(block_size=8, landmarks=8, rho=2.0), chunk_size=5).with_info(
        RNG, np.ones((COUNT, WIDTH), np.float32), np.ones((COUNT, WIDTH), np.float32), size=SIZE
    )
    assert found.rounds == 2
