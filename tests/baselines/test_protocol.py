"""What every compressor owes to the protocol, whatever it keeps."""

import dataclasses
import math
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from coreset_jax import balanced, baselines, fitted, pivoted, refit, walks, with_ends
from coreset_jax.coreset import Compressor, whole_cache

LEADING, COUNT, SIZE, WIDTH, VALUE_WIDTH = (2, 4), 40, 22, 8, 5
SAMPLES = np.random.default_rng(4).standard_normal((6, WIDTH))


@dataclasses.dataclass(frozen=True)
class Asked:
    """A compressor that wants sample queries, and is given the same ones for every head."""

    informed: Compressor

    def __call__(self, rng, keys, values, **options):
        # Made from the keys, so that they are sharded alike.
        queries = jnp.zeros_like(keys[..., :1, :])
        samples = jnp.asarray(SAMPLES, queries.dtype)
        samples = jnp.broadcast_to(samples, (*queries.shape[:-2], *samples.shape))
        return self.informed(rng, keys, values, queries=queries + samples, **options)


MAKERS = {
    "uniform": baselines.uniform,
    "balance_kv": lambda: baselines.balance_kv(block_size=8),
    "balance_kv_corrected": lambda: baselines.balance_kv(corrected=True, block_size=8),
    # A walk that draws, and a radius, beside which sample queries have no say.
    "balanced": lambda: balanced(
        rho=2.0, walk=walks.self_balancing, block_size=8, landmarks=8, max_swaps=2
    ),
    "nystrom": lambda: refit.nystrom(baselines.uniform(), rho=2.0),
    "log_weights": lambda: refit.log_weights(baselines.uniform(), rho=2.0),
    "pivoted": lambda: pivoted(rho=2.0),
    "fitted": lambda: fitted(rho=2.0),
    "with_ends": lambda: with_ends(baselines.uniform(), sinks=1, recent=0.3),
    "relocation": lambda: refit.relocation(baselines.uniform(), rho=2.0),
    "matching": lambda: Asked(refit.matching(baselines.uniform(), rho=2.0)),
    "matched": lambda: Asked(refit.attention_matching(baselines.uniform())),
    "streaming_llm": baselines.streaming_llm,
    "key_similarity": baselines.key_similarity,
    "top_attention": lambda: Asked(baselines.top_attention()),
    "h2o": lambda: Asked(baselines.h2o()),
    "snapkv": lambda: Asked(baselines.snapkv(window=3, kernel_size=3, groups=2)),
    "expected_attention": lambda: Asked(baselines.expected_attention(groups=2)),
    "kmeans": lambda: baselines.kmeans(iterations=3),
    "kernel_halving": baselines.kernel_halving,
    "wildcat": baselines.wildcat,
    "attention_matching": lambda: Asked(baselines.attention_matching()),
    "quantised": lambda: baselines.quantised(baselines.uniform()),
}
# Values that are not those of the source: these write weights into them, or fit them.
OTHER_VALUES = {
    "balance_kv",
    "nystrom",
    "fitted",
    "relocation",
    "matching",
    "matched",
    "kmeans",
    "wildcat",
    "attention_matching",
    "quantised",
}
# Weights that are fitted, and add up to the length only as well as they fit.
OTHER_WEIGHTS = {
    "nystrom",
    "log_weights",
    "relocation",
    "matching",
    "matched",
    "attention_matching",
}
# JAX cannot yet vmap a while loop over an axis of an Explicit mesh. Under shard_map it can, which
# tests/test_compression.py does.
LOOPS = {"balanced", "pivoted", "fitted", "attention_matching"} | OTHER_WEIGHTS
# Methods that drop pairs with their mass, every one left with weight one.
EVICTIONS = {
    "streaming_llm",
    "key_similarity",
    "top_attention",
    "h2o",
    "snapkv",
    "expected_attention",
}
# Keys that are not those of the source.
OTHER_KEYS = {"kmeans", "fitted", "relocation", "quantised"}
# Signed normalizers stand beside the weights.
NORMALIZED = {"wildcat"}
# Pairs are rounded, even where all of them are kept: by so much.
ROUNDED = {"quantised": 0.02}
# Nothing is drawn, and equal heads are compressed alike.
DETERMINISTIC = EVICTIONS | {"attention_matching"}
# What compiles the programs of those that are made of others.
COMPILED = {"fitted": "coreset_jax.pivots", "with_ends": "coreset_jax.baselines.uniform"}
# Sample queries are needed.
INFORMED = {name for name, make in MAKERS.items() if isinstance(make(), Asked)}


