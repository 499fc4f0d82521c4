"""What every compressor owes to the protocol, whatever it keeps.

All of them run in two programs: one for whole heads in float32, with a softmax scale for each head,
and one for ragged heads in bfloat16, with the default scale.
"""

import dataclasses
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import coreset_jax as cj
from coreset_jax import (
    attended,
    balanced,
    baselines,
    better_of,
    chunked,
    fitted,
    keep_ends,
    pivoted,
    refit,
    walks,
)
from coreset_jax._src.core.coreset import normalizers, whole_cache, with_normalizers
from coreset_jax.baselines import SignedCoreset, uniform

LEADING, COUNT, SIZE, WIDTH, VALUE_WIDTH = (2, 4), 40, 22, 8, 5
LENGTHS = np.array([[1, 2, SIZE - 1, SIZE], [SIZE + 1, 29, COUNT - 1, COUNT]])
SCALES = np.linspace(0.3, 0.4, 8, dtype=np.float32).reshape(LEADING)
RNG, OTHER_RNG = jax.random.key(0), jax.random.key(1)

MAKERS = {
    # A walk that draws, and radii, beside which sample queries have no say.
    "balanced": functools.partial(
        balanced, rho=2.0, walk=walks.self_balancing, block_size=8, landmarks=8, max_swaps=2
    ),
    "pivoted": functools.partial(pivoted, rho=2.0),
    "fitted": functools.partial(fitted, rho=2.0, newton_steps=1),
    "attended": attended,
    "chunked": functools.partial(chunked, uniform(), chunk_size=11),
    "better_of": functools.partial(better_of, uniform(), chunked(uniform(), chunk_size=11)),
    "keep_ends": functools.partial(keep_ends, uniform(), sinks=1, recent_fraction=0.3),
    "nystrom": functools.partial(refit.nystrom, uniform(), rho=2.0),
    "weights": functools.partial(refit.weights, uniform(), rho=2.0),
    "move_keys": functools.partial(refit.move_keys, uniform(), rho=2.0, newton_steps=1),
    "matching": functools.partial(refit.matching, uniform(), rho=2.0),
    "refit.attention_matching": functools.partial(refit.attention_matching, uniform()),
    "uniform": uniform,
    "balance_kv": functools.partial(baselines.balance_kv, block_size=8),
    "balance_kv, corrected": functools.partial(baselines.balance_kv, corrected=True, block_size=8),
    "kernel_halving": baselines.kernel_halving,
    "streaming_llm": baselines.streaming_llm,
    "keydiff": baselines.keydiff,
    "compactor": functools.partial(baselines.compactor, sinks=2, num_recent=3, rope_base=100.0),
    "kvzip": functools.partial(baselines.kvzip, num_recent=2),
    "top_attention": baselines.top_attention,
    "h2o": baselines.h2o,
    "snapkv": functools.partial(baselines.snapkv, window=3, kernel_size=3, groups=2),
    "expected_attention": functools.partial(baselines.expected_attention, groups=2),
    "kmeans": functools.partial(baselines.kmeans, iterations=3),
    "wildcat": baselines.wildcat,
    "attention_matching": baselines.attention_matching,
    "quantized": functools.partial(baselines.quantized, uniform()),
}
# Methods that drop pairs with their mass, every one left with weight one.
EVICTIONS = {
    *("streaming_llm", "keydiff", "compactor", "kvzip"),
    *("top_attention", "h2o", "snapkv", "expected_attention"),
}
# Nothing is drawn, and equal heads are compressed alike.
DETERMINISTIC = EVICTIONS | {"attention_matching"}
# Weights that are fitted, and add up to the length only as well as they fit.
FITTED_WEIGHTS = {
    *("attended", "fitted", "nystrom", "weights", "move_keys", "matching"),
    *("refit.attention_matching", "attention_matching"),
}
# Keys that are not those of the source, although a head may be kept whole.
OTHER_KEYS = {"kmeans", "fitted", "move_keys", "quantized"}
# Pairs are rounded, even where all of them are kept: by so much.
ROUNDED = {"quantized": 0.02}
# What is kept depends on the softmax scale itself, and not on the radius of the queries alone.
SCALED = {
    *("balance_kv", "balance_kv, corrected", "wildcat", "attention_matching"),
    *("top_attention", "h2o", "snapkv", "expected_attention", "refit.attention_matching"),
    *("attended", "kvzip", "matching"),
}
# Those that sample queries change, and that can do without.
OPTIONAL = {"fitted", "compactor"}


