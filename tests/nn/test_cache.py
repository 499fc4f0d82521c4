"""The cache: exact while everything fits, bounded afterwards, and every sequence by itself."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax.nn import CoresetCache, grouped

STEPS = 2000
FIT = 56


def ones(sequences, stop, start=0):
    """The tokens of all sequences, one by one."""
    for place in range(start, stop):
        yield sequences.cut(place, place + 1)


@pytest.mark.slow
def test_exact_while_everything_fits(sequences, empty_cache):
    expected = sequences.cut(0, FIT).causal()
    singles = empty_cache()
    for place, token in enumerate(ones(sequences, FIT)):
        outputs, singles = singles.read_and_extend(*token)
        np.testing.assert_allclose(outputs[:, 0], expected[:, place], rtol=1e-5, atol=1e-6)
    chunks = empty_cache()
    for start in range(0, FIT, 17):
        starts = np.full(4, start)
        counts = np.minimum(17, FIT - starts)
        outputs, chunks = chunks.read_and_extend(*sequences.following(starts, 150), counts)
        stop = start + counts[0]
        found = outputs[:, : counts[0]]
        np.testing.assert_allclose(found, expected[:, start:stop], rtol=1e-5, atol=1e-6)
    for cache in (singles, chunks):
        np.testing.assert_array_equal(cache.lengths, FIT)
        held = np.sort(cache.positions, axis=-1)[..., -FIT:]
        np.testing.assert_array_equal(held, np.broadcast_to(np.arange(FIT), held.shape))


def test_padding_is_as_if_it_were_not_there(sequences, empty_cache):
    lengths = np.array([3, FIT - 1, 40, 24])
    outputs, cache = empty_cache().read_and_extend(*sequences, lengths)
    following = sequences.following(lengths, 1)
    after, cache = cache.read_and_extend(*following)
    np.testing.assert_array_equal(cache.lengths, lengths + 1)
    outputs, after = np.asarray(outputs), np.asarray(after)
    for entry, count in enumerate(lengths.tolist()):
        alone = sequences.entries(entry).cut(0, count + 1).causal()
        np.testing.assert_allclose(outputs[[entry], :count], alone[:, :count], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(after[[entry]], alone[:, count:], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_thousands_of_steps_stay_bounded_and_weigh_what_has_come(
    sequences, config, empty_cache, weights
):
    """In one trace, and in the same memory."""
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(CoresetCache.read_and_extend, n=1), donate_argnums=0)
    rng = jax.random.key(1)
    cache = CoresetCache.init(config, rng, *sequences[1:])
    like, undonated, totals = jax.tree.map(jnp.zeros_like, cache), empty_cache(), []
    generator = np.random.default_rng(2)
    for place in range(STEPS):
        if place < 100:
            token = sequences.cut(place, place + 1)
            expected, undonated = undonated.read_and_extend(*token)
        else:
            token = (generator.standard_normal(a.shape).astype(np.float32) for a in token)
            token = type(sequences)(*token)
        old = cache
        outputs, cache = step(cache, *token)
        assert old.recent.keys.is_deleted()
        if place < 100:
            np.testing.assert_allclose(outputs, expected, rtol=1e-6, atol=1e-6)
        if place % 50 == 0:
            totals.append(weights(cache).sum(axis=-1) - (place + 1))
            assert np.all(np.isfinite(outputs))
    np.testing.assert_allclose(totals, np.zeros_like(totals), atol=1e-5 * STEPS)
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, like)
    np.testing.assert_array_equal(cache.lengths, STEPS)
    full = np.sum(np.asarray(cache.positions) >= 0, axis=-1)
    assert np.all(full >= config.size - config.block_size // 2)
    assert np.asarray(cache.middle.absorbed).max() == STEPS - config.sinks - cache.filled[0]
    # The key belongs to the caller.
    jax.random.key_data(rng).block_until_ready()


def check_held(cache, sequences, weights):
    """Held pairs are those of the sequence at their positions; sinks and window are all there."""
    config = cache.config
    weights, cache = np.asarray(weights(cache)), jax.tree.map(np.asarray, cache)
    all_positions = np.asarray(cache.positions)
    parts = [
        np.concatenate(arrays, axis=2)
        for arrays in zip(cache.sinks, cache.middle.pairs[:2], cache.recent, strict=True)
    ]
    for entry, head in np.ndindex(*parts[0].shape[:2]):
        length = int(cache.lengths[entry])
        positions = all_positions[entry, head]
        full = positions >= 0
        np.testing.assert_array_equal(full, weights[entry, head] > 0)
        held = positions[full]
        assert len(set(held)) == len(held)
        assert set(range(min(length, config.sinks))) <= set(held)
        assert set(range(max(length - config.window, 0), length)) <= set(held)
        assert held.max(initial=-1) < length
        for part, source in zip(parts, sequences[1:], strict=True):
            np.testing.assert_array_equal(part[entry, head][full], source[entry, held, head])


@pytest.mark.slow
def test_held_pairs_are_those_of_the_sequence(sequences, empty_cache, subsets, weights):
    nothing, some, ragged = np.zeros(4, int), np.array([0, 3, 57, 90]), np.array([17, 1, 5, 12])
    single = empty_cache(subsets), nothing, 1, np.ones(4, int)
    prompted = empty_cache(subsets).prefill(*sequences[1:], some), some, 150, ragged
    for cache, lengths, width, counts in (single, prompted):
        check_held(cache, sequences, weights)
        while np.all(lengths + counts <= sequences.keys.shape[1]):
            cache = cache.append(*sequences.following(lengths, width)[1:], counts)
            lengths = lengths + counts
            if width > 1 or lengths[0] % 10 == 0:
                check_held(cache, sequences, weights)


def test_each_sequence_of_a_ragged_batch_is_read_as_if_alone(sequences, empty_cache):
    lengths = np.array([3, 150, 57, 30])

    def run(sequences, lengths):
        _, cache = empty_cache().read_and_extend(*sequences, lengths)
        found = []
        for step in range(40):
            outputs, cache = cache.read_and_extend(*sequences.following(lengths + step, 1))
            found.append(np.asarray(outputs))
        return np.stack(found), np.asarray(cache.positions)

    outputs, positions = run(sequences, lengths)
    for entry in range(len(lengths)):
        expected, held = run(sequences.copies(entry), lengths[[entry] * 4])
        np.testing.assert_array_equal(positions[entry], held[entry])
        np.testing.assert_allclose(outputs[:, entry], expected[:, entry], rtol=1e-5, atol=1e-5)


def test_a_prompt_beside_running_sequences_is_compressed_at_once(sequences, empty_cache):
    running = np.array([0, 40, 0, 7])
    everything = np.full(4, 150)

    def run(sequences, running):
        _, cache = empty_cache().read_and_extend(*sequences, running)
        return cache.read_and_extend(*sequences, everything)

    outputs, mixed = run(sequences, running)
    for entry, count in enumerate(running):
        answers, expected = run(sequences.copies(entry), np.full(4, count))
        np.testing.assert_array_equal(mixed.positions[entry], expected.positions[entry])
        np.testing.assert_allclose(outputs[entry], answers[entry], rtol=1e-5, atol=1e-5)


def test_prompts_are_compressed_with_the_same_key_for_every_sequence(
    sequences, empty_cache, subsets
):
    """What a sequence is batched with does not matter; heads have keys and options of their own."""
    cache = empty_cache(subsets).prefill(*sequences[1:], np.full(4, 150))
    rng = jax.random.fold_in(jax.random.wrap_key_data(cache.rng[0], impl="threefry2x32"), 0)
    part = slice(subsets.sinks, 150 - subsets.num_recent)
    compress = jax.jit(functools.partial(subsets.compressor, size=subsets.middle))
    for keys, values, found in zip(*sequences[1:], cache.middle.pairs.positions, strict=True):
        expected = compress(rng, *(array[part].swapaxes(0, 1) for array in (keys, values)))
        np.testing.assert_array_equal(found, expected.indices + subsets.sinks)
        np.testing.assert_array_equal(found[0], 4 + np.arange(40))
        assert np.any(found[1] != found[0])


@pytest.mark.slow
def test_prompts_are_read_a_few_queries_at_a_time(sequences, monkeypatch):
    queries = jnp.asarray(sequences.queries)
    new = tuple(grouped.by_head(jnp.asarray(array)) for array in sequences[1:])
    held = *new, jnp.zeros(new[0].shape[:3])
    at_once = grouped.attend(queries, [held], new, 0.3)
    monkeypatch.setattr(grouped, "_SCORES", 2**17)
    chunked = grouped.attend(queries, [held], new, 0.3)
    np.testing.assert_allclose(chunked, at_once, rtol=1e-5, atol=1e-6)


def test_padding_may_hold_anything(sequences, empty_cache):
    lengths, more = np.array([0, 3, 57, 150]), np.array([0, 17, 5, 16])

    def run(filling):
        outputs, cache = [], empty_cache()
        for counts in (lengths, more, more):
            padded = sequences.padded_with(counts, filling)
            answers, cache = cache.read_and_extend(*padded, counts)
            outputs += [out[:count] for out, count in zip(np.asarray(answers), counts, strict=True)]
        return outputs, cache

    expected = run(0.0)
    for filling in (np.nan, np.inf):
        chex.assert_trees_all_equal(run(filling), expected)


@pytest.mark.slow
def test_a_sequence_changes_no_other(sequences, empty_cache):
    """The batch compresses at other times, too: one of them has a longer prompt."""

    def run(sequences, lengths):
        _, cache = empty_cache().read_and_extend(*sequences, lengths)
        for step in range(30):
            cache = cache.append(*sequences.following(lengths + step, 1)[1:])
        others = np.array([0, 2, 3])
        return jax.tree.map(lambda array: array[others], cache)

    other = sequences._replace(keys=sequences.keys.copy())
    other.keys[1] *= 3
    lengths = np.array([3, 150, 57, 90])
    expected = run(sequences, lengths)
    lengths[1] = 2
    chex.assert_trees_all_equal(run(other, lengths), expected)


def test_what_is_not_finite_is_never_lost(sequences, empty_cache):
    """The head answers NaN, from when it has come; the others do not."""
    all_of_it, short = np.full(4, 150), np.full(4, 30)
    for name in sequences._fields:
        sick = sequences._replace(**{name: getattr(sequences, name).copy()})
        # Of the queries, the last ones are samples.
        getattr(sick, name)[0, 149 if name == "queries" else 50, 0, 0] = np.nan
        expected = np.zeros((4, 1, 4, 6), bool)
        expected[0, :, :2] = True
        _, prompted = empty_cache().read_and_extend(*sick, all_of_it)
        _, cache = prompted.read_and_extend(*sequences, all_of_it)
        found = [cache]
        if name != "queries":
            # Behind a prompt that was sound.
            _, decoded = empty_cache().read_and_extend(*sequences, short)
            for _ in range(2):
                _, decoded = decoded.read_and_extend(*sick, all_of_it)
            found.append(decoded)
        for each in found:
            answers = each.attend(*sequences.cut(0, 1))
            np.testing.assert_array_equal(np.isnan(answers), expected)


@pytest.mark.slow
def test_without_a_middle_older_pairs_are_dropped(config, sequences, empty_cache):
    config = config.replace(size=config.sinks + config.num_recent)
    cache = empty_cache(config).prefill(*sequences[1:], np.full(4, 100))
    for token in ones(sequences, 150, 100):
        cache = cache.append(*token[1:])
    assert cache.positions.shape[-1] == config.size
    held = np.unique(cache.positions)
    held = held[held >= 0]
    np.testing.assert_array_equal(held[: config.sinks], np.arange(config.sinks))
    assert config.window <= len(held) - config.sinks <= config.num_recent
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