@pytest.fixture(params=MAKERS)
def name(request):
    return request.param


@pytest.fixture
def compressor(name):
    return MAKERS[name]()


@pytest.fixture(scope="module")
def cache():
    rng = np.random.default_rng(3)
    keys = rng.standard_normal((*LEADING, COUNT, WIDTH)).astype(np.float32)
    values = rng.standard_normal((*LEADING, COUNT, VALUE_WIDTH)).astype(np.float32)
    return keys, values


def check_subset(name, coreset, keys, values, lengths):
    """A weighted subset of the valid pairs, in order, whose weights add up to the length."""
    size = coreset.indices.shape[-1]
    for head in np.ndindex(*keys.shape[:-2]):
        indices, length = np.asarray(coreset.indices[head]), int(lengths[head])
        kept = min(size, length)
        assert np.all(indices[kept:] == -1)
        indices = indices[:kept]
        assert np.all(np.diff(indices) > 0)
        assert indices[0] >= 0
        assert indices[-1] < length
        log_weights = np.asarray(coreset.log_weights[head], np.float64)
        assert np.all(np.isfinite(log_weights[:kept]))
        assert np.all(np.isneginf(log_weights[kept:]))
        if name in EVICTIONS:
            np.testing.assert_array_equal(log_weights[:kept], 0.0)
        elif name not in OTHER_WEIGHTS:
            np.testing.assert_allclose(np.exp(log_weights).sum(), length, rtol=1e-6)
        if name not in OTHER_KEYS:
            np.testing.assert_array_equal(coreset.keys[head][:kept], keys[head][indices])
        assert not np.any(coreset.keys[head][kept:])
        assert not np.any(coreset.values[head][kept:])
        if name not in OTHER_VALUES:
            np.testing.assert_array_equal(coreset.values[head][:kept], values[head][indices])


def test_keeps_a_weighted_subset(name, compressor, cache):
    coreset = compressor(jax.random.key(0), *cache, size=SIZE)
    assert coreset.indices.shape == (*LEADING, SIZE)
    assert coreset.indices.dtype == jnp.int32
    assert (coreset.normalizers is None) == (name not in NORMALIZED)
    check_subset(name, coreset, *cache, np.full(LEADING, COUNT))


def test_padding_is_never_looked_at(name, compressor, cache):
    lengths = np.array([[1, 2, SIZE - 1, SIZE], [SIZE + 1, 29, COUNT - 1, COUNT]])
    inside = (np.arange(COUNT) < lengths[..., None])[..., None]

    def padded(filling):
        return [np.where(inside, array, np.float32(filling)) for array in cache]

    coreset = compressor(jax.random.key(0), *padded(0.0), size=SIZE, lengths=lengths)
    check_subset(name, coreset, *cache, lengths)
    for filling in (np.nan, np.inf, -np.inf, 3e38, 7.0):
        again = compressor(jax.random.key(0), *padded(filling), size=SIZE, lengths=lengths)
        chex.assert_trees_all_equal(coreset, again)


def test_short_heads_are_kept_whole(name, compressor, cache):
    lengths = np.arange(SIZE - 7, SIZE + 1).reshape(LEADING)
    coreset = compressor(jax.random.key(0), *cache, size=SIZE, lengths=lengths)
    kept = np.arange(SIZE) < lengths[..., None]
    np.testing.assert_array_equal(coreset.indices, np.where(kept, np.arange(SIZE), -1))
    np.testing.assert_array_equal(coreset.log_weights, np.where(kept, 0.0, -np.inf))
    values = np.where(kept[..., None], cache[1][..., :SIZE, :], 0.0)
    np.testing.assert_allclose(coreset.values, values, rtol=0, atol=ROUNDED.get(name, 0))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("filling", [np.nan, np.inf])
