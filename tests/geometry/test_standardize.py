"""The change to unit keys and unit values: exact, invertible, invisible to attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import geometry
from tests import brute_force

LEADING, COUNT, WIDTH, VALUE_WIDTH = (2, 3), 29, 6, 4
FULL = np.full(LEADING, COUNT)
LENGTHS = np.array([[1, 2, 13], [COUNT - 1, COUNT, 20]])
RADII = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)

standardize = jax.jit(geometry.standardize)


@jax.jit
def units(standardization, keys, values, queries):
    """Everything in unit problem, and back again."""
    there = {
        "keys": standardization.unit_keys(keys),
        "values": standardization.unit_values(values),
        "queries": standardization.unit_queries(queries),
    }
    back = {name: getattr(standardization, f"restore_{name}")(unit) for name, unit in there.items()}
    again = {name: getattr(standardization, f"unit_{name}")(array) for name, array in back.items()}
    return there, back, again


@pytest.fixture(scope="module")
def cache():
    rng = np.random.default_rng(1)
    keys = 3 * rng.standard_normal((*LEADING, COUNT, WIDTH)) + 5 * rng.standard_normal(WIDTH)
    values = 0.1 * rng.standard_normal((*LEADING, COUNT, VALUE_WIDTH)) - 2
    return keys.astype(np.float32), values.astype(np.float32)


@pytest.fixture(scope="module")
def queries():
    rng = np.random.default_rng(2)
    return rng.standard_normal((*LEADING, 5, WIDTH)).astype(np.float32)


def inside(lengths):
    return np.arange(COUNT) < np.asarray(lengths)[..., None]


def padded(arrays, lengths, filling=np.nan):
    mask = inside(lengths)[..., None]
    return tuple(np.where(mask, array, np.float32(filling)) for array in arrays)


def test_unit_pairs_are_centered_and_the_longest_has_norm_one(cache, queries):
    for lengths in (FULL, LENGTHS):
        found = standardize(*padded(cache, lengths), lengths=lengths)
        there = units(found, *cache, queries)[0]
        for name, spread in (("keys", found.key_spread), ("values", found.value_spread)):
            unit = np.asarray(there[name])
            for head in np.ndindex(*LEADING):
                valid = unit[head][: lengths[head]]
                np.testing.assert_allclose(valid.mean(axis=0), 0, atol=3e-6)
                longest = 0.0 if lengths[head] == 1 else 1.0
                norms = np.linalg.norm(valid, axis=1)
                np.testing.assert_allclose(norms.max(), longest, atol=1e-5)
            squares = np.sum(np.square(unit), axis=-1, where=inside(lengths)[..., None])
            expected = np.sqrt(squares.sum(axis=-1) / lengths)
            np.testing.assert_allclose(spread, expected, rtol=1e-5)
    # Without lengths all pairs are valid.
    whole, plain = standardize(*cache, lengths=FULL), standardize(*cache)
    for ours, expected in zip(whole, plain, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_padding_is_never_looked_at(cache):
    poisoned = standardize(*padded(cache, LENGTHS), lengths=LENGTHS)
    clean = standardize(*padded(cache, LENGTHS, 1e30), lengths=LENGTHS)
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
    # A head that is cut to its length is what it was with padding.
    for head in ((0, 2), (1, 2)):
        alone = standardize(*(array[head][: LENGTHS[head]] for array in cache))
        for masked, expected in zip(poisoned, alone, strict=True):
            np.testing.assert_allclose(masked[head], expected, rtol=1e-5, atol=1e-6)


def test_inverses_round_trip(cache, queries):
    arrays = {"keys": cache[0], "values": cache[1], "queries": queries}
    there, back, again = units(standardize(*cache), *cache, queries)
    for name, array in arrays.items():
        np.testing.assert_allclose(back[name], array, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(again[name], there[name], rtol=1e-4, atol=1e-4)


def test_attention_does_not_see_the_change(cache, queries, x64):
    """In float64, read with scale 1 and taken back."""
    cache, (queries,) = brute_force.double(*cache), brute_force.double(queries)
    for scale in (WIDTH**-0.5, 0.7):
        for lengths in (FULL, LENGTHS):
            found = standardize(*cache, lengths=lengths, scale=scale)
            there = units(found, *cache, queries)[0]
            log_weights = np.where(inside(lengths), 0.0, -np.inf)
            order = (there[name] for name in ("queries", "keys", "values"))
            outputs = brute_force.attention(*order, log_weights, scale=1.0)
            outputs = outputs * found.value_radius[..., None, None]
            outputs += found.value_center[..., None, :]
            expected = brute_force.attention(queries, *cache, log_weights, scale=scale)
            np.testing.assert_allclose(outputs, expected, rtol=1e-12)
    np.testing.assert_array_equal(standardize(*cache).scale, WIDTH**-0.5)


def test_degenerate_heads_become_something_harmless(cache, queries):
    """Heads of one key, of one value, of both, and of a single pair; 0, small and large."""
    fillings = np.float32([0.0, 0.1, 1e4])
    keys, values = (np.tile(array[:1, :1], (4, 3, 1, 1)) for array in cache)
    for column, filling in enumerate(fillings):
        keys[[0, 2], column] = filling
        values[[1, 2], column] = filling
        keys[3, column] *= filling
    lengths = np.full((4, 3), COUNT)
    lengths[3] = 1
    asked = np.broadcast_to(queries[0, 0], (4, 3, *queries.shape[2:]))
    found = standardize(keys, values, lengths=lengths)
    there, _, _ = units(found, keys, values, asked)
    assert all(np.all(np.isfinite(leaf)) for leaf in found)
    assert np.all(found.rho >= 0)
    assert np.all(found.key_radius > 0)
    assert np.all(found.value_radius > 0)
    log_weights = np.where(inside(lengths), 0.0, -np.inf)
    for name in ("keys", "values"):
        norms = np.linalg.norm(there[name], axis=-1)
        assert np.all(norms[inside(lengths)] <= 1 + 1e-6)
    order = (there[name] for name in ("queries", "keys", "values"))
    outputs = brute_force.attention(*order, log_weights, scale=1.0)
    np.testing.assert_allclose(
        outputs * found.value_radius[..., None, None] + found.value_center[..., None, :],
        brute_force.attention(asked, keys, values, log_weights),
        rtol=1e-5,
        atol=1e-6,
    )


def test_pairs_that_all_agree_have_radius_one():
    # The mean of equal numbers is not always exactly that number.
    keys, values = np.full((3, 1000, WIDTH), 0.1), np.full((3, 1000, VALUE_WIDTH), 0.3)
    found = standardize(np.float32(keys), np.float32(values), lengths=np.array([1, 3, 1000]))
    for radius in (found.key_radius, found.value_radius):
        np.testing.assert_array_equal(radius, 1)
    for spread in (found.key_spread, found.value_spread):
        np.testing.assert_array_equal(spread, 0)


def test_where_the_radius_comes_from(cache, queries):
    (keys,) = brute_force.double(cache[0])
    centered = keys - keys.mean(axis=-2, keepdims=True)
    key_radius = np.linalg.norm(centered, axis=-1).max(axis=-1)

    def rho(**options):
        found = standardize(*cache, **options)
        np.testing.assert_allclose(
            found.rho, found.scale * found.key_radius * found.query_norm, rtol=1e-6
        )
        return found.rho

    # A radius is taken as it is, whatever the samples.
    for given in (2.5, RADII):
        found = rho(rho=given, queries=queries)
        np.testing.assert_array_equal(found, np.broadcast_to(np.float32(given), LEADING))
    # A norm is scaled by the keys.
    for norm in (4.0, RADII):
        found = rho(query_norm=norm, queries=queries, scale=0.3)
        np.testing.assert_allclose(found, 0.3 * norm * key_radius, rtol=1e-5)
        found = rho(query_norm=norm, queries=queries)
        np.testing.assert_allclose(found, norm * key_radius * WIDTH**-0.5, rtol=1e-5)
    # Of samples the longest decides.
    found = rho(queries=queries)
    norms = np.linalg.norm(queries, axis=-1).max(axis=-1)
    np.testing.assert_allclose(found, norms * key_radius * WIDTH**-0.5, rtol=1e-5)
    unit = units(standardize(*cache, queries=queries), *cache, queries)[0]["queries"]
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1).max(axis=-1), found, rtol=1e-5)
    # Samples of zeros leave a positive radius, and without a word a Gaussian query is meant.
    assert np.all(rho(queries=0 * queries) > 0)
    np.testing.assert_allclose(rho(), key_radius, rtol=1e-5)


def test_a_traced_radius_that_is_none_says_so(cache):
    radii = np.array([[1.0, np.nan, -1.0], [np.inf, 0.0, 2.0]], np.float32)
    none = ~(np.isfinite(radii) & (radii > 0))
    np.testing.assert_array_equal(np.isnan(standardize(*cache, rho=radii).query_norm), none)


def test_half_precision_is_standardized_in_float32(cache):
    for dtype in (jnp.bfloat16, jnp.float16):
        halves = [jnp.asarray(array, dtype) for array in cache]
        found = standardize(*halves)
        assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.float32)}
        expected = standardize(*(np.asarray(array, np.float32) for array in halves))
        for leaf, wide in zip(found, expected, strict=True):
            np.testing.assert_allclose(leaf, wide, rtol=1e-6, atol=1e-7)


def test_a_sick_head_says_so_and_leaves_the_others_alone(cache):
    well = standardize(*cache)
    healthy = np.ones(LEADING, bool)
    healthy[1, 2] = False
    for which in (0, 1):
        arrays = [array.copy() for array in cache]
        arrays[which][1, 2, 3, 0] = np.nan
        sick = standardize(*arrays)
        radius = (sick.key_radius, sick.value_radius)[which]
        assert np.isnan(radius[1, 2])
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[healthy], b[healthy]), sick, well)
