"""Caches and modules on meshes: what they say on one device, and sequences and heads in place."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from coreset_jax.nn import CacheConfig, CoresetCache, linen
from coreset_jax.nn.nnx import CoresetAttention

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")

BATCH, LENGTH, KV_HEADS, WIDTH, FEATURES = 2, 60, 4, 8, 32
CONFIG = CacheConfig(size=40, sinks=2, window=8, block_size=8)
OPTIONS = {"size": 40, "sinks": 2, "window": 8, "block_size": 8}
BY_ROW, BY_HEAD = PartitionSpec("batch"), PartitionSpec("batch", "head")
BY_TOKEN, BY_LENGTH = PartitionSpec("batch", None, "head"), PartitionSpec(None, "head")


def make_mesh(kind):
    return jax.make_mesh((2, 2), BY_HEAD, axis_types=(kind,) * 2, devices=jax.devices()[:4])


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return make_mesh(request.param)


@pytest.fixture(scope="module")
def tokens():
    """Queries of two heads for each key-value head, keys and values."""
    rng = np.random.default_rng(0)
    shapes = [(BATCH, LENGTH, heads, WIDTH) for heads in (2 * KV_HEADS, KV_HEADS, KV_HEADS)]
    return [np.float32(rng.standard_normal(shape)) for shape in shapes]


@pytest.fixture(scope="module")
def inputs():
    return np.float32(np.random.default_rng(1).standard_normal((BATCH, LENGTH, FEATURES)))


def place(mesh, tree, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def lies(array, mesh, spec):
    return array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)


def read(queries, keys, values, *, prompt=40):
    """A ragged prompt, a block of tokens and one token."""
    cache = CoresetCache.init(CONFIG, jax.random.key(0), keys, values)
    outputs, starts = [], [0, prompt, prompt + 12]
    for start, stop, lengths in zip(
        starts, [*starts[1:], starts[-1] + 1], ([prompt, prompt - 9], None, None), strict=True
    ):
        part = (array[:, start:stop] for array in (queries, keys, values))
        lengths = None if lengths is None else jnp.array(lengths)
        found, cache = cache.read_and_extend(*part, lengths)
        outputs.append(found if lengths is None else found[:, : prompt - 9])
    return outputs, cache


def check_cache(cache, expected, mesh):
    for block in (cache.sinks, cache.recent, cache.middle):
        assert all(lies(leaf, mesh, BY_HEAD) for leaf in jax.tree.leaves(block))
    for rows in (cache.filled, cache.lengths, cache.rng):
        assert lies(rows, mesh, BY_ROW)
    found, expected = jax.device_get((cache, expected))
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-3)


def test_types_say_where_caches_are(tokens):
    """Under Explicit axes: of prompts, of many tokens and of one, with and without padding."""
    sharding = NamedSharding(make_mesh(AxisType.Explicit), BY_TOKEN)
    given = [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=sharding) for each in tokens]
    outputs, cache = jax.eval_shape(read, *given)
    assert {tuple(found.sharding.spec) for found in outputs} == {("batch", None, "head", None)}
    blocks = jax.tree.leaves((cache.sinks, cache.recent, cache.middle))
    assert {tuple(leaf.sharding.spec)[:2] for leaf in blocks} == {("batch", "head")}
    rows = cache.filled, cache.lengths, cache.rng
    assert {tuple(leaf.sharding.spec)[:1] for leaf in rows} == {("batch",)}


@pytest.mark.slow
def test_caches_say_the_same_and_stay(mesh, tokens):
    outputs, cache = jax.jit(read)(*place(mesh, tokens, BY_TOKEN))
    expected, held = jax.jit(read)(*tokens)
    assert all(lies(found, mesh, BY_TOKEN) for found in outputs)
    chex.assert_trees_all_close(jax.device_get(outputs), jax.device_get(expected), atol=1e-4)
    check_cache(cache, held, mesh)


@pytest.mark.slow
def test_caches_outside_of_jit_too(mesh, tokens):
    with jax.set_mesh(mesh):
        outputs, cache = read(*place(mesh, tokens, BY_TOKEN))
        cleared = cache.reset(np.array([True, False]))
    expected, held = read(*tokens)
    chex.assert_trees_all_close(jax.device_get(outputs), jax.device_get(expected), atol=1e-4)
    check_cache(cache, held, mesh)
    check_cache(cleared, held.reset(np.array([True, False])), mesh)
    assert lies(cache.positions, mesh, BY_HEAD)
    np.testing.assert_array_equal(cache.positions, held.positions)


@pytest.mark.slow
def test_queries_may_be_on_more_devices_than_there_are_kv_heads(tokens):
    """Two devices for queries of one kv head: outputs are where their queries were."""
    mesh = make_mesh(AxisType.Explicit)
    queries, keys, values = tokens[0], *(array[:, :, :1] for array in tokens[1:])
    given = place(mesh, queries, BY_TOKEN), *place(mesh, (keys, values), BY_ROW)
    call = jax.jit(functools.partial(read, prompt=20))
    outputs, _ = call(*given)
    expected, _ = call(queries, keys, values)
    assert all(lies(found, mesh, BY_TOKEN) for found in outputs)
    chex.assert_trees_all_close(jax.device_get(outputs), jax.device_get(expected), atol=1e-4)


def sharded_by_heads(mesh, path, array):
    """A parameter of an attention, with its heads on the devices of a mesh."""
    by_head = {3: PartitionSpec(None, "head"), 2: PartitionSpec("head")}
    spec = by_head.get(array.ndim, PartitionSpec())
    if "out" in path:
        spec = PartitionSpec("head") if array.ndim == 3 else PartitionSpec()
    return place(mesh, array, spec)


def read_nnx(module, inputs):
    module.init_cache(inputs.shape)
    step = nnx.jit(lambda module, inputs: module(inputs, decode=True))
    parts = inputs[:, :50], inputs[:, 50:51], inputs[:, 51:52]
    return [step(module, part) for part in parts], module.cache.get_value()


@pytest.mark.slow
def test_nnx_modules_decode_over_sharded_heads(mesh, inputs):
    module = CoresetAttention(
        4, FEATURES, num_kv_heads=2, **OPTIONS, rope_base=1e4, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(module)
    expected, held = read_nnx(module, inputs)
    placed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharded_by_heads(mesh, jax.tree_util.keystr(path), leaf), state
    )
    outputs, cache = read_nnx(nnx.merge(graph, placed), place(mesh, inputs, BY_ROW))
    assert all(lies(found, mesh, BY_ROW) for found in outputs)
    chex.assert_trees_all_close(jax.device_get(outputs), jax.device_get(expected), atol=1e-4)
    check_cache(cache, held, mesh)


@pytest.mark.slow
def test_linen_modules_decode_over_sharded_heads(mesh, inputs):
    module = linen.CoresetAttention(
        num_heads=4, num_kv_heads=2, **OPTIONS, rope_base=1e4, decode=True
    )
    variables = module.init(jax.random.key(0), inputs)

    @jax.jit
    def step(variables, inputs):
        return module.apply(variables, inputs, mutable=["cache"])

    def read(variables, inputs):
        outputs = []
        for part in (inputs[:, :50], inputs[:, 50:51], inputs[:, 51:52]):
            found, changed = step(variables, part)
            variables = {**variables, **changed}
            outputs.append(found)
        return outputs, variables["cache"]["coreset"]

    expected, held = read(variables, inputs)
    placed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharded_by_heads(mesh, jax.tree_util.keystr(path), leaf),
        variables["params"],
    )
    cache = jax.tree.map(lambda leaf: place(mesh, leaf, PartitionSpec()), variables["cache"])
    given = {"params": placed, "cache": cache}
    outputs, cache = read(given, place(mesh, inputs, BY_ROW))
    assert all(lies(found, mesh, BY_ROW) for found in outputs)
    chex.assert_trees_all_close(jax.device_get(outputs), jax.device_get(expected), atol=1e-4)
    check_cache(cache, held, mesh)


def test_a_sharded_sequence_is_refused(mesh, tokens, inputs):
    keys, values = tokens[1:]
    cut = place(mesh, keys, BY_LENGTH)
    cache = CoresetCache.init(CONFIG, jax.random.key(0), keys, values)
    module = CoresetAttention(4, FEATURES, num_kv_heads=2, **OPTIONS, rngs=nnx.Rngs(0))
    module.init_cache(inputs.shape)
    calls = {
        "keys": lambda: cache.prefill(cut, values),
        "values": lambda: cache.append(keys, cut),
        "inputs_q": lambda: module(place(mesh, inputs, BY_LENGTH), decode=True),
    }
    for name, call in calls.items():
        message = f"{name} must not be sharded along the sequence.* 30 of 60.*batch or heads"
        with pytest.raises(ValueError, match=message):
            call()
