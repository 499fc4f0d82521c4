"""Exact weighted attention, against float64 brute force."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax._src.attention import (
    PartialAttention,
    attention,
    finish,
    length_log_weights,
    merge,
    partial_attention,
)
from tests import brute_force

LEADING, QUERIES, COUNT, WIDTH, VALUE_WIDTH = (2, 3), 7, 37, 8, 5


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    shapes = [(QUERIES, WIDTH), (COUNT, WIDTH), (COUNT, VALUE_WIDTH), (COUNT,)]
    queries, keys, values, log_weights = (
        rng.standard_normal((*LEADING, *shape)).astype(np.float32) for shape in shapes
    )
    return 2 * queries, keys, values, log_weights


@pytest.fixture(scope="module")
def parts(inputs):
    """The same pairs cut in three."""
    queries, *pairs = (array[0, 0] for array in inputs)
    return [
        state_of(queries, *(array[start:stop] for array in pairs))
        for start, stop in [(0, 10), (10, 11), (11, COUNT)]
    ]


attend = jax.jit(attention, static_argnames="block_size")
state_of = jax.jit(partial_attention)
merged, finished = jax.jit(merge), jax.jit(finish)


def assert_close(actual, desired):
    scale = np.max(np.linalg.norm(desired, axis=-1))
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-5 * scale)


def test_weighted_attention_is_brute_force(inputs):
    expected = brute_force.attention(*inputs)
    assert attend(*inputs).shape == expected.shape == (*LEADING, QUERIES, VALUE_WIDTH)
    for block_size in (None, 1, 8, COUNT - 1, COUNT, 1000):
        assert_close(attend(*inputs, block_size=block_size), expected)


def test_scale_multiplies_the_logits(inputs):
    for scale in (0.1, 1.0, 5.0):
        expected = brute_force.attention(*inputs, scale=scale)
        assert_close(attend(*inputs, scale=scale), expected)


# A logit for every query, for every head, of which one is no pair, and none.
SINK_LOGITS = {
    "a query": np.random.default_rng(1).standard_normal((*LEADING, QUERIES)).astype(np.float32),
    "a head": np.array([[3, -1, 0], [0.5, 10, -np.inf]], np.float32),
    "none": None,
}


@pytest.mark.parametrize("sinks", SINK_LOGITS)
def test_capped_scores_and_sink_logits_are_brute_force(inputs, sinks):
    logits = SINK_LOGITS[sinks]
    rows = logits
    if sinks == "a head":
        rows = np.broadcast_to(logits[..., None], (*LEADING, QUERIES))
    for soft_cap in (None, 1.5):
        expected = brute_force.attention(*inputs, soft_cap=soft_cap, sink_logits=rows)
        for block_size in (None, 8):
            options = {"soft_cap": soft_cap, "sink_logits": logits, "block_size": block_size}
            assert_close(attend(*inputs, **options), expected)
    # The cap is one that matters.
    plain = brute_force.attention(*inputs, sink_logits=rows)
    assert np.linalg.norm(expected - plain) > 0.1 * np.linalg.norm(plain)


def test_under_a_cap_weights_are_still_numbers_of_copies(inputs):
    queries, keys, values, _ = (array[0] for array in inputs)
    counts = np.arange(COUNT) % 4
    with np.errstate(divide="ignore"):
        log_weights = np.broadcast_to(np.log(counts.astype(np.float32)), keys.shape[:-1])
    copies = [np.repeat(array, counts, axis=1) for array in (keys, values)]
    options = {"soft_cap": 1.5, "sink_logits": SINK_LOGITS["a head"][0]}
    weighted = attention(queries, keys, values, log_weights, **options)
    assert_close(weighted, np.asarray(attention(queries, *copies, **options)))


def test_a_huge_cap_is_none_and_a_sink_alone_gives_zero(inputs):
    assert_close(attend(*inputs, soft_cap=1e6), np.asarray(attend(*inputs)))
    nothing = np.full_like(inputs[3], -np.inf)
    outputs = attend(*inputs[:3], nothing, sink_logits=SINK_LOGITS["a head"])
    assert not np.any(outputs)


def test_caps_and_sink_logits_that_do_not_fit_are_refused(inputs):
    for soft_cap in (0.0, -1.0, np.inf):
        with pytest.raises(ValueError, match="soft_cap"):
            attention(*inputs, soft_cap=soft_cap)
    for logits in (np.zeros(3), np.zeros((2, 3, 8)), np.zeros((2, 3), int)):
        with pytest.raises(ValueError, match="sink_logits"):
            attention(*inputs, sink_logits=logits)


def test_without_weights_it_is_the_attention_of_jax(inputs):
    queries, keys = (np.moveaxis(array, 1, -2) for array in inputs[:2])
    expected = np.moveaxis(jax.nn.dot_product_attention(queries, keys, keys), -2, 1)
    chex.assert_trees_all_close(attend(inputs[0], inputs[1], inputs[1]), expected, atol=1e-5)


@pytest.mark.parametrize("block_size", [None, 8])
def test_pairs_of_weight_zero_are_left_out(inputs, block_size):
    *pairs, log_weights = inputs
    log_weights = np.where(np.arange(COUNT) % 3 == 0, log_weights, -np.inf).astype(np.float32)
    # One whole block weighs nothing, and so does the whole of one head.
    log_weights[..., 8:16] = -np.inf
    log_weights[1, 2] = -np.inf
    outputs = attend(*pairs, log_weights, block_size=block_size)
    assert not np.any(outputs[1, 2])
    kept = (0, slice(None))
    assert_close(
        outputs[kept], brute_force.attention(*(array[kept] for array in (*pairs, log_weights)))
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block_size", [None, 8])
def test_padding_may_hold_anything(inputs, weighted, block_size):
    queries, keys, values, log_weights = inputs
    lengths = np.array([[1, 5, 8], [9, 36, COUNT]])
    inside = np.arange(COUNT) < lengths[..., None]
    expected = brute_force.attention(
        queries, keys, values, np.where(inside, log_weights if weighted else 0.0, -np.inf)
    )
    keys, values = (np.where(inside[..., None], array, np.nan) for array in (keys, values))
    log_weights = np.where(inside, log_weights, np.nan) if weighted else None
    outputs = attend(queries, keys, values, log_weights, lengths=lengths, block_size=block_size)
    assert_close(outputs, expected)


def test_huge_logits_do_not_overflow(inputs):
    queries, *pairs = inputs
    outputs = attend(1e4 * queries, *pairs, block_size=8)
    # Logits of this size have a rounding error of order one, yet never leave the convex hull.
    assert np.all(np.isfinite(outputs))
    assert np.all(np.abs(outputs) <= np.abs(pairs[1]).max() * (1 + 1e-6))


def test_merged_parts_are_the_whole(inputs, parts):
    whole = state_of(*(array[0, 0] for array in inputs))
    chex.assert_trees_all_close(functools.reduce(merged, parts), whole, rtol=1e-5, atol=1e-5)
    assert_close(
        finished(functools.reduce(merged, parts)),
        brute_force.attention(*(array[0, 0] for array in inputs)),
    )


def test_merging_is_associative_and_commutative(parts):
    left, middle, right = parts
    chex.assert_trees_all_close(
        merged(merged(left, middle), right), merged(left, merged(middle, right)), rtol=1e-6
    )
    chex.assert_trees_all_equal(merged(left, right), merged(right, left))


def test_empty_parts_change_nothing(inputs, parts):
    queries, keys, values, _ = (array[0, 0] for array in inputs)
    nothing = np.full(COUNT, -np.inf, np.float32)
    empty = state_of(queries, keys, values, nothing)
    zeros = np.zeros(QUERIES)
    chex.assert_trees_all_equal(
        empty, PartialAttention(zeros - np.inf, zeros, np.zeros((QUERIES, VALUE_WIDTH)))
    )
    chex.assert_trees_all_equal(merged(empty, parts[0]), parts[0])
    chex.assert_trees_all_equal(merged(parts[0], empty), parts[0])
    chex.assert_trees_all_equal(merged(empty, empty), empty)
    assert not np.any(finished(empty))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(inputs, dtype):
    halves = [jnp.asarray(array, dtype) for array in inputs[:3]]
    outputs = attend(*halves, inputs[3], block_size=8)
    assert outputs.dtype == dtype
    state = state_of(*halves, inputs[3])
    assert {leaf.dtype for leaf in state} == {jnp.dtype(jnp.float32)}
    expected = brute_force.attention(*halves, inputs[3])
    assert_close(finished(state), expected)
    np.testing.assert_allclose(
        outputs.astype(np.float32), expected, rtol=jnp.finfo(dtype).eps, atol=1e-5
    )


def test_double_precision(inputs, x64):
    inputs = brute_force.double(*inputs)
    outputs = attend(*inputs, block_size=8)
    assert outputs.dtype == jnp.float64
    np.testing.assert_allclose(outputs, brute_force.attention(*inputs), rtol=1e-12, atol=1e-13)


def test_gradients_under_a_cap_and_of_sink_logits(inputs):
    logits = SINK_LOGITS["a head"]

    def plain(queries, keys, values, sinks):
        scores = 1.5 * jnp.tanh(jnp.einsum("...qd,...nd->...qn", queries, keys) * WIDTH**-0.5 / 1.5)
        sinks = jnp.broadcast_to(sinks[..., None, None], (*LEADING, QUERIES, 1))
        shares = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1))[..., :-1]
        return jnp.sum(jnp.sin(shares @ values))

    def ours(queries, keys, values, sinks):
        outputs = attention(queries, keys, values, soft_cap=1.5, sink_logits=sinks, block_size=8)
        return jnp.sum(jnp.sin(outputs))

    arguments = (*inputs[:3], np.where(np.isinf(logits), 2, logits))
    found, expected = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arguments) for loss in (ours, plain)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    assert np.all(found[3] != 0)


def test_gradients_are_those_of_softmax(inputs):
    log_weights = inputs[3].copy()
    log_weights[..., ::3] = -np.inf
    lengths = np.array([[COUNT, 30, 2], [20, 9, 8]])

    def plain(queries, keys, values):
        logits = jnp.einsum("...qd,...nd->...qn", queries, keys) * WIDTH**-0.5
        logits = logits + log_weights[..., None, :]
        logits += length_log_weights(lengths, COUNT, jnp.dtype(jnp.float32))[..., None, :]
        return jnp.sum(jnp.sin(jax.nn.softmax(logits) @ values))

    expected = jax.jit(jax.grad(plain, argnums=(0, 1, 2)))(*inputs[:3])
    for block_size in (None, 8):

        def ours(queries, keys, values, block_size=block_size):
            outputs = attention(
                queries, keys, values, log_weights, lengths=lengths, block_size=block_size
            )
            return jnp.sum(jnp.sin(outputs))

        gradients = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(*inputs[:3])
        chex.assert_tree_all_finite(gradients)
        chex.assert_trees_all_close(gradients, expected, rtol=1e-4, atol=1e-5)