@pytest.fixture(params=MAKERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def cache():
    rng = np.random.default_rng(3)
    shapes = [(*LEADING, COUNT, width) for width in (WIDTH, VALUE_WIDTH)]
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


@pytest.fixture(scope="module")
def half(cache):
    """The same in bfloat16."""
    return tuple(array.astype(jnp.bfloat16) for array in cache)


def has_scale(name):
    return "scale" in {field.name for field in dataclasses.fields(MAKERS[name]())}


def make(name, scale=None):
    """A compressor, with that softmax scale if it has any."""
    return MAKERS[name](scale=scale) if has_scale(name) else MAKERS[name]()


def samples(compressor, keys):
    """Sample queries where they are needed, the same for every head."""
    if not compressor.needs_queries:
        return None
    rows = np.random.default_rng(4).standard_normal((6, WIDTH)).astype(keys.dtype)
    return np.broadcast_to(rows, (*keys.shape[:-2], *rows.shape))


def run(name, keys, values, *, rng=RNG, **options):
    """The program of whole heads, in which neither dtypes nor ranks are promoted in silence."""
    compressor = make(name, options.pop("scale", SCALES))
    options = {"size": SIZE, "queries": samples(compressor, keys), **options}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return jax.device_get(compressor(rng, keys, values, **options))


@pytest.mark.parametrize("tied", [name for name in MAKERS if MAKERS[name]().keeps_pairs])
def test_values_that_are_a_slice_of_the_keys_stay_it_where_pairs_are_kept(tied, cache):
    """As in latent attention; nothing but the keys then needs to be stored."""
    keys = cache[0]
    coreset = run(tied, keys, keys[..., :VALUE_WIDTH])
    np.testing.assert_array_equal(coreset.values, coreset.keys[..., :VALUE_WIDTH])
    assert np.any(coreset.values != 0)


def run_ragged(name, keys, values):
    """That of ragged heads."""
    compressor = make(name)
    queries = samples(compressor, keys)
    options = {"size": SIZE, "lengths": LENGTHS, "queries": queries}
    return jax.device_get(compressor(RNG, keys, values, **options))


def check(name, coreset, keys, values, lengths):
    """A weighted part of the valid pairs, in order, and a head kept whole where it fits in."""
    compressor = make(name)
    assert isinstance(coreset, SignedCoreset) == compressor.signed
    assert coreset.keys.dtype == coreset.values.dtype == keys.dtype
    assert (coreset.log_weights.dtype, coreset.indices.dtype) == (np.float32, np.int32)
    assert coreset.indices.shape == coreset.log_weights.shape == (*keys.shape[:-2], SIZE)
    for head in np.ndindex(*keys.shape[:-2]):
        one = jax.tree.map(lambda leaf, head=head: leaf[head], coreset._replace(scale=None))
        kept = min(SIZE, lengths[head])
        empty = jax.tree.map(lambda leaf, kept=kept: leaf[kept:], one)
        np.testing.assert_array_equal(empty.indices, -1)
        np.testing.assert_array_equal(empty.log_weights, -np.inf)
        assert not np.any(empty.keys)
        assert not np.any(empty.values)
        one = jax.tree.map(lambda leaf, kept=kept: leaf[:kept], one)
        assert np.all(np.diff(one.indices) > 0)
        assert one.indices[0] >= 0
        assert one.indices[-1] < lengths[head]
        assert np.all(np.isfinite(one.log_weights))
        assert np.all(np.isfinite(np.float32(one.values)))
        source = keys[head][one.indices], values[head][one.indices]
        if name not in OTHER_KEYS:
            np.testing.assert_array_equal(one.keys, source[0])
        if compressor.keeps_pairs:
            np.testing.assert_array_equal(one.values, source[1])
        if lengths[head] <= SIZE or name in EVICTIONS:
            np.testing.assert_array_equal(one.log_weights, 0)
        elif name not in FITTED_WEIGHTS:
            total = np.sum(np.exp(np.float64(one.log_weights)))
            np.testing.assert_allclose(total, lengths[head], rtol=1e-6)
        if lengths[head] <= SIZE:
            for array, expected in zip(one[:2], source, strict=True):
                atol = ROUNDED.get(name, 0)
                np.testing.assert_allclose(np.float32(array), np.float32(expected), atol=atol)
            assert np.all(normalizers(one) == 1)


def test_every_public_compressor_is_here():
    public = set()
    for module in (cj, baselines, refit):
        members = [getattr(module, each) for each in module.__all__]
        public |= {each for each in members if inspect.isclass(each)}
    public = {each for each in public if issubclass(each, cj.Compressor)}
    made = {type(make(each)) for each in MAKERS}
    assert public - {cj.Compressor, cj.Wrapper} == made


def test_keeps_a_weighted_part_of_whole_heads(name, cache):
    check(name, run(name, *cache), *cache, np.full(LEADING, COUNT))


def test_keeps_a_weighted_part_of_ragged_heads_in_half_precision(name, half):
    """And short heads as they are. What lies beyond them is not looked at."""
    inside = (np.arange(COUNT) < LENGTHS[..., None])[..., None]
    coreset = run_ragged(name, *half)
    check(name, coreset, *half, LENGTHS)
    poisoned = [np.where(inside, array, jnp.bfloat16(np.nan)) for array in half]
    chex.assert_trees_all_equal(coreset, run_ragged(name, *poisoned))


def test_the_rng_decides_and_nothing_is_compiled_again(name, cache, programs):
    # Small, so that the walks are not driven to the same signs in every head.
    alike = [np.float32(0.1) * np.broadcast_to(each[:1, :1], each.shape) for each in cache]
    coreset = run(name, *alike)
    before = programs()
    chex.assert_trees_all_equal(run(name, *alike), coreset)
    other = run(name, *alike, rng=OTHER_RNG)
    assert programs() == before
    if name in DETERMINISTIC:
        chex.assert_trees_all_equal(other, coreset)
        return
    drawn = {tuple(head) for head in coreset.indices.reshape(-1, SIZE)}
    assert len(drawn) == SCALES.size
    assert tuple(other.indices[0, 0]) not in drawn


def test_a_head_that_is_not_finite_says_so(name, cache):
    for which, filling in ((0, np.nan), (1, np.inf)):
        arrays = [array.copy() for array in cache]
        arrays[which][1, 3, 17, 3] = filling
        sick = np.isnan(run(name, *arrays).log_weights)
        assert np.all(sick[1, 3])
        assert sick.sum() == SIZE


def test_sample_queries_are_needed_or_change_nothing(name, cache, programs):
    compressor, queries = make(name, SCALES), np.ascontiguousarray(cache[0][..., :6, :])
    if compressor.needs_queries:
        sick = queries.copy()
        sick[1, 3, 5, 2] = np.nan
        found = np.isnan(run(name, *cache, queries=sick).log_weights)
        assert np.all(found[1, 3])
        assert found.sum() == SIZE
        for size, given in ((SIZE, None), (COUNT, None), (SIZE, queries[..., :0, :])):
            with pytest.raises(ValueError, match="queries must be given to"):
                compressor(RNG, *cache, size=size, queries=given)
    elif not compressor.reads_queries:
        coreset, before = run(name, *cache), programs()
        chex.assert_trees_all_equal(run(name, *cache, queries=queries), coreset)
        assert programs() == before
    else:
        assert name in OPTIONAL


def test_every_head_has_a_scale_of_its_own(name, cache, programs):
    if not has_scale(name):
        return
    coreset, before = run(name, *cache), programs()
    scales = SCALES.copy()
    scales[1, 2] = 3.0
    other = run(name, *cache, scale=scales)
    assert programs() == before
    unlike = np.zeros(LEADING, bool)
    if name == "compactor":  # whose scale is that of its scores, and not of attention
        assert other.scale is None
    else:
        np.testing.assert_allclose(other.scale, scales, rtol=1e-6)
    pairs = (each._replace(scale=None) for each in (coreset, other))
    for one, two in zip(*map(jax.tree.leaves, pairs), strict=True):
        unlike |= np.any((one != two).reshape(*LEADING, -1), axis=-1)
    assert unlike.sum() == unlike[1, 2]
    if name in SCALED:
        assert unlike[1, 2]


@pytest.mark.slow
def test_nothing_is_lost_where_nothing_has_to_go(cache):
    compressors = {each: make(each, SCALES) for each in MAKERS}

    @jax.jit
    def whole(keys, values):
        found = {}
        for name, compressor in compressors.items():
            options = {"lengths": LENGTHS, "queries": samples(compressor, keys)}
            found[name] = compressor(RNG, keys, values, size=COUNT + 1, **options)
        return found, whole_cache(keys, values, LENGTHS)

    found, expected = jax.device_get(whole(*cache))
    for name, coreset in found.items():
        coreset = coreset._replace(scale=None)
        if compressors[name].signed:
            ones = np.ones_like(expected.log_weights)
            chex.assert_trees_all_equal(coreset, with_normalizers(expected, ones))
        else:
            atol = ROUNDED.get(name, 0)
            chex.assert_trees_all_close(coreset, expected, rtol=0, atol=atol)


def test_equal_options_are_equal_compressors():
    for scale in (None, 0.5, SCALES):
        compressors = {name: make(name, scale) for name in MAKERS}
        for name, compressor in compressors.items():
            assert make(name, None if scale is None else jnp.asarray(scale)) == compressor
            assert hash(make(name, scale)) == hash(compressor)
            if has_scale(name):
                assert make(name, 0.25) != compressor
        assert len(set(compressors.values())) == len(MAKERS)


def test_bad_calls_are_refused(cache):
    keys, values = cache
    for name in MAKERS:
        compressor = make(name, 0.5)
        call = functools.partial(compressor, RNG, queries=samples(compressor, keys))
        for change, message in (
            ({"size": 0}, "size must be at least 1"),
            ({"size": 3.0}, "size must be a static Python int"),
            ({"keys": keys[0]}, "rank of keys"),
            ({"values": values[..., 1:, :]}, "as many pairs"),
            ({"keys": keys.astype(int)}, "floating dtype"),
            ({"lengths": LENGTHS + 1}, "lengths must lie in"),
            ({"lengths": LENGTHS[0]}, "leading axes"),
            ({"queries": keys[:1]}, "leading axes of keys"),
        ):
            arguments = {"keys": keys, "values": values, "size": SIZE, **change}
            with pytest.raises(ValueError, match=message):
                call(**arguments)
        if has_scale(name):
            for scale in (0.0, np.nan, -SCALES):
                with pytest.raises(ValueError, match="scale must be"):
                    make(name, scale)
            with pytest.raises(ValueError, match="scale must be a scalar or have shape"):
                make(name, SCALES[0])(RNG, keys, values, size=SIZE)


def over_devices(kind):
    """Two axes cut over four devices, which a CPU always has here, or over one."""
    count = 2 if jax.device_count() >= 4 else 1
    axes = PartitionSpec("batch", "head")
    devices = jax.devices()[: count**2]
    mesh = jax.make_mesh((count, count), axes, axis_types=(kind,) * 2, devices=devices)
    return NamedSharding(mesh, axes)


def test_explicit_shardings_survive(name, cache):
    sharding = over_devices(AxisType.Explicit)
    compressor = make(name)
    queries = samples(compressor, cache[0])
    arrays = (*cache, queries) if compressor.needs_queries else cache
    given = [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=sharding) for each in arrays]

    def compress(keys, values, queries=None):
        return compressor(RNG, keys, values, size=SIZE, queries=queries)

    # Shardings are a matter of types: where they do not go together, nothing is traced.
    coreset = jax.eval_shape(compress, *given)
    for leaf in jax.tree.leaves(coreset):
        assert tuple(leaf.sharding.spec)[:2] == tuple(sharding.spec)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_meshes_change_nothing(name, kind, cache):
    """Heads of every device are compressed there, and to the same as on one."""
    sharding = over_devices(kind)
    compressor = make(name)
    queries = samples(compressor, cache[0])
    arrays = (*cache, queries) if compressor.needs_queries else cache

    @jax.jit
    def compress(keys, values, queries=None):
        return compressor(RNG, keys, values, size=SIZE, queries=queries)

    coreset = compress(*jax.device_put(arrays, sharding))
    for leaf in jax.tree.leaves(coreset):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    # A solver amplifies rounding.
    solved = name in FITTED_WEIGHTS | {"wildcat"}
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if solved else {"rtol": 1e-6}
    chex.assert_trees_all_close(
        jax.device_get(coreset), jax.device_get(compress(*arrays)), **tolerance
    )


