"""Methods that keep the pairs of largest score, against the same scores in float64 NumPy."""

import jax
import numpy as np
import pytest

from coreset_jax import baselines
from coreset_jax.baselines import scores

COUNT, WIDTH, VALUE_WIDTH, SAMPLES = 60, 6, 4, 22
LENGTHS = (COUNT, 47, 9)
SIZE = 17


@pytest.fixture(scope="module")
def heads():
    rng = np.random.default_rng(11)
    keys = 2 * rng.standard_normal((len(LENGTHS), COUNT, WIDTH)) + 0.5
    # Much attention next to a window of recent pairs, and none of it the others' business.
    for head, length in enumerate(LENGTHS):
        keys[head, length - 5] = 6.0
    values = rng.standard_normal((len(LENGTHS), COUNT, VALUE_WIDTH))
    queries = rng.standard_normal((len(LENGTHS), SAMPLES, WIDTH)) + 0.3
    return tuple(array.astype(np.float32) for array in (keys, values, queries))


def softmax(logits):
    masses = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return masses / masses.sum(axis=-1, keepdims=True)


def by_position(keys, values, queries, *, sinks=4):
    positions = np.arange(len(keys), dtype=float)
    return np.where(positions < sinks, np.inf, positions)


def by_attention(keys, values, queries, *, scale=WIDTH**-0.5):
    return softmax(scale * queries @ keys.T).mean(axis=0)


def by_heavy_hitters(keys, values, queries, *, recent):
    attention = by_attention(keys, values, queries)
    attention[len(keys) - recent :] = np.inf
    return attention


def by_pooled_attention(keys, values, queries, *, observed, recent, reach):
    """With the queries to observe, the pairs of the window, and neighbours on either side."""
    attention = by_attention(keys, values, queries[observed])
    before = attention[: max(len(keys) - recent, 0)]
    pooled = [before[max(i - reach, 0) : i + reach + 1].max() for i in range(len(before))]
    return np.concatenate([pooled, np.full(len(keys) - len(before), np.inf)])


def by_expected_attention(keys, values, queries, *, groups, epsilon=0.0):
    masses = []
    for group in np.split(queries, groups):
        centered = group - group.mean(axis=0)
        covariance = centered.T @ centered / len(group)
        exponents = keys @ group.mean(axis=0) / np.sqrt(WIDTH)
        exponents += np.einsum("nd,de,ne->n", keys, covariance, keys) / (2 * WIDTH)
        masses.append(softmax(exponents[4:]))
    judged = (np.mean(masses, axis=0) + epsilon) * np.linalg.norm(values[4:], axis=1)
    return np.concatenate([np.full(4, np.inf), judged])


def by_dissimilarity(keys, values, queries):
    directions = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    return -directions @ directions.mean(axis=0)


