"""What queries look up is kept bit by bit, and what is fitted to the rest answers for it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import attended, baselines
from coreset_jax._src.core.head import Head
from coreset_jax._src.fit.represent import represent
from tests.attention_scores import attention_weights, kept_of, largest_weights
from tests.brute_force import attention, double

LAYERS, HEADS, COUNT, SIZE, WIDTH, SAMPLES = 2, 3, 64, 16, 6, 24
# Of sixteen slots twelve are for what is kept, two of them each for the first and the last pairs.
KEPT, ENDS = 12, {"sinks": 2, "recent": 2}
LENGTHS = np.array([[COUNT, 40, 1], [COUNT, 9, SIZE]])
RNG = jax.random.key(0)

# Compressors, the axes of a budget, and the most pairs of a head.
RECENT = {"recent_fraction": 0.125}
CASES = {
    "a head": (attended(**RECENT), (), KEPT),
    "a layer": (attended(axes=-1, **RECENT), (1,), COUNT - (SIZE - KEPT)),
    "every head": (attended(axes=(0, -1), max_multiple=1.5, **RECENT), (0, 1), 18),
}
FULL = np.full((LAYERS, HEADS), COUNT)


@pytest.fixture(scope="module")
def cache():
    """Heads of ever sharper attention; what lies behind their pairs is not finite."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((LAYERS, HEADS, COUNT, WIDTH)) * np.array([0.5, 2, 4])[:, None, None]
    values = rng.standard_normal((LAYERS, HEADS, COUNT, 5))
    queries = rng.standard_normal((LAYERS, HEADS, SAMPLES, WIDTH))
    inside = (np.arange(COUNT) < LENGTHS[..., None])[..., None]
    keys, values = np.where(inside, keys, np.nan), np.where(inside, values, np.inf)
    return tuple(array.astype(np.float32) for array in (keys, values, queries))


@pytest.fixture(scope="module")
def whole(cache):
    """The same without lengths."""
    keys, values, queries = cache
    rng = np.random.default_rng(1)
    filling = rng.standard_normal((2, *keys.shape))[:, ..., :5].astype(np.float32)
    keys = np.where(np.isnan(keys), np.pad(filling[0], [(0, 0)] * 3 + [(0, 1)]), keys)
    return keys, np.where(np.isinf(values), filling[1], values), queries


@jax.jit
def compress(keys, values, queries, scores, lengths):
    """Every case, by scores that are given or by samples: all of them in one program."""
    found = {}
    for case, (compressor, _, _) in CASES.items():
        found[case] = compressor(
            RNG,
            keys,
            values,
            size=SIZE,
            queries=queries,
            lengths=lengths,
            scores=scores if case == "every head" else None,
        )
    return found


def ranked(case, keys, queries, scores, lengths):
    """The scores that a case goes by."""
    return scores if case == "every head" else largest_weights(queries, keys, lengths)


@pytest.fixture(scope="module")
def given():
    return np.random.default_rng(2).uniform(size=(LAYERS, HEADS, COUNT)).astype(np.float32)


def expected_pairs(case, scores, lengths):
    """What every head keeps, in a list of all heads."""
    _, axes, most = CASES[case]
    together = {(): LAYERS * HEADS, (1,): LAYERS, (0, 1): 1}[axes]
    rows = scores.reshape(together, -1, COUNT), lengths.reshape(together, -1)
    return [
        pairs
        for each, counts in zip(*rows, strict=True)
        for pairs in kept_of(each, counts, mean=KEPT, most=most, **ENDS)
    ]


def check(case, coreset, ranked, keys, values, lengths):
    """The pairs that are to be kept, with weight one, and at most as many others as there are."""
    assert np.sum(coreset.indices >= 0) <= LAYERS * HEADS * SIZE
    assert coreset.indices.shape[-1] == CASES[case][2] + SIZE - KEPT
    expected = expected_pairs(case, ranked, lengths)
    for number, head in enumerate(np.ndindex(LAYERS, HEADS)):
        one = jax.tree.map(lambda leaf, head=head: np.asarray(leaf[head]), coreset)
        filled = int(np.sum(one.indices >= 0))
        length = lengths[head]
        assert filled == min(length, len(expected[number]) + SIZE - KEPT)
        np.testing.assert_array_equal(one.indices[filled:], -1)
        np.testing.assert_array_equal(one.log_weights[filled:], -np.inf)
        one = jax.tree.map(lambda leaf, filled=filled: leaf[:filled], one)
        assert np.all(np.diff(one.indices) > 0)
        assert one.indices[-1] < length
        np.testing.assert_array_equal(one.keys, keys[head][one.indices])
        assert np.all(np.isfinite(np.float32(one.values)))
        assert np.all(np.isfinite(one.log_weights))
        kept = np.isin(one.indices, expected[number])
        assert kept.sum() == len(expected[number])
        # And whatever there is, where it fits in.
        kept |= filled == length
        np.testing.assert_array_equal(one.log_weights[kept], 0)
        np.testing.assert_array_equal(one.values[kept], values[head][one.indices[kept]])


