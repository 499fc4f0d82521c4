"""Methods that keep the pairs of largest score, against the same scores in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import baselines
from coreset_jax._src.core.head import Head
from coreset_jax._src.queries import scores

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
    """With the queries to observe, the pairs of the window, and neighbors on either side."""
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
    "h2o, few recent": (baselines.h2o(recent_fraction=0.2), by_heavy_hitters, {"recent": 3}),
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
    "keydiff": (baselines.keydiff(), by_dissimilarity, {}),
}


@jax.jit
def compress(keys, values, queries):
    """What every case keeps of ragged heads: all of them in one program."""
    options = {"size": SIZE, "lengths": np.array(LENGTHS), "queries": queries}
    rng = jax.random.key(0)
    return {case: CASES[case][0](rng, keys, values, **options) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_keeps_what_the_formula_says(heads, case):
    _, formula, options = CASES[case]
    keys, values, queries = heads
    coreset = compress(*heads)[case]
    for head, length in enumerate(LENGTHS):
        pairs = (array[head, :length].astype(np.float64) for array in (keys, values))
        expected = formula(*pairs, queries[head].astype(np.float64), **options)
        # Of equal scores the first: a pool gives many.
        best = np.sort(np.argsort(-expected, kind="stable")[:SIZE])
        filled = np.full(SIZE, -1)
        filled[: len(best)] = best
        np.testing.assert_array_equal(coreset.indices[head], filled)


@pytest.mark.slow
def test_blocks_of_queries_add_up(heads, monkeypatch):
    keys, values, queries = (array[0] for array in heads)
    length = 47
    shares = softmax(np.float64(queries) @ np.float64(keys[:length]).T / np.sqrt(WIDTH))
    for block_size in (1, 5, 100):
        monkeypatch.setattr(scores, "WEIGHTS", block_size * COUNT)

        def every(keys, values, queries):
            given = jnp.int32(0), keys, values, jnp.int32(length), queries
            head = Head.prepare(jax.random.key(0), *given, ragged=True)
            means = scores.mean_attention, scores.mean_squared_attention
            largest = scores.largest_attention(head, queries)
            return [mean(head, queries) for mean in means], largest

        means, largest = jax.jit(every)(keys, values, queries)
        np.testing.assert_allclose(largest[:length], shares.max(axis=0), rtol=1e-5)
        np.testing.assert_array_equal(largest[length:], 0.0)
        for power, mean in enumerate(means, start=1):
            np.testing.assert_allclose(mean[:length], (shares**power).mean(axis=0), rtol=1e-5)
            np.testing.assert_array_equal(mean[length:], 0.0)


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
    coresets = compress(keys, values, queries)
    for case in ("top_attention", "h2o", "snapkv, window of all", "expected_attention"):
        sick = np.isnan(coresets[case].log_weights).all(axis=-1)
        np.testing.assert_array_equal(sick, [False, True, False])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (baselines.streaming_llm, {"sinks": -1}, "sinks must be at least 0"),
        (baselines.h2o, {"recent_fraction": 1.5}, "recent_fraction must lie between 0 and 1"),
        (baselines.h2o, {"recent_fraction": None}, "recent_fraction must be a number"),
        (baselines.snapkv, {"window": 0}, "window must be at least 1"),
        (baselines.snapkv, {"kernel_size": 4}, "kernel_size must be odd"),
        (baselines.snapkv, {"groups": 2.0}, "groups must be a static Python int"),
        (baselines.expected_attention, {"epsilon": -1}, "epsilon must be at least 0"),
        (baselines.expected_attention, {"sinks": True}, "sinks must be a static Python int"),
    ],
)
def test_bad_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_queries_must_divide_into_groups(heads):
    keys, values, queries = heads
    for make in (baselines.snapkv, baselines.expected_attention, baselines.h2o):
        compressor = make(groups=2)
        for size in (SIZE, COUNT):
            with pytest.raises(ValueError, match=r"each of 2 groups; got queries \(3, 21, 6\)"):
                compressor(jax.random.key(0), keys, values, size=size, queries=queries[:, 1:])
