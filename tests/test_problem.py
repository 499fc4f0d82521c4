"""The reduction to unit keys and unit values: exact, invertible, invisible to attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import problem
from tests import brute_force

LEADING, COUNT, WIDTH, VALUE_WIDTH = (2, 3), 29, 6, 4
LENGTHS = np.array([[1, 2, 13], [COUNT - 1, COUNT, 20]])


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


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_unit_pairs_are_centered_and_the_longest_has_norm_one(cache, lengths):
    counts = np.full(LEADING, COUNT) if lengths is None else lengths
    reduction = problem.reduce(*padded(cache, counts), lengths=lengths)
    units = (
        problem.unit_keys(reduction, cache[0]),
        problem.unit_values(reduction, cache[1]),
    )
    for unit in map(np.asarray, units):
        for head in np.ndindex(*LEADING):
            valid = unit[head][: counts[head]]
            np.testing.assert_allclose(valid.mean(axis=0), 0, atol=3e-6)
            longest = 0.0 if counts[head] == 1 else 1.0
            np.testing.assert_allclose(np.linalg.norm(valid, axis=1).max(), longest, atol=1e-5)
    for unit, spread in zip(units, (reduction.key_spread, reduction.value_spread), strict=True):
        squares = np.sum(np.square(unit), axis=-1, where=inside(counts)[..., None])
        np.testing.assert_allclose(spread, np.sqrt(squares.sum(axis=-1) / counts), rtol=1e-5)


def test_padding_is_never_looked_at(cache):
    reduction = problem.reduce(*padded(cache, LENGTHS), lengths=LENGTHS)
    for head in np.ndindex(*LEADING):
        alone = problem.reduce(*(array[head][: LENGTHS[head]] for array in cache))
        for masked, expected in zip(reduction, alone, strict=True):
            np.testing.assert_allclose(masked[head], expected, rtol=1e-5, atol=1e-6)


def test_inverses_round_trip(cache, queries):
    reduction = problem.reduce(*cache)
    for name, array in (("keys", cache[0]), ("values", cache[1]), ("queries", queries)):
        there = getattr(problem, f"unit_{name}")
        back = getattr(problem, f"restore_{name}")
        np.testing.assert_allclose(
            back(reduction, there(reduction, array)), array, rtol=2e-6, atol=2e-6
        )
        np.testing.assert_allclose(
            there(reduction, back(reduction, array)), array, rtol=1e-4, atol=1e-4
        )


def attention_in_the_unit_problem(reduction, cache, queries, lengths):
    """In float64, read with scale 1 and taken back."""
    log_weights = np.where(inside(lengths), 0.0, -np.inf)
    units = [
        problem.unit_queries(reduction, queries),
        problem.unit_keys(reduction, cache[0]),
        problem.unit_values(reduction, cache[1]),
    ]
    outputs = brute_force.attention(*units, log_weights, scale=1.0)
    return problem.restore_values(reduction, outputs), log_weights


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("lengths", [np.full(LEADING, COUNT), LENGTHS])
def test_attention_does_not_see_the_reduction(cache, queries, lengths, scale, x64):
    cache, queries = brute_force.double(*cache), brute_force.double(queries)[0]
    reduction = problem.reduce(*cache, lengths=lengths, scale=scale)
    outputs, log_weights = attention_in_the_unit_problem(reduction, cache, queries, lengths)
    expected = brute_force.attention(queries, *cache, log_weights, scale=scale)
    np.testing.assert_allclose(outputs, expected, rtol=1e-12)


@pytest.mark.parametrize("filling", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("which", ["keys", "values", "both", "one pair"])
def test_degenerate_heads_reduce_to_something_harmless(cache, queries, which, filling):
    keys, values = (array[0, 0] for array in cache)
    if which in ("keys", "both"):
        keys = np.full_like(keys, filling)
    if which in ("values", "both"):
        values = np.full_like(values, filling)
    if which == "one pair":
        keys, values = keys[:1] * filling, values[:1]
    reduction = problem.reduce(keys, values)
    assert all(np.all(np.isfinite(leaf)) for leaf in reduction)
    assert reduction.rho >= 0
    for radius in (reduction.key_radius, reduction.value_radius):
        assert radius > 0
    for unit in (problem.unit_keys(reduction, keys), problem.unit_values(reduction, values)):
        assert np.all(np.linalg.norm(unit, axis=-1) <= 1 + 1e-6)
    outputs = brute_force.attention(
        problem.unit_queries(reduction, queries[0, 0]),
        problem.unit_keys(reduction, keys),
        problem.unit_values(reduction, values),
        scale=1.0,
    )
    np.testing.assert_allclose(
        problem.restore_values(reduction, outputs),
        brute_force.attention(queries[0, 0], keys, values),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_pairs_that_all_agree_have_radius_one(count):
    # The mean of equal numbers is not always exactly that number.
    keys, values = jnp.full((count, WIDTH), 0.1), jnp.full((count, VALUE_WIDTH), 0.3)
    reduction = problem.reduce(keys, values)
    assert reduction.key_radius == 1
    assert reduction.value_radius == 1
    assert reduction.key_spread == reduction.value_spread == 0


class TestRadius:
    """Where rho comes from."""

    def key_radius(self, keys):
        (keys,) = brute_force.double(keys)
        return np.linalg.norm(keys - keys.mean(axis=-2, keepdims=True), axis=-1).max(axis=-1)

    @pytest.mark.parametrize("rho", [2.5, np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])])
    def test_rho_is_taken_as_it_is(self, cache, queries, rho):
        reduction = problem.reduce(*cache, rho=rho, queries=queries)
        np.testing.assert_array_equal(reduction.rho, np.broadcast_to(rho, LEADING))

    @pytest.mark.parametrize("scale", [None, 0.3])
    @pytest.mark.parametrize("norm", [4.0, np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])])
    def test_query_norm_is_scaled_by_the_keys(self, cache, queries, norm, scale):
        reduction = problem.reduce(*cache, query_norm=norm, queries=queries, scale=scale)
        factor = WIDTH**-0.5 if scale is None else scale
        np.testing.assert_allclose(
            reduction.rho, factor * norm * self.key_radius(cache[0]), rtol=1e-5
        )

    def test_longest_sample_query_decides(self, cache, queries):
        reduction = problem.reduce(*cache, queries=queries)
        norms = np.linalg.norm(queries, axis=-1).max(axis=-1)
        expected = norms * self.key_radius(cache[0]) * WIDTH**-0.5
        np.testing.assert_allclose(reduction.rho, expected, rtol=1e-5)
        units = np.linalg.norm(problem.unit_queries(reduction, queries), axis=-1)
        np.testing.assert_allclose(units.max(axis=-1), reduction.rho, rtol=1e-5)

    def test_without_a_word_a_gaussian_query_is_meant(self, cache):
        np.testing.assert_allclose(problem.reduce(*cache).rho, self.key_radius(cache[0]), rtol=1e-5)

    def test_zero_samples_leave_a_positive_radius(self, cache, queries):
        assert np.all(problem.reduce(*cache, queries=0 * queries).rho > 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_reduced_in_float32(cache, dtype):
    halves = [jnp.asarray(array, dtype) for array in cache]
    reduction = problem.reduce(*halves)
    assert {leaf.dtype for leaf in reduction} == {jnp.dtype(jnp.float32)}
    expected = problem.reduce(*(array.astype(jnp.float32) for array in halves))
    for leaf, wide in zip(reduction, expected, strict=True):
        np.testing.assert_allclose(leaf, wide, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("which", [0, 1])
def test_a_sick_head_says_so_and_leaves_the_others_alone(cache, which):
    arrays = [array.copy() for array in cache]
    arrays[which][1, 2, 3, 0] = np.nan
    sick, well = problem.reduce(*arrays), problem.reduce(*cache)
    radius = (sick.key_radius, sick.value_radius)[which]
    assert np.isnan(radius[1, 2])
    healthy = np.ones(LEADING, bool)
    healthy[1, 2] = False
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[healthy], b[healthy]), sick, well)
