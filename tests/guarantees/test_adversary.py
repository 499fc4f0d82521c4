"""The adversary against float64 brute force, closed forms and the symmetries of attention.

Nearly all of the time goes into compilation, so that tests share one program: six heads of up to 96
pairs, in blocks that do not divide them, with padding that is not finite and empty slots.
"""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import geometry
from coreset_jax._src.core.coreset import Coreset, SignedCoreset, gather
from coreset_jax.guarantees import adversary
from coreset_jax.guarantees.adversary import _adversary
from tests import brute_force
from tests.guarantees.padded import HEADS, padded_heads

COUNT, SLOTS, WIDTH = 104, 32, 6
OPTIONS = {"starts": 16, "steps": 32, "block_size": 40}


cache = partial(padded_heads, count=COUNT, slots=SLOTS)


def instance(seed, *, width=WIDTH):
    """96 Gaussian pairs off the origin in some directions, and 24 of them with uneven weights."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(0.5, 1.0, (*HEADS, 96, WIDTH)) * (np.arange(WIDTH) < width)
    values = rng.normal(-2.0, 1.0, (*HEADS, 96, 4))
    indices = np.argsort(rng.random((*HEADS, 96)), axis=-1)[..., :24]
    return cache(keys, values, indices, rng.choice([1.0, 2.0, 4.0], (*HEADS, 24)))


def search(seed, keys, values, coreset, *, rho, scale=1.0, lengths=96):
    rho = np.broadcast_to(np.float32(rho), HEADS)
    lengths = np.broadcast_to(np.int32(lengths), HEADS)
    known = {"rho": rho, "scale": scale, "lengths": lengths}
    return adversary(jax.random.key(seed), keys, values, coreset, **known, **OPTIONS)


def errors64(queries, keys, values, coreset, head, scale=1.0, length=96):
    """Float64 errors of queries [q, d] of one head."""
    kept = [array[head] for array in coreset[:4]]
    given = brute_force.attention(queries, keys[head][:length], values[head][:length], scale=scale)
    read = brute_force.attention(queries, *kept[:3], scale=scale)
    return np.linalg.norm(given - read, axis=-1)


def raw_radius(keys, rho, scale):
    keys = np.asarray(keys[:96], np.float64)
    return rho / (scale * np.linalg.norm(keys - keys.mean(axis=0), axis=-1).max())


def disc(radius, *, radii=100, angles=360):
    """Queries of the plane of the first two coordinates."""
    lengths, turns = np.meshgrid(
        np.linspace(0, radius, radii), np.linspace(0, 2 * np.pi, angles, endpoint=False)
    )
    plane = np.stack([lengths * np.cos(turns), lengths * np.sin(turns)], axis=-1).reshape(-1, 2)
    return np.pad(plane, [(0, 0), (0, WIDTH - 2)])


@pytest.mark.slow
def test_reaches_the_supremum_of_a_fine_grid_in_the_plane():
    found = instance(0, width=2)
    rho = np.array([[0.5, 2.0, 6.0], [20.0, 2.0, 6.0]])
    worst = search(0, *found, rho=rho, scale=0.7)
    for head in np.ndindex(HEADS):
        grid = disc(raw_radius(found[0][head], rho[head], 0.7))
        assert worst.error[head] >= 0.999 * errors64(grid, *found, head, 0.7).max()


@pytest.mark.slow
def test_finds_a_supremum_inside_the_ball():
    # Far out the outer keys, which both sides hold, outshout the inner ones, which only the source
    # holds; the error is largest on the way.
    cross = np.pad([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [(0, 0), (0, WIDTH - 2)])
    keys = np.concatenate([cross, np.tile(0.5 * cross, (23, 1))])
    values = np.zeros((96, 4))
    values[4::4, 0], values[5::4, 0] = 1, -1
    found, rho = cache(keys, values, np.arange(4), 1), 30.0
    worst = search(0, *found, rho=rho)
    grid = errors64(disc(rho, radii=3000, angles=8), *found, (0, 0))
    assert np.all(worst.error >= 0.999 * grid.max())
    assert np.all(np.linalg.norm(worst.query, axis=-1) < 0.5 * rho)


def test_finds_the_planted_direction():
    # Keys ±e_j, of which only ±e_1 have values, ±v, and a coreset that forgot them:
    # ||Attn - Attn'|| = |v| sinh(q_1) / sum_j cosh(q_j), largest at q = ±rho e_1.
    keys = np.tile(np.concatenate([np.eye(WIDTH), -np.eye(WIDTH)]), (8, 1))
    values = keys[:, :1] * np.array([3.0, 4.0, 0.0, 0.0])
    found = cache(keys, values, np.arange(24), 1)
    forgot = found[2]._replace(values=jnp.zeros_like(found[2].values))
    rho = np.array([[0.5, 1.0, 3.0]] * 2)
    worst = search(0, *found[:2], forgot, rho=rho)
    exact = 5 * np.sinh(rho) / (np.cosh(rho) + 5)
    np.testing.assert_allclose(worst.error, exact, rtol=1e-5)
    np.testing.assert_allclose(jnp.abs(worst.query[..., 0]), rho, rtol=1e-4)
    assert np.all(np.abs(worst.query[..., 1:]) < 0.02 * rho[..., None])


def test_the_error_is_attained_by_the_query_inside_the_ball():
    keys, values, coreset = instance(0)
    query_norm = np.array([[0.5, 1.0, 2.0], [4.0, 8.0, 16.0]], np.float32)
    known = {"query_norm": query_norm, "scale": 0.4, "lengths": np.full(HEADS, 96)}
    rho = jax.jit(geometry.standardize)(keys, values, **known).rho
    worst = search(1, keys, values, coreset, rho=rho, scale=0.4)
    chex.assert_shape(worst, [HEADS, (*HEADS, WIDTH), (*HEADS, 16), HEADS])
    np.testing.assert_allclose(worst.rho, rho, rtol=1e-6)
    for head in np.ndindex(HEADS):
        query = worst.query[head]
        error = errors64(query[None], keys, values, coreset, head, 0.4)[0]
        assert float(worst.error[head]) == pytest.approx(error, abs=2e-6)
        assert jnp.linalg.norm(query) <= query_norm[head] * (1 + 1e-6)
        assert jnp.max(worst.errors[head]) == worst.error[head]


def test_small_errors_are_exact_in_float32():
    # Every pair eight times with slightly different values, and the coreset has one of the eight.
    rng = np.random.default_rng(3)
    keys = np.tile(rng.normal(size=(12, WIDTH)), (8, 1))
    values = np.tile(rng.normal(10.0, 1.0, (12, 4)), (8, 1))
    found = cache(keys, values + 0.01 * rng.normal(size=values.shape), np.arange(12), 1)
    worst = search(0, *found, rho=1.0)
    for head in np.ndindex(HEADS):
        exact = errors64(worst.query[head][None], *found, head)[0]
        assert 2e-3 < exact < 2e-2
        assert float(worst.error[head]) == pytest.approx(exact, abs=2e-6)


def test_the_scale_is_the_coresets():
    keys, values, coreset = instance(1)
    carried = coreset._replace(scale=0.7)
    expected = search(0, keys, values, coreset, rho=1.0, scale=0.7)
    chex.assert_trees_all_equal(search(0, keys, values, carried, rho=1.0, scale=None), expected)
    with pytest.raises(ValueError, match=r"made for, 0\.7; got 0\.5"):
        search(0, keys, values, carried, rho=1.0, scale=0.5)


@pytest.mark.slow
def test_every_head_is_searched_at_its_own_scale():
    keys, values, coreset = instance(1)
    scales = np.linspace(0.3, 2.0, 6).reshape(HEADS).astype(np.float32)
    carried = coreset._replace(scale=scales)
    worst = search(0, keys, values, carried, rho=1.0, scale=None)
    for head in np.ndindex(HEADS):
        query = worst.query[head][None]
        exact = errors64(query, keys, values, coreset, head, scale=float(scales[head]))
        assert float(worst.error[head]) == pytest.approx(exact[0], rel=1e-3)


def test_grows_with_the_ball():
    keys, values, coreset = instance(1)
    same = [jnp.broadcast_to(array[:1, :1], array.shape) for array in (keys, values, *coreset[:4])]
    rho = np.reshape([0.125, 0.5, 1.0, 2.0, 4.0, 16.0], HEADS)
    errors = np.ravel(search(0, *same[:2], Coreset(*same[2:]), rho=rho).error)
    assert all(after >= 0.999 * before for before, after in itertools.pairwise(errors))


def test_more_search_finds_hardly_more():
    found = instance(2)
    rho = np.array([[1.0] * 3, [3.0] * 3])
    errors = np.stack([search(seed, *found, rho=rho).error for seed in range(8)])
    assert np.all(errors >= 0.999 * errors.max(axis=0))


def test_moves_and_scales_with_the_cache():
    keys, values, coreset = instance(5)
    plain = search(0, keys, values, coreset, rho=2.0)

    def moved(some_keys, some_values):
        return 3.0 * (some_keys + jnp.arange(6.0)), 7.0 * (some_values - 4.0)

    other_keys, other_values = moved(coreset.keys, coreset.values)
    other = coreset._replace(keys=other_keys, values=other_values)
    worst = search(0, *moved(keys, values), other, rho=2.0)
    np.testing.assert_allclose(worst.error, 7.0 * plain.error, rtol=1e-4)
    np.testing.assert_allclose(worst.query, plain.query / 3.0, rtol=0.05, atol=0.02)


def test_the_whole_cache_has_no_error():
    rng = np.random.default_rng(9)
    keys, values = rng.normal(size=(96, WIDTH)), rng.normal(size=(96, 4))
    found = cache(keys, values, np.arange(30), 1)
    # What is behind the length is no part of the source: here other pairs, and no numbers.
    worst = search(0, *found, rho=2.0, lengths=30)
    assert np.all((worst.error >= 0) & (worst.error < 1e-6))
    assert np.all(search(0, *found, rho=2.0, lengths=31).error > 1e-3)


@pytest.mark.slow
def test_normalizers_are_read_as_attend_reads_them():
    keys, values, coreset = instance(7)
    weights = jnp.exp(coreset.log_weights)
    log_weights = jnp.where(weights > 0, 0, -jnp.inf)
    coefficients = weights[..., None] * coreset.values
    signed = SignedCoreset(coreset.keys, coefficients, log_weights, coreset.indices, weights)
    plain = search(0, keys, values, coreset, rho=2.0)
    worst = search(0, keys, values, signed, rho=2.0)
    np.testing.assert_allclose(worst.error, plain.error, rtol=1e-4)

    # A denominator that vanishes somewhere in the ball leaves the error without bound.
    distances = jnp.linalg.norm(
        coreset.keys - jnp.mean(keys[..., :96, :], 2, keepdims=True), axis=-1
    )
    distances = jnp.where(weights > 0, distances, 0)
    furthest = jnp.arange(SLOTS) == jnp.argmax(distances, axis=-1, keepdims=True)
    signed = signed._replace(normalizers=jnp.where(furthest, -1, weights))
    worst = search(0, keys, values, signed, rho=20.0)
    assert np.all(np.isposinf(worst.error))
    assert np.all(np.isfinite(worst.query))


def test_a_head_that_is_not_finite_is_nan_and_the_others_are_not():
    keys, values, coreset = instance(10)
    keys = keys.at[0, 1, 5, 1].set(jnp.nan)
    coreset = coreset._replace(log_weights=coreset.log_weights.at[1, 2].set(jnp.nan))
    worst = search(0, keys, values, coreset, rho=1.0)
    expected = [[False, True, False], [False, False, True]]
    np.testing.assert_array_equal(jnp.isnan(worst.error), expected)


def test_scores_of_any_size_do_not_overflow():
    found = instance(12)
    worst = search(0, *found, rho=1e4)
    for head in np.ndindex(HEADS):
        exact = errors64(worst.query[head][None], *found, head)[0]
        assert float(worst.error[head]) == pytest.approx(exact, rel=1e-2)
        assert worst.error[head] > 0.1


@pytest.mark.slow
def test_half_precision_is_searched_in_float32_and_everything_may_be_traced():
    for dtype in (jnp.bfloat16, jnp.float16):
        halves = jax.tree.map(
            lambda array, dtype=dtype: array.astype(dtype) if array.dtype == jnp.float32 else array,
            instance(13),
        )
        worst = jax.eval_shape(
            lambda rng, cache, rho, rate: adversary(
                rng, *cache, rho=rho, learning_rate=rate, **OPTIONS
            ),
            jax.random.key(0),
            halves,
            2.0,
            1.0,
        )
        assert all(array.dtype == jnp.float32 for array in worst)


def test_equal_shapes_trace_once():
    keys, values, coreset = instance(14)
    search(0, keys, values, coreset, rho=1.0)
    traced = _adversary._cache_size()
    for seed in range(2):
        search(seed, keys + seed, values, coreset, rho=2.0 + seed, scale=0.5 + seed)
    assert _adversary._cache_size() == traced


@pytest.mark.slow
def test_memory_does_not_grow_with_scores():
    count, size, width = 131072, 16384, 64
    floats = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    coreset = Coreset(
        floats((size, width)),
        floats((size, width)),
        floats((size,)),
        jax.ShapeDtypeStruct((size,), jnp.int32),
    )
    rng = jax.eval_shape(jax.random.key, 0)
    ball = {"rho": 1.0, "query_norm": None, "queries": None, "scale": None, "lengths": None}
    arguments = rng, floats((count, width)), floats((count, width)), coreset, None, ball, 1.0
    lowered = _adversary.lower(*arguments, starts=256, steps=40, block_size=1024)
    memory = lowered.compile().memory_analysis().temp_size_in_bytes
    # The cache in unit form and half of it again; the scores would be 134 MB.
    assert memory < 1.5 * 4 * 2 * (count + size) * width + 16e6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keys": jnp.zeros((96, 5))}, "coreset"),
        ({"values": jnp.zeros((95, 4))}, "values"),
        ({"values": jnp.zeros((96, 3))}, "coreset"),
        ({"keys": jnp.zeros((2, 96, 6)), "values": jnp.zeros((2, 96, 4))}, "coreset"),
        ({"rho": 0.0}, "rho"),
        ({"rho": 1.0, "query_norm": 1.0}, "query_norm"),
        ({"query_norm": -1.0}, "query_norm"),
        ({"queries": jnp.zeros((3, 5))}, "queries"),
        ({"scale": 0.0}, "scale"),
        ({"lengths": jnp.asarray(97)}, "lengths"),
        ({"starts": 0}, "starts"),
        ({"steps": 2.5}, "steps"),
        ({"block_size": True}, "block_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_bad_input_is_refused(change, named):
    keys, values = jnp.ones((96, 6)), jnp.ones((96, 4))
    coreset = gather(keys, values, jnp.arange(24), jnp.zeros(24))
    arguments = {"keys": keys, "values": values, "coreset": coreset} | change
    with pytest.raises(ValueError, match=named):
        adversary(jax.random.key(0), **arguments)
