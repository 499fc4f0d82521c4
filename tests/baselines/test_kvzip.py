"""KVzip: which pairs are kept, by a budget a head and by one for many, in float64 NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax.baselines import kvzip
from tests.attention_scores import kept_of, largest_weights

LAYERS, HEADS, COUNT, SIZE, WIDTH = 2, 3, 40, 10, 6
LENGTHS = np.array([[COUNT, 25, 1], [COUNT, 6, 33]])
RNG = jax.random.key(0)

# What compressors do, and what says it: axes that share a budget and the options of `kept_of`.
CASES = {
    "a head": (kvzip(), (), {"sinks": 4, "recent": 0}),
    "recent": (kvzip(sinks=1, num_recent=3, scale=1.0), (), {"sinks": 1, "recent": 3}),
    "many recent": (kvzip(sinks=2, num_recent=64), (), {"sinks": 2, "recent": SIZE - 2}),
    "a layer": (kvzip(num_recent=2, axes=-1), (1,), {"sinks": 4, "recent": 2}),
    "every head": (kvzip(sinks=0, axes=(0, -1)), (0, 1), {"sinks": 0, "recent": 0}),
    "at most": (
        kvzip(sinks=1, axes=(0, 1), max_multiple=1.5),
        (0, 1),
        {"sinks": 1, "recent": 0, "most": 15},
    ),
}


@pytest.fixture(scope="module")
def cache():
    """Heads of ever sharper attention; what lies behind their pairs is NaN."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((LAYERS, HEADS, COUNT, WIDTH)) * np.array([0.5, 2, 4])[:, None, None]
    values, queries = rng.standard_normal((LAYERS, HEADS, COUNT, 5)), keys[..., :12, ::-1]
    inside = (np.arange(COUNT) < LENGTHS[..., None])[..., None]
    keys, values = (np.where(inside, array, np.nan) for array in (keys, values))
    queries = rng.standard_normal(queries.shape) * 1.5
    return tuple(array.astype(np.float32) for array in (keys, values, queries))


@jax.jit
def compress(keys, values, queries, lengths, scores):
    """Every case, by samples and by scores that are given: all of them in one program."""
    found = {}
    for case, (compressor, _, _) in CASES.items():
        call = functools.partial(
            compressor, RNG, keys, values, size=SIZE, lengths=lengths, queries=queries
        )
        found[case] = call(), call(scores=scores)
    return found


@pytest.fixture(scope="module")
def given():
    return np.random.default_rng(1).uniform(size=(LAYERS, HEADS, COUNT)).astype(np.float32)


@pytest.fixture(scope="module")
def found(cache, given):
    poisoned = np.where(np.arange(COUNT) < LENGTHS[..., None], given, np.nan)
    return jax.device_get(compress(*cache, LENGTHS, poisoned))


@pytest.mark.parametrize("case", CASES)
def test_keeps_both_ends_and_the_largest_weights(cache, given, found, case):
    keys, values, queries = cache
    compressor, axes, options = CASES[case]
    scores = largest_weights(queries, keys, LENGTHS, scale=compressor.scale)
    for coreset, ranked in zip(found[case], (scores, given), strict=True):
        together = {(): LAYERS * HEADS, (1,): LAYERS, (0, 1): 1}[axes]
        rows = ranked.reshape(together, -1, COUNT), LENGTHS.reshape(together, -1)
        expected = [
            pairs
            for each, lengths in zip(*rows, strict=True)
            for pairs in kept_of(each, lengths, mean=SIZE, **options)
        ]
        assert np.sum(coreset.indices >= 0) <= LAYERS * HEADS * SIZE
        for number, head in enumerate(np.ndindex(LAYERS, HEADS)):
            kept = len(expected[number])
            one = jax.tree.map(lambda leaf, head=head: leaf[head], coreset)
            np.testing.assert_array_equal(one.indices[:kept], expected[number])
            np.testing.assert_array_equal(one.indices[kept:], -1)
            np.testing.assert_array_equal(one.log_weights[:kept], 0)
            np.testing.assert_array_equal(one.log_weights[kept:], -np.inf)
            np.testing.assert_array_equal(one.keys[:kept], keys[head][expected[number]])
            np.testing.assert_array_equal(one.values[:kept], values[head][expected[number]])
    slots = {(): SIZE, (1,): COUNT, (0, 1): options.get("most", COUNT)}[axes]
    assert coreset.indices.shape[-1] == slots


