"""Packed coresets: the same pairs, the same attention, and no more bytes than they need."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax._src.attention import finish
from coreset_jax._src.core import packed as packing
from coreset_jax._src.core.coreset import SignedCoreset, emptied
from tests.brute_force import attention

RNG = jax.random.key(0)
WIDTH, VALUE_WIDTH, SLOTS, PAGE = 8, 6, 40, 4


def ragged(counts, dtype=np.float32, seed=0):
    """A coreset of heads of so many pairs, which lie in any of their slots."""
    counts = np.asarray(counts)
    rng = np.random.default_rng(seed)
    shape = (*counts.shape, SLOTS)
    held = rng.permuted(np.broadcast_to(np.arange(SLOTS), shape), axis=-1) < counts[..., None]
    places = np.sort(rng.integers(0, 10_000, shape), axis=-1).astype(np.int32)
    coreset = cj.Coreset(
        jnp.asarray(rng.normal(size=(*shape, WIDTH)), dtype),
        jnp.asarray(rng.normal(size=(*shape, VALUE_WIDTH)), dtype),
        jnp.asarray(rng.normal(size=shape), jnp.float32),
        jnp.asarray(places),
    )
    return emptied(coreset, jnp.asarray(~held))


COUNTS = [[40, 5, 12, 1], [0, 33, 0, 7]]
read = jax.jit(packing.partial_attention_packed, static_argnames="scale")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_back_and_forth(dtype):
    coreset = ragged(COUNTS, dtype)
    packed = cj.pack(coreset, page_size=PAGE)
    back = cj.unpack(packed, size=SLOTS)
    order = np.argsort(np.asarray(coreset.indices) < 0, axis=-1, kind="stable")
    expected = jax.tree.map(
        lambda leaf: np.stack(
            [
                [one[places] for one, places in zip(entry, rows, strict=True)]
                for entry, rows in zip(np.asarray(leaf), order, strict=True)
            ]
        ),
        coreset,
    )
    chex.assert_trees_all_equal(back, expected)
    assert packed.keys.dtype == dtype
    counts = np.asarray(COUNTS)
    np.testing.assert_array_equal(packed.offsets[:, 1:], np.cumsum(-(-counts // PAGE) * PAGE, 1))


@pytest.mark.parametrize("together", [2**24, 64])
def test_attention_is_that_of_every_head(monkeypatch, together):
    """Empty heads, heads of one pair, and queries that are read a few at a time."""
    monkeypatch.setattr(packing, "_NUMBERS", together)
    coreset = ragged(COUNTS)
    queries = jax.random.normal(RNG, (2, 4, 5, WIDTH))
    state = packing.partial_attention_packed(queries, cj.pack(coreset, page_size=PAGE), scale=0.7)
    found = np.asarray(finish(state))
    for place in np.ndindex(2, 4):
        if COUNTS[place[0]][place[1]] == 0:
            np.testing.assert_array_equal(found[place], 0)
            assert np.all(np.isneginf(state.maximum[place]))
            continue
        one = jax.tree.map(lambda leaf, place=place: leaf[place], coreset)
        exact = attention(queries[place], one.keys, one.values, one.log_weights, scale=0.7)
        np.testing.assert_allclose(found[place], exact, atol=2e-6)


def test_scales_of_heads():
    coreset = ragged(COUNTS[0])
    queries = jax.random.normal(RNG, (4, 3, WIDTH))
    scales = jnp.array([0.1, 0.5, 1.0, 2.0])
    packed = cj.pack(coreset._replace(scale=scales), page_size=PAGE)
    np.testing.assert_array_equal(cj.unpack(packed, size=SLOTS).scale, scales)
    found = finish(packing.partial_attention_packed(queries, packed))
    with pytest.raises(ValueError, match="scale must be that"):
        packing.partial_attention_packed(queries, packed, scale=2 * scales)
    for head, scale in enumerate(scales):
        one = jax.tree.map(lambda leaf, head=head: leaf[head], coreset)
        expected = cj.attention(
            queries[head], one.keys, one.values, one.log_weights, scale=float(scale)
        )
        np.testing.assert_allclose(found[head], expected, atol=1e-6)


def test_bytes_are_those_of_the_pairs():
    """Budgets from 1 to 8 times each other, in many heads."""
    counts = np.linspace(150, 1200, 24).astype(int)
    rng = np.random.default_rng(0)
    held = np.arange(1200) < counts[:, None]
    coreset = cj.Coreset(
        jnp.asarray(rng.normal(size=(24, 1200, 64)), jnp.bfloat16),
        jnp.asarray(rng.normal(size=(24, 1200, 64)), jnp.bfloat16),
        jnp.zeros((24, 1200)),
        jnp.broadcast_to(jnp.arange(1200, dtype=jnp.int32), (24, 1200)),
    )
    packed = cj.pack(emptied(coreset, jnp.asarray(~held)))
    a_pair = sum(leaf.nbytes for leaf in jax.tree.leaves(coreset)) / held.size
    assert packed.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    assert packed.nbytes <= 1.05 * a_pair * counts.sum()


def test_one_program_whatever_the_offsets(programs):
    queries = jax.random.normal(RNG, (4, 3, WIDTH))
    slots = 64
    found, before = [], None
    for counts in ([40, 5, 12, 1], [1, 1, 1, 40], [0, 0, 40, 0]):
        packed = cj.pack(ragged(counts), page_size=PAGE, num_slots=slots)
        found.append(read(queries, packed).total)
        if before is None:
            before = programs()
    assert programs() == before
    assert not np.array_equal(found[0], found[1])


def test_pairs_that_do_not_fit():
    coreset = ragged(COUNTS)
    with pytest.raises(ValueError, match="num_slots must be at least 64"):
        cj.pack(coreset, page_size=PAGE, num_slots=60)
    packed = jax.jit(lambda each: cj.pack(each, page_size=PAGE, num_slots=60))(coreset)
    assert np.all(np.isnan(packed.log_weights[0]))
    assert not np.any(np.isnan(packed.log_weights[1]))
    cut = cj.unpack(cj.pack(coreset, page_size=PAGE), size=12)
    np.testing.assert_array_equal(
        np.isnan(cut.log_weights).any(-1),
        [[True, False, False, False], [False, True, False, False]],
    )


def test_a_head_that_is_nan_stays_so():
    coreset = ragged(COUNTS)
    log_weights = coreset.log_weights.at[0, 1].set(jnp.nan)
    packed = cj.pack(coreset._replace(log_weights=log_weights), page_size=PAGE)
    queries = jax.random.normal(RNG, (2, 4, 5, WIDTH))
    found = np.isnan(finish(packing.partial_attention_packed(queries, packed)))
    assert found[0, 1].all()
    assert found.sum() == found[0, 1].sum()


def test_empty_pages_behind_change_nothing():
    packed = cj.pack(ragged(COUNTS[0]), page_size=PAGE)
    wide = packing.with_slots(packed, 100)
    assert wide.keys.shape == (100, WIDTH)
    queries = jax.random.normal(RNG, (4, 5, WIDTH))
    chex.assert_trees_all_close(read(queries, wide), read(queries, packed), rtol=1e-6)


def test_derivatives():
    coreset = ragged(COUNTS[0])
    queries = jax.random.normal(RNG, (4, 5, WIDTH))

    def packed(queries, keys):
        pages = cj.pack(coreset._replace(keys=keys), page_size=PAGE, num_slots=72)
        return jnp.sum(jnp.sin(finish(packing.partial_attention_packed(queries, pages))))

    def plain(queries, keys):
        return jnp.sum(jnp.sin(cj.attend(queries, coreset._replace(keys=keys))))

    for found, expected in zip(
        jax.grad(packed, (0, 1))(queries, coreset.keys),
        jax.grad(plain, (0, 1))(queries, coreset.keys),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bad_input_is_refused():
    coreset = ragged(COUNTS)
    with pytest.raises(ValueError, match="heads, m"):
        cj.pack(jax.tree.map(lambda leaf: leaf[0, 0], coreset))
    with pytest.raises(ValueError, match="signed"):
        cj.pack(SignedCoreset(*coreset[:4], jnp.ones_like(coreset.log_weights)))
    with pytest.raises(ValueError, match="page_size"):
        cj.pack(coreset, page_size=0)
    with pytest.raises(ValueError, match="multiple of 4"):
        cj.pack(coreset, page_size=PAGE, num_slots=66)
    with pytest.raises(ValueError, match="num_slots must be given"):
        jax.jit(cj.pack)(coreset)
    with pytest.raises(ValueError, match="size"):
        cj.unpack(cj.pack(coreset), size=0)


def test_strict_modes(x64):
    coreset = ragged(COUNTS)
    queries = jax.random.normal(RNG, (2, 4, 5, WIDTH), jnp.float32)
    expected = cj.attend(queries, coreset)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        packed = cj.pack(coreset, page_size=PAGE)
        found = cj.attend(queries, packed, return_lse=True)
        merged, _ = cj.merge_attention([found, found])
        back = cj.unpack(packed, size=SLOTS)
    np.testing.assert_allclose(merged, expected, atol=1e-5)
    assert back.indices.dtype == jnp.int32


def test_batches_are_read_in_little_memory():
    """Queries are read a few at a time, however many entries a batch has."""
    shapes = jax.eval_shape(lambda: cj.pack(ragged([[40] * 8] * 16), page_size=PAGE, num_slots=320))
    queries = jax.ShapeDtypeStruct((16, 8, 4096, WIDTH), jnp.float32)
    compiled = read.lower(queries, shapes).compile()
    memory = compiled.memory_analysis()
    outputs = 16 * 8 * 4096 * (VALUE_WIDTH + 2) * 4
    assert memory.temp_size_in_bytes < 4 * packing._NUMBERS * 4 + 4 * outputs


def test_fields_are_leaves():
    packed = cj.pack(ragged(COUNTS), page_size=PAGE)
    assert len(jax.tree.leaves(packed)) == 5
    assert dataclasses.replace(packed, page_size=2) != packed
