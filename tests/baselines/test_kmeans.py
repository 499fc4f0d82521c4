"""Clusters of keys: what Lloyd's steps promise, and what repeated keys must not break."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import baselines
from coreset_jax.baselines.kmeans import lloyd_step

COUNT, SIZE = 200, 24
LENGTHS = np.array([COUNT, 131, SIZE + 1])


@pytest.fixture(scope="module")
def heads():
    rng = np.random.default_rng(5)
    # Far from the origin and unevenly spread: a few keys lie well outside.
    spread = np.where(np.arange(COUNT) % 17 == 3, 8.0, 1.0)[:, None]
    keys = 5 + spread * rng.standard_normal((len(LENGTHS), COUNT, 6))
    values = rng.standard_normal((len(LENGTHS), COUNT, 3))
    return keys.astype(np.float32), values.astype(np.float32)


def squared_distances(points, centers):
    points, centers = np.asarray(points, np.float64), np.asarray(centers, np.float64)
    return np.sum((points[:, None] - centers[None]) ** 2, axis=-1)


@pytest.fixture(scope="module")
def coresets(heads):
    """The same draws after more and more of Lloyd's steps."""
    return [
        baselines.kmeans(iterations=steps)(jax.random.key(0), *heads, size=SIZE, lengths=LENGTHS)
        for steps in (0, 1, 3, 40)
    ]


def test_objective_never_grows(heads, coresets):
    objectives = []
    for coreset in coresets:
        for head, length in enumerate(LENGTHS):
            centers = np.asarray(coreset.keys[head])[np.asarray(coreset.indices[head]) >= 0]
            nearest = squared_distances(heads[0][head, :length], centers).min(axis=1)
            objectives.append(nearest.sum())
    objectives = np.reshape(objectives, (len(coresets), len(LENGTHS)))
    assert np.all(np.diff(objectives, axis=0) <= 1e-5 * objectives[:-1])
    assert np.all(objectives[-1, :2] < 0.95 * objectives[0, :2])


def test_converged_clusters_are_those_of_their_centers(heads, coresets):
    coreset = coresets[-1]
    for head, length in enumerate(LENGTHS):
        keys, values = (array[head, :length].astype(np.float64) for array in heads)
        filled = np.asarray(coreset.indices[head]) >= 0
        centers = np.asarray(coreset.keys[head])[filled]
        distances = squared_distances(keys, centers)
        clusters = np.argmin(distances, axis=1)
        counts = np.bincount(clusters, minlength=len(centers))
        np.testing.assert_allclose(np.exp(coreset.log_weights[head][filled]), counts, rtol=1e-5)
        for cluster, (center, index) in enumerate(
            zip(centers, np.asarray(coreset.indices[head])[filled], strict=True)
        ):
            members = np.flatnonzero(clusters == cluster)
            np.testing.assert_allclose(center, keys[members].mean(axis=0), rtol=1e-4, atol=1e-4)
            mean = values[members].mean(axis=0)
            np.testing.assert_allclose(
                coreset.values[head][filled][cluster], mean, rtol=1e-4, atol=1e-4
            )
            # With two members both are nearest.
            least = distances[members, cluster].min()
            assert index in members
            np.testing.assert_allclose(distances[index, cluster], least, rtol=1e-3, atol=1e-5)


def test_weights_sum_to_the_length(coresets):
    for coreset in coresets:
        weights = np.exp(np.asarray(coreset.log_weights, np.float64))
        np.testing.assert_allclose(weights.sum(axis=-1), LENGTHS, rtol=1e-6)
        indices = np.asarray(coreset.indices)
        for head in indices:
            kept = head[head >= 0]
            assert np.all(np.diff(kept) > 0)
            np.testing.assert_array_equal(head[len(kept) :], -1)


