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
from coreset_jax.coreset import gather
from coreset_jax.nn import CacheConfig, CoresetCache


@pytest.fixture(scope="module")
def filled_cache(sequences, empty_cache):
    return empty_cache().prefill(*sequences[1:], np.full(4, 150))


def decode(cache, sequences, steps):
    """Decodes a step at a time, and returns the outputs and the cache behind them."""
    outputs = []
    for step in range(steps):
        part = sequences.cut(step, step + 1)
        outputs.append(cache.attend(*part))
        cache = cache.append(*part[1:])
    return jnp.concatenate(outputs, axis=1), cache


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
    prompt = *sequences[1:], np.full(4, 150)
    full = zeros.prefill(*prompt)
    for each, count in ((full, 64), (decode(zeros, sequences, 40)[1], 40)):
        assert np.all(np.sum(np.asarray(each.positions) >= 0, axis=-1) == count)
        assert np.all(np.isfinite(each.attend(sequences.queries[:, :1])))


def test_donated_arrays_are_used_again(sequences, empty_cache):
    step = jax.jit(CoresetCache.append, donate_argnums=0)
    rng = jax.random.key(1)
    cache = CoresetCache.init(empty_cache().config, rng, *sequences[1:])
    expected = decode(cache, sequences, 30)[1]
    for start in range(30):
        old = cache
        cache = step(cache, *sequences.cut(start, start + 1)[1:])
        assert old.recent.keys.is_deleted()
    chex.assert_trees_all_equal(cache, expected)
    jax.random.key_data(rng).block_until_ready()


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
    specs = jax.tree.map(
        lambda array: PartitionSpec("batch") if array.shape[0] == 4 else PartitionSpec(),
        empty_cache(),
    )

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


def test_half_precision_is_kept(sequences, empty_cache):
    halves = type(sequences)(*(jnp.asarray(array, jnp.bfloat16) for array in sequences))
    empty = empty_cache(like=halves)
    outputs = empty.attend(*halves.cut(0, 56))
    assert outputs.dtype == jnp.bfloat16
    expected = halves.cut(0, 56).causal()
    np.testing.assert_allclose(outputs.astype(np.float32), expected, rtol=2**-7, atol=2**-9)
    outputs, cache = decode(empty, halves, 100)
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, empty)
    assert cache.middle.pairs.keys.dtype == cache.middle.pairs.values.dtype == jnp.bfloat16
    assert np.all(np.isfinite(outputs.astype(np.float32)))
    pairs = cache.middle.pairs
    place = int(pairs.positions[2, 1, 7])
    np.testing.assert_array_equal(pairs.keys[2, 1, 7], halves.keys[2, place, 1])


def test_double_precision_mode_changes_no_dtype(sequences, empty_cache, x64):
    def run(cache):
        _, prompted = cache.read_and_extend(*sequences)
        _, extended = prompted.read_and_extend(*sequences.cut(0, 17))
        return prompted, extended.read_and_extend(*sequences.cut(0, 1))[1]

    cache = empty_cache()
    for each in jax.eval_shape(run, cache):
        chex.assert_trees_all_equal_shapes_and_dtypes(each, cache)


def newest(rng, keys, values, *, size, lengths=None, queries=None):
    """A user's own compressor: the newest pairs, of equal weights."""
    del rng, queries
    count = keys.shape[-2]
    size = min(size, count)
    lengths = jnp.full(keys.shape[:-2], count) if lengths is None else lengths
    indices = jnp.arange(size) + jnp.maximum(lengths - size, 0)[..., None]
    indices = jnp.where(indices < lengths[..., None], indices, -1)
    log_weights = jnp.log(lengths / jnp.minimum(lengths, size))[..., None] + jnp.zeros(size)
    return gather(keys, values, indices, log_weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    "compressor",
    [
        cj.baselines.uniform(),
        cj.baselines.balance_kv(block_size=8),
        cj.balanced(block_size=8, landmarks=8, max_swaps=2),
        newest,
    ],
    ids=["uniform", "balance_kv", "balanced", "own"],
)
def test_every_compressor_plugs_in(sequences, empty_cache, config, weights, compressor):
    cache = empty_cache(config.replace(compressor=compressor))
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


def test_compressors_are_handed_the_last_queries(sequences, empty_cache, config):
    seen = []

    def note(queries):
        seen.append(np.asarray(queries))

    def asking(rng, keys, values, *, size, lengths=None, queries=None):
        if queries is not None:
            assert queries.shape == (2, 2 * config.window, 8)
            jax.debug.callback(note, queries)
        return newest(rng, keys, values, size=size, lengths=lengths)

    lengths = np.array([0, 3, 57, 150])
    queries = np.where(
        (np.arange(150) < lengths[:, None])[..., None, None], sequences.queries, np.nan
    )
    cache = empty_cache(config.replace(compressor=asking))
    cache.read_and_extend(queries, *sequences[1:], lengths)[1].lengths.block_until_ready()
    jax.effects_barrier()
    assert len(seen) == 4
    assert np.all(np.isfinite(seen))
    last = queries[3, -config.window :].reshape(config.window, 2, 2, 8)
    expected = last.transpose(1, 2, 0, 3).reshape(2, 2 * config.window, 8)
    assert any(np.array_equal(each, expected) for each in seen)


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
        ({"landmarks": 0}, "landmarks"),
        ({"query_norm": -1.0}, "query_norm"),
        ({"scale": np.nan}, "scale"),
        ({"compressor": "uniform"}, "compressor"),
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