@pytest.mark.slow
def test_transformations_change_nothing(name, cache):
    # A solver amplifies rounding.
    solved = name in FITTED_WEIGHTS | {"wildcat"}
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if solved else {"rtol": 1e-6}
    rngs = jax.random.split(RNG, LEADING[0])
    compressor = make(name)
    queries = samples(compressor, cache[0])
    given = (rngs, *cache) if queries is None else (rngs, *cache, queries)

    def compress(rng, keys, values, queries=None):
        return compressor(rng, keys, values, size=SIZE, queries=queries)

    one_by_one = [compress(*(each[i] for each in given)) for i in range(LEADING[0])]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one)
    chex.assert_trees_all_close(jax.jit(jax.vmap(compress))(*given), expected, **tolerance)

    mesh = jax.make_mesh(
        LEADING[:1] if jax.device_count() >= LEADING[0] else (1,),
        ("batch",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[: LEADING[0]],
    )
    # One element a device (or all on one), gone through in a scan on each.
    scanned = jax.shard_map(
        lambda *inputs: jax.lax.map(lambda one: compress(*one), inputs),
        mesh=mesh,
        in_specs=PartitionSpec("batch"),
        out_specs=PartitionSpec("batch"),
    )
    chex.assert_trees_all_close(jax.jit(scanned)(*given), expected, **tolerance)