def test_heads_are_permuted_and_equal_ones_share_alike(cache):
    pairs = [np.nan_to_num(array) for array in cache]
    compressor = kvzip(axes=(0, 1))

    @jax.jit
    def run(keys, values, queries):
        return compressor(RNG, keys, values, size=SIZE, queries=queries)

    found = run(*pairs)
    turned = run(*(np.ascontiguousarray(array[::-1, ::-1]) for array in pairs))
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[::-1, ::-1], found), turned)
    equal = run(*(np.broadcast_to(array[:1, 1:2], array.shape) for array in pairs))
    np.testing.assert_array_equal(np.sum(equal.indices >= 0, axis=-1), SIZE)


def test_a_sick_head_says_so_and_costs_the_others_nothing(cache):
    keys, values, queries = (np.nan_to_num(array) for array in cache)
    compressor = kvzip(axes=-1, sinks=1, num_recent=1)
    scores = largest_weights(queries, keys).astype(np.float32)
    for sick in ("queries", "scores"):
        arrays = {"queries": queries.copy()} | ({"scores": scores.copy()} if sick[0] == "s" else {})
        arrays[sick][0, 2, 3] = np.nan
        coreset = compressor(RNG, keys, values, size=SIZE, **arrays)
        broken = np.isnan(coreset.log_weights)
        assert np.all(broken[0, 2])
        assert broken.sum() == COUNT
        # It keeps both its ends, and the others have what it leaves.
        kept = np.sum(coreset.indices >= 0, axis=-1)
        np.testing.assert_array_equal(kept.sum(axis=-1), HEADS * SIZE)
        assert kept[0, 2] == 2


def test_budgets_go_under_vmap_and_over_whole_caches(cache):
    keys, values, queries = (np.nan_to_num(array) for array in cache)
    compressor = kvzip(axes=0)

    def run(keys, values, queries):
        return compressor(RNG, keys, values, size=SIZE, queries=queries)

    each = [run(keys[layer], values[layer], queries[layer]) for layer in range(LAYERS)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    chex.assert_trees_all_close(jax.vmap(run)(keys, values, queries), expected)
    for size in (COUNT, COUNT + 3):
        whole = compressor(RNG, keys[0], values[0], size=size, queries=queries[0])
        np.testing.assert_array_equal(whole.keys, keys[0])
        np.testing.assert_array_equal(whole.log_weights, 0)


def test_bad_calls_are_refused(cache):
    keys, values, queries = cache
    for options, message in (
        ({"sinks": -1}, "sinks must be at least 0"),
        ({"num_recent": 1.5}, "num_recent must be a static Python int"),
        ({"max_multiple": 0.5}, "max_multiple must be at least 1"),
        ({"axes": 1.0}, "axes must be one or more static Python ints"),
    ):
        with pytest.raises(ValueError, match=message):
            kvzip(**options)
    for compressor, message in (
        (kvzip(axes=2), "axes must name leading axes of keys"),
        (kvzip(axes=(0, -2)), "axes must not repeat"),
        (cj.keep_ends(kvzip(axes=0)), "cannot compress one by itself"),
    ):
        with pytest.raises(ValueError, match=message):
            compressor(RNG, keys, values, size=SIZE, queries=queries)
    with pytest.raises(ValueError, match=r"scores \(2, 3, 39\) and keys \(2, 3, 40, 6\)"):
        kvzip()(RNG, keys, values, size=SIZE, queries=queries, scores=np.ones((2, 3, 39)))
