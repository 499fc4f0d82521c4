"""Pivots: heavy pairs are held, and the others reach what a float64 factor says they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax._src.fit import pivots
from coreset_jax._src.geometry.kernels import gaussian_kernel

RNG = jax.random.key(0)


def residuals(keys, picked):
    """What pivots leave of the diagonal of their Gaussian kernel, in float64."""
    keys = np.asarray(keys, np.float64)
    squares = np.sum((keys[:, None] - keys[None]) ** 2, axis=-1)
    kernel = np.exp(-squares / 2)
    corner = kernel[np.ix_(picked, picked)] + 1e-10 * np.eye(len(picked))
    return 1 - np.sum(kernel[picked] * np.linalg.solve(corner, kernel[picked]), axis=0)


def certain_by_hand(importance, size):
    """Those of a threshold sample that are held for certain, one after another."""
    shares = np.exp(np.asarray(importance, np.float64))
    held = np.zeros(len(shares), bool)
    for index in np.argsort(-shares, kind="stable"):
        left = size - held.sum()
        if held.sum() >= 7 * size // 8 or shares[index] * left < shares[~held].sum():
            break
        held[index] = True
    return held


def test_heavy_pairs_are_those_of_a_threshold_sample():
    spreads = np.array([0.0, 0.5, 1.0, 3.0, 8.0])
    for size in (1, 4, 10, 40):
        importance = np.random.default_rng(size).standard_normal((5, 60)).astype(np.float32)
        # Heads with spreads of their own; with the largest, more are certain than may be held.
        importance *= spreads[:, None].astype(np.float32)
        heavy = jax.jit(jax.vmap(lambda each, size=size: pivots.heavy_pairs(each, size)))
        found = np.asarray(heavy(importance))
        for ours, head in zip(found, importance, strict=True):
            np.testing.assert_array_equal(ours, certain_by_hand(head, size))
    assert found[-1].sum() == 35
    assert np.all(found[:3].sum(axis=1) < 35)


def test_padding_and_what_is_beside_giants_are_not_heavy():
    heavy = jax.jit(lambda importance: pivots.heavy_pairs(importance, 16))
    giant = np.zeros(60, np.float32)
    giant[5] = 150
    np.testing.assert_array_equal(np.flatnonzero(heavy(giant)), [5])
    padded = np.where(np.arange(60) < 3, np.arange(60), -np.inf).astype(np.float32)
    assert not np.any(heavy(padded)[3:])


@functools.partial(jax.jit, static_argnames=("size", "block"))
def _draw(rng, keys, importance, target, *, size, block):
    uniforms = jax.random.uniform(rng, (8, block + len(keys)), minval=1e-30)

    def kernel_rows(drawn):
        return gaussian_kernel(keys[drawn], keys)

    return pivots.cholesky_pivots(uniforms, kernel_rows, importance, target, size=size, block=block)


def draw(keys, importance, target, size, seed=0, block=8):
    """The pivots, -1 behind the last."""
    given = (np.float32(keys), np.float32(importance), np.int32(target))
    drawn, rounds = _draw(jax.random.key(seed), *given, size=size, block=block)
    assert 1 <= rounds <= 64
    drawn = np.asarray(drawn)
    return np.where(drawn < len(keys), drawn, -1)


@pytest.mark.slow
def test_pivots_are_distinct_and_reach_further_than_a_sample():
    keys = np.random.default_rng(1).standard_normal((300, 3))
    ours, samples = [], []
    for seed in range(8):
        drawn = draw(keys, np.zeros(300), 40, 40, seed)
        assert len(set(drawn.tolist())) == 40
        assert drawn.min() >= 0
        ours.append(residuals(keys, drawn).sum())
        sample = np.random.default_rng(seed).permutation(300)[:40]
        samples.append(residuals(keys, sample).sum())
    # One at a time, in float64, with the same probabilities.
    exact = [residuals(keys, one_by_one(keys, 40, seed)).sum() for seed in range(8)]
    assert np.mean(ours) < 0.95 * np.mean(samples)
    assert np.mean(ours) < 1.05 * np.mean(exact)


def one_by_one(keys, size, seed):
    rng, picked = np.random.default_rng(seed), []
    for _ in range(size):
        left = np.ones(len(keys)) if not picked else np.maximum(residuals(keys, picked), 0)
        left[picked] = 0
        picked.append(int(rng.choice(len(keys), p=left / left.sum())))
    return picked


def test_copies_are_not_drawn_twice():
    keys = np.repeat(np.random.default_rng(2).standard_normal((20, 4)), 10, axis=0)
    drawn = draw(keys, np.zeros(200), 32, 32, block=16)
    held = drawn[drawn >= 0]
    assert sorted((held // 10).tolist()) == list(range(20))
    np.testing.assert_array_equal(drawn[20:], -1)


def test_near_copies_leave_no_more_than_their_distance():
    """Corners of a block that hardly can be solved: rounding must not be drawn for residuals."""
    for apart in (1e-4, 5e-4, 1e-3, 1e-2, 0.1):
        rng = np.random.default_rng(0)
        centers = rng.standard_normal((8, 4))
        keys = centers[rng.integers(0, 8, 200)] + apart * rng.standard_normal((200, 4))
        picked = draw(keys, np.zeros(200), 32, 32, block=16)
        found = picked[picked >= 0]
        assert len(set(found)) == len(found) >= 8
        # Copies to rounding are no more than one pivot; a thousandth apart, a few are told apart.
        assert apart > 5e-4 or len(found) == 8
        assert apart > 1e-3 or len(found) <= 12
        # One pivot a cluster leaves no more than the squares of the distances in it.
        assert residuals(keys, found).max() <= 40 * apart**2 + 1e-3


def test_what_has_no_importance_is_not_drawn():
    keys = np.random.default_rng(3).standard_normal((200, 4))
    importance = np.where(np.arange(200) % 2 == 0, 0.0, -np.inf)
    drawn = draw(keys, importance, 20, 32, block=16)
    assert np.all(drawn[:20] % 2 == 0)
    np.testing.assert_array_equal(drawn[20:], -1)


def test_keys_far_out_are_kept_with_weight_one():
    keys, values = jax.random.normal(RNG, (2, 400, 8))
    far = jnp.array([7, 123, 399])
    keys = keys.at[far].mul(8)
    coreset, info = cj.pivoted().with_info(RNG, keys, values, size=20)
    assert {7, 123, 399} <= set(np.asarray(coreset.indices).tolist())
    weights = np.exp(coreset.log_weights)
    np.testing.assert_array_equal(weights[jnp.searchsorted(coreset.indices, far)], 1)
    assert int(info.heavy) == np.sum(weights == 1) >= 3


@pytest.mark.parametrize("size", [1, 15, 199])
def test_any_size_is_a_weighted_subset(size):
    keys, values = np.random.default_rng(4).standard_normal((2, 3, 200, 5)).astype(np.float32)
    lengths = np.array([200, 70, 1])
    coreset = cj.pivoted()(RNG, keys, values, size=size, lengths=lengths)
    for head, length in enumerate(lengths):
        kept = min(size, length)
        indices = np.asarray(coreset.indices[head])
        np.testing.assert_array_equal(indices[kept:], -1)
        assert np.all(np.diff(indices[:kept]) > 0)
        assert indices[kept - 1] < length
        np.testing.assert_array_equal(coreset.keys[head][:kept], keys[head][indices[:kept]])
        np.testing.assert_allclose(np.exp(coreset.log_weights[head]).sum(), length, rtol=1e-6)
    # Padding may hold anything, and a NaN among the pairs says so.
    dirty, broken = keys.copy(), values.copy()
    dirty[1, 70:], broken[0, 3, 1] = np.nan, np.nan
    found = cj.pivoted()(RNG, dirty, values, size=size, lengths=lengths)
    jax.tree.map(np.testing.assert_array_equal, found, coreset)
    found = cj.pivoted()(RNG, keys, broken, size=size, lengths=lengths)
    sick = np.isnan(found.log_weights)
    np.testing.assert_array_equal(sick, np.arange(3)[:, None] == np.zeros(size))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="rho"):
        cj.pivoted(rho=-1.0)
    keys, values = jnp.ones((2, 2, 10, 4))
    with pytest.raises(ValueError, match="kernel_radius"):
        cj.pivoted(kernel_radius=jnp.ones(3))(RNG, keys, values, size=2)
