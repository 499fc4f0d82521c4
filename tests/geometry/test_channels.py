"""Wide channels are told from others, brought to their width, and no score changes by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import geometry
from coreset_jax._src.geometry.channels import channel_units
from tests.wide_pairs import turned

COUNT, WIDTH = 512, 16


@jax.jit
def units_of(keys, inside, queries=None):
    shares = inside / jnp.sum(inside)
    rows = jnp.where(inside[:, None], keys, 0)
    return channel_units(rows, shares @ rows, shares, queries)


def gaussian(seed=0):
    return np.random.default_rng(seed).standard_normal((COUNT, WIDTH))


def circle(pair, radius=300.0, base=10_000.0):
    """A bias in two channels, turned by rotary positions."""
    bias = np.zeros(WIDTH)
    bias[[pair, pair + WIDTH // 2]] = radius * np.cos(0.7), radius * np.sin(0.7)
    return turned(np.tile(bias, (COUNT, 1)), np.arange(COUNT), base)


def units(keys, queries=None, inside=None):
    inside = np.ones(COUNT, bool) if inside is None else inside
    queries = None if queries is None else jnp.asarray(queries, jnp.float32)
    return np.asarray(units_of(jnp.asarray(keys, jnp.float32), jnp.asarray(inside), queries))


@pytest.mark.parametrize("pair", [0, 3, 7])
def test_channels_that_turn_become_about_as_wide_as_others(pair):
    keys = gaussian() + circle(pair, base=500.0)
    order = np.random.default_rng(1).permutation(WIDTH)  # Whatever the order of channels.
    found = units(keys[:, order])[np.argsort(order)]
    wide = np.isin(np.arange(WIDTH), [pair, pair + WIDTH // 2])
    np.testing.assert_array_equal(found < 1, wide)
    mantissas, _ = np.frexp(found)
    np.testing.assert_array_equal(mantissas, 0.5)
    distances = np.abs(found * (keys - keys.mean(axis=0))).mean(axis=0)
    multiples = distances[wide] / np.median(distances[~wide])
    assert np.all((multiples > 1.2) & (multiples < 3.2))


def test_other_keys_stay_what_they_are():
    plain = gaussian()
    single, far, padded, constant = (plain.copy() for _ in range(4))
    single[:, 3] *= 50  # Nothing says that queries do not look there.
    far[7] *= 1000
    padded[:, 5:] = 0  # Heads that were padded to a round width.
    constant[:, 4:] = 300 + np.arange(WIDTH - 4)
    for keys in (plain, single, far, padded, constant, circle(0, 3.0) + plain, 0 * plain):
        np.testing.assert_array_equal(units(keys), 1)


def test_padding_and_factors_change_nothing():
    keys = gaussian() + circle(2)
    inside = np.arange(COUNT) < 400
    dirty = np.where(inside[:, None], keys, 1e6)
    found = units(dirty, inside=inside)
    assert np.sum(found < 1) == 2
    np.testing.assert_array_equal(units(np.where(inside[:, None], keys, 0), inside=inside), found)
    np.testing.assert_array_equal(units(2.0**20 * keys), units(keys))


def test_samples_say_whether_anybody_looks():
    keys = gaussian()
    keys[:, 3] *= 50
    queries = gaussian(1)[:100]
    np.testing.assert_array_equal(units(keys, queries), 1)
    queries[:, 3] /= 50
    narrowed = units(keys, queries)
    assert narrowed[3] < 1 / 5
    np.testing.assert_array_equal(np.delete(narrowed, 3), 1)
    # A single one is no proof: that it does not look there may be chance.
    queries = queries[:1]
    queries[:, 3] = 0
    assert units(keys, queries)[3] >= 0.5
    # Where a circle is looked at, it stays as wide as it counts.
    keys = gaussian() + circle(0, 60.0)
    blind, seen = gaussian(1)[:100], gaussian(2)[:100]
    blind[:, [0, WIDTH // 2]] = 0
    np.testing.assert_array_equal(units(keys, blind), units(keys))
    np.testing.assert_array_equal(units(keys, seen), 1)


def test_scores_are_what_they_were(x64):
    keys, queries = gaussian() + circle(1), gaussian(2)[:9]
    values = gaussian(3)
    found = geometry.standardize(keys, values, query_norm=2.0, scale=0.3, narrow=True)
    assert np.sum(np.asarray(found.key_units) < 1) == 2
    unit = np.asarray(found.unit_keys(keys))
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1).max(), 1)
    scores = np.asarray(found.unit_queries(queries)) @ unit.T
    np.testing.assert_allclose(scores, 0.3 * queries @ (keys - keys.mean(axis=0)).T, atol=1e-10)
    np.testing.assert_allclose(found.restore_keys(unit), keys, atol=1e-10)
    back = found.restore_queries(found.unit_queries(queries))
    np.testing.assert_allclose(back, queries, atol=1e-12)
    # Guarantees are for a ball of queries as they are: nobody narrows unasked.
    unasked = geometry.standardize(keys, values, query_norm=2.0).key_units
    np.testing.assert_array_equal(unasked, 1)
