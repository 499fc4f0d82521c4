"""Compactor: leverage, attention within chunks and their blend, in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax.baselines import compactor
from coreset_jax.nn.rotary import rotate
from tests.attention_scores import attention_weights

COUNT, WIDTH, SIZE, BASE = 60, 6, 20, 50.0
LENGTHS = (COUNT, 41, 9, 2)
RNG = jax.random.key(3)
ENDS = {"sinks": 2, "num_recent": 3}
# Keys as they are, a sketch of them, and keys turned back; with samples of one and two groups.
CASES = {
    "leverage": (compactor(**ENDS), 0),
    "sketch": (compactor(sketch_width=4, **ENDS), 0),
    "turned back": (compactor(rope_base=BASE, **ENDS), 0),
    "every query": (compactor(chunk_size=16, **ENDS), COUNT),
    "some queries": (compactor(chunk_size=25, blending=1.0, scale=0.5, **ENDS), 17),
    "groups": (compactor(chunk_size=16, groups=2, scale=None, **ENDS), 30),
    "few queries": (compactor(chunk_size=7, blending=0.0, **ENDS), 3),
    "one chunk": (compactor(rope_base=BASE, sinks=0, num_recent=0), 40),
}


@pytest.fixture(scope="module")
def heads():
    rng = np.random.default_rng(2)
    keys = rng.standard_normal((len(LENGTHS), COUNT, WIDTH)) * [3, 1, 1, 1, 0.5, 0.2] + 0.5
    values = rng.standard_normal((len(LENGTHS), COUNT, 4))
    values *= np.exp(rng.standard_normal(COUNT))[:, None]
    queries = rng.standard_normal((len(LENGTHS), 2 * COUNT, WIDTH))
    return tuple(array.astype(np.float32) for array in (keys, values, queries))


def samples(queries, compressor, count):
    """The first of each group, one group behind the other."""
    return queries[:, : compressor.groups * count] if count else None


@jax.jit
def compress(keys, values, queries):
    found = {}
    for case, (compressor, count) in CASES.items():
        options = {"size": SIZE, "lengths": np.array(LENGTHS)}
        given = samples(queries, compressor, count)
        found[case] = compressor(RNG, keys, values, queries=given, **options)
    return found


def normalized(scores):
    return (scores - scores.mean()) / scores.std()


def scores_by_hand(compressor, head, keys, values, queries, length):
    """Scores of the pairs that are judged, and where these begin and end."""
    start, stop = compressor.sinks, length - compressor.num_recent
    inner = np.float64(keys)
    if compressor.rope_base is not None:
        places = -jnp.arange(len(keys))[None]
        inner = np.float64(rotate(keys[None, :, None], places, compressor.rope_base)[0, :, 0])
    inner = inner[start:stop] - inner[start:stop].mean(axis=0)
    if compressor.sketch_width < WIDTH:
        shape = WIDTH, compressor.sketch_width
        inner = inner @ np.float64(jax.random.normal(jax.random.fold_in(RNG, head), shape))
        inner /= np.sqrt(compressor.sketch_width)
    left, singular, _ = np.linalg.svd(inner, full_matrices=False)
    # The regularizer hardly matters.
    leverage = np.sum(left**2 * (singular**2 / (singular**2 + 5e-3)), axis=-1)
    if queries is None:
        return leverage, start, stop
    groups = queries.reshape(compressor.groups, -1, WIDTH)
    positions = [index * COUNT // groups.shape[1] for index in range(groups.shape[1])]
    attention = np.zeros(COUNT)
    for first in range(0, COUNT, compressor.chunk_size):
        pairs = [i for i in range(first, first + compressor.chunk_size) if start <= i < stop]
        near = [j for j, position in enumerate(positions) if position in pairs]
        if pairs:
            scale = WIDTH**-0.5 if compressor.scale is None else compressor.scale
            attention[pairs] = 1.0
            if near:
                rows = groups[:, near].reshape(-1, WIDTH)
                shares = attention_weights(rows, keys[pairs], scale=scale).mean(axis=0)
                attention[pairs] = len(pairs) * shares
    attention *= np.linalg.norm(np.float64(values), axis=-1)
    wide = np.concatenate([[0], attention[start:stop], [0]])
    pooled = (wide[:-2] + wide[1:-1] + wide[2:]) / 3
    return normalized(pooled) + compressor.blending * normalized(leverage), start, stop


@pytest.mark.parametrize("case", CASES)
def test_keeps_what_the_formula_says(heads, case):
    keys, values, queries = heads
    compressor, count = CASES[case]
    coreset, given = compress(*heads)[case], samples(queries, compressor, count)
    for head, length in enumerate(LENGTHS):
        one = jax.tree.map(lambda leaf, head=head: leaf[head], coreset)
        if length <= SIZE:
            expected = np.arange(length)
        else:
            rows = None if given is None else given[head]
            scores, start, stop = scores_by_hand(
                compressor, head, keys[head], values[head], rows, length
            )
            left = SIZE - start - (length - stop)
            best = start + np.argsort(-scores, kind="stable")[:left]
            expected = np.sort([*range(start), *best, *range(stop, length)])
        kept = len(expected)
        np.testing.assert_array_equal(one.indices[:kept], expected, err_msg=str(length))
        np.testing.assert_array_equal(one.indices[kept:], -1)
        np.testing.assert_array_equal(one.log_weights[:kept], 0)
        np.testing.assert_array_equal(one.keys[:kept], keys[head][expected])


def test_sketches_are_near_to_exact_leverage_and_drawn():
    """An outlying direction is found through every sketch; others depend on the draw."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((1, 400, 64)).astype(np.float32)
    far = np.array([17, 230, 311])
    keys[:, far] *= 20
    compressor = compactor(sinks=0, num_recent=0)
    kept = [
        set(np.ravel(compressor(jax.random.key(seed), keys, keys, size=40).indices))
        for seed in range(3)
    ]
    assert all(set(far) <= each for each in kept)
    assert kept[0] != kept[1] != kept[2]