def test_non_finite_heads_say_so(compressor, cache, which, filling):
    arrays = [array.copy() for array in cache]
    arrays[which][1, 3, 17, 3] = filling
    log_weights = compressor(jax.random.key(0), *arrays, size=SIZE).log_weights
    sick = np.isnan(np.asarray(log_weights))
    assert np.all(sick[1, 3])
    assert sick.sum() == SIZE


def test_whole_cache_where_nothing_has_to_go(name, compressor, cache):
    for lengths in (None, np.full(LEADING, COUNT - 1)):
        expected = whole_cache(*cache, lengths)
        for size in (COUNT, COUNT + 1):
            coreset = compressor(jax.random.key(0), *cache, size=size, lengths=lengths)
            if name in ROUNDED:
                chex.assert_trees_all_close(coreset, expected, rtol=0, atol=ROUNDED[name])
            else:
                chex.assert_trees_all_equal(coreset, expected)


@pytest.mark.parametrize("name", sorted(DETERMINISTIC))
def test_deterministic_methods_draw_nothing(name, cache):
    compressor = MAKERS[name]()
    coreset = compressor(jax.random.key(0), *cache, size=SIZE)
    chex.assert_trees_all_equal(coreset, compressor(jax.random.key(1), *cache, size=SIZE))


@pytest.mark.parametrize("name", sorted(set(MAKERS) - DETERMINISTIC))
def test_same_rng_same_coreset_and_heads_differ(name, cache):
    compressor = MAKERS[name]()
    # Small, so that the walks are not driven to the same signs in every head.
    keys, values = (
        np.float32(0.1) * np.broadcast_to(array[:1, :1], array.shape) for array in cache
    )
    coreset = compressor(jax.random.key(0), keys, values, size=SIZE)
    chex.assert_trees_all_equal(coreset, compressor(jax.random.key(0), keys, values, size=SIZE))
    drawn = {tuple(head) for head in np.asarray(coreset.indices).reshape(-1, SIZE)}
    assert len(drawn) == coreset.indices[..., 0].size
    other = compressor(jax.random.key(1), keys, values, size=SIZE)
    assert tuple(np.asarray(other.indices[0, 0])) not in drawn


@pytest.mark.slow
def test_heads_are_numbered_flat(compressor, cache):
    coreset = compressor(jax.random.key(0), *cache, size=SIZE)
    flat = compressor(
        jax.random.key(0), *(array.reshape(-1, *array.shape[2:]) for array in cache), size=SIZE
    )
    for nested, unnested in zip(coreset[:4], flat[:4], strict=True):
        np.testing.assert_array_equal(np.reshape(nested, unnested.shape), unnested)


@pytest.mark.slow
def test_transformations_change_nothing(name, compressor, cache):
    # A solver amplifies rounding.
    solved = name in OTHER_WEIGHTS | NORMALIZED | {"fitted"}
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if solved else {"rtol": 1e-6}
    rngs = jax.random.split(jax.random.key(0), LEADING[0])

    def compress(rng, keys, values):
        return compressor(rng, keys, values, size=SIZE)

    one_by_one = [compress(rngs[i], cache[0][i], cache[1][i]) for i in range(LEADING[0])]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one)
    chex.assert_trees_all_close(jax.jit(jax.vmap(compress))(rngs, *cache), expected, **tolerance)

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
    chex.assert_trees_all_close(jax.jit(scanned)(rngs, *cache), expected, **tolerance)


def test_second_call_does_not_retrace(name, cache, monkeypatch):
    compressor = MAKERS[name]()
    module = type(getattr(compressor, "informed", compressor)).__module__
    module = sys.modules[COMPILED.get(name, module)]
    chex.clear_trace_counter()
    names = ("over_heads", "radii_of_heads", "_round_trip")
    traced = next(each for each in names if hasattr(module, each))
    limited = chex.assert_max_traces(getattr(module, traced), n=1)
    monkeypatch.setattr(module, traced, limited)
    keys, values = (array[0, 0, :31] for array in cache)
    for seed in range(3):
        MAKERS[name]()(jax.random.key(seed), keys, values, size=16)
    with pytest.raises(AssertionError, match="traced"):
        MAKERS[name]()(jax.random.key(0), keys, values, size=17)