CASES = {
    "streaming_llm": (baselines.streaming_llm(), by_position, {}),
    "no sinks": (baselines.streaming_llm(sinks=0), by_position, {"sinks": 0}),
    "only sinks": (baselines.streaming_llm(sinks=SIZE + 3), by_position, {"sinks": SIZE}),
    "top_attention": (baselines.top_attention(), by_attention, {}),
    "scale": (baselines.top_attention(scale=1.0), by_attention, {"scale": 1.0}),
    "h2o": (baselines.h2o(), by_heavy_hitters, {"recent": SIZE // 2}),
    "h2o, few recent": (baselines.h2o(recent=0.2), by_heavy_hitters, {"recent": 3}),
    "snapkv": (
        baselines.snapkv(window=5),
        by_pooled_attention,
        {"observed": range(SAMPLES - 5, SAMPLES), "recent": 5, "reach": 3},
    ),
    "snapkv, groups": (
        baselines.snapkv(window=4, kernel_size=1, groups=2),
        by_pooled_attention,
        {"observed": [7, 8, 9, 10, 18, 19, 20, 21], "recent": 4, "reach": 0},
    ),
    "snapkv, window of all": (
        baselines.snapkv(window=100),
        by_pooled_attention,
        {"observed": range(SAMPLES), "recent": SIZE, "reach": 3},
    ),
    "expected_attention": (
        baselines.expected_attention(),
        by_expected_attention,
        {"groups": 1},
    ),
    "expected_attention, groups": (
        baselines.expected_attention(epsilon=0.02, groups=2),
        by_expected_attention,
        {"groups": 2, "epsilon": 0.02},
    ),
    "key_similarity": (baselines.key_similarity(), by_dissimilarity, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_keeps_what_the_formula_says(heads, case):
    compressor, formula, options = CASES[case]
    keys, values, queries = heads
    coreset = compressor(
        jax.random.key(0), keys, values, size=SIZE, lengths=np.array(LENGTHS), queries=queries
    )
    for head, length in enumerate(LENGTHS):
        pairs = (array[head, :length].astype(np.float64) for array in (keys, values))
        expected = formula(*pairs, queries[head].astype(np.float64), **options)
        # Of equal scores the first: a pool gives many.
        best = np.sort(np.argsort(-expected, kind="stable")[:SIZE])
        filled = np.full(SIZE, -1)
        filled[: len(best)] = best
        np.testing.assert_array_equal(coreset.indices[head], filled)


@pytest.mark.parametrize("block_size", [1, 5, SAMPLES, 100])
def test_blocks_of_queries_add_up(heads, block_size):
    keys, values, queries = (array[0] for array in heads)
    length = 47
    head = scores.Head(keys, values, np.arange(COUNT) < length, np.int32(length), None)
    weights = scores.mean_attention(head, queries, scale=None, block_size=block_size)
    expected = by_attention(keys[:length].astype(np.float64), None, queries.astype(np.float64))
    np.testing.assert_allclose(weights[:length], expected, rtol=1e-5)
    np.testing.assert_array_equal(weights[length:], 0.0)


def test_weights_too_small_for_floats_still_have_an_order():
    # Expected attention down to e^-4000: most of it is zero in float32.
    keys = np.linspace(400, 0, COUNT)[::-1, None].astype(np.float32)
    values, queries = np.ones((COUNT, 2), np.float32), np.full((3, 1), 10, np.float32)
    coreset = baselines.expected_attention()(
        jax.random.key(0), keys, values, size=SIZE, queries=queries
    )
    expected = [0, 1, 2, 3, *range(COUNT - SIZE + 4, COUNT)]
    np.testing.assert_array_equal(coreset.indices, expected)


def test_scores_that_overflow_say_so(heads):
    keys, values, queries = (array.copy() for array in heads)
    keys[1, 5] = queries[1, 3] = 1e30
    for compressor in (baselines.top_attention(), baselines.expected_attention()):
        coreset = compressor(jax.random.key(0), keys, values, size=SIZE, queries=queries)
        sick = np.isnan(np.asarray(coreset.log_weights)).all(axis=-1)
        np.testing.assert_array_equal(sick, [False, True, False])


# Mean errors of "top-m mean attention" with 1024 sample queries, measured apart from this
# library; seed of the instance and the sum of squares of its sample queries.
FIGURES = {
    "smooth": (20261, 47047.0239, {512: 1.6508606741, 128: 2.2768972256}),
    "heavy": (20262, 47626.8712, {512: 0.0265525091, 128: 0.0331072329}),
    "medium": (20263, 47084.0393, {512: 0.8795378394, 128: 1.3710997550}),
}


def sample_queries(seed):
    """What the generator of an instance gives after its keys, values and queries."""
    rng = np.random.default_rng(seed)
    count, width = 4096, 32
    rng.standard_normal((16, width))
    rng.integers(0, 16, size=count)
    for rows in (count, width, count, 512):
        rng.standard_normal((rows, width))
    return (1.2 * rng.standard_normal((1024, width))).astype(np.float32)


@pytest.mark.parametrize("name", FIGURES)
def test_error_is_the_measured_one(instances, name):
    seed, squares, figures = FIGURES[name]
    instance, queries = instances[name], sample_queries(seed)
    np.testing.assert_allclose(np.sum(queries.astype(np.float64) ** 2), squares, rtol=1e-8)
    for size, expected in figures.items():
        coreset = baselines.top_attention()(
            jax.random.key(0), instance.keys, instance.values, size=size, queries=queries
        )
        np.testing.assert_allclose(instance.error(*coreset[:3]), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (baselines.streaming_llm, {"sinks": -1}, "sinks must be at least 0"),
        (baselines.top_attention, {"scale": 0.0}, "scale must be positive"),
        (baselines.h2o, {"recent": 1.5}, "recent must lie between 0 and 1"),
        (baselines.h2o, {"recent": None}, "recent must lie between 0 and 1"),
        (baselines.snapkv, {"window": 0}, "window must be at least 1"),
        (baselines.snapkv, {"kernel_size": 4}, "kernel_size must be odd"),
        (baselines.snapkv, {"groups": 2.0}, "groups must be a static Python int"),
        (baselines.expected_attention, {"epsilon": -1}, "epsilon must be at least 0"),
        (baselines.expected_attention, {"sinks": True}, "sinks must be a static Python int"),
        (baselines.kmeans, {"iterations": -1}, "iterations must be at least 0"),
    ],
)
def test_bad_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("make", [baselines.snapkv, baselines.expected_attention])
def test_queries_must_divide_into_groups(heads, make):
    for count in (0, SAMPLES - 1):
        with pytest.raises(ValueError, match=r"each of 2 groups.*queries \(3, "):
            make(groups=2)(jax.random.key(0), *heads[:2], size=SIZE, queries=heads[2][:, :count])