def test_keys_of_low_rank_and_equal_keys_have_leverage():
    rng = np.random.default_rng(1)
    keys = rng.standard_normal((3, 50, 2)) @ rng.standard_normal((3, 2, 8))
    keys[1] = keys[1, :1]
    keys[2] = 0
    keys = keys.astype(np.float32)
    coreset = compactor(sinks=1, num_recent=1)(RNG, keys, keys, size=10, queries=keys[:, :20])
    assert np.all(np.isfinite(coreset.log_weights))
    assert np.all(np.diff(coreset.indices, axis=-1) > 0)


@pytest.mark.slow
def test_samples_that_are_not_finite_say_so_where_they_are_given(heads):
    keys, values, queries = (array.copy() for array in heads)
    queries[1, 3] = np.nan
    call = functools.partial(compactor(chunk_size=16), RNG, keys, values, size=SIZE)
    assert not np.any(np.isnan(call().log_weights))
    sick = np.isnan(call(queries=queries[:, :COUNT]).log_weights)
    np.testing.assert_array_equal(sick.all(axis=-1), [False, True, False, False])
    assert sick.sum() == SIZE


def test_bad_options_are_refused(heads):
    keys, values, queries = heads
    for options, message in (
        ({"blending": -0.1}, "blending must be at least 0"),
        ({"sketch_width": 0}, "sketch_width must be at least 1"),
        ({"chunk_size": 2.0}, "chunk_size must be a static Python int"),
        ({"sinks": -1}, "sinks must be at least 0"),
        ({"rope_base": 0.0}, "rope_base must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            compactor(**options)
    with pytest.raises(ValueError, match="even width to be rotated"):
        compactor(rope_base=BASE)(RNG, keys[..., :5], values, size=SIZE)
    with pytest.raises(ValueError, match="each of 7 groups"):
        compactor(groups=7)(RNG, keys, values, size=SIZE, queries=queries)
