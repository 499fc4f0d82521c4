"""How much each head should have, and what size that makes, against the rules written out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import baselines, budgets
from coreset_jax._src.core import driver
from coreset_jax._src.core.coreset import SignedCoreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.geometry.kernel_geometry import balancing_geometry
from coreset_jax.budgets.energy import energy
from coreset_jax.budgets.pyramid import layer_budgets
from coreset_jax.budgets.split import count_largest, grid, split
from tests import brute_force
from tests.budgets.conftest import COUNT, HEADS, LAYERS

RNG = jax.random.key(0)
SIZE = 16


def test_pyramids_fall_in_a_line():
    for beta in (1.0, 2.0, 20.0):
        for layers in (1, 2, 5, 32):
            for count in (70, 1000):
                for size in (1, 2, 16, 64, 69):
                    found = layer_budgets(layers, size, count, beta)
                    assert sum(found) <= layers * size
                    assert sum(found) > layers * size - layers
                    assert 1 <= min(found) <= max(found) <= count
                    steps = -np.diff(found)
                    assert np.all(steps >= 0)
                    # A line, but for rounding.
                    assert np.ptp(steps) <= 2 if len(steps) else found == (size,)
                    if beta == 1.0:
                        assert set(found) == {size}
    assert layer_budgets(5, 64, 1000, 20.0)[-1] == int(64 / 20)
    assert layer_budgets(1, 7, 9, 20.0) == (7,)


def split_by_hand(shares, lengths, sizes, size):
    """Every head goes up, the one that is furthest behind its share first, while pairs last."""
    heads = len(shares)
    levels = [0] * heads
    shares = [share if np.isfinite(share) and share > 0 else 0.0 for share in shares]

    def pairs(levels):
        return sum(min(sizes[level], length) for level, length in zip(levels, lengths, strict=True))

    steps = [(head, step) for head in range(heads) for step in range(len(sizes) - 1)]
    steps.sort(key=lambda s: (-shares[s[0]] / math.sqrt(sizes[s[1]] * sizes[s[1] + 1]), s[1], s[0]))
    for head, step in steps:
        if levels[head] == step:
            higher = [level + (other == head) for other, level in enumerate(levels)]
            if pairs(higher) <= heads * size:
                levels = higher
    return levels


def test_split_agrees_with_the_rule_written_out():
    rng = np.random.default_rng(0)
    sizes = grid(20, 50, 0.3, 2.0, 3)
    assert sizes == (6, 8, 13, 20, 25, 31, 40)
    rule = functools.partial(split, sizes=sizes, size=20)
    last, two = (jax.jit(functools.partial(rule, axes=axes)) for axes in ((2,), (0, 2)))
    for _ in range(30):
        shares = np.exp(rng.standard_normal((2, 3, 4))).astype(np.float32)
        shares[0, 0, 1] = rng.choice([np.nan, 0.0, np.inf])
        lengths = rng.integers(1, 51, shares.shape, np.int32)
        together = np.asarray(last(shares, lengths))
        for row in np.ndindex(2, 3):
            expected = split_by_hand(shares[row], lengths[row], sizes, 20)
            np.testing.assert_array_equal(together[row], expected)
        # One budget for two axes, which need not be the last.
        together = np.asarray(two(shares, lengths))
        for row in range(3):
            expected = split_by_hand(shares[:, row].ravel(), lengths[:, row].ravel(), sizes, 20)
            np.testing.assert_array_equal(np.ravel(together[:, row]), expected)


def count_by_hand(scores, mean, most):
    """The largest of all heads one after another, as long as there are some and heads may."""
    counts = [0] * len(scores)
    ranked = [np.sort(row[np.isfinite(row)])[::-1][:most] for row in np.asarray(scores)]
    places = [
        (-row[rank], rank, head) for head, row in enumerate(ranked) for rank in range(len(row))
    ]
    for _, _, head in sorted(places)[: len(scores) * mean]:
        counts[head] += 1
    return counts


@pytest.mark.slow
def test_largest_scores_are_counted_as_by_hand():
    rng = np.random.default_rng(2)
    # Some are equal, and some are no numbers.
    scores = np.round(rng.standard_normal((2, 3, 4, 12)), 1).astype(np.float32)
    scores[0, 0, 1, :5], scores[1, 2, 3], scores[1, 1, 0, 3:] = np.nan, -np.inf, np.inf
    for mean, most in ((3, 12), (3, 4), (0, 12), (12, 12), (11, 12), (5, 0)):

        def count(scores, mean=mean, most=most):
            axes = (2,), (0, 2), (0, 1, 2), (1,)
            return [count_largest(scores, each, mean=mean, most=most) for each in axes]

        last, outer, every, middle = map(np.asarray, jax.jit(count)(scores))
        assert last.dtype == np.int32
        np.testing.assert_array_equal(
            every.ravel(), count_by_hand(scores.reshape(24, 12), mean, most)
        )
        for batch, row in np.ndindex(2, 3):
            expected = count_by_hand(scores[batch, row], mean, most)
            np.testing.assert_array_equal(last[batch, row], expected)
        for row in range(3):
            expected = count_by_hand(scores[:, row].reshape(8, 12), mean, most)
            np.testing.assert_array_equal(outer[:, row].ravel(), expected)
        for batch, head in np.ndindex(2, 4):
            expected = count_by_hand(scores[batch, :, head], mean, most)
            np.testing.assert_array_equal(middle[batch, :, head], expected)
    # Equal heads share alike, whatever their scores.
    alike = np.broadcast_to(scores[0, 0, 0], (4, 12))
    np.testing.assert_array_equal(count_largest(jnp.asarray(alike), (0,), mean=5, most=9), 5)


def attention_scores(keys, queries, scale, lengths):
    """Mean attention weights of the pairs, in float64."""
    scores = scale * np.einsum("...qd,...nd->...qn", np.float64(queries), np.float64(keys))
    inside = np.arange(COUNT) < lengths[..., None, None]
    masses = np.where(inside, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    return (masses / masses.sum(axis=-1, keepdims=True)).mean(axis=-2)


def test_adaptive_counts_the_largest_scores(cache):
    keys, values, queries = cache
    lengths = np.random.default_rng(1).integers(30, COUNT + 1, (LAYERS, HEADS))
    scores = attention_scores(keys, queries, 0.3, lengths)
    for axes in ((-1,), (0, 1)):
        budget = budgets.adaptive(baselines.uniform(), scale=0.3, axes=axes)
        found = jax.jit(
            lambda *arrays, budget=budget: budget.shares(
                driver.Cache(RNG, *arrays, scores=None, measured=False), SIZE, None
            )
        )(keys, values, lengths, queries)
        rows = scores.reshape(-1, HEADS * len(axes) * COUNT if len(axes) == 1 else scores.size)
        largest = np.argsort(-rows, axis=-1)[:, : rows.shape[-1] // COUNT * SIZE] // COUNT
        counts = [np.bincount(row, minlength=rows.shape[-1] // COUNT) for row in largest]
        np.testing.assert_allclose(np.ravel(found), 0.2 * SIZE + 0.8 * np.ravel(counts), rtol=1e-6)


def test_energy_is_that_of_attention_in_the_kernel_of_the_balance(cache):
    keys, values, _ = (jnp.asarray(array[0, 2]) for array in cache)
    rng = np.random.default_rng(5)
    rows = jnp.asarray(np.sort(rng.permutation(COUNT)[:SIZE]))
    signs = jnp.asarray(rng.uniform(0.5, 1.5, SIZE), jnp.float32)
    log_weights = jnp.asarray(rng.standard_normal(SIZE), jnp.float32)
    coreset = SignedCoreset(keys[rows], signs[:, None] * values[rows], log_weights, rows, signs)

    @jax.jit
    def measure(keys, values, coreset):
        head = Head.prepare(RNG, 0, keys, values, jnp.int32(COUNT), None, ragged=False)
        geometry = balancing_geometry(head.standardization)
        return energy(head, coreset, probes=40), geometry.keys(keys), geometry.radius, geometry

    found, unit, radius, geometry = measure(keys, values, coreset)
    unit, centers = np.asarray(unit, np.float64), np.asarray(unit, np.float64)[1::2]
    # Attention with the kernel's scores, of raw values: then in units of the geometry.
    outputs = [
        brute_force.attention(centers, *pairs, scale=float(radius), normalizers=normalizers)
        for pairs, normalizers in (
            ((unit, values), None),
            ((unit[rows], coreset.values, log_weights), signs),
        )
    ]
    gain = float(geometry.value_gain / geometry.standardization.value_radius)
    wrong = gain * (outputs[0] - outputs[1])
    np.testing.assert_allclose(found, np.sum(wrong**2, axis=1).mean(), rtol=1e-4)
