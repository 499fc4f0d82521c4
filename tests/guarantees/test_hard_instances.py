"""The hard instances against the formulas of the proofs, and the game against its bounds.

Nearly all of the time goes into compilation, so that tests share shapes.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import baselines
from coreset_jax._src.core.coreset import gather, whole_cache
from coreset_jax.guarantees import hard_instances
from coreset_jax.guarantees.hard_instances import coreset_instance, index_game, sketch_instance
from coreset_jax.guarantees.sizes import decoding_bound
from tests.brute_force import attention
from tests.compressors import scaled

RHO, WIDTH, SEEDS = 3.0, 32, 4
# 25 codewords of width 128: 800 pairs of one bit, and 25 pairs of 32.
INSTANCES = {
    "coreset": functools.partial(coreset_instance, width=WIDTH, rho=RHO, eps=0.03),
    "sketch": functools.partial(sketch_instance, width=WIDTH, rho=RHO, eps=0.15),
}


@functools.cache
def instances(name):
    """Four instances, as heads."""
    return jax.vmap(INSTANCES[name])(jax.random.split(jax.random.key(5), SEEDS))


def whole(rng, keys, values, *, size):
    return whole_cache(keys, values)


@pytest.mark.parametrize("name", INSTANCES)
def test_an_instance_is_what_its_theorem_says(name):
    drawn = jax.tree.map(np.asarray, instances(name))
    assert drawn.bits.shape == (SEEDS, 25, WIDTH)
    repeats = WIDTH if name == "coreset" else 1
    assert drawn.keys.shape == (SEEDS, 25 * repeats, 128)
    np.testing.assert_allclose(np.linalg.norm(drawn.keys, axis=-1), 1, rtol=1e-5)
    assert np.all(np.linalg.norm(drawn.values, axis=-1) <= 1 + 1e-6)
    codewords = drawn.keys[:, ::repeats].astype(np.float64)
    np.testing.assert_array_equal(drawn.keys, np.repeat(drawn.keys[:, ::repeats], repeats, axis=1))
    np.testing.assert_allclose(drawn.queries, RHO * codewords, rtol=1e-6)
    overlaps = np.abs(codewords @ np.swapaxes(codewords, 1, 2)) - np.eye(25)
    np.testing.assert_allclose(drawn.coherence, overlaps.max(axis=(1, 2)), rtol=1e-5)
    assert np.all(drawn.coherence <= 1 / RHO)

    shown = drawn.signs * drawn.bits
    if name == "coreset":
        values = drawn.values.reshape(SEEDS, 25, WIDTH, WIDTH)
        np.testing.assert_array_equal(values, shown[..., None] * np.eye(WIDTH))
    else:
        np.testing.assert_allclose(drawn.values, shown / math.sqrt(WIDTH), rtol=1e-6)
    for fair in (drawn.bits, drawn.signs > 0, drawn.keys[:, ::repeats] > 0):
        assert abs(np.mean(fair) - 0.5) < 4 * 0.5 / math.sqrt(fair.size)
    # Four draws, not one.
    assert len({head.tobytes() for head in drawn.bits}) == SEEDS


@pytest.mark.parametrize("name", INSTANCES)
def test_a_bit_shows_as_twice_the_threshold_over_noise_of_the_stated_deviation(name):
    drawn = jax.tree.map(np.asarray, instances(name))
    outputs = attention(drawn.queries, drawn.keys, drawn.values, scale=1.0)
    signals = 2 * drawn.thresholds.astype(np.float64)[..., None]
    # Setting a bit moves its coordinate by the signal, and no other coordinate.
    values, place = drawn.values.copy(), WIDTH * 3 + 7 if name == "coreset" else 3
    values[:, place, 7] = drawn.signs[:, 3, 7] * (1 if name == "coreset" else WIDTH**-0.5)
    moved = attention(drawn.queries, drawn.keys, values, scale=1.0) - outputs
    expected = drawn.signs[:, 3, 7] * ~drawn.bits[:, 3, 7] * signals[:, 3, 0]
    np.testing.assert_allclose(moved[:, 3, 7], expected, atol=1e-7)
    assert not np.any(np.delete(moved, 7, axis=-1))

    # Noise in signals: sum over the others of e^(rho <c_i, c_l>) / e^rho, half of the bits set.
    noise = drawn.signs * outputs / signals - drawn.bits
    overlaps = (drawn.queries.astype(np.float64) @ np.swapaxes(drawn.queries, 1, 2)) / RHO - RHO
    variance = np.mean((np.sum(np.exp(2 * overlaps), axis=-1) - 1) / 2)
    # No longer than sqrt(N / 2) e^-rho and the overlaps' share.
    assert math.sqrt(variance) < math.sqrt(25 / 2) * math.exp(RHO**2 / 128 - RHO) * 1.1
    # The noise of a column is nearly the same at all queries: some 128 independent ones.
    np.testing.assert_allclose(np.std(noise), math.sqrt(variance), rtol=0.25)


@pytest.mark.parametrize("name", INSTANCES)
def test_the_full_cache_shows_its_bits_and_half_of_it_does_not(name):
    drawn = instances(name)
    count = drawn.keys.shape[-2]
    full = index_game(jax.random.key(0), drawn, whole, count)
    assert full.success.shape == (SEEDS,)
    assert np.mean(full.success) >= 0.99
    np.testing.assert_allclose(full.error, 0, atol=1e-6)
    bound = decoding_bound(count, count // 2, bits_per_pair=drawn.bits[0].size // count)
    corrected = name == "sketch"
    for compressor in (baselines.uniform(), baselines.balance_kv(corrected=corrected, scale=1.0)):
        half = index_game(jax.random.key(0), drawn, compressor, count // 2)
        assert np.mean(half.success) < 0.8
        assert np.mean(half.success) <= bound
        assert np.all(half.error > 0.01)


@pytest.mark.slow
def test_balanced_coresets_are_below_the_information_bound():
    # Many bits a pair: here a choice of pairs tells little, and the bound bites.
    drawn = instances("sketch")
    bound = decoding_bound(25, 12, bits_per_pair=WIDTH)
    assert bound < 0.92
    half = index_game(jax.random.key(0), drawn, cj.balanced(rho=RHO, scale=1.0), 12)
    assert 0.6 < np.mean(half.success) < min(0.8, bound)


def test_a_choice_that_knows_the_bits_tells_more_than_a_blind_one():
    drawn = instances("coreset")
    count = drawn.keys.shape[-2]

    def only_ones(rng, keys, values, *, size):
        # The first pairs whose bit is set; the rest is read as zeros, correctly or not.
        shows = jnp.any(values != 0, axis=-1)
        indices = jnp.sort(jnp.argsort(~shows, axis=-1, stable=True)[..., :size], axis=-1)
        return gather(keys, values, indices, jnp.zeros(indices.shape))

    size = count // 8
    clever = index_game(jax.random.key(0), drawn, only_ones, size)
    blind = decoding_bound(count, size, choice="blind")
    assert np.mean(clever.success) > blind + 0.03
    assert np.mean(clever.success) < decoding_bound(count, size, choice="equal")


def test_the_game_is_read_at_scale_one():
    drawn = instances("coreset")
    with pytest.raises(ValueError, match=r"made for, 0\.5; got 1"):
        index_game(jax.random.key(0), drawn, scaled(scale=0.5), 12)


def test_equal_pairs_may_be_merged_into_one_of_their_weight():
    # All pairs without a bit share a value, and with it all that differs behind one key.
    drawn = instances("coreset")
    count = drawn.keys.shape[-2]

    def merged(rng, keys, values, *, size):
        bits = drawn.bits
        zeros = jnp.sum(~bits, axis=-1, keepdims=True)
        first = jnp.argmin(bits, axis=-1)[..., None] == jnp.arange(WIDTH)
        weights = jnp.where(bits, 1, jnp.where(first, zeros, 0)).reshape(SEEDS, -1)
        order = jnp.argsort(weights == 0, axis=-1, stable=True)[..., :size]
        indices = jnp.where(jnp.take_along_axis(weights, order, -1) > 0, order, -1)
        return gather(keys, values, indices, jnp.log(jnp.take_along_axis(weights, order, -1)))

    kept = int(jnp.max(jnp.sum(drawn.bits, axis=(-2, -1)))) + 25
    assert kept < 0.6 * count
    full = index_game(jax.random.key(0), drawn, whole, count)
    result = index_game(jax.random.key(0), drawn, merged, kept)
    np.testing.assert_allclose(result.error, 0, atol=1e-6)
    np.testing.assert_array_equal(result.success, full.success)
    # Which is why no bound forbids it.
    assert decoding_bound(count, kept) == 1


def test_what_is_not_finite_is_not_taken_for_guessing():
    drawn = instances("sketch")

    def broken(rng, keys, values, *, size):
        coreset = whole_cache(keys, values)
        return coreset._replace(log_weights=coreset.log_weights.at[1].set(jnp.nan))

    result = index_game(jax.random.key(0), drawn, broken, 25)
    np.testing.assert_array_equal(np.isnan(result.success), [False, True, False, False])


def test_equal_shapes_trace_once():
    traced = []
    for seed, rho in enumerate((3.0, 3.1, 3.2)):
        # 15 codewords at each radius.
        drawn = sketch_instance(jax.random.key(seed), 4, rho, math.exp(rho) / 62, key_width=200)
        index_game(jax.random.key(seed), drawn, whole, 15)
        jitted = hard_instances._instance, hard_instances._play
        traced.append([function._cache_size() for function in jitted])
    assert traced[0] == traced[1] == traced[2]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_dtypes_are_those_asked_for(dtype, x64):
    drawn = jax.eval_shape(lambda rng: INSTANCES["coreset"](rng, dtype=dtype), jax.random.key(0))
    assert drawn.keys.dtype == drawn.values.dtype == dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    assert drawn.queries.dtype == drawn.thresholds.dtype == wide
    result = jax.eval_shape(lambda drawn: index_game(jax.random.key(0), drawn, whole, 800), drawn)
    assert result.success.dtype == result.error.dtype == wide


def test_bfloat16_shows_all_bits():
    drawn = INSTANCES["sketch"](jax.random.key(0), dtype=jnp.bfloat16)
    assert index_game(jax.random.key(0), drawn, whole, 25).success >= 0.99


def test_codes_are_as_large_as_their_width_allows():
    for rho in (1.0, 2.5, 6.0):
        for codewords in (2, 25, 1000):
            width = hard_instances.code_width(codewords, rho)
            assert hard_instances.code_size(width, rho) >= codewords
            assert width == 1 or hard_instances.code_size(width - 1, rho) < codewords


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"width": 0}, "width"),
        ({"rho": -1.0}, "rho"),
        ({"eps": 0.0}, "eps"),
        # Here even two codewords are too many.
        ({"rho": 1.0}, "rho"),
        ({"eps": 100.0}, "eps"),
        ({"key_width": 127}, "key_width"),
        ({"key_width": 128.0}, "key_width"),
        ({"dtype": jnp.int32}, "dtype"),
    ],
)
@pytest.mark.parametrize("make", [coreset_instance, sketch_instance])
def test_bad_input_is_refused(make, change, named):
    arguments = {"width": WIDTH, "rho": RHO, "eps": 0.01} | change
    with pytest.raises(ValueError, match=named):
        make(jax.random.key(0), **arguments)


def test_outputs_and_sizes_that_do_not_fit_are_refused():
    drawn = instances("sketch")
    with pytest.raises(ValueError, match="outputs"):
        hard_instances.decode(drawn, jnp.zeros((SEEDS, 25, WIDTH + 1)))
    with pytest.raises(ValueError, match="size"):
        index_game(jax.random.key(0), drawn, whole, 0)
