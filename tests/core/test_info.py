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


class counting(newest):  # noqa: N801
    """Says how many pairs and slots there were."""

    def compress_head(self, head, size):
        coreset, _ = super().compress_head(head, size)
        return coreset, cj.Info(heavy=head.length, rounds=jnp.int32(size))


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
    pairs = [
        (geometry.scaled(each), geometry.coefficients(column), weights)
        for each, column, weights in ((keys, values, jnp.zeros(len(keys))), kept[:3])
    ]
    scale = geometry.standardization.scale * geometry.standardization.key_radius
    return pairs, geometry.level, 2.0 * scale


def squared_norm(source, kept, level):
    """Of the difference of two measures, in the kernel of the fit, in float64."""
    keys, columns = (
        np.concatenate([np.float64(each[i]) for each in (source, kept)]) for i in (0, 1)
    )
    weights = np.concatenate([np.exp(np.float64(source[2])), -np.exp(np.float64(kept[2]))])
    columns = weights[:, None] * columns
    # Features at the root mean square have norm one.
    kernel = np.exp(keys @ keys.T - 2 * float(level))
    return np.sum(columns * (kernel @ columns))


def test_errors_in_the_kernel_are_those_of_brute_force(cache, moved):
    before, _, (after, info) = moved
    assert info.sample_error_before is None
    for head in (0, 1):
        keys, values = (array[head, : LENGTHS[head]] for array in cache)
        # Heavy pairs that were kept stand for themselves, and are not fitted.
        free = np.flatnonzero(after.log_weights[head] != 0)
        still = np.delete(np.arange(SIZE), free)
        others = np.delete(np.arange(len(keys)), before.indices[head][still])
        assert len(free) > SIZE // 2
        found = {}
        for name, coreset in (("before", before), ("after", after)):
            kept = jax.tree.map(lambda leaf, head=head: leaf[head], coreset)
            (source, kept), level, rho = jax.device_get(in_geometry(keys, values, kept))
            source, kept = [leaf[others] for leaf in source], [leaf[free] for leaf in kept]
            found[name] = squared_norm(source, kept, level)
            np.testing.assert_allclose(info.rho[head], rho, rtol=1e-5)
        energy = squared_norm(source, [leaf[:0] for leaf in kept], level)
        np.testing.assert_allclose(info.kernel_energy[head], energy, rtol=1e-4)
        for name, error in found.items():
            measured = getattr(info, f"kernel_error_{name}")[head]
            np.testing.assert_allclose(measured, error, rtol=2e-3, atol=1e-4 * energy)


def test_no_fit_makes_an_error_larger(moved):
    _, _, (_, info) = moved
    assert np.all(info.kernel_error_after <= info.kernel_error_before)
    # Those that lack some pairs are improved by far, and that is no fallback.
    assert np.all(info.kernel_error_after[:2] < 0.5 * info.kernel_error_before[:2])
    np.testing.assert_array_equal(info.fits, 1)
    np.testing.assert_array_equal(info.accepted[:2], True)
    np.testing.assert_array_equal(info.accepted, info.fallbacks == 0)
    # The last one is kept whole: nothing is wrong with it, and nothing can be better.
    np.testing.assert_allclose(info.kernel_error_after[2], 0, atol=1e-4 * info.kernel_energy[2])


@pytest.mark.slow
def test_a_fit_that_cannot_improve_is_a_fallback(cache):
    """The whole of a head, a pair that answers exactly, and weights that are held from what is."""
    full = cj.Coreset(
        *cache, np.zeros((HEADS, COUNT), np.float32), np.tile(np.arange(COUNT), (HEADS, 1))
    )
    after, info = refitted(refit.weights(sampled()), *cache, full)
    jax.tree.map(np.testing.assert_array_equal, after, full)
    np.testing.assert_array_equal(info.fits, 1)

    # One pair behind one, answered exactly whatever it is fitted to.
    queries = np.random.default_rng(1).standard_normal((HEADS, 12, WIDTH)).astype(np.float32)
    alone = jax.tree.map(lambda leaf: leaf[:, :1], full)
    after, info = refitted(refit.matching(sampled()), *alone[:2], alone, queries)
    np.testing.assert_array_equal(info.accepted, False)
    np.testing.assert_array_equal(info.fallbacks, 1)
    np.testing.assert_array_equal(info.sample_error_after, info.sample_error_before)
    jax.tree.map(np.testing.assert_array_equal, after, alone)

    # Copies of a few pairs, with weights that are exact, for a fit that is bound to equal ones.
    copies = np.array([1, 2, 4, 8, 25])
    exact = jax.tree.map(lambda leaf: leaf[:, :5], full)
    exact = exact._replace(log_weights=np.tile(np.log(copies), (HEADS, 1)).astype(np.float32))
    repeated = [np.repeat(array[:, :5], copies, axis=1) for array in cache]
    for bound, accepted in ((1e-3, False), (4.0, True)):
        compressor = refit.attention_matching(sampled(), bound=bound)
        worse = exact if not accepted else exact._replace(log_weights=0 * exact.log_weights)
        after, info = refitted(compressor, *repeated, worse, queries)
        np.testing.assert_array_equal(info.accepted, accepted)
        if accepted:
            assert np.all(info.sample_error_after < 0.1 * info.sample_error_before)
        else:
            jax.tree.map(np.testing.assert_array_equal, after, worse)


@pytest.mark.slow
def test_errors_of_samples_are_those_of_attention(cache):
    queries = np.random.default_rng(1).standard_normal((HEADS, 16, WIDTH)).astype(np.float32)
    before = newest()(RNG, *cache, size=SIZE)
    after, info = refitted(refit.matching(sampled()), *cache, before, queries)
    exact = cj.attention(queries, *cache)
    for name, coreset in (("before", before), ("after", after)):
        # Those that the match has not seen.
        missed = np.linalg.norm(cj.attend(queries, coreset) - exact, axis=-1)[:, -2:]
        expected = np.sqrt(np.mean(np.square(missed), axis=-1))
        np.testing.assert_allclose(getattr(info, f"sample_error_{name}"), expected, rtol=1e-3)
    taken = np.asarray(info.matched) == 1
    np.testing.assert_array_equal(info.accepted, taken)
    assert np.any(taken)
    np.testing.assert_array_equal(info.sample_error_after < info.sample_error_before, taken)
    same = np.all(after.values == before.values, axis=(-2, -1))
    np.testing.assert_array_equal(same, ~taken)


@pytest.mark.slow
def test_heavy_pairs_and_rounds_are_counted():
    keys, values = np.random.default_rng(2).standard_normal((2, HEADS, COUNT, WIDTH))
    keys[1, [3, 17]] *= 8
    keys[2, 5] *= 8
    compressor = cj.pivoted()
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


@pytest.mark.slow
def test_halvings_are_counted(cache):
    small = cj.balanced(block_size=8, landmarks=None, max_swaps=0, rho=2.0)
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
    # As a cache that is cut into chunks does it.
    pairs = np.ones((2, COUNT, WIDTH), np.float32)
    _, found = cj.chunked(counting(), chunk_size=5).with_info(RNG, *pairs, size=SIZE)
    assert (found.heavy, found.rounds) == (COUNT, 5)
