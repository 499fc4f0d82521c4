"""Clusters of keys: what Lloyd's steps promise, and what repeated keys must not break."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import baselines
from coreset_jax.baselines.kmeans import lloyd_step

COUNT, SIZE, WIDTH, VALUE_WIDTH = 200, 24, 6, 3
LENGTHS = np.array([COUNT, 131, SIZE + 1])

step = jax.jit(lloyd_step, static_argnames="block_size")


@pytest.fixture(scope="module")
def heads():
    rng = np.random.default_rng(5)
    # Far from the origin and unevenly spread: a few keys lie well outside.
    spread = np.where(np.arange(COUNT) % 17 == 3, 8.0, 1.0)[:, None]
    keys = 5 + spread * rng.standard_normal((len(LENGTHS), COUNT, WIDTH))
    values = rng.standard_normal((len(LENGTHS), COUNT, VALUE_WIDTH))
    return keys.astype(np.float32), values.astype(np.float32)


def compress(keys, values, lengths=LENGTHS, seed=0, iterations=40):
    """Three heads: of two programs, one has the seeds alone."""
    compressor, rng = baselines.kmeans(iterations=iterations), jax.random.key(seed)
    return jax.device_get(compressor(rng, keys, values, size=SIZE, lengths=lengths))


def squared_distances(points, centers):
    points, centers = np.asarray(points, np.float64), np.asarray(centers, np.float64)
    return np.sum((points[:, None] - centers[None]) ** 2, axis=-1)


@pytest.mark.slow
def test_objective_never_grows(heads):
    seeds = compress(*heads, iterations=0)
    converged = compress(*heads)
    for head, length in enumerate(LENGTHS):
        keys, inside = heads[0][head], np.arange(COUNT) < length
        filled = seeds.indices[head] >= 0
        # An empty slot is filled by a step, and must not be nearer to anything before.
        centers = np.where(filled[:, None], seeds.keys[head], np.float32(1e3))
        objectives = []
        for _ in range(40):
            objectives.append(squared_distances(keys[:length], centers).min(axis=1).sum())
            centers = step(keys, centers, inside, block_size=64)
        objectives = np.array(objectives)
        assert np.all(np.diff(objectives) <= 1e-5 * objectives[:-1])
        assert objectives[-1] < (0.95 if head < 2 else 1.001) * objectives[0]
        centers = converged.keys[head][converged.indices[head] >= 0]
        found = squared_distances(keys[:length], centers).min(axis=1).sum()
        np.testing.assert_allclose(found, objectives[-1], rtol=0.05)


def test_converged_clusters_are_those_of_their_centers(heads):
    coreset = compress(*heads)
    for head, length in enumerate(LENGTHS):
        keys, values = (array[head, :length].astype(np.float64) for array in heads)
        filled = coreset.indices[head] >= 0
        centers, indices = coreset.keys[head][filled], coreset.indices[head][filled]
        distances = squared_distances(keys, centers)
        clusters = np.argmin(distances, axis=1)
        counts = np.bincount(clusters, minlength=len(centers))
        np.testing.assert_allclose(np.exp(coreset.log_weights[head][filled]), counts, rtol=1e-5)
        for cluster, (center, index) in enumerate(zip(centers, indices, strict=True)):
            members = np.flatnonzero(clusters == cluster)
            np.testing.assert_allclose(center, keys[members].mean(axis=0), rtol=1e-4, atol=1e-4)
            mean = values[members].mean(axis=0)
            found = coreset.values[head][filled][cluster]
            np.testing.assert_allclose(found, mean, rtol=1e-4, atol=1e-4)
            # With two members both are nearest.
            least = distances[members, cluster].min()
            assert index in members
            np.testing.assert_allclose(distances[index, cluster], least, rtol=1e-3, atol=1e-5)


def test_weights_sum_to_the_length_and_empty_slots_come_last(heads):
    for iterations in (0, 40):
        coreset = compress(*heads, iterations=iterations)
        weights = np.exp(np.float64(coreset.log_weights))
        np.testing.assert_allclose(weights.sum(axis=-1), LENGTHS, rtol=1e-6)
        for indices in coreset.indices:
            kept = indices[indices >= 0]
            assert np.all(np.diff(kept) > 0)
            np.testing.assert_array_equal(indices[len(kept) :], -1)


def test_keys_alone_in_their_cluster_are_untouched(heads):
    # One key more than clusters: a single pair shares one.
    coreset = compress(*heads, lengths=np.full(3, SIZE + 1))
    weights = np.sort(np.exp(coreset.log_weights), axis=-1)
    np.testing.assert_allclose(weights, [[1.0] * (SIZE - 1) + [2.0]] * 3, rtol=1e-6)
    single = coreset.log_weights == 0
    for array, kept in zip(heads, coreset[:2], strict=True):
        source = np.take_along_axis(array, coreset.indices[..., None], axis=1)
        np.testing.assert_array_equal(kept[single], source[single])


def test_centers_without_keys_move_to_keys_far_from_theirs():
    points = np.array([[0.0], [1.0], [2.0], [10.0], [5.0]], np.float32)
    inside = np.array([True, True, True, True, False])
    # Nothing is near to the last two centers; the padding at 5 does not pull at the first.
    centers = np.array([[1.0], [70.0], [-90.0]], np.float32)
    moved = step(points, centers, inside, block_size=2)
    np.testing.assert_allclose(moved[0], 13 / 4)
    assert float(moved[1, 0]) == 10.0
    assert float(moved[2, 0]) in (0.0, 2.0)


def test_repeated_keys_share_a_cluster():
    rng = np.random.default_rng(1)
    numbers = (1, 7, SIZE)
    distinct = rng.standard_normal((SIZE, WIDTH), np.float32)
    copies = np.stack([np.arange(COUNT) % number for number in numbers])
    values = rng.standard_normal((3, COUNT, VALUE_WIDTH), np.float32)
    coresets = compress(distinct[copies], values, lengths=np.full(3, COUNT), seed=2)
    for head, number in enumerate(numbers):
        coreset = jax.tree.map(lambda leaf, head=head: leaf[head], coresets)
        filled = coreset.indices >= 0
        assert filled.sum() == number
        assert not np.any(filled[number:])
        which = copies[head][coreset.indices[filled]]
        assert sorted(which) == list(range(number))
        np.testing.assert_allclose(coreset.keys[filled], distinct[which], rtol=1e-5, atol=1e-5)
        means = [values[head][copies[head] == one].mean(axis=0) for one in which]
        np.testing.assert_allclose(coreset.values[filled], means, rtol=1e-4, atol=1e-5)
        counts = np.bincount(copies[head])[which]
        np.testing.assert_allclose(np.exp(coreset.log_weights[filled]), counts, rtol=1e-5)


def test_clusters_far_apart_are_found():
    rng = np.random.default_rng(3)
    centers = 1000 * rng.standard_normal((SIZE, WIDTH))
    # Seeds far apart are what squared distances are for: uniform ones would miss a third.
    for seed in range(7):
        blobs = rng.integers(0, SIZE, size=(3, COUNT))
        keys = np.float32(centers[blobs] + rng.standard_normal((3, COUNT, WIDTH)))
        values = keys[..., :VALUE_WIDTH]
        indices = compress(keys, values, np.full(3, COUNT), seed, iterations=0).indices
        for head in range(3):
            kept = indices[head][indices[head] >= 0]
            assert set(blobs[head][kept]) == set(blobs[head])


def test_seeds_are_drawn_by_squared_distance():
    # Three keys on a line: from 0 the others are drawn as 1 to 9, and so on round.
    draws = 20_000
    line = jnp.array([0.0, 1.0, 3.0])[:, None]
    keys = jnp.broadcast_to(line, (draws, 3, 1))
    coreset = baselines.kmeans(iterations=0)(jax.random.key(1), keys, keys, size=2)
    # The pair that is left alone tells which two were drawn, but for the middle one's cluster.
    apart = np.exp(np.asarray(coreset.log_weights)).round().astype(int)
    first_alone = np.mean(apart[:, 0] == 1)
    # {0, 1} (0 alone, and 1 with 3): first 0 then 1, or first 1 then 0; {1, 3} and {0, 3} else
    # have 0 and 1 together.
    expected = (1 / 10 + 1 / 5) / 3
    assert abs(first_alone - expected) < 4 * np.sqrt(expected / draws)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="iterations must be at least 0"):
        baselines.kmeans(iterations=-1)