def test_keys_alone_in_their_cluster_are_untouched(heads):
    # One key more than clusters: a single pair shares one.
    coreset = baselines.kmeans()(
        jax.random.key(0), *(array[:, : SIZE + 1] for array in heads), size=SIZE
    )
    weights = np.sort(np.exp(np.asarray(coreset.log_weights)), axis=-1)
    np.testing.assert_allclose(weights, [[1.0] * (SIZE - 1) + [2.0]] * len(LENGTHS), rtol=1e-6)
    single = np.asarray(coreset.log_weights) == 0
    for array, kept in zip(heads, coreset[:2], strict=True):
        source = np.take_along_axis(array, np.asarray(coreset.indices)[..., None], axis=1)
        np.testing.assert_array_equal(np.asarray(kept)[single], source[single])


def test_centers_without_keys_move_to_keys_far_from_theirs():
    points = np.array([[0.0], [1.0], [2.0], [10.0], [5.0]], np.float32)
    inside = np.array([True, True, True, True, False])
    # Nothing is near to the last two centers; the padding at 5 does not pull at the first.
    centers = np.array([[1.0], [70.0], [-90.0]], np.float32)
    moved = jax.jit(lloyd_step, static_argnames="block_size")(points, centers, inside, block_size=2)
    np.testing.assert_allclose(moved[0], 13 / 4)
    assert float(moved[1, 0]) == 10.0
    assert float(moved[2, 0]) in (0.0, 2.0)


@pytest.mark.parametrize("distinct", [1, 7, SIZE])
def test_repeated_keys_share_a_cluster(distinct):
    rng = np.random.default_rng(distinct)
    keys = rng.standard_normal((distinct, 6)).astype(np.float32)
    copies = np.arange(COUNT) % distinct
    values = rng.standard_normal((COUNT, 3)).astype(np.float32)
    coreset = baselines.kmeans()(jax.random.key(2), keys[copies], values, size=SIZE)
    filled = np.asarray(coreset.indices) >= 0
    assert filled.sum() == distinct
    assert not np.any(filled[distinct:])
    which = copies[np.asarray(coreset.indices)[filled]]
    assert sorted(which) == list(range(distinct))
    np.testing.assert_allclose(coreset.keys[filled], keys[which], rtol=1e-5, atol=1e-5)
    means = np.stack([values[copies == one].mean(axis=0) for one in which])
    np.testing.assert_allclose(coreset.values[filled], means, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        np.exp(coreset.log_weights[filled]), np.bincount(copies)[which], rtol=1e-5
    )


def test_clusters_far_apart_are_found():
    rng = np.random.default_rng(3)
    centers = 1000 * rng.standard_normal((SIZE, 6))
    blobs = rng.integers(0, SIZE, size=(20, COUNT))
    keys = (centers[blobs] + rng.standard_normal((20, COUNT, 6))).astype(np.float32)
    # Seeds far apart are what squared distances are for: uniform ones would miss a third.
    coreset = baselines.kmeans(iterations=0)(jax.random.key(0), keys, keys, size=SIZE)
    indices = np.asarray(coreset.indices)
    for head in range(20):
        kept = indices[head][indices[head] >= 0]
        assert set(blobs[head][kept]) == set(blobs[head])


def test_seeds_are_drawn_by_squared_distance():
    # Three keys on a line: from 0 the others are drawn as 1 to 9, and so on round.
    draws = 20_000
    line = jnp.array([0.0, 1.0, 3.0])[:, None]
    keys = jnp.broadcast_to(line, (draws, 3, 1))
    coreset = baselines.kmeans(iterations=0)(jax.random.key(1), keys, keys, size=2)
    # The pair that is left alone tells which two were drawn, but for the middle one's cluster.
    apart = np.asarray(jnp.exp(coreset.log_weights)).round().astype(int)
    first_alone = np.mean(apart[:, 0] == 1)
    # {0, 1} (0 alone, and 1 with 3): first 0 then 1, or first 1 then 0; {1, 3} and {0, 3} else
    # have 0 and 1 together.
    expected = (1 / 10 + 1 / 5) / 3
    assert abs(first_alone - expected) < 4 * np.sqrt(expected / draws)