def test_equal_options_are_equal_compressors(name, compressor):
    assert MAKERS[name]() == compressor
    assert hash(MAKERS[name]()) == hash(compressor)
    assert len({make() for make in MAKERS.values()}) == len(MAKERS)


@pytest.mark.parametrize("name", sorted(set(MAKERS) - LOOPS))
def test_explicit_shardings_survive(name, cache):
    compressor = MAKERS[name]()
    expected = compressor(jax.random.key(0), *cache, size=SIZE)
    shape = (2, 2) if jax.device_count() >= 4 else (1, 1)
    mesh = jax.make_mesh(
        shape,
        ("batch", "head"),
        axis_types=(AxisType.Explicit,) * 2,
        devices=jax.devices()[: math.prod(shape)],
    )
    sharding = NamedSharding(mesh, PartitionSpec("batch", "head"))
    coreset = compressor(jax.random.key(0), *jax.device_put(cache, sharding), size=SIZE)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if name in NORMALIZED else {"rtol": 1e-6}
    chex.assert_trees_all_close(coreset, expected, **tolerance)
    for leaf in coreset[:4]:
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_half_precision(name, compressor, cache):
    keys, values = (array.astype(jnp.bfloat16) for array in cache)
    coreset = compressor(jax.random.key(0), keys, values, size=SIZE)
    assert coreset.keys.dtype == coreset.values.dtype == jnp.bfloat16
    assert coreset.log_weights.dtype == jnp.float32
    check_subset(name, coreset, keys, values, np.full(LEADING, COUNT))


def test_strict_promotion(compressor, cache):
    lengths = np.full(LEADING, COUNT, np.uint8)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        strict = compressor(jax.random.key(0), *cache, size=SIZE, lengths=lengths)
    coreset = compressor(jax.random.key(0), *cache, size=SIZE)
    chex.assert_trees_all_close(strict, coreset, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", sorted(INFORMED))
def test_queries_must_be_given_where_they_are_wanted(name, cache):
    compressor = MAKERS[name]().informed
    for size in (SIZE, COUNT):
        with pytest.raises(ValueError, match="queries must be given"):
            compressor(jax.random.key(0), *cache, size=size)
    with pytest.raises(ValueError, match="leading axes of keys"):
        compressor(jax.random.key(0), *cache, size=SIZE, queries=cache[0][:1])


@pytest.mark.parametrize("name", sorted(INFORMED))
def test_non_finite_queries_say_so(name, cache):
    queries = cache[0][..., :6, :].copy()
    queries[1, 3, 5, 2] = np.nan
    compressor = MAKERS[name]().informed
    log_weights = compressor(jax.random.key(0), *cache, size=SIZE, queries=queries).log_weights
    sick = np.isnan(np.asarray(log_weights))
    assert np.all(sick[1, 3])
    assert sick.sum() == SIZE


@pytest.mark.parametrize("name", sorted(set(MAKERS) - INFORMED - {"fitted"}))
def test_queries_are_ignored(name, cache):
    compressor = MAKERS[name]()
    coreset = compressor(jax.random.key(0), *cache, size=SIZE, queries=cache[0])
    chex.assert_trees_all_equal(coreset, compressor(jax.random.key(0), *cache, size=SIZE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"size": 3.0}, "size must be a static Python int"),
        ({"keys": np.zeros((COUNT, WIDTH))}, "rank of keys"),
        ({"keys": np.zeros((*LEADING, COUNT - 1, WIDTH))}, "as many pairs"),
        ({"keys": np.zeros((*LEADING, COUNT, WIDTH), int)}, "floating dtype"),
        ({"lengths": np.full(LEADING, COUNT + 1)}, "lengths must lie in"),
        ({"lengths": np.full(LEADING[:1], COUNT)}, "leading axes"),
    ],
)
def test_bad_arguments_are_refused(compressor, cache, change, message):
    arguments = {"keys": cache[0], "values": cache[1], "size": SIZE, **change}
    with pytest.raises(ValueError, match=message):
        compressor(jax.random.key(0), **arguments)
