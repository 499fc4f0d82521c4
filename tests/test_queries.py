"""Sample queries: what is known of those that came, which are taken, and how they are moved."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import queries
from coreset_jax.nn.rotary import rotate
from tests.attention_scores import largest_weights

LEADING, COUNT, WIDTH, MANY = (2, 3), 21, 8, 24
LENGTHS = np.array([[1, 9, COUNT], [COUNT, 4, 20]])
SCALES = np.linspace(0.2, 1.0, 6, dtype=np.float32).reshape(LEADING)


@pytest.fixture(scope="module")
def arrays():
    """Keys that are not numbers in padding, queries, and what these attend to besides."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((*LEADING, COUNT, WIDTH))
    keys = np.where((np.arange(COUNT) < LENGTHS[..., None])[..., None], keys, np.nan)
    asked = 2 * rng.standard_normal((*LEADING, MANY, WIDTH))
    others = 3 * rng.standard_normal((*LEADING, MANY))
    return tuple(array.astype(np.float32) for array in (keys, asked, others))


def in_chunks(arrays, sizes, count, **options):
    """What is known after chunks of these sizes."""
    keys, asked, others = arrays
    observed = queries.empty(keys, count=count)
    for stop in np.cumsum(sizes):
        chunk = slice(int(observed.seen), stop)
        more = {"log_others": others[..., chunk]} if options.get("scale") is not None else {}
        observed = queries.observe(observed, asked[..., chunk, :], keys, **options, **more)
    return observed


@pytest.mark.parametrize("scale", [None, SCALES])
def test_scores_are_the_largest_weights_however_queries_are_cut(arrays, scale):
    keys, asked, others = arrays
    options = {"lengths": LENGTHS, "scale": scale}
    once = in_chunks(arrays, [MANY], 7, **options)
    for head in np.ndindex(LEADING):
        more = {} if scale is None else {"scale": scale[head], "log_others": others[head]}
        expected = largest_weights(asked[head], keys[head][: LENGTHS[head]], **more)
        np.testing.assert_allclose(once.scores[head][: LENGTHS[head]], expected, rtol=1e-5)
        np.testing.assert_array_equal(once.scores[head][LENGTHS[head] :], 0)
    thrice = in_chunks(arrays, [8, 8, 8], 7, **options)
    chex.assert_trees_all_close(thrice, once, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 7, MANY, MANY + 9])
def test_the_sample_is_evenly_spread_and_does_not_depend_on_chunks(arrays, count):
    _, asked, _ = arrays
    options = {"lengths": LENGTHS}
    once = in_chunks(arrays, [MANY], count, **options)
    chex.assert_trees_all_close(in_chunks(arrays, [8] * 3, count, **options), once, rtol=1e-6)
    taken = min(count, MANY)
    assert int(once.seen) == MANY
    places = np.asarray(once.places)
    assert np.all(np.diff(places[:taken]) > 0)
    np.testing.assert_array_equal(places[taken:], -1)
    # Those that are missing are filled up with the others.
    rows = places[np.arange(count) % taken]
    np.testing.assert_array_equal(once.queries, asked[..., rows, :])


def test_a_long_stream_leaves_no_wide_gap():
    keys = np.zeros((1, 2), np.float32)
    observed = queries.empty(keys, count=64)
    for start in range(0, 5000, 1000):
        chunk = np.arange(start, start + 1000, dtype=np.float32)
        observed = queries.observe(observed, np.stack([chunk, chunk], axis=-1), keys)
        places = np.asarray(observed.places)
        np.testing.assert_array_equal(observed.queries[:, 0], places)
        gaps = np.diff([-1, *places, start + 1000])
        assert gaps.max() <= 3 * (start + 1000) / 64
    assert int(observed.seen) == 5000


def test_a_query_that_is_not_finite_is_not_forgotten(arrays):
    keys, asked, _ = arrays
    keys, sick = np.nan_to_num(keys), asked.copy()
    for filling in (np.nan, np.inf):
        # Not in the sample, and not in the last chunk.
        sick[1, 2, 5, 1] = filling
        observed = in_chunks((keys, sick, None), [8, 8, 8], 2)
        assert 5 not in np.asarray(observed.places)
        np.testing.assert_array_equal(
            np.isnan(observed.scores).all(axis=-1), np.isnan(observed.scores).any(axis=-1)
        )
        found = np.isnan(observed.scores[..., 0])
        assert found[1, 2]
        assert found.sum() == 1


