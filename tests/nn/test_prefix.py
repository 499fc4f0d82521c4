"""Sequences that begin with compressed documents."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import coreset_jax as cj
from coreset_jax._src.core.coreset import emptied
from coreset_jax.nn import CacheConfig, CoresetCache, of_layer
from coreset_jax.nn.nnx import CoresetAttention
from coreset_jax.prefixes import Prefix, load, save
from tests.brute_force import attention

RNG = np.random.default_rng(0)
HEADS, GROUPS, WIDTH, SLOTS = 2, 2, 8, 12
CONFIG = CacheConfig(size=48, sinks=0, window=16, block_size=16)
SHORT = CONFIG.replace(size=32)


def document(seed, length, counts):
    """A prefix of one layer, and its coreset."""
    rng = np.random.default_rng(seed)
    shape = (1, HEADS, SLOTS)
    coreset = cj.Coreset(
        jnp.asarray(rng.normal(size=(*shape, WIDTH)), jnp.float32),
        jnp.asarray(rng.normal(size=(*shape, WIDTH)), jnp.float32),
        jnp.asarray(rng.normal(size=shape), jnp.float32),
        jnp.broadcast_to(jnp.arange(SLOTS, dtype=jnp.int32), shape),
    )
    held = np.arange(SLOTS) < np.asarray(counts)[None, :, None]
    coreset = emptied(coreset, jnp.asarray(~held))
    return Prefix.of(coreset, length=length, model="tiny", page_size=4), coreset


def arrays(batch, length, heads=HEADS):
    return jnp.asarray(RNG.normal(size=(batch, length, heads, WIDTH)), jnp.float32)


FIRST, SECOND = document(1, 100, [12, 3]), document(2, 70, [5, 5])


def opened(prefixes, batch, config=CONFIG):
    like = jnp.zeros((batch, 1, HEADS, WIDTH))
    return CoresetCache.init(config, jax.random.key(0), like, like, of_layer(prefixes, 0))


@pytest.mark.parametrize("shared", [True, False])
def test_attention_is_over_document_and_what_follows(shared):
    batch = 2
    documents = [FIRST, FIRST] if shared else [FIRST, SECOND]
    cache = opened(FIRST[0] if shared else [each[0] for each in documents], batch)
    keys, values, queries = arrays(batch, 9), arrays(batch, 9), arrays(batch, 9, HEADS * GROUPS)
    outputs, cache = cache.read_and_extend(queries, keys, values)
    more = cache.attend(queries[:, -1:])
    np.testing.assert_array_equal(cache.next_positions, [109, 109] if shared else [109, 79])
    for row in range(batch):
        coreset = documents[row][1]
        for head in range(HEADS * GROUPS):
            kv = head // GROUPS
            for place in (0, 8):
                end = place + 1
                exact = attention(
                    queries[row, place:end, head],
                    jnp.concatenate([coreset.keys[0, kv], keys[row, :end, kv]]),
                    jnp.concatenate([coreset.values[0, kv], values[row, :end, kv]]),
                    np.concatenate([coreset.log_weights[0, kv], np.zeros(end)]),
                )
                np.testing.assert_allclose(outputs[row, place, head], exact[0], atol=2e-6)
            np.testing.assert_allclose(more[row, 0, head], exact[0], atol=2e-6)


def test_saved_loaded_and_forked_caches_go_on_alike(tmp_path):
    save(tmp_path / "document", FIRST[0])
    caches = [opened(each, 2) for each in (FIRST[0], load(tmp_path / "document", model="tiny"))]
    queries, keys, values = arrays(2, 50, HEADS * GROUPS), arrays(2, 50), arrays(2, 50)
    chex.assert_trees_all_equal(*(each.read_and_extend(queries, keys, values) for each in caches))
    # A fork of three sequences shares one document, and each goes on as the one that it was.
    fork = caches[0].reordered(jnp.array([1, 0, 1]))
    assert fork.prefix.pairs.keys.shape == caches[0].prefix.pairs.keys.shape
    order = np.array([1, 0, 1])
    found = fork.read_and_extend(queries[order], keys[order], values[order])
    alone = caches[0].read_and_extend(queries, keys, values)
    np.testing.assert_allclose(found[0], np.asarray(alone[0])[order], atol=1e-6)
    chex.assert_trees_all_equal(
        found[1].recent, jax.tree.map(lambda leaf: leaf[order], alone[1].recent)
    )


@pytest.mark.slow
def test_rows_are_reordered_by_any_gather():
    cache = opened([FIRST[0], SECOND[0]], 2)
    queries, keys, values = arrays(2, 5, HEADS * GROUPS), arrays(2, 5), arrays(2, 5)
    _, cache = cache.read_and_extend(queries, keys, values)
    order = jnp.array([1, 0])
    chex.assert_trees_all_equal(
        cache.reordered(order), jax.tree.map(lambda leaf: leaf[order], cache)
    )
    # What a beam search does: the same step behind, in other rows.
    step = queries[:, :1], keys[:, :1], values[:, :1]
    outputs, _ = cache.read_and_extend(*step)
    swapped, _ = cache.reordered(order).read_and_extend(*(each[order] for each in step))
    np.testing.assert_array_equal(swapped, outputs[order])


@pytest.mark.parametrize("prefix", [pytest.param(None, marks=pytest.mark.slow), FIRST[0]])
def test_rolled_back_is_never_gone(prefix):
    """What was guessed and taken back leaves no trace in what follows."""
    like = jnp.zeros((2, 1, HEADS, WIDTH))
    front = None if prefix is None else of_layer(prefix, 0)
    config = CONFIG.replace(sinks=0 if prefix is not None else 2, size=50)
    cache = CoresetCache.init(config, jax.random.key(0), like, like, front)
    _, kept = cache.read_and_extend(arrays(2, 20, HEADS * GROUPS), arrays(2, 20), arrays(2, 20))
    guess = [arrays(2, 4, HEADS * GROUPS), arrays(2, 4), arrays(2, 4)]
    _, gone = kept.read_and_extend(*guess)
    back = gone.rolled_back(jnp.array([20, 21]))
    other = kept.append(guess[1][:, :1], guess[2][:, :1], jnp.array([0, 1]))
    np.testing.assert_array_equal(back.lengths, other.lengths)
    for _ in range(3):
        step = arrays(2, 7, HEADS * GROUPS), arrays(2, 7), arrays(2, 7)
        one, back = back.read_and_extend(*step)
        two, other = other.read_and_extend(*step)
        np.testing.assert_array_equal(one, two)


def test_how_far_back():
    cache = opened(FIRST[0], 2)
    _, long = cache.read_and_extend(arrays(2, 60, HEADS * GROUPS), arrays(2, 60), arrays(2, 60))
    with pytest.raises(ValueError, match=r"lengths must be at least \[28, 28\]"):
        long.rolled_back(jnp.array([27, 60]))
    lost = jax.jit(CoresetCache.rolled_back)(long, jnp.array([27, 60]))
    outputs = lost.attend(arrays(2, 1, HEADS * GROUPS))
    assert np.isnan(outputs[0]).all()
    assert not np.isnan(outputs[1]).any()
    # Where every exact pair is taken back as well.
    emptied = long.rolled_back(jnp.array([28, 28]))
    lost = jax.jit(CoresetCache.rolled_back)(emptied, jnp.array([3, 28]))
    outputs = lost.attend(arrays(2, 1, HEADS * GROUPS))
    assert np.isnan(outputs[0]).all()
    assert not np.isnan(outputs[1]).any()
    # Nothing has left the window: back to the document.
    _, short = cache.read_and_extend(arrays(2, 20, HEADS * GROUPS), arrays(2, 20), arrays(2, 20))
    queries = arrays(2, 1, HEADS * GROUPS)
    np.testing.assert_array_equal(
        short.rolled_back(jnp.zeros(2, jnp.int32)).attend(queries), cache.attend(queries)
    )
    with pytest.raises(ValueError, match="integers"):
        long.rolled_back(jnp.zeros(2))


@pytest.mark.slow
def test_rows_begin_anew_behind_their_documents():
    cache = opened([FIRST[0], SECOND[0]], 2)
    _, used = cache.read_and_extend(arrays(2, 60, HEADS * GROUPS), arrays(2, 60), arrays(2, 60))
    queries = arrays(2, 1, HEADS * GROUPS)
    fresh = used.reset(jnp.array([True, False]))
    np.testing.assert_array_equal(fresh.next_positions, [100, 130])
    np.testing.assert_array_equal(fresh.attend(queries)[0], cache.attend(queries)[0])
    np.testing.assert_array_equal(fresh.attend(queries)[1], used.attend(queries)[1])


def test_one_step_for_all_documents(programs):
    """Offsets are data: documents of other budgets share the program."""
    prefixes = [document(seed, 50, counts)[0] for seed, counts in ((3, [12, 4]), (4, [5, 6]))]
    step = arrays(1, 1, HEADS * GROUPS), arrays(1, 1), arrays(1, 1)
    caches = [opened(each, 1, SHORT) for each in prefixes]
    assert caches[0].prefix.pairs.keys.shape == caches[1].prefix.pairs.keys.shape
    read = jax.jit(CoresetCache.read_and_extend)
    read(caches[0], *step)
    before = programs()
    read(caches[1], *step)
    assert programs() == before


@pytest.mark.slow
def test_modules_read_behind_a_document():
    """Tokens stand behind the document: their keys are rotated by its length."""
    module = CoresetAttention(
        4,
        32,
        num_kv_heads=2,
        size=48,
        sinks=0,
        window=16,
        block_size=16,
        rope_base=1e4,
        rngs=nnx.Rngs(0),
    )
    inputs = jnp.asarray(RNG.normal(size=(1, 40, 32)), jnp.float32)
    plain = CoresetAttention(
        4,
        32,
        num_kv_heads=2,
        size=96,
        sinks=0,
        window=64,
        block_size=16,
        rope_base=1e4,
        rngs=nnx.Rngs(0),
    )
    plain.init_cache((1, 64, 32))
    expected = plain(inputs, decode=True)
    # What the module itself holds of the first 30 tokens is their document.
    plain.init_cache((1, 64, 32))
    plain(inputs[:, :30], decode=True)
    recent = plain.cache.get_value().recent
    keys, values = (array[:, :, :30] for array in recent)
    weights, places = jnp.zeros((1, 2, 30)), jnp.broadcast_to(jnp.arange(30), (1, 2, 30))
    prefix = Prefix.of(
        cj.Coreset(keys, values, weights, places.astype(jnp.int32)), length=30, model="tiny"
    )
    module.init_cache((1, 64, 32), prefix=of_layer(prefix, 0))
    found = module(inputs[:, 30:], decode=True)
    np.testing.assert_allclose(found, expected[:, 30:], atol=1e-5)


def test_scales_are_compared():
    scaled = document(1, 100, [12, 3])[1]._replace(scale=jnp.full((1, HEADS), 0.5))
    prefix = Prefix.of(scaled, length=100, model="tiny", page_size=4)
    with pytest.raises(ValueError, match=r"scale must be that .* made for, 0\.5"):
        opened(prefix, 1)
    cache = opened(prefix, 1, CONFIG.replace(scale=0.5))
    assert not np.isnan(cache.attend(arrays(1, 1, HEADS * GROUPS))).any()


def test_sequences_of_several_devices_are_reordered():
    # A CPU always has several here.
    devices = jax.devices()[:2]
    mesh = jax.make_mesh(
        (len(devices),), ("batch",), axis_types=(AxisType.Explicit,), devices=devices
    )
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    pairs, order = [arrays(2, 5), arrays(2, 5)], jnp.array([1, 1])
    plain = opened(FIRST[0], 2).append(*pairs).reordered(order)
    like = jax.device_put(jnp.zeros((2, 1, HEADS, WIDTH)), rows)
    cache = CoresetCache.init(CONFIG, jax.random.key(0), like, like)
    moved = cache.append(*jax.device_put(pairs, rows)).reordered(order)
    np.testing.assert_array_equal(moved.recent.keys, plain.recent.keys)
    assert jax.typeof(moved.recent.keys).sharding.spec[0] == "batch"


def test_bad_prefixes_are_refused():
    with pytest.raises(ValueError, match="prefix must hold 1 or 3 documents of 2 kv heads"):
        opened([FIRST[0], SECOND[0]], 3)
    like = jnp.zeros((1, 1, 3, WIDTH))
    with pytest.raises(ValueError, match="of 3 kv heads"):
        CoresetCache.init(CONFIG, jax.random.key(0), like, like, of_layer(FIRST[0], 0))
    with pytest.raises(ValueError, match="all have a layer 1"):
        of_layer(FIRST[0], 1)
    other = Prefix(SECOND[0].layers, 70, "huge")
    with pytest.raises(ValueError, match="of one model"):
        of_layer([FIRST[0], other], 0)
    with pytest.raises(ValueError, match="empty"):
        of_layer([], 0)
    coarse = Prefix.of(SECOND[1], length=70, model="tiny", page_size=8)
    with pytest.raises(ValueError, match="page size"):
        of_layer([FIRST[0], coarse], 0)
    cache = opened(FIRST[0], 1)
    with pytest.raises(ValueError, match="order must lie in"):
        cache.reordered(jnp.array([1]))
