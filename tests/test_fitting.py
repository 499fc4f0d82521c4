"""The default: what compress does, by whichever arguments it is asked, and what it is worth."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import fitting
from coreset_jax._src.core.coreset import whole_cache

RNG = jax.random.key(0)


@pytest.fixture(scope="module")
def cache():
    return jax.random.normal(jax.random.key(1), (2, 3, 120, 8))


@pytest.mark.slow
def test_compress_is_fitted_with_its_defaults(cache):
    lengths = np.array([120, 60, 5])
    known = {"rho": 2.0, "scale": 0.5}
    expected = cj.fitted(**known)(RNG, *cache, size=40, lengths=lengths)
    coreset = cj.compress(RNG, *cache, size=40, lengths=lengths, **known)
    chex.assert_trees_all_equal(coreset, expected)
    # As fitted, and not scaled to it.
    np.testing.assert_allclose(np.exp(coreset.log_weights).sum(axis=-1), lengths, rtol=0.2)


@pytest.mark.parametrize(
    "size",
    [40, 119, 120, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 5, 79, 130))],
)
def test_any_size(cache, size):
    coreset = cj.fitted()(RNG, *cache, size=size)
    if size >= 120:
        chex.assert_trees_all_equal(coreset, whole_cache(*cache))
        return
    assert coreset.keys.shape == (3, size, 8)
    assert bool(jnp.all(jnp.isfinite(coreset.values)))
    assert size < 10 or np.allclose(np.exp(coreset.log_weights).sum(axis=-1), 120, rtol=0.3)
    assert np.all(np.diff(coreset.indices, axis=-1) > 0)


@pytest.mark.slow
def test_sample_queries_are_matched(cache):
    keys, values = cache
    # All about one mean, of which nothing is known without them.
    queries, fresh = 2 + jax.random.normal(jax.random.key(2), (2, 3, 200, 8))
    exact = cj.attention(fresh, keys, values)

    def miss(coreset):
        return np.mean(np.linalg.norm(cj.attend(fresh, coreset) - exact, axis=-1), axis=-1)

    compressor = cj.fitted(query_norm=8.0)
    blind = compressor(RNG, keys, values, size=12)
    matched, info = compressor.with_info(RNG, keys, values, size=12, queries=queries)
    np.testing.assert_array_equal(matched.keys, blind.keys)
    taken = np.asarray(info.matched) == 1
    assert np.sum(taken) >= 2
    assert np.all(miss(matched)[taken] < miss(blind)[taken])
    np.testing.assert_array_equal(matched.values[~taken], blind.values[~taken])


@pytest.mark.slow
@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_cuts_within_cuts(monkeypatch, cache, queries, ragged):
    """Groups of chunks of parts, each head with a radius of its own."""
    monkeypatch.setattr(fitting, "_MATCHED_TOGETHER", 40)
    keys, values = cache
    lengths = jnp.array([120, 60, 5]) if ragged else None
    asked = keys[:, :30] if queries else None
    options = {"size": 101, "lengths": lengths, "queries": asked}
    norms = np.array([1.0, 4.0, 9.0], np.float32)
    cuts = {"chunk_size": 16, "moved_together": 8}
    together = cj.fitted(query_norm=norms, **cuts)(RNG, keys, values, **options)
    counts = [120, 60, 5] if ragged else [120] * 3
    for head, length in enumerate(counts):
        indices = np.asarray(together.indices[head])
        held = indices[indices >= 0]
        assert min(101, length) - 12 <= len(held) <= min(101, length)
        assert np.all(np.diff(held) > 0)
        assert held[-1] < length
        alike = cj.fitted(query_norm=float(norms[head]), **cuts)(RNG, keys, values, **options)
        np.testing.assert_allclose(together.keys[head], alike.keys[head], atol=1e-4)


@pytest.mark.slow
def test_a_radius_is_that_of_the_whole_cache(cache):
    """Whatever lies far out at the ends, the pairs between them have the same queries."""
    keys, values = (np.array(array) for array in cache)
    keys[:, 0] *= 8
    center = keys.mean(axis=1, keepdims=True)
    radius = np.linalg.norm(keys - center, axis=-1).max(axis=-1)
    options = {"size": 40, "lengths": np.full(3, 120)}
    by_rho = cj.fitted(rho=3.0, scale=0.5)(RNG, keys, values, **options)
    norm = 3.0 / (0.5 * radius)
    by_norm = cj.fitted(query_norm=norm, scale=0.5)(RNG, keys, values, **options)
    chex.assert_trees_all_close(by_rho, by_norm, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_half_the_error_of_the_subset():
    """Clustered keys in no order, on queries that nobody was shown."""
    rng = jax.random.split(RNG, 5)
    centers = jax.random.normal(rng[0], (16, 32))
    keys = centers[jax.random.randint(rng[1], (2048,), 0, 16)]
    keys = keys + 0.3 * jax.random.normal(rng[2], (2048, 32))
    values = jax.random.normal(rng[3], (2048, 32)) + keys
    queries = jax.random.normal(rng[4], (200, 32))
    exact = cj.attention(queries, keys, values)

    # A single draw of 64 may forget clusters: 0.65 of WildCat's error in the mean, and up to 1.
    heads = [jnp.broadcast_to(array, (8, *array.shape)) for array in (keys, values, queries)]

    def miss(compressor, size):
        coreset = compressor(RNG, *heads[:2], size=size)
        missed = cj.attend(heads[2], coreset) - exact
        return float(jnp.mean(jnp.linalg.norm(missed, axis=-1)))

    fitted = cj.fitted(sinks=0, recent_fraction=0)
    for size, share in ((64, 0.8), (256, 1.2)):
        assert miss(fitted, size) < 0.5 * miss(cj.balanced(), size)
        assert miss(fitted, size) < share * miss(cj.baselines.wildcat(), size)


@pytest.mark.slow
def test_both_ends_are_kept(cache):
    keys, values = cache
    for queries in (None, keys[:, :50]):
        coreset = cj.fitted()(RNG, keys, values, size=40, queries=queries)
        kept = [*range(4), *range(115, 120)]
        for head in range(3):
            slots = np.flatnonzero(np.isin(coreset.indices[head], kept))
            assert len(slots) == len(kept)
            np.testing.assert_array_equal(coreset.keys[head][slots], keys[head][jnp.array(kept)])
            np.testing.assert_array_equal(
                coreset.values[head][slots], values[head][jnp.array(kept)]
            )
            np.testing.assert_array_equal(coreset.log_weights[head][slots], 0)


@pytest.mark.slow
def test_a_head_knows_nothing_of_the_others_and_sickness_stays_in_it(cache, programs):
    keys, values = (np.array(array) for array in cache)
    coreset = cj.fitted()(RNG, keys, values, size=40)
    before = programs()
    changed = keys.copy()
    changed[1] += 1
    changed[1, 3] *= 2
    other = cj.fitted()(RNG, changed, values, size=40)
    # A call is one program, and none at equal shapes.
    assert programs() == before
    cj.fitted()(RNG, keys[:1], values[:1], size=1)
    assert programs() == before + 1
    for place in (0, 2):
        np.testing.assert_allclose(coreset.keys[place], other.keys[place], atol=1e-5)
        np.testing.assert_array_equal(coreset.indices[place], other.indices[place])
    for which in (0, 1):
        for wrong in (np.nan, np.inf):
            broken = [keys.copy(), values.copy()]
            broken[which][1, 7, 2] = wrong
            sick = np.isnan(cj.fitted()(RNG, *broken, size=40).log_weights)
            np.testing.assert_array_equal(sick.all(axis=1), [False, True, False])
            np.testing.assert_array_equal(sick.any(axis=1), sick.all(axis=1))


@pytest.mark.slow
def test_without_steps_pivots_are_fitted_where_they_are(cache):
    keys, values = (np.asarray(array) for array in cache)
    fitted = cj.fitted(newton_steps=0, moved_together=16, sinks=0, recent_fraction=0.0)
    coreset = fitted(RNG, keys, values, size=40)
    for head, indices in enumerate(np.asarray(coreset.indices)):
        assert len(set(indices)) == 40
        np.testing.assert_allclose(coreset.keys[head], keys[head, indices], atol=1e-5)


def test_sizes_of_which_chunks_leave_slots_empty_say_so():
    assert cj.fitted().fills(1024)
    # Between the ends 32 chunks of 257, and each of those two parts of 128.
    assert not cj.fitted().fills(9403)


def test_bad_input_is_refused(cache):
    keys, values = cache
    with pytest.raises(ValueError, match="newton_steps"):
        cj.fitted(newton_steps=-1)
    with pytest.raises(ValueError, match="chunk_size"):
        cj.fitted(chunk_size=0)
    with pytest.raises(ValueError, match="rho and query_norm"):
        cj.fitted(rho=1.0, query_norm=1.0)
    with pytest.raises(ValueError, match="queries"):
        cj.fitted()(RNG, keys, values, size=4, queries=keys[:2])
    with pytest.raises(ValueError, match="lengths"):
        cj.fitted()(RNG, keys, values, size=4, lengths=jnp.array([1, 2]))