def test_observing_compiles_once_and_keeps_dtypes(arrays):
    keys, asked, _ = (np.nan_to_num(array) for array in arrays)

    @jax.jit
    @chex.assert_max_traces(1)
    def run(observed, chunk, keys):
        return queries.observe(observed, chunk, keys)

    observed = queries.empty(keys, count=4)
    for start in (0, 8, 16):
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            observed = run(observed, asked[..., start : start + 8, :], keys)
    half, rows = keys.astype(jnp.bfloat16), asked.astype(jnp.bfloat16)
    found = queries.observe(queries.empty(half, count=4), rows, half)
    assert (found.queries.dtype, found.scores.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(found.places, observed.places)
    np.testing.assert_allclose(found.scores, observed.scores, atol=0.03)


def test_moved_queries_are_those_of_tokens_behind_the_prompt():
    rng = np.random.default_rng(1)
    plain = rng.standard_normal((3, 30, WIDTH)).astype(np.float32)
    positions, start, base = np.arange(30), 100, 50.0
    frequencies = queries.rotary_frequencies(WIDTH, base)

    def turned(array, places):
        places = jnp.broadcast_to(jnp.asarray(places), (len(array), array.shape[1]))
        return rotate(array[:, :, None], places, base)[:, :, 0]

    for horizon in (1, 7, 256):
        move = functools.partial(queries.ahead, frequencies=frequencies, horizon=horizon)
        expected = turned(plain, start + positions % horizon)
        found = move(turned(plain, positions), positions, start)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        # Positions of each head, and a start that is traced.
        each = positions + np.arange(3)[:, None]
        found = jax.jit(move)(turned(plain, each), each, jnp.int32(start))
        np.testing.assert_allclose(found, turned(plain, start + each % horizon), atol=2e-5)
    # Scores of keys depend on distances alone: both moved by as many positions.
    keys = rng.standard_normal((3, 30, WIDTH)).astype(np.float32)
    one = queries.ahead(turned(plain, positions), positions, 40, frequencies, horizon=1)
    other = queries.ahead(turned(plain, positions), positions, 53, frequencies, horizon=1)
    scores = [
        np.einsum("hqd,hnd->hqn", *pair)
        for pair in ((one, turned(keys, positions)), (other, turned(keys, positions + 13)))
    ]
    np.testing.assert_allclose(*scores, atol=1e-4)


def test_channels_beyond_the_frequencies_stay_as_they_are():
    plain = np.random.default_rng(2).standard_normal((5, WIDTH)).astype(np.float32)
    frequencies, positions = queries.rotary_frequencies(4, 10.0), np.arange(5)
    found = queries.ahead(plain, positions, 9, frequencies, horizon=2)
    np.testing.assert_array_equal(found[:, 4:], plain[:, 4:])
    angles = (9 + positions % 2 - positions)[:, None] * np.array([1, 10**-0.5])
    for channel in (0, 1):
        turned = (plain[:, channel] + 1j * plain[:, channel + 2]) * np.exp(1j * angles[:, channel])
        np.testing.assert_allclose(found[:, channel], turned.real, atol=1e-5)
        np.testing.assert_allclose(found[:, channel + 2], turned.imag, atol=1e-5)
    half = queries.ahead(plain.astype(jnp.bfloat16), positions, 9, frequencies, horizon=2)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(half), found, atol=0.05)
    np.testing.assert_allclose(
        queries.rotary_frequencies(6, 1e4), 1e4 ** (-np.arange(3) / 3), rtol=1e-6
    )


def test_some_of_a_prompts_queries():
    asked = np.random.default_rng(3).standard_normal((2, 10, 4)).astype(np.float32)
    for source in ("last", "spread"):
        for count in (1, 3, 9, 10, 50):
            places = {
                "last": np.arange(10)[-count:],
                "spread": [row * 10 // count for row in range(min(count, 10))],
            }
            rows = places[source]
            rows = np.arange(10) if count >= 10 else rows
            found = queries.select(asked, count, source)
            np.testing.assert_array_equal(found, asked[:, rows])


def test_bad_input_is_refused(arrays):
    keys, asked, others = arrays
    observed = queries.empty(keys, count=4)
    frequencies, places = queries.rotary_frequencies(WIDTH, 10.0), np.arange(MANY)
    for call, message in (
        (lambda: queries.empty(keys, count=0), "count must be at least 1"),
        (lambda: queries.empty(keys[0, 0, 0]), "keys must have rank"),
        (lambda: queries.observe(observed, asked[0], keys), "queries must have the rank"),
        (lambda: queries.observe(observed, asked[..., 1:], keys), "queries must have the width"),
        (lambda: queries.observe(observed, asked, keys[..., 1:, :]), "scores must be"),
        (lambda: queries.observe(observed, asked, keys, lengths=LENGTHS[0]), "lengths must have"),
        (lambda: queries.observe(observed, asked, keys, scale=-1.0), "scale must be positive"),
        (
            lambda: queries.observe(observed, asked, keys, log_others=others[..., 1:]),
            r"log_others \(2, 3, 23\) and queries \(2, 3, 24, 8\)",
        ),
        (lambda: queries.ahead(asked, places[1:], 0, frequencies), "one for each query"),
        (lambda: queries.ahead(asked, asked[..., 0, :], 0, frequencies), "one for each query"),
        (lambda: queries.ahead(asked, places, 0, frequencies, horizon=0), "horizon must be at"),
        (lambda: queries.ahead(asked[..., 1:], places, 0, frequencies), "2 h at most d"),
        (lambda: queries.ahead(places, places, 0, frequencies), "queries must have a floating"),
        (lambda: queries.rotary_frequencies(5, 10.0), "width must be even"),
        (lambda: queries.rotary_frequencies(0, 10.0), "width must be at least 2"),
        (lambda: queries.rotary_frequencies(4, 0.0), "base must be positive"),
        (lambda: queries.select(asked, 0), "count must be at least 1"),
        (lambda: queries.select(asked, 3, "first"), "source must be 'last' or 'spread'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