@pytest.mark.parametrize("case", CASES)
def test_pairs_that_are_looked_up_and_both_ends_are_kept_as_they_are(cache, given, case):
    """In ragged heads; scores of padding are no numbers."""
    keys, values, queries = cache
    poisoned = np.where(np.arange(COUNT) < LENGTHS[..., None], given, np.nan)
    coreset = jax.device_get(compress(*cache, poisoned, LENGTHS)[case])
    check(case, coreset, ranked(case, keys, queries, given, LENGTHS), keys, values, LENGTHS)


@pytest.mark.slow
def test_half_precision_is_kept_bit_by_bit(whole):
    keys, values, queries = (array.astype(jnp.bfloat16) for array in whole)
    scores, compressor = largest_weights(queries, keys), CASES["a layer"][0]
    coreset = compressor(RNG, keys, values, size=SIZE, queries=queries)
    assert coreset.values.dtype == coreset.keys.dtype == jnp.bfloat16
    assert coreset.log_weights.dtype == np.float32
    check("a layer", jax.device_get(coreset), scores, keys, values, FULL)


@pytest.mark.slow
def test_scores_of_observed_queries_are_those_that_it_finds(whole):
    keys, values, queries = (array[0] for array in whole)
    observed = cj.queries.observe(cj.queries.empty(keys, count=SAMPLES), queries, keys)
    np.testing.assert_array_equal(observed.queries, queries)
    call = functools.partial(attended(axes=0), RNG, keys, values, size=SIZE)
    one, other = call(queries=queries), call(queries=queries, scores=observed.scores)
    chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-5)


def test_samples_that_are_not_finite_say_so_and_cost_other_heads_nothing(whole, given):
    """Neither do those whose scores overflow."""
    keys, values, queries = whole
    for fillings in ((1.0, np.inf), (1e30, 1e30)):
        sick_keys, sick = keys.copy(), queries.copy()
        sick_keys[1, 1, 30, 2] *= fillings[0]
        sick[1, 1, 5, 2] = fillings[1]
        for case, coreset in compress(sick_keys, values, sick, given, FULL).items():
            broken = np.isnan(coreset.log_weights)
            # Scores that are given do not overflow, nor what is fitted beside them.
            assert np.all(broken[1, 1]) or (case == "every head" and fillings[0] > 1)
            assert broken.sum() == np.sum(broken[1, 1])
            # What the sick head does not keep, others do.
            if case == "a layer":
                kept = np.sum(coreset.indices[1] >= 0, axis=-1)
                assert kept.sum() == HEADS * SIZE
                assert kept[1] <= sum(ENDS.values()) + SIZE - KEPT


def test_budgets_are_permuted_with_heads_and_equal_heads_share_alike(whole, given):
    found = compress(*whole, given, FULL)
    turned = (np.ascontiguousarray(array[::-1, ::-1]) for array in (*whole, given))
    other = compress(*turned, FULL)
    alike = (np.broadcast_to(array[:1, 1:2], array.shape) for array in (*whole, given))
    equal = compress(*alike, FULL)
    for case in CASES:
        kept = [np.sum(each[case].indices >= 0, axis=-1) for each in (found, other)]
        np.testing.assert_array_equal(kept[0], kept[1][::-1, ::-1])
        np.testing.assert_array_equal(np.sum(equal[case].indices >= 0, axis=-1), SIZE)
        assert (case == "a head") == (len(set(np.ravel(kept[0]).tolist())) == 1)


