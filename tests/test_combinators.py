"""Chunks and ends: what a compressor makes of each part, side by side, for any length and size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax._src.core.coreset import SignedCoreset
from coreset_jax.combinators import chunk_count, end_counts
from tests.compressors import asking, heads_of, newest, sampled

RNG = jax.random.key(0)
HEADS, COUNT, WIDTH = 3, 64, 4
LENGTHS = np.array([COUNT, 41, 5])


class doubled(cj.Compressor):  # noqa: N801
    """Pairs that stand for twice what they are, and half of that in the denominator."""

    signed = True

    def compress_head(self, head, size):
        kept, info = newest().compress_head(head, size)
        kept = SignedCoreset(*kept[:4], jnp.full(size, 0.5, head.dtype))
        return kept._replace(log_weights=kept.log_weights + np.log(2)), info


class sparse(cj.Compressor):  # noqa: N801
    """Leaves every other slot empty."""

    def fills(self, size):
        return False

    def compress_head(self, head, size):
        places = jnp.where(jnp.arange(size) % 2 == 0, jnp.arange(size), -1)
        places = jnp.where(places < head.length, places, -1)
        kept = head.pairs(places, jnp.zeros(size, head.dtype))
        weights = jnp.where(places < 0, -jnp.inf, 0)
        return kept._replace(log_weights=weights, indices=places), cj.Info()


@pytest.fixture(scope="module")
def cache():
    return np.random.default_rng(0).standard_normal((2, HEADS, COUNT, WIDTH)).astype(np.float32)


def held_pairs(coreset, keys, values):
    """Places and weights of the pairs of every head, which are those of the source, in order."""
    for head, (coreset, keys, values) in enumerate(heads_of(coreset, keys, values)):  # noqa: B020
        indices = np.asarray(coreset.indices)
        held = indices[indices >= 0]
        np.testing.assert_array_equal(indices[len(held) :], -1)
        assert np.all(np.diff(held) > 0)
        np.testing.assert_array_equal(coreset.keys[: len(held)], keys[held])
        np.testing.assert_array_equal(coreset.values[: len(held)], values[held])
        weights = np.exp(coreset.log_weights)
        assert np.all(weights[len(held) :] == 0)
        yield head, held, weights[: len(held)]


def test_numbers_of_chunks():
    for size, chunk_size, count in (
        (10, 10, 1), (11, 10, 2), (20, 10, 2), (21, 10, 3), (22, 10, 3), (28, 10, 4), (50, 10, 5),
    ):  # fmt: skip
        found = chunk_count(size, chunk_size)
        assert found == count
        assert size // found <= chunk_size


def test_numbers_of_ends():
    for size in range(1, 600):
        for sinks, fraction in ((4, 0.125), (3, 0.3), (0, 0.0), (2, 0.0), (4, 0.9)):
            first, last = end_counts(size, sinks, fraction)
            assert first == min(sinks, size // 8)
            # Rounded up so that the middle is a round number, by less than a sixty-fourth of it.
            middle = size - first - last
            asked = min(int(fraction * size), size - first - 1)
            assert middle >= 1
            assert asked <= last <= asked + max(1, size) / 64
            assert fraction or last == 0


@pytest.mark.parametrize("size", [20, 23])
@pytest.mark.parametrize("ragged", [False, True])
def test_each_chunk_keeps_its_share(cache, size, ragged):
    lengths = LENGTHS if ragged else np.full(HEADS, COUNT)
    compressor = cj.chunked(sampled(), chunk_size=10)
    chunks = chunk_count(size, 10)
    coreset = compressor(RNG, *cache, size=size, lengths=lengths if ragged else None)
    assert coreset.indices.shape == (HEADS, size)
    for head, held, weights in held_pairs(coreset, *cache):
        length = lengths[head]
        assert min(size, length) - chunks <= len(held) <= size
        assert held[-1] < length
        np.testing.assert_allclose(weights.sum(), length, rtol=1e-5)
        edges = np.arange(chunks + 1) * length // chunks
        counts = np.histogram(held, edges)[0]
        assert counts.max() - counts.min() <= max(1, np.diff(edges).max() - 1)


def test_small_sizes_are_left_alone(cache):
    found = cj.chunked(newest(), chunk_size=10)(RNG, *cache, size=10)
    jax.tree.map(np.testing.assert_array_equal, found, newest()(RNG, *cache, size=10))
    whole = cj.chunked(newest(), chunk_size=10)(RNG, *cache, size=COUNT)
    np.testing.assert_array_equal(whole.keys, cache[0])
    found = cj.keep_ends(newest(), sinks=0, recent_fraction=0)(RNG, *cache, size=10)
    jax.tree.map(np.testing.assert_array_equal, found, newest()(RNG, *cache, size=10))


def test_chunks_are_heads_of_their_own(cache):
    """With sample queries and random keys, and as the compressor sees them by themselves."""
    queries = np.random.default_rng(1).standard_normal((HEADS, 5, WIDTH)).astype(np.float32)
    coreset = cj.chunked(asking(), chunk_size=8)(RNG, *cache, size=16, queries=queries)
    first = asking()(RNG, *(array[:, :32] for array in cache), size=8, queries=queries)
    second = asking()(RNG, *(array[:, 32:] for array in cache), size=8, queries=queries)
    np.testing.assert_array_equal(coreset.indices[:, :8], first.indices)
    np.testing.assert_array_equal(coreset.indices[:, 8:], second.indices + 32)
    drawn = cj.chunked(sampled(), chunk_size=8)(RNG, *cache, size=16).indices
    # Every part of every head draws for itself.
    assert len({tuple(np.asarray(part)) for part in (drawn % 32).reshape(-1, 8)}) == 2 * HEADS


@pytest.mark.parametrize("wrap", [cj.chunked, cj.keep_ends])
def test_signed_and_sparse_coresets_go_along(cache, wrap):
    options = {"chunk_size": 8} if wrap is cj.chunked else {"sinks": 1, "recent_fraction": 0.25}
    for given in (None, LENGTHS):
        coreset = wrap(doubled(), **options)(RNG, *cache, size=16, lengths=given)
        plain = wrap(newest(), **options)(RNG, *cache, size=16, lengths=given)
        assert coreset.normalizers.shape == (HEADS, 16)
        np.testing.assert_array_equal(coreset.indices, plain.indices)
        masses = np.exp(coreset.log_weights) * coreset.normalizers
        np.testing.assert_allclose(masses, np.exp(plain.log_weights), rtol=1e-6)
        coreset = wrap(sparse(), **options)(RNG, *cache, size=16, lengths=given)
        for head, held, _ in held_pairs(coreset, *cache):
            length = COUNT if given is None else given[head]
            ends = 5 if wrap is cj.keep_ends else 0
            assert len(held) >= min((16 - ends) // 2 + ends, (length + 1) // 2)
            assert len(held) < 16


@pytest.mark.slow
def test_slots_that_do_not_divide_among_chunks_are_empty_and_last(cache):
    """Of ten slots between the ends, five a chunk, of which two parts take two each."""
    nested = cj.chunked(cj.chunked(newest(), chunk_size=3), chunk_size=5)
    compressor = cj.keep_ends(nested, sinks=1, recent_fraction=0.2)
    assert not compressor.fills(13)
    assert cj.keep_ends(cj.chunked(newest(), chunk_size=5), sinks=1, recent_fraction=0.2).fills(13)
    coreset = compressor(RNG, *cache, size=13)
    for _, held, weights in held_pairs(coreset, *cache):
        assert len(held) == 11
        assert (held[0], list(held[-2:])) == (0, [COUNT - 2, COUNT - 1])
        np.testing.assert_array_equal(weights, 1)


def test_double_precision_changes_no_dtype_of_places(cache, x64):
    with jax.numpy_dtype_promotion("strict"):
        for lengths in (None, LENGTHS):
            coreset = cj.keep_ends(newest())(RNG, *cache, size=16, lengths=lengths)
            assert coreset.indices.dtype == np.int32


@pytest.mark.parametrize("size", [1, 8, 20, 63])
@pytest.mark.parametrize("ragged", [False, True])
def test_ends_are_kept(cache, size, ragged):
    lengths = np.array([COUNT, 20, 3]) if ragged else np.full(HEADS, COUNT)
    compressor = cj.keep_ends(sampled(), sinks=3, recent_fraction=0.3)
    coreset = compressor(RNG, *cache, size=size, lengths=lengths if ragged else None)
    assert coreset.indices.shape == (HEADS, size)
    sinks = min(3, size // 8)
    recent = min(int(0.3 * size), size - sinks - 1)
    for head, held, weights in held_pairs(coreset, *cache):
        length = lengths[head]
        assert len(held) == min(size, length)
        np.testing.assert_allclose(weights.sum(), length, rtol=1e-5)
        for place in [*range(min(sinks, length)), *range(max(length - recent, 0), length)]:
            (slot,) = np.flatnonzero(held == place)
            assert weights[slot] == 1


def test_what_lies_between_is_the_compressors(cache):
    found = cj.keep_ends(sampled(), sinks=2, recent_fraction=0.25)(RNG, *cache, size=16)
    between = sampled()(RNG, *(array[:, 2:60] for array in cache), size=10)
    np.testing.assert_array_equal(found.indices[:, 2:12], between.indices + 2)
    np.testing.assert_array_equal(found.log_weights[:, 2:12], between.log_weights)


def test_a_query_that_looks_at_the_ends_alone_is_answered_exactly(cache):
    """Whatever is between, and whatever it is compressed to."""
    keys, values = (array.copy() for array in cache)
    keys[:, :2] += 40
    keys[:, -4:] += 40
    noise = np.random.default_rng(1).standard_normal((HEADS, 3, WIDTH)).astype(np.float32)
    queries = 1 + 0.01 * noise
    coreset = cj.keep_ends(sampled(), sinks=2, recent_fraction=0.25)(RNG, keys, values, size=16)
    exact = cj.attention(queries, keys, values)
    np.testing.assert_allclose(cj.attend(queries, coreset), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_nan_in_any_part_is_one_of_the_head_and_padding_may_hold_anything(cache):
    for compressor in (
        cj.chunked(sampled(), chunk_size=8),
        cj.keep_ends(sampled(), sinks=1, recent_fraction=0.25),
    ):
        clean = compressor(RNG, *cache, size=16, lengths=LENGTHS)
        for place in (0, 30, COUNT - 1):
            for which, filling in ((0, np.nan), (1, np.inf)):
                broken = [array.copy() for array in cache]
                # Padding of the second head from 41 on.
                broken[which][:2, place] = filling
                found = compressor(RNG, *broken, size=16, lengths=LENGTHS)
                sick = np.isnan(found.log_weights)
                np.testing.assert_array_equal(sick.all(axis=1), [True, place < 41, False])
                np.testing.assert_array_equal(sick.any(axis=1), sick.all(axis=1))
                rest = slice(2, 3) if place < 41 else slice(1, 3)
                for before, after in zip(
                    jax.tree.leaves(clean), jax.tree.leaves(found), strict=True
                ):
                    np.testing.assert_array_equal(before[rest], after[rest])


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="chunk_size"):
        cj.chunked(sampled(), chunk_size=0)
    for wrap in (cj.chunked, cj.keep_ends):
        for given in (None, 3):
            with pytest.raises(ValueError, match="compressor"):
                wrap(given)
    for options in (
        {"sinks": -1},
        {"recent_fraction": 1.0},
        {"recent_fraction": -0.1},
        {"recent_fraction": None},
    ):
        (name,) = options
        for make in (lambda **more: cj.keep_ends(sampled(), **more), cj.fitted):
            with pytest.raises(ValueError, match=name):
                make(**options)
