"""The cache under JAX's transformations, on disk, with other compressors, and used wrongly."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import safetensors.flax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import coreset_jax as cj
from coreset_jax.nn import CacheConfig, CoresetCache
from tests.stream import compressors


@pytest.fixture(scope="module")
def filled_cache(sequences, empty_cache):
    return empty_cache().read_and_extend(*sequences, np.full(4, 150))[1]


def decode(cache, sequences, steps):
    """Decodes a step at a time, and returns the outputs and the cache behind them."""
    outputs = []
    for step in range(steps):
        output, cache = cache.read_and_extend(*sequences.cut(step, step + 1))
        outputs.append(np.asarray(output))
    return np.concatenate(outputs, axis=1), cache


def test_forks_do_not_disturb_each_other(sequences, filled_cache):
    before = jax.tree.map(np.array, filled_cache)
    expected = decode(filled_cache, sequences, 20)
    other = decode(filled_cache, sequences._replace(keys=-sequences.keys), 20)
    chex.assert_trees_all_equal(filled_cache, before)
    chex.assert_trees_all_equal(decode(filled_cache, sequences, 20), expected)
    assert not np.allclose(other[0], expected[0])


def test_a_checkpoint_continues_bit_by_bit(sequences, filled_cache, empty_cache, tmp_path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "cache", filled_cache)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "cache", empty_cache())
    assert restored.config == filled_cache.config
    chex.assert_trees_all_equal(restored, filled_cache)
    chex.assert_trees_all_equal(
        decode(restored, sequences, 20), decode(filled_cache, sequences, 20)
    )


def test_a_safetensors_file_continues_bit_by_bit(sequences, filled_cache, empty_cache, tmp_path):
    leaves, _ = jax.tree_util.tree_flatten_with_path(filled_cache)
    file = tmp_path / "cache.safetensors"
    safetensors.flax.save_file({jax.tree_util.keystr(path): leaf for path, leaf in leaves}, file)
    arrays = safetensors.flax.load_file(file)
    restored = jax.tree_util.tree_map_with_path(
        lambda path, _: arrays[jax.tree_util.keystr(path)], empty_cache()
    )
    chex.assert_trees_all_equal(
        decode(restored, sequences, 20), decode(filled_cache, sequences, 20)
    )


def test_zeros_are_an_empty_cache(sequences, empty_cache):
    """As Flax users make them, from the shapes of ``init``."""
    zeros = jax.tree.map(jnp.zeros_like, empty_cache())
    assert np.all(np.asarray(zeros.positions) == -1)
    _, full = zeros.read_and_extend(*sequences, np.full(4, 150))
    for each, count in ((full, 64), (decode(zeros, sequences, 40)[1], 40)):
        assert np.all(np.sum(np.asarray(each.positions) >= 0, axis=-1) == count)
        assert np.all(np.isfinite(each.attend(*sequences.cut(0, 1))))


@pytest.mark.slow
def test_vmap_over_layers(sequences, empty_cache):
    """Each layer is read as if alone, in a scan over steps."""
    layers = [sequences, sequences._replace(keys=sequences.keys[:, ::-1])]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    cache = jax.tree.map(lambda array: jnp.stack([array] * 2), empty_cache())

    def step(cache, number):
        part = (jax.lax.dynamic_slice_in_dim(array, number, 1, axis=2) for array in stacked)
        outputs, cache = jax.vmap(CoresetCache.read_and_extend)(cache, *part)
        return cache, outputs

    _, outputs = jax.jit(lambda cache: jax.lax.scan(step, cache, jnp.arange(80)))(cache)
    for layer, each in enumerate(layers):
        expected, _ = decode(empty_cache(), each, 80)
        found = outputs[:, layer, :, 0].swapaxes(0, 1)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_batch_may_be_sharded(sequences, empty_cache):
    mesh = Mesh(np.array(jax.devices()[:4]), "batch", axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    specs = jax.tree.map(lambda array: PartitionSpec("batch"), empty_cache())

    def run(cache, queries, keys, values):
        cache = cache.prefill(keys, values, jnp.full(keys.shape[0], 150))

        def step(cache, number):
            part = (
                jax.lax.dynamic_slice_in_dim(array, number, 1, axis=1)
                for array in (queries, keys, values)
            )
            outputs, cache = cache.read_and_extend(*part)
            return cache, outputs

        cache, outputs = jax.lax.scan(step, cache, jnp.arange(20))
        return jnp.moveaxis(outputs[:, :, 0], 0, 1), cache

    mapped = jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(specs, *[PartitionSpec("batch")] * 3),
            out_specs=(PartitionSpec("batch"), specs),
        )
    )
    arrays = [jax.device_put(array, sharding) for array in sequences]
    outputs, cache = mapped(empty_cache(), *arrays)
    prompted = empty_cache().prefill(*sequences[1:], np.full(4, 150))
    expected, single = decode(prompted, sequences, 20)
    assert cache.recent.keys.sharding.spec[0] == "batch"
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.positions, single.positions)


@pytest.mark.slow
def test_half_precision_is_kept(sequences, empty_cache, subsets):
    halves = type(sequences)(*(jnp.asarray(array, jnp.bfloat16) for array in sequences))
    empty = empty_cache(subsets, like=halves)
    outputs, cache = decode(empty, halves, 100)
    assert outputs.dtype == jnp.bfloat16
    expected = halves.cut(0, 56).causal()
    found = outputs[:, :56].astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=2**-7, atol=2**-9)
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, empty)
    assert cache.middle.pairs.keys.dtype == cache.middle.pairs.values.dtype == jnp.bfloat16
    assert np.all(np.isfinite(outputs.astype(np.float32)))
    pairs = cache.middle.pairs
    place = int(pairs.positions[2, 1, 7])
    np.testing.assert_array_equal(pairs.keys[2, 1, 7], halves.keys[2, place, 1])


@pytest.mark.slow
def test_double_precision_mode_changes_no_dtype(sequences, empty_cache, x64):
    cache = empty_cache()
    _, extended = jax.eval_shape(CoresetCache.read_and_extend, cache, *sequences)
    chex.assert_trees_all_equal_shapes_and_dtypes(extended, cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: cj.baselines.balance_kv(block_size=8),
        lambda: cj.balanced(block_size=8, landmarks=8, max_swaps=2),
    ],
    ids=["balance_kv", "balanced"],
)
def test_every_subset_method_plugs_in(sequences, empty_cache, config, weights, make):
    cache = empty_cache(config.replace(compressor=make()))
    cache = cache.prefill(*sequences[1:], np.array([3, 150, 57, 90]))
    _, cache = decode(cache, sequences, 30)
    np.testing.assert_allclose(
        weights(cache).sum(axis=-1),
        np.broadcast_to(np.asarray(cache.lengths)[:, None], (4, 2)),
        rtol=1e-5,
    )
    outputs = cache.attend(sequences.queries[:, :1])
    assert np.all(np.isfinite(outputs))
    assert np.abs(outputs).max() < np.abs(sequences.values).max()


@pytest.mark.slow
def test_compressors_are_handed_the_last_queries(sequences, empty_cache, config):
    seen = []
    compressor = compressors.sampled(note=lambda queries: seen.append(np.asarray(queries)))
    lengths = np.array([0, 3, 57, 150])
    queries = np.where(
        (np.arange(150) < lengths[:, None])[..., None, None], sequences.queries, np.nan
    )
    cache = empty_cache(config.replace(compressor=compressor))
    cache.read_and_extend(queries, *sequences[1:], lengths)[1].lengths.block_until_ready()
    jax.effects_barrier()
    assert np.shape(seen) == (8, 2 * config.window, 8)
    assert np.all(np.isfinite(seen))
    last = queries[3, -config.window :].reshape(config.window, 2, 2, 8)
    for head in range(2):
        expected = last[:, head].reshape(2 * config.window, 8)
        assert any(np.array_equal(each, expected) for each in seen)


def test_equal_options_share_their_programs(config):
    def make(skew):
        return config.replace(compressor=compressors.sampled(skew=np.array([1.0, skew])))

    one, same, other = make(2.0), make(2.0), make(3.0)
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    chex.clear_trace_counter()
    read = jax.jit(chex.assert_max_traces(lambda config: config.size, n=1), static_argnums=0)
    assert read(one) == read(same) == one.size


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": 0}, "size"),
        ({"size": 10}, "size must be at least"),
        ({"size": 26}, "size must be .* larger by at least block_size"),
        ({"block_size": 7}, "block_size must be even"),
        ({"block_size": 0}, "block_size"),
        ({"sinks": -1}, "sinks"),
        ({"window": 1.5}, "window"),
        ({"query_norm": -1.0}, "query_norm"),
        ({"scale": np.nan}, "scale"),
        ({"compressor": "uniform"}, "compressor must be a Compressor"),
        ({"compressor": compressors.signed()}, "compressor signed .* weights"),
        ({"compressor": compressors.asking()}, "compressor .* queries"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_bad_options_are_refused(config, options, named):
    with pytest.raises(ValueError, match=named):
        config.replace(**options)


def test_bad_arguments_are_refused(sequences, empty_cache, config):
    queries, keys, values = sequences.cut(0, 5)
    cache = empty_cache(config.replace(max_length=4))
    cases = [
        ("keys", cache.append, (keys[:2], values[:2])),
        ("keys", cache.append, (keys[:, :, :1], values[:, :, :1])),
        ("keys", cache.append, (keys[..., :4], values)),
        ("keys .* dtype", cache.append, (keys.astype(np.float16), values)),
        ("keys", cache.append, (keys[0], values[0])),
        ("keys", cache.append, (keys.astype(int), values)),
        ("values", cache.append, (keys, values[:, :3])),
        ("values", cache.append, (keys, values[..., :3])),
        ("values .* dtype", cache.append, (keys, values.astype(np.float16))),
        ("lengths", cache.append, (keys, values, np.array([1, 2]))),
        ("lengths", cache.append, (keys, values, np.array([1.0, 2, 3, 4]))),
        ("lengths", cache.append, (keys, values, np.array([1, 2, 3, 6]))),
        ("lengths", cache.prefill, (keys[:, :4], values[:, :4], np.array([-1, 1, 1, 1]))),
        ("max_length 4", cache.prefill, (keys, values)),
        ("max_length 4", cache.read_and_extend, (queries, keys, values)),
        ("queries", cache.prefill, (keys[:, :4], values[:, :4], None, queries[..., :3])),
        ("queries", cache.attend, (queries[:2],)),
        ("queries", cache.attend, (queries[:, :, :3],)),
        ("queries", cache.attend, (queries[..., :3],)),
        ("queries", cache.attend, (queries.astype(int),)),
        ("keys and values", cache.attend, (queries, keys)),
        ("lengths", cache.attend, (queries, None, None, np.ones(4, int))),
        ("lengths", cache.attend, (queries, keys, values, np.ones(1, int))),
        ("keys", cache.attend, (queries, keys[:, :3], values[:, :3])),
        ("keys", cache.read_and_extend, (queries[:, :1], keys, values)),
    ]
    for named, call, arguments in cases:
        with pytest.raises(ValueError, match=named):
            call(*arguments)
    with pytest.raises(ValueError, match="values"):
        CoresetCache.init(CacheConfig(size=512), jax.random.key(0), keys, values[:, :, :1])
    odd = CacheConfig(size=512, compressor=compressors.sampled(skew=np.ones(3)))
    with pytest.raises(ValueError, match="skew"):
        CoresetCache.init(odd, jax.random.key(0), keys, values)


def test_arrays_by_head_are_refused(sequences, empty_cache, config):
    """The other layout of the library."""
    cache = empty_cache()
    by_head = type(sequences)(*(array.swapaxes(1, 2) for array in sequences))
    two = sequences.cut(0, 2)
    few = type(sequences)(*(array[:, :, :1] for array in by_head))
    for named, call, arguments in (
        ("Keys", cache.append, by_head[1:]),
        ("Keys", cache.prefill, few[1:]),
        ("Keys", cache.read_and_extend, by_head),
        ("Queries", cache.attend, (few.queries,)),
        ("Queries", cache.attend, (by_head.queries[:, :, :2], *two[1:])),
    ):
        transpose = rf"{named} seem to be .*: transpose them by swapaxes\(1, 2\)"
        with pytest.raises(ValueError, match=transpose):
            call(*arguments)
    long = jnp.zeros((1, 8, 4096, 4))
    with pytest.raises(ValueError, match=r"4096 kv heads\. Keys seem to be"):
        CoresetCache.init(config, jax.random.key(0), long, long)
    wide = jnp.zeros((1, 1, 128, 4))
    assert CoresetCache.init(config, jax.random.key(0), wide, wide).recent.keys.shape[1] == 128