@pytest.mark.parametrize("size", [1, 15, COUNT - 1, COUNT, COUNT + 5])
def test_any_size_is_answered(whole, size):
    keys, values, queries = (array[0] for array in whole)
    coreset = attended(axes=0)(RNG, keys, values, size=size, queries=queries)
    held = coreset.indices >= 0
    assert HEADS * min(size, COUNT) >= np.sum(held) > 0
    np.testing.assert_array_equal(held, np.isfinite(coreset.log_weights))
    assert np.all(np.isfinite(cj.attend(queries, coreset)))
    if size >= COUNT:
        np.testing.assert_array_equal(coreset.values, values)
        np.testing.assert_array_equal(coreset.log_weights, 0)


def fit_by_hand(keys, values, queries, rest, pivots):
    """Weights and values behind pivots, and squared errors of the fit and of the plain answer.

    Values are those of the unit problem, a shift and a factor away.
    """
    keys, values = double(keys, values)
    center = values.mean(axis=0)
    radius = np.linalg.norm(values - center, axis=1).max()
    values = (values - center) / radius
    weights = attention_weights(queries, keys)
    outputs, shares = weights @ values, weights[:, pivots]
    mass, numerators = weights[:, rest].sum(axis=1), weights[:, rest] @ values[rest]
    judging = np.arange(len(queries)) % 8 == 4
    seen, own = shares[~judging], values[pivots]
    together = seen.sum(axis=1)
    common = mass[~judging] @ together / (together @ together)
    lengths = np.linalg.norm(seen, axis=0)
    features = seen / lengths
    normal = features.T @ features + 0.1 * np.eye(len(pivots))

    def change(wanted):
        return np.linalg.solve(normal, features.T @ wanted) / lengths[:, None]

    fitted = common + change((mass[~judging] - common * together)[:, None])[:, 0]
    fitted = np.maximum(fitted, 0.02 * common)
    wanted = numerators[~judging] + (seen @ fitted - mass[~judging])[:, None] * outputs[~judging]
    moved = fitted[:, None] * own
    moved = (moved + change(wanted - seen @ moved)) / fitted[:, None]
    # No value goes further out than four times the farthest of the cache.
    moved = moved * np.minimum(1, 4 / np.linalg.norm(moved, axis=1))[:, None]
    plain, fitted = (np.full(len(pivots), common), own), (fitted, moved)

    def error(weights, values):
        told = shares * weights
        mixed = outputs - numerators + told @ values
        wrong = mixed / (1 - mass + told.sum(axis=1))[:, None] - outputs
        return np.sum(wrong[judging] ** 2)

    after, before = (radius**2 * error(*each) for each in (fitted, plain))
    answer = fitted if after < before else plain
    return answer[0], radius * answer[1] + center, after, before


def test_the_fit_is_that_of_least_squares_and_never_worse_than_the_plain_answer(whole):
    keys, values, queries = (array.reshape(-1, *array.shape[2:]) for array in whole)
    # Heads with a few pairs that are kept, with samples enough to be judged by, or too few.
    rest = np.random.default_rng(3).uniform(size=keys.shape[:2]) < 0.8

    @jax.jit
    @jax.vmap
    def run(keys, values, queries, rest):
        head = Head.prepare(
            RNG, jnp.int32(0), keys, values, jnp.int32(COUNT), queries, ragged=False
        )
        return represent(head, rest, 6)

    better = []
    for samples in (SAMPLES, 4):
        coresets, info = jax.device_get(run(keys, values, queries[:, :samples], rest))
        for head in range(len(keys)):
            one = jax.tree.map(lambda leaf, head=head: leaf[head], coresets)
            assert np.all(rest[head][one.indices])
            np.testing.assert_array_equal(one.keys, keys[head][one.indices])
            weights, moved, after, before = fit_by_hand(
                keys[head], values[head], queries[head, :samples], rest[head], one.indices
            )
            better.append(bool(after < before))
            assert info.fallbacks[head] == (not better[-1])
            np.testing.assert_allclose(np.exp(one.log_weights), weights, rtol=2e-3)
            np.testing.assert_allclose(one.values, moved, rtol=2e-3, atol=2e-3)
            count = max(np.sum(np.arange(samples) % 8 == 4), 1)
            found = info.sample_error_before[head], info.sample_error_after[head]
            expected = np.sqrt(np.array([before, min(before, after)]) / count)
            np.testing.assert_allclose(found, expected, rtol=5e-3, atol=1e-5)
    assert any(better)
    assert not any(better[len(keys) :])


