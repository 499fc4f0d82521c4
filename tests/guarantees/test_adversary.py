"""The adversary against float64 brute force, closed forms and the symmetries of attention."""

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


def instance(seed, *, count=96, width=5, value_width=4, size=24, leading=()):
    """Gaussian pairs off the origin, and a subset of them with uneven weights."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(0.5, 1.0, (*leading, count, width))
    values = rng.normal(-2.0, 1.0, (*leading, count, value_width))
    indices = np.sort(rng.permuted(np.broadcast_to(np.arange(count), (*leading, count)), axis=-1))
    indices = np.argsort(rng.random((*leading, count)), axis=-1)[..., :size]
    log_weights = rng.choice(np.log([1.0, 2.0, 4.0]), (*leading, size))
    keys, values, log_weights = (jnp.asarray(a, jnp.float32) for a in (keys, values, log_weights))
    return keys, values, gather(keys, values, jnp.asarray(indices), log_weights)


def attend64(queries, pairs, scale):
    """Float64 attention of queries [q, d] over one head."""
    keys, values, log_weights = (
        np.asarray(array, np.float64) for array in (pairs.keys, pairs.values, pairs.log_weights)
    )
    normalizers = 1.0 if pairs.normalizers is None else np.asarray(pairs.normalizers, np.float64)
    scores = scale * np.asarray(queries, np.float64) @ keys.T + log_weights
    masses = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return masses @ values / np.sum(masses * normalizers, axis=-1, keepdims=True)


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
    for seed in range(3):
        keys, values, coreset = instance(seed, width=2)
        worst = search(jax.random.key(seed), keys, values, coreset, rho=rho, scale=0.7)
        grid = errors64(disc(raw_radius(keys, rho, 0.7)), keys, values, coreset, 0.7)
        assert worst.error >= 0.999 * grid.max()


def test_finds_a_supremum_inside_the_ball():
    # Far out along the axis the outer keys, which both sides hold, outshout the inner ones, which
    # only the source holds; the error is largest on the way.
    keys = jnp.asarray([[1.0, 0.0], [-1.0, 0.0]] + [[0.5, 0.0]] * 8 + [[-0.5, 0.0]] * 8)
    values = jnp.asarray([[0.0], [0.0]] + [[1.0]] * 8 + [[-1.0]] * 8)
    coreset = gather(keys, values, jnp.asarray([0, 1]), jnp.zeros(2))
    rho = 30.0
    worst = search(jax.random.key(0), keys, values, coreset, rho=rho, scale=1.0)
    grid = errors64(disc(rho, radii=3000, angles=8), keys, values, coreset, 1.0)
    assert worst.error >= 0.999 * grid.max()
    assert jnp.linalg.norm(worst.query) < 0.5 * rho


@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0])
def test_finds_the_planted_direction(rho):
    # Keys ±e_j, of which only ±e_1 have values, ±v, and a coreset that forgot them:
    # ||Attn - Attn'|| = |v| sinh(q_1) / sum_j cosh(q_j), largest at q = ±rho e_1.
    width = 6
    keys = jnp.concatenate([jnp.eye(width), -jnp.eye(width)])
    values = jnp.zeros((2 * width, 2)).at[0].set([3.0, 4.0]).at[width].set([-3.0, -4.0])
    coreset = whole_cache(keys, values)._replace(values=jnp.zeros_like(values))
    worst = search(jax.random.key(0), keys, values, coreset, rho=rho, scale=0.5)
    exact = 5 * math.sinh(rho) / (math.cosh(rho) + width - 1)
    assert float(worst.error) == pytest.approx(exact, rel=1e-5)
    np.testing.assert_allclose(jnp.abs(worst.query[0]), rho / 0.5, rtol=1e-4)
    np.testing.assert_allclose(worst.query[1:], 0.0, atol=0.02 * rho)


def test_the_error_is_attained_by_the_query_inside_the_ball():
    keys, values, coreset = instance(0, leading=(2, 3))
    rho = jnp.asarray([[0.5, 1.0, 2.0], [4.0, 8.0, 16.0]])
    worst = search(jax.random.key(1), keys, values, coreset, rho=rho)
    chex.assert_shape(worst, [(2, 3), (2, 3, 5), (2, 3, 16), (2, 3)])
    np.testing.assert_array_equal(worst.rho, rho)
    for head in np.ndindex(2, 3):
        pairs = jax.tree.map(lambda array, head=head: array[head], coreset)
        query = worst.query[head]
        error = errors64(query[None], keys[head], values[head], pairs, 5**-0.5)[0]
        assert float(worst.error[head]) == pytest.approx(error, abs=1e-6)
        assert jnp.linalg.norm(query) <= raw_radius(keys[head], rho[head], 5**-0.5) * (1 + 1e-6)
        assert jnp.max(worst.errors[head]) == pytest.approx(float(worst.error[head]), abs=1e-6)


def test_small_errors_are_exact_in_float32():
    # A coreset of nearly everything, of values far from the origin: errors of about 1e-3.
    keys, values, _ = instance(3, count=4096, width=16, value_width=16)
    indices = jnp.arange(4096 - 8)
    coreset = gather(keys, values + 10, indices, jnp.zeros(indices.shape))
    worst = search(jax.random.key(0), keys, values + 10, coreset, rho=1.0)
    exact = errors64(worst.query[None], keys, values + 10, coreset, 0.25)[0]
    assert 1e-4 < exact < 1e-2
    assert float(worst.error) == pytest.approx(exact, abs=1e-6)


def test_grows_with_the_ball():
    keys, values, coreset = instance(1)
    errors = [
        float(search(jax.random.key(0), keys, values, coreset, rho=rho).error)
        for rho in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    ]
    assert all(after >= 0.999 * before for before, after in zip(errors, errors[1:], strict=False))


def test_more_search_finds_hardly_more():
    keys, values, coreset = instance(2, count=1024, width=16, size=128)
    for rho in (1.0, 3.0):
        once = adversary(jax.random.key(0), keys, values, coreset, rho=rho)
        more = adversary(jax.random.key(1), keys, values, coreset, rho=rho, starts=256, steps=80)
        assert once.error >= 0.999 * more.error


@pytest.mark.parametrize("lengths", [None, 40])
def test_the_whole_cache_has_no_error(lengths):
    keys, values, _ = instance(4)
    lengths = None if lengths is None else jnp.asarray(lengths)
    coreset = whole_cache(keys, values, lengths)
    worst = search(jax.random.key(0), keys, values, coreset, rho=4.0, lengths=lengths)
    assert 0 <= worst.error < 1e-6


def test_moves_and_scales_with_the_cache():
    keys, values, coreset = instance(5)
    plain = search(jax.random.key(0), keys, values, coreset, rho=2.0)

    def moved(pairs_keys, pairs_values):
        return 3.0 * (pairs_keys + jnp.arange(5.0)), 7.0 * (pairs_values - 4.0)

    other_keys, other_values = moved(coreset.keys, coreset.values)
    other = coreset._replace(keys=other_keys, values=other_values)
    worst = search(jax.random.key(0), *moved(keys, values), other, rho=2.0)
    np.testing.assert_allclose(worst.error, 7.0 * plain.error, rtol=1e-4)
    np.testing.assert_allclose(worst.query, plain.query / 3.0, rtol=0.05, atol=0.01)


def test_the_radius_is_named_in_three_ways():
    keys, values, coreset = instance(6)
    queries = jnp.stack([jnp.ones(5), jnp.full(5, 0.1)])
    named = [
        search(jax.random.key(0), keys, values, coreset, scale=0.3, **radius)
        for radius in (
            {"query_norm": math.sqrt(5)},
            {"queries": queries},
            {"rho": problem.reduce(keys, values, queries=queries, scale=0.3).rho},
            {},
        )
    ]
    for worst in named[1:]:
        np.testing.assert_allclose(worst.error, named[0].error, rtol=1e-5)
        np.testing.assert_allclose(worst.rho, named[0].rho, rtol=1e-6)


def test_normalizers_are_read_as_attend_reads_them():
    keys, values, coreset = instance(7)
    weights = jnp.exp(coreset.log_weights)
    refitted = coreset._replace(
        values=weights[:, None] * coreset.values,
        log_weights=jnp.zeros_like(coreset.log_weights),
        normalizers=weights,
    )
    plain = search(jax.random.key(0), keys, values, coreset, rho=2.0)
    worst = search(jax.random.key(0), keys, values, refitted, rho=2.0)
    np.testing.assert_allclose(worst.error, plain.error, rtol=1e-4)


def test_a_vanishing_denominator_is_an_infinite_error():
    keys, values, coreset = instance(8, width=2)
    normalizers = jnp.ones_like(coreset.log_weights)
    furthest = jnp.argmax(coreset.keys @ jnp.asarray([1.0, 0.0]))
    refitted = coreset._replace(normalizers=normalizers.at[furthest].set(-1.0))
    worst = search(jax.random.key(0), keys, values, refitted, rho=20.0)
    assert jnp.isposinf(worst.error)
    assert jnp.all(jnp.isfinite(worst.query))


def test_empty_slots_and_padding_change_nothing():
    keys, values, coreset = instance(9)
    rho, lengths = 2.0, jnp.asarray(96)
    plain = search(jax.random.key(0), keys, values, coreset, rho=rho)

    def padded(array, fill):
        return jnp.pad(array, [(0, 8)] + [(0, 0)] * (array.ndim - 1), constant_values=fill)

    slots = Coreset(
        padded(coreset.keys, 0.0),
        padded(coreset.values, 0.0),
        padded(coreset.log_weights, -jnp.inf),
        padded(coreset.indices, -1),
    )
    worst = search(
        jax.random.key(0),
        padded(keys, jnp.nan),
        padded(values, jnp.inf),
        slots,
        rho=rho,
        lengths=lengths,
    )
    np.testing.assert_allclose(worst.error, plain.error, rtol=1e-4)
    np.testing.assert_allclose(worst.rho, plain.rho)


def test_a_head_that_is_not_finite_is_nan_and_the_others_are_not():
    keys, values, coreset = instance(10, leading=(3,))
    keys = keys.at[0, 5, 1].set(jnp.nan)
    log_weights = coreset.log_weights.at[1].set(jnp.nan)
    worst = search(
        jax.random.key(0), keys, values, coreset._replace(log_weights=log_weights), rho=1.0
    )
    np.testing.assert_array_equal(jnp.isnan(worst.error), [True, True, False])


@pytest.mark.parametrize("block_size", [7, 96, 1000])
def test_blocks_do_not_show(block_size):
    keys, values, coreset = instance(11)
    plain = search(jax.random.key(0), keys, values, coreset, rho=2.0, block_size=48)
    worst = search(jax.random.key(0), keys, values, coreset, rho=2.0, block_size=block_size)
    np.testing.assert_allclose(worst.error, plain.error, rtol=1e-4)


def test_scores_of_any_size_do_not_overflow():
    keys, values, coreset = instance(12)
    worst = search(jax.random.key(0), keys, values, coreset, rho=1e4)
    exact = errors64(worst.query[None], keys, values, coreset, 5**-0.5)[0]
    assert float(worst.error) == pytest.approx(exact, rel=1e-2)
    assert worst.error > 0.1


def test_reads_half_precision():
    keys, values, coreset = instance(13)
    worst = search(
        jax.random.key(0),
        keys.astype(jnp.bfloat16),
        values.astype(jnp.bfloat16),
        coreset._replace(
            keys=coreset.keys.astype(jnp.bfloat16), values=coreset.values.astype(jnp.bfloat16)
        ),
        rho=2.0,
    )
    assert worst.error.dtype == worst.query.dtype == jnp.float32
    plain = search(jax.random.key(0), keys, values, coreset, rho=2.0)
    np.testing.assert_allclose(worst.error, plain.error, rtol=0.05)


def test_equal_shapes_trace_once():
    keys, values, coreset = instance(14)
    search(jax.random.key(0), keys, values, coreset, rho=1.0)
    traced = _adversary._cache_size()
    for seed, rho in enumerate((2.0, 3.5)):
        search(jax.random.key(seed), keys + seed, values, coreset, rho=rho, learning_rate=0.5)
    assert _adversary._cache_size() == traced

    @jax.jit
    @chex.assert_max_traces(n=1)
    def jitted(rng, keys, values, coreset, rho):
        return search(rng, keys, values, coreset, rho=rho)

    for rho in (1.0, 2.0):
        worst = jitted(jax.random.key(0), keys, values, coreset, rho)
        plain = search(jax.random.key(0), keys, values, coreset, rho=rho)
        np.testing.assert_allclose(worst.error, plain.error, rtol=1e-4)


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
        *arguments, None, None, None, None, 1.0, starts=64, steps=40, block_size=1024
    )
    memory = lowered.compile().memory_analysis().temp_size_in_bytes
    # The cache in unit form, twice, and no 64 x 131072 scores beside it (33 MB a copy).
    assert memory < 2 * 4 * 2 * (count + size) * width + 16e6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keys": jnp.zeros((96, 4))}, "coreset"),
        ({"values": jnp.zeros((95, 4))}, "values"),
        ({"values": jnp.zeros((96, 3))}, "coreset"),
        ({"keys": jnp.zeros((2, 96, 5)), "values": jnp.zeros((2, 96, 4))}, "coreset"),
        ({"rho": 0.0}, "rho"),
        ({"rho": 1.0, "query_norm": 1.0}, "query_norm"),
        ({"query_norm": -1.0}, "query_norm"),
        ({"queries": jnp.zeros((3, 4))}, "queries"),
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
