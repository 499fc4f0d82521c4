"""The cache: exact while everything fits, bounded afterwards, and every sequence by itself."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax.nn import CoresetCache, grouped

STEPS = 5000


@pytest.mark.parametrize(
    "pieces",
    [pytest.param([56], marks=pytest.mark.slow), [24, *[1] * 32], [1] * 56, [24, 24, 8]],
    ids=["prompt", "prompt and steps", "steps", "chunks"],
)
def test_exact_while_everything_fits(sequences, empty_cache, read, pieces):
    first = sequences.cut(0, 56)
    outputs, cache = read(empty_cache(), first, pieces)
    np.testing.assert_allclose(outputs, first.causal(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(cache.lengths, 56)
    held = np.sort(cache.positions, axis=-1)[..., -56:]
    np.testing.assert_array_equal(held, np.broadcast_to(np.arange(56), held.shape))


def test_thousands_of_steps_stay_bounded_and_weigh_what_has_come(config, empty_cache, weights):
    cache = empty_cache()
    like = cache.recent.keys.shape, cache.recent.values.shape

    def pair(number):
        rngs = jax.random.split(jax.random.fold_in(jax.random.key(2), number))
        shapes = ((batch, 1, heads, width) for batch, heads, _, width in like)
        return tuple(map(jax.random.normal, rngs, shapes))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def decode(cache):
        def step(cache, number):
            keys, values = pair(number)
            queries = jnp.repeat(keys, 2, axis=2)
            outputs, cache = cache.read_and_extend(queries, keys, values)
            return cache, (jnp.all(jnp.isfinite(outputs)), weights(cache).sum(axis=-1))

        return jax.lax.scan(step, cache, jnp.arange(STEPS))

    last, (finite, totals) = decode(cache)
    chex.assert_trees_all_equal_shapes_and_dtypes(last, cache)
    assert np.all(finite)
    lengths = np.arange(1, STEPS + 1)[:, None, None]
    np.testing.assert_allclose(totals, np.broadcast_to(lengths, totals.shape), rtol=1e-5)
    np.testing.assert_array_equal(last.lengths, STEPS)
    assert np.all(np.asarray(last.positions) >= 0)
    assert np.asarray(last.middle.absorbed).max() == STEPS - config.sinks - last.filled[0]


def test_a_jitted_step_is_traced_once(sequences, empty_cache):
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(CoresetCache.read_and_extend, n=1))
    cache = empty_cache()
    for start in range(sequences.keys.shape[1]):
        _, cache = step(cache, *sequences.cut(start, start + 1))


def check_held(cache, sequences, weights):
    """Held pairs are those of the sequence at their positions; sinks and window are all there."""
    config = cache.config
    parts = [
        np.concatenate([np.asarray(part) for part in arrays], axis=2)
        for arrays in zip(cache.sinks, cache.middle.pairs[:2], cache.recent, strict=True)
    ]
    for entry, head in np.ndindex(*parts[0].shape[:2]):
        length = int(cache.lengths[entry])
        positions = np.asarray(cache.positions[entry, head])
        full = positions >= 0
        np.testing.assert_array_equal(full, np.asarray(weights(cache)[entry, head]) > 0)
        held = positions[full]
        assert len(set(held)) == len(held)
        assert set(range(min(length, config.sinks))) <= set(held)
        assert set(range(max(length - config.window, 0), length)) <= set(held)
        assert held.max(initial=-1) < length
        for part, source in zip(parts, sequences[1:], strict=True):
            np.testing.assert_array_equal(part[entry, head][full], source[entry, held, head])


@pytest.mark.parametrize("piece", [pytest.param(1, marks=pytest.mark.slow), 5, 17])
def test_held_pairs_are_those_of_the_sequence(config, sequences, empty_cache, weights, piece):
    lengths = np.array([0, 3, 57, 90])
    # Prompts as subsets: refitted values are not those of the sequence.
    subsets = empty_cache(config.replace(compressor=cj.balanced()))
    cache = subsets.prefill(*sequences[1:], lengths)
    check_held(cache, sequences, weights)
    while lengths.max() + piece <= sequences.keys.shape[1]:
        cache = cache.append(*sequences.following(lengths, piece)[1:])
        lengths += piece
        if piece > 1 or lengths[0] % 10 == 0:
            check_held(cache, sequences, weights)


@pytest.mark.slow
def test_each_sequence_of_a_ragged_batch_is_read_as_if_alone(sequences, empty_cache):
    lengths = np.array([3, 150, 57, 30])

    def run(cache, sequences, lengths):
        outputs = cache.attend(*sequences, lengths)
        cache = cache.prefill(*sequences[1:], lengths)
        inside = np.arange(outputs.shape[1]) < lengths[:, None]
        found = [np.where(inside[..., None, None], outputs, 0)]
        for step in range(40):
            following = sequences.following(lengths + step, 1)
            found.append(cache.attend(*following))
            cache = cache.append(*following[1:])
        return np.concatenate(found, axis=1), np.asarray(cache.positions)

    outputs, positions = run(empty_cache(), sequences, lengths)
    for entry in range(len(lengths)):
        alone = sequences.entries(entry)
        expected, held = run(empty_cache(like=alone), alone, lengths[[entry]])
        np.testing.assert_array_equal(positions[[entry]], held)
        np.testing.assert_allclose(outputs[[entry]], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_prompt_beside_running_sequences_is_compressed_at_once(sequences, empty_cache):
    running = np.array([0, 40, 0, 7])
    cache = empty_cache().prefill(*sequences[1:], running)
    _, mixed = cache.read_and_extend(*sequences)
    for entry, count in enumerate(running):
        alone = sequences.entries(entry)
        expected = empty_cache(like=alone)
        if count:
            expected = expected.prefill(*alone[1:], np.array([count])).append(*alone[1:])
        else:
            _, expected = expected.read_and_extend(*alone)
        np.testing.assert_array_equal(mixed.positions[entry], expected.positions[0])


@pytest.mark.slow
def test_prompts_are_read_a_few_queries_at_a_time(sequences, empty_cache, monkeypatch):
    cache = empty_cache().prefill(*sequences[1:])
    lengths = np.array([150, 3, 80, 149])
    arguments = sequences.queries, sequences.keys, sequences.values, lengths
    at_once = np.asarray(cache.attend(*arguments))
    jax.clear_caches()
    monkeypatch.setattr(grouped, "_SCORES", 2**15)
    chunked = np.asarray(cache.attend(*arguments))
    inside = np.arange(at_once.shape[1]) < lengths[:, None]
    np.testing.assert_allclose(chunked[inside], at_once[inside], rtol=1e-5, atol=1e-6)
    jax.clear_caches()


def test_padding_is_as_if_it_were_not_there(sequences, empty_cache):
    lengths = np.array([3, 56, 40, 24])
    outputs, cache = empty_cache().read_and_extend(*sequences.cut(0, 56), lengths)
    following = sequences.following(lengths, 1)
    after = np.asarray(cache.attend(*following))
    for entry, count in enumerate(lengths.tolist()):
        alone = sequences.entries(entry).cut(0, count + 1).causal()
        np.testing.assert_allclose(outputs[[entry], :count], alone[:, :count], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(after[[entry]], alone[:, count:], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("filling", [np.nan, np.inf])
def test_padding_may_hold_anything(sequences, empty_cache, filling):
    lengths, more = np.array([0, 3, 57, 150]), np.array([0, 17, 5, 16])

    def run(filling):
        prompt = sequences.padded_with(lengths, filling)
        caches = [empty_cache().prefill(*prompt[1:], lengths)]
        outputs = [(empty_cache().attend(*prompt, lengths), lengths)]
        part = sequences.cut(0, 17).padded_with(more, filling)
        for _ in range(4):
            outputs.append((caches[-1].attend(*part, more), more))
            caches.append(caches[-1].append(*part[1:], more))
        meant = [
            [out[:count] for out, count in zip(np.asarray(each), counts, strict=True)]
            for each, counts in outputs
        ]
        return meant, caches

    chex.assert_trees_all_equal(run(filling), run(0.0))


@pytest.mark.slow
def test_a_sequence_changes_no_other(sequences, empty_cache):
    """The batch compresses at other times, too: one of them has a longer prompt."""

    def run(sequences, lengths):
        cache = empty_cache().prefill(*sequences[1:], lengths)
        for step in range(30):
            cache = cache.append(*sequences.following(lengths + step, 1)[1:])
        others = np.array([0, 2, 3])
        return jax.tree.map(lambda array: array[others], cache.replace(rng=jnp.zeros(4)))

    other = sequences._replace(keys=sequences.keys.copy())
    other.keys[1] *= 3
    lengths = np.array([3, 150, 57, 90])
    expected = run(sequences, lengths)
    lengths[1] = 2
    chex.assert_trees_all_equal(run(other, lengths), expected)


def test_what_is_not_finite_is_never_lost(sequences, empty_cache):
    """The head answers NaN, from when it has come; the others do not."""
    for which in (1, 2):
        sick = sequences._replace(**{sequences._fields[which]: sequences[which].copy()})
        sick[which][0, 50, 0, 0] = np.nan
        asked = sequences.queries[:, :1]
        expected = np.zeros(asked.shape[:3], bool)
        expected[0, :, :2] = True
        cache = empty_cache().prefill(*sick[1:], np.full(4, 150))
        decoded = empty_cache()
        for start in range(0, 136, 17):
            cache = cache.append(*sequences.cut(start, start + 17)[1:])
            decoded = decoded.append(*sick.cut(start, start + 17)[1:])
        for each in (cache, decoded):
            found = np.isnan(each.attend(asked))
            np.testing.assert_array_equal(found, np.broadcast_to(expected[..., None], found.shape))


def test_without_a_middle_older_pairs_are_dropped(config, sequences, empty_cache):
    config = config.replace(size=config.sinks + config.recent)
    cache = empty_cache(config).prefill(*sequences.cut(0, 100)[1:])
    for start in range(100, 150):
        cache = cache.append(*sequences.cut(start, start + 1)[1:])
    assert cache.positions.shape[-1] == config.size
    held = np.unique(cache.positions)
    held = held[held >= 0]
    np.testing.assert_array_equal(held[: config.sinks], np.arange(config.sinks))
    assert config.window <= len(held) - config.sinks <= config.recent
    np.testing.assert_array_equal(held[config.sinks :], 150 - np.arange(len(held) - 4, 0, -1))
    kept = type(sequences)(
        sequences.queries[:, -len(held) :], sequences.keys[:, held], sequences.values[:, held]
    )
    outputs = cache.attend(sequences.queries[:, -1:])
    np.testing.assert_allclose(outputs, kept.causal()[:, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_eighth_of_the_pairs_takes_a_seventh_of_the_bytes(config, dtype):
    like = jnp.zeros((1, 1, 8, 64), dtype)
    config = type(config)(size=2048)
    cache = CoresetCache.init(config, jax.random.key(0), like, like)
    assert cache.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert cache.nbytes <= 2 * 16384 * like.nbytes / 7