def test_few_pairs_stand_for_themselves(whole):
    keys, values, queries = (array[0, 0] for array in whole)
    rest = np.isin(np.arange(COUNT), [3, 20, 41])
    given = jnp.int32(0), keys, values, jnp.int32(COUNT), queries
    head = Head.prepare(RNG, *given, ragged=False)
    coreset, _ = jax.jit(represent, static_argnums=2)(head, rest, 5)
    np.testing.assert_array_equal(coreset.indices, [3, 20, 41, -1, -1])
    np.testing.assert_array_equal(coreset.log_weights, [0, 0, 0, -np.inf, -np.inf])
    np.testing.assert_array_equal(coreset.values[:3], values[[3, 20, 41]])


@pytest.mark.slow
def test_queries_that_it_has_not_seen_are_answered_better_than_by_a_sample():
    """Clusters of keys, and a few pairs that single queries look up."""
    heads, count, width = 6, 256, 16
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((heads, 12, width)) * 2
    labels = rng.integers(0, 12, (heads, count))
    keys = np.take_along_axis(centers, labels[..., None], axis=1)
    keys = keys + 0.4 * rng.standard_normal(keys.shape)
    values = np.tanh(keys[..., :8]) + 0.3 * rng.standard_normal((heads, count, 8))
    needles = rng.integers(8, count - 8, (heads, 10))
    queries = rng.standard_normal((heads, 256, width)) + centers[:, :1] * 0.3
    found = np.take_along_axis(keys, needles[..., None], axis=1)
    queries[:, ::13] = np.tile(found, (1, 2, 1)) * 1.5
    keys, values, queries = (np.float32(array) for array in (keys, values, queries))
    seen, asked = queries[:, ::2], queries[:, 1::2]
    exact = attention(asked, keys, values)

    def error(compressor):
        coreset = compressor(RNG, keys, values, size=32, queries=seen)
        answers = attention(asked, coreset.keys, coreset.values, coreset.log_weights)
        return np.linalg.norm(answers - exact, axis=-1).mean(axis=-1)

    sample, evicted = error(cj.keep_ends(baselines.uniform())), error(baselines.kvzip())
    for compressor in (attended(), attended(axes=0)):
        ours = error(compressor)
        assert np.mean(ours) < 0.7 * np.mean(sample)
        assert np.mean(ours) < 0.8 * np.mean(evicted)


@pytest.mark.slow
def test_equal_shapes_are_compiled_once(whole):
    keys, values, queries = (array[0] for array in whole)

    @jax.jit
    @chex.assert_max_traces(1)
    def run(rng, compressor, keys, values, queries):
        return compressor(rng, keys, values, size=SIZE, queries=queries)

    for seed, scale in ((0, 0.3), (1, 0.5), (1, 0.4)):
        compressor = attended(axes=0, scale=jnp.float32(scale))
        run(jax.random.key(seed), compressor, keys, values, queries)


def test_bad_calls_are_refused(whole):
    keys, values, queries = whole
    for options, message in (
        ({"kept_fraction": 1.0}, "kept_fraction must be at least 0 and below 1"),
        ({"kept_fraction": 0.02}, "recent_fraction must be at most kept_fraction"),
        ({"recent_fraction": -0.1}, "recent_fraction must be at least 0"),
        ({"max_multiple": 0.9}, "max_multiple must be at least 1"),
        ({"sinks": None}, "sinks must be a static Python int"),
        ({"axes": "heads"}, "axes must be one or more static Python ints"),
    ):
        with pytest.raises(ValueError, match=message):
            attended(**options)
    call = {"size": SIZE, "queries": queries}
    with pytest.raises(ValueError, match="axes must name leading axes"):
        attended(axes=(0, 2))(RNG, keys, values, **call)
    with pytest.raises(ValueError, match="queries must be given to attended"):
        attended()(RNG, keys, values, size=SIZE, scores=np.ones(keys.shape[:-1], np.float32))
    for wrapper in (cj.keep_ends, functools.partial(cj.chunked, chunk_size=8)):
        with pytest.raises(ValueError, match="cannot compress one by itself"):
            wrapper(attended(axes=0))(RNG, keys, values, **call)
