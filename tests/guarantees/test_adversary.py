"""The adversary against float64 brute force, closed forms and the symmetries of attention.

Nearly all of the time goes into compilation, so that tests share shapes where they can.
"""

import itertools
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import problem
from coreset_jax.coreset import Coreset, gather, whole_cache
from coreset_jax.guarantees import adversary
from coreset_jax.guarantees.adversary import _adversary

search = partial(adversary, starts=16, steps=32)


def instance(seed, *, width=6, leading=()):
    """96 Gaussian pairs off the origin, and 24 of them with uneven weights."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(0.5, 1.0, (*leading, 96, width))
    values = rng.normal(-2.0, 1.0, (*leading, 96, 4))
    indices = np.argsort(rng.random((*leading, 96)), axis=-1)[..., :24]
    log_weights = rng.choice(np.log([1.0, 2.0, 4.0]), (*leading, 24))
    keys, values, log_weights = (jnp.asarray(a, jnp.float32) for a in (keys, values, log_weights))
    return keys, values, gather(keys, values, jnp.asarray(indices), log_weights)


def attend64(queries, pairs, scale):
    """Float64 attention of queries [q, d] over one head."""
    keys, values, log_weights = (
        np.asarray(array, np.float64) for array in (pairs.keys, pairs.values, pairs.log_weights)
    )
    scores = scale * np.asarray(queries, np.float64) @ keys.T + log_weights
    masses = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return masses @ values / np.sum(masses, axis=-1, keepdims=True)


def errors64(queries, keys, values, coreset, scale):
    source = attend64(queries, whole_cache(keys, values), scale)
    return np.linalg.norm(source - attend64(queries, coreset, scale), axis=-1)


def raw_radius(keys, rho, scale):
    keys = np.asarray(keys, np.float64)
    return rho / (scale * np.linalg.norm(keys - keys.mean(axis=0), axis=-1).max())


def disc(radius, *, radii=150, angles=720):
    lengths, turns = np.meshgrid(
        np.linspace(0, radius, radii), np.linspace(0, 2 * np.pi, angles, endpoint=False)
    )
    return np.stack([lengths * np.cos(turns), lengths * np.sin(turns)], axis=-1).reshape(-1, 2)


@pytest.mark.parametrize("rho", [0.5, 2.0, 6.0, 20.0])
def test_reaches_the_supremum_of_a_fine_grid_in_the_plane(rho):
    for seed in range(2):
        keys, values, coreset = instance(seed, width=2)
        worst = search(jax.random.key(seed), keys, values, coreset, rho=rho, scale=0.7)
        grid = errors64(disc(raw_radius(keys, rho, 0.7)), keys, values, coreset, 0.7)
        assert worst.error >= 0.999 * grid.max()


def test_finds_a_supremum_inside_the_ball():
    # Far out the outer keys, which both sides hold, outshout the inner ones, which only the source
    # holds; the error is largest on the way.
    cross = jnp.asarray([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    keys = jnp.concatenate([cross, jnp.tile(0.5 * cross, (23, 1))])
    values = jnp.zeros((96, 4)).at[4::4, 0].set(1.0).at[5::4, 0].set(-1.0)
    indices = jnp.full(24, -1).at[:4].set(jnp.arange(4))
    coreset = gather(keys, values, indices, jnp.zeros(24))
    rho = 30.0
    worst = search(jax.random.key(0), keys, values, coreset, rho=rho, scale=1.0)
    grid = errors64(disc(rho, radii=3000, angles=8), keys, values, coreset, 1.0)
    assert worst.error >= 0.999 * grid.max()
    assert jnp.linalg.norm(worst.query) < 0.5 * rho


@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0])
def test_finds_the_planted_direction(rho):
    # Keys ±e_j, of which only ±e_1 have values, ±v, and a coreset that forgot them:
    # ||Attn - Attn'|| = |v| sinh(q_1) / sum_j cosh(q_j), largest at q = ±rho e_1.
    keys = jnp.tile(jnp.concatenate([jnp.eye(6), -jnp.eye(6)]), (8, 1))
    values = keys[:, :1] * jnp.asarray([3.0, 4.0, 0.0, 0.0])
    coreset = gather(keys, jnp.zeros_like(values), jnp.arange(24), jnp.zeros(24))
    worst = search(jax.random.key(0), keys, values, coreset, rho=rho, scale=1.0)
    exact = 5 * math.sinh(rho) / (math.cosh(rho) + 5)
    assert float(worst.error) == pytest.approx(exact, rel=1e-5)
    np.testing.assert_allclose(jnp.abs(worst.query[0]), rho, rtol=1e-4)
    np.testing.assert_allclose(worst.query[1:], 0.0, atol=0.02 * rho)


def test_the_error_is_attained_by_the_query_inside_the_ball():
    keys, values, coreset = instance(0, leading=(2, 3))
    query_norm = jnp.asarray([[0.5, 1.0, 2.0], [4.0, 8.0, 16.0]])
    worst = search(jax.random.key(1), keys, values, coreset, query_norm=query_norm)
    chex.assert_shape(worst, [(2, 3), (2, 3, 6), (2, 3, 16), (2, 3)])
    rho = problem.reduce(keys, values, query_norm=query_norm).rho
    np.testing.assert_allclose(worst.rho, rho, rtol=1e-6)
    for head in np.ndindex(2, 3):
        pairs = jax.tree.map(lambda array, head=head: array[head], coreset)
        query = worst.query[head]
        error = errors64(query[None], keys[head], values[head], pairs, 6**-0.5)[0]
        assert float(worst.error[head]) == pytest.approx(error, abs=2e-6)
        assert jnp.linalg.norm(query) <= query_norm[head] * (1 + 1e-6)
        assert jnp.max(worst.errors[head]) == worst.error[head]


def test_small_errors_are_exact_in_float32():
    # Every pair eight times with slightly different values, and the coreset has one of the eight.
    # The last block is a short one.
    rng = np.random.default_rng(3)
    keys = jnp.tile(jnp.asarray(rng.normal(size=(512, 16)), jnp.float32), (8, 1))
    values = np.tile(rng.normal(10.0, 1.0, (512, 16)), (8, 1))
    values = jnp.asarray(values + 0.01 * rng.normal(size=values.shape), jnp.float32)
    coreset = gather(keys, values, jnp.arange(512), jnp.zeros(512))
    worst = search(jax.random.key(0), keys, values, coreset, rho=1.0, block_size=300)
    exact = errors64(worst.query[None], keys, values, coreset, 0.25)[0]
    assert 5e-4 < exact < 5e-3
    assert float(worst.error) == pytest.approx(exact, abs=1e-6)


def test_grows_with_the_ball():
    keys, values, coreset = instance(1)
    errors = [
        float(search(jax.random.key(0), keys, values, coreset, rho=rho, scale=1.0).error)
        for rho in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    ]
    assert all(after >= 0.999 * before for before, after in itertools.pairwise(errors))


def test_more_search_finds_hardly_more():
    for seed in range(3):
        keys, values, coreset = instance(seed)
        for rho in (1.0, 3.0):
            known = {"rho": rho, "scale": 1.0}
            once = search(jax.random.key(0), keys, values, coreset, **known)
            more = adversary(
                jax.random.key(1), keys, values, coreset, starts=256, steps=100, **known
            )
            assert once.error >= 0.999 * more.error


def test_moves_and_scales_with_the_cache():
    keys, values, coreset = instance(5)
    plain = search(jax.random.key(0), keys, values, coreset, rho=2.0, scale=1.0)

    def moved(some_keys, some_values):
        return 3.0 * (some_keys + jnp.arange(6.0)), 7.0 * (some_values - 4.0)

    other_keys, other_values = moved(coreset.keys, coreset.values)
    other = coreset._replace(keys=other_keys, values=other_values)
    worst = search(jax.random.key(0), *moved(keys, values), other, rho=2.0, scale=1.0)
    np.testing.assert_allclose(worst.error, 7.0 * plain.error, rtol=1e-4)
    np.testing.assert_allclose(worst.query, plain.query / 3.0, rtol=0.05, atol=0.01)


def test_the_whole_cache_has_no_error_and_padding_no_part():
    keys, values, coreset = instance(9)

    def padded(array, fill, count=104):
        width = [(0, count - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, width, constant_values=fill)

    find = partial(
        search,
        jax.random.key(0),
        padded(keys, jnp.nan),
        padded(values, jnp.inf),
        rho=2.0,
        lengths=jnp.asarray(96),
    )
    whole = find(whole_cache(padded(keys, jnp.nan), padded(values, jnp.inf), jnp.asarray(96)))
    assert 0 <= whole.error < 1e-6
    slots = Coreset(
        padded(coreset.keys, 0.0),
        padded(coreset.values, 0.0),
        padded(coreset.log_weights, -jnp.inf),
        padded(coreset.indices, -1),
    )
    plain = search(jax.random.key(0), keys, values, coreset, rho=2.0, scale=6**-0.5)
    np.testing.assert_allclose(find(slots).error, plain.error, rtol=1e-4)


def test_normalizers_are_read_as_attend_reads_them():
    keys, values, coreset = instance(7)
    weights = jnp.exp(coreset.log_weights)
    refitted = coreset._replace(
        values=weights[:, None] * coreset.values,
        log_weights=jnp.zeros_like(coreset.log_weights),
        normalizers=weights,
    )
    plain = search(jax.random.key(0), keys, values, coreset, rho=2.0, scale=1.0)
    worst = search(jax.random.key(0), keys, values, refitted, rho=2.0, scale=1.0)
    np.testing.assert_allclose(worst.error, plain.error, rtol=1e-4)

    # A denominator that vanishes somewhere in the ball leaves the error without bound.
    furthest = jnp.argmax(jnp.linalg.norm(coreset.keys - jnp.mean(keys, axis=0), axis=-1))
    refitted = refitted._replace(normalizers=weights.at[furthest].set(-1.0))
    worst = search(jax.random.key(0), keys, values, refitted, rho=20.0, scale=1.0)
    assert jnp.isposinf(worst.error)
    assert jnp.all(jnp.isfinite(worst.query))


def test_a_head_that_is_not_finite_is_nan_and_the_others_are_not():
    keys, values, coreset = instance(10, leading=(2, 3))
    keys = keys.at[0, 1, 5, 1].set(jnp.nan)
    log_weights = coreset.log_weights.at[1, 2].set(jnp.nan)
    coreset = coreset._replace(log_weights=log_weights)
    worst = search(jax.random.key(0), keys, values, coreset, query_norm=jnp.ones((2, 3)))
    expected = [[False, True, False], [False, False, True]]
    np.testing.assert_array_equal(jnp.isnan(worst.error), expected)


def test_scores_of_any_size_do_not_overflow():
    keys, values, coreset = instance(12)
    worst = search(jax.random.key(0), keys, values, coreset, rho=1e4, scale=1.0)
    exact = errors64(worst.query[None], keys, values, coreset, 1.0)[0]
    assert float(worst.error) == pytest.approx(exact, rel=1e-2)
    assert worst.error > 0.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_searched_in_float32_and_everything_may_be_traced(dtype):
    halves = jax.tree.map(
        lambda array: array.astype(dtype) if array.dtype == jnp.float32 else array, instance(13)
    )
    worst = jax.eval_shape(
        lambda rng, cache, rho, rate: search(rng, *cache, rho=rho, learning_rate=rate),
        jax.random.key(0),
        halves,
        2.0,
        1.0,
    )
    assert all(array.dtype == jnp.float32 for array in worst)


def test_equal_shapes_trace_once():
    keys, values, coreset = instance(14)
    search(jax.random.key(0), keys, values, coreset, rho=1.0, scale=1.0)
    traced = _adversary._cache_size()
    for seed, rho in enumerate((2.0, 3.5)):
        search(
            jax.random.key(seed),
            keys + seed,
            values,
            coreset,
            rho=rho,
            scale=0.5 + seed,
            learning_rate=0.5,
        )
    assert _adversary._cache_size() == traced


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
    arguments = rng, floats((count, width)), floats((count, width)), coreset, 1.0
    lowered = _adversary.lower(
        *arguments, None, None, None, None, 1.0, starts=256, steps=40, block_size=1024
    )
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
    keys, values, coreset = instance(15)
    arguments = {"keys": keys, "values": values, "coreset": coreset} | change
    with pytest.raises(ValueError, match=named):
        adversary(jax.random.key(0), **arguments)
