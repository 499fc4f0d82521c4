"""The softmax scale of a compression: whoever reads the coreset has it, or is refused another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import coreset_jax as cj
from coreset_jax import baselines, budgets, refit
from coreset_jax._src.core import coreset as module
from coreset_jax._src.core.coreset import with_normalizers
from tests import brute_force
from tests.compressors import sampled, scaled

RNG = jax.random.key(0)
LEADING, COUNT, SIZE, WIDTH = (2, 3), 24, 8, 4
SCALES = np.array([[0.2, 0.5, 1.0], [1.5, 2.0, 3.0]], np.float32)

attend = jax.jit(cj.attend, static_argnames="block_size")


@pytest.fixture(scope="module")
def cache():
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((2, *LEADING, COUNT, WIDTH)).astype(np.float32))


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).standard_normal((*LEADING, 5, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def coreset(cache):
    """One with a scale for every head, and some empty slots."""
    lengths = np.array([[1, 5, COUNT], [2, 10, 4]])
    return jax.device_get(scaled(scale=SCALES)(RNG, *cache, size=SIZE, lengths=lengths))


def exact(queries, coreset, scales, normalizers=None):
    """Attention over a coreset in float64, with one scale or one a head."""
    queries = queries * np.broadcast_to(scales, LEADING)[..., None, None]
    return brute_force.attention(queries, *coreset[:3], scale=1.0, normalizers=normalizers)


@pytest.mark.parametrize("scale", [0.8, np.float32(2.0), SCALES])
def test_a_coreset_is_read_with_the_scale_it_was_made_for(cache, queries, scale):
    coreset = scaled(scale=scale)(RNG, *cache, size=SIZE)
    assert coreset.scale.shape == LEADING
    np.testing.assert_allclose(coreset.scale, np.broadcast_to(scale, LEADING), rtol=1e-6)
    expected = exact(queries, coreset, scale)
    assert np.abs(expected - exact(queries, coreset, WIDTH**-0.5)).max() > 0.01
    for read in (cj.attend, attend):
        for block_size in (None, 3):
            found = read(queries, coreset, block_size=block_size)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    halves = coreset._replace(values=coreset.values.astype(jnp.bfloat16))
    assert cj.attend(queries, halves).dtype == jnp.bfloat16


def test_signed_coresets_and_empty_slots_are_read_with_it(coreset, queries):
    normalizers = np.random.default_rng(2).uniform(0.5, 2, (*LEADING, SIZE)).astype(np.float32)
    for each in (coreset, with_normalizers(coreset, normalizers)):
        assert np.any(each.indices < 0)
        signs = module.normalizers(each)
        np.testing.assert_allclose(
            attend(queries, each), exact(queries, each, SCALES, signs), rtol=1e-4, atol=1e-5
        )


def test_a_compression_that_was_given_none_has_none(cache):
    shapes = jax.eval_shape(lambda *pairs: scaled()(RNG, *pairs, size=SIZE), *cache)
    assert shapes.scale is None
    assert len(jax.tree.leaves(shapes)) == 4
    assert sampled()(RNG, *cache, size=SIZE).scale is None


@pytest.mark.parametrize("scale", [None, 0.8])
def test_the_default_method_hands_it_on(cache, queries, scale):
    whole = cj.compress(RNG, *cache, size=COUNT, scale=scale)
    expected = brute_force.attention(queries, *cache, scale=scale)
    np.testing.assert_allclose(cj.attend(queries, whole), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_default_method_compresses_for_it(cache, queries):
    coreset = cj.compress(RNG, *cache, size=SIZE, scale=0.8)
    np.testing.assert_allclose(
        cj.attend(queries, coreset), exact(queries, coreset, 0.8), rtol=1e-5, atol=1e-5
    )


def test_another_scale_is_refused(coreset, queries, cache):
    for scale in (0.5, SCALES[:, ::-1], np.where(SCALES == 1.0, 1.1, SCALES)):
        with pytest.raises(ValueError, match="scale must be that which the coreset was made for"):
            cj.attend(queries, coreset, scale=scale)
    one = scaled(scale=0.5)(RNG, *cache, size=SIZE)
    with pytest.raises(ValueError, match=r"made for, 0\.5; got 0\.25"):
        cj.attend(queries, one, scale=0.25)
    for scale, message in (
        (SCALES[0], "scale must be a scalar or have shape"),
        (-0.5, "scale must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            cj.attend(queries, one, scale=scale)
    # Normalizers that stand where the scale is, after ``SignedCoreset(*coreset, normalizers)``.
    with pytest.raises(ValueError, match="scale of the coreset must be a scalar or have shape"):
        cj.attend(queries, one._replace(scale=one.log_weights))


def test_the_same_scale_is_taken_and_any_where_there_is_none(coreset, queries, cache):
    expected = cj.attend(queries, coreset)
    for scale in (SCALES, np.float64(SCALES), jnp.asarray(SCALES)):
        np.testing.assert_array_equal(cj.attend(queries, coreset, scale=scale), expected)
    free = coreset._replace(scale=None)
    for scale in (0.7, SCALES):
        found = cj.attend(queries, free, scale=scale)
        np.testing.assert_allclose(found, exact(queries, free, scale), rtol=1e-5, atol=1e-5)
    one = scaled(scale=0.5)(RNG, *cache, size=SIZE)
    np.testing.assert_array_equal(cj.attend(queries, one, scale=0.5), cj.attend(queries, one))


def test_what_cannot_be_compared_is_nan_where_it_differs(coreset, queries):
    scales = SCALES.copy()
    scales[1, 2] = 2.9
    found = np.array(attend(queries, coreset, scale=scales))
    assert np.all(np.isnan(found[1, 2]))
    found[1, 2] = attend(queries, coreset)[1, 2]
    np.testing.assert_allclose(found, attend(queries, coreset), rtol=1e-6)


def test_it_is_a_leaf_with_the_axes_of_heads(cache, queries):
    """One program makes and reads coresets of a scale that is traced; axes are mapped with it."""
    expected = exact(queries, scaled(scale=SCALES)(RNG, *cache, size=SIZE), SCALES)

    @jax.jit
    def at_once(scales, keys, values, queries):
        return cj.attend(queries, scaled(scale=scales)(RNG, keys, values, size=SIZE))

    np.testing.assert_allclose(at_once(SCALES, *cache, queries), expected, rtol=1e-5, atol=1e-5)
    coreset = scaled(scale=SCALES)(RNG, *cache, size=SIZE)
    found = jax.vmap(jax.vmap(cj.attend))(queries, coreset)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    _, found = jax.lax.scan(lambda _, each: (None, cj.attend(*each)), None, (queries, coreset))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # Heads are taken out of it as out of any tree.
    one = jax.tree.map(lambda leaf: leaf[1, 2], coreset)
    np.testing.assert_allclose(cj.attend(queries[1, 2], one), expected[1, 2], rtol=1e-5, atol=1e-5)


def test_it_is_sharded_as_the_heads_are(cache):
    mesh = jax.make_mesh(
        (2, 1), ("batch", "head"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:2]
    )
    sharding = NamedSharding(mesh, PartitionSpec("batch", "head"))
    given = [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=sharding) for each in cache]
    with jax.set_mesh(mesh):
        for scale in (0.8, SCALES):
            compressor = scaled(scale=scale)
            coreset = jax.eval_shape(lambda *p, c=compressor: c(RNG, *p, size=SIZE), *given)
            assert tuple(coreset.scale.sharding.spec) == ("batch", "head")
            jax.eval_shape(cj.attend, given[0], coreset)


def test_derivatives_reach_the_scale_through_the_coreset(cache, queries):
    coreset = scaled(scale=SCALES)(RNG, *cache, size=SIZE)

    def carried(scales):
        return jnp.sum(jnp.sin(cj.attend(queries, coreset._replace(scale=scales))))

    def compressed(scales):
        kept = scaled(scale=scales)(RNG, *cache, size=SIZE)
        return jnp.sum(jnp.sin(cj.attend(queries, kept)))

    def given(queries):
        pairs = (coreset.keys, coreset.values, coreset.log_weights)
        return jnp.sum(jnp.sin(cj.attention(queries, *pairs, scale=1.0)))

    # The derivative along the queries, which the scale multiplies.
    along = jax.grad(given)(queries * SCALES[..., None, None])
    expected = np.sum(np.asarray(along) * queries, axis=(-2, -1))
    for loss in (carried, compressed):
        np.testing.assert_allclose(jax.grad(loss)(SCALES), expected, rtol=1e-4, atol=1e-5)


def test_rearranged_slots_keep_it(coreset, queries):
    dropped = np.arange(SIZE) == 1
    normalizers = np.ones((*LEADING, SIZE), np.float32)
    for whole in (coreset, with_normalizers(coreset, normalizers)):
        kept = module.emptied(whole, np.broadcast_to(dropped, (*LEADING, SIZE)))
        expected = exact(queries, kept, SCALES)
        # Parts that have none, pairs that were kept as they are say, are read with that of others.
        parts = [
            whole._replace(
                **{
                    name: leaf[:, :, part]
                    for name, leaf in kept._asdict().items()
                    if name != "scale"
                }
            )
            for part in (slice(3), slice(3, SIZE))
        ]
        parts[0] = parts[0]._replace(scale=None)
        for each in (
            kept,
            module.packed(kept),
            module.ascending(kept),
            module.padded(kept, SIZE + 2),
            module.concatenated(parts, SIZE + 2),
        ):
            np.testing.assert_array_equal(each.scale, SCALES)
            np.testing.assert_allclose(cj.attend(queries, each), expected, rtol=1e-4, atol=1e-5)
    parts = [coreset, coreset._replace(scale=2 * SCALES)]
    with pytest.raises(ValueError, match="parts of a coreset must have one softmax scale"):
        module.concatenated(parts, 2 * SIZE)


def test_a_bias_is_refused_to_attention_of_another_scale(coreset):
    at = coreset._replace(scale=np.full(LEADING, 0.25, np.float32))
    np.testing.assert_array_equal(
        cj.attention_bias(at, scale=0.25), cj.attention_bias(coreset._replace(scale=None))
    )
    for scale in (None, 0.5):
        with pytest.raises(ValueError, match=r"made for, 0\.25; got 0\.5"):
            cj.attention_bias(at, scale=scale)
    default = coreset._replace(scale=np.full(LEADING, WIDTH**-0.5, np.float32))
    np.testing.assert_array_equal(cj.attention_bias(default), cj.attention_bias(at, scale=0.25))
    bias = jax.jit(cj.attention_bias)
    with pytest.raises(ValueError, match="scale must be given"):
        bias(at)
    np.testing.assert_array_equal(bias(at, scale=0.25), cj.attention_bias(at, scale=0.25))
    assert np.all(np.isnan(bias(at, scale=0.5)))


def test_wrappers_read_with_the_scale_that_they_compress_with():
    inner, other = scaled(scale=0.5), scaled(scale=0.25)
    for compressor, scale in (
        (cj.keep_ends(inner), 0.5),
        (cj.chunked(inner), 0.5),
        (baselines.quantized(inner), 0.5),
        (baselines.quantized(), None),
        # One head goes through both.
        (refit.nystrom(inner), 0.5),
        (refit.nystrom(inner, scale=0.25), 0.25),
        (refit.nystrom(sampled(), scale=0.25), 0.25),
        # What a budget weighs heads by is not what their pairs are compressed with.
        (budgets.pyramid(inner), 0.5),
        (budgets.by_energy(inner), 0.5),
        (budgets.by_energy(inner, scale=0.25), 0.5),
        (budgets.by_energy(sampled(), scale=0.25), 0.25),
        # Two methods see the same head.
        (cj.better_of(inner, scaled()), 0.5),
        (cj.better_of(scaled(), inner), 0.5),
        (cj.better_of(inner, inner), 0.5),
        # That of its scores is none of attention.
        (baselines.compactor(), None),
        (cj.better_of(baselines.compactor(), inner), 0.5),
    ):
        assert compressor.coreset_scale == scale, compressor
    with pytest.raises(ValueError, match="both compressors must have one softmax scale"):
        cj.better_of(inner, other)


@pytest.mark.slow
def test_a_choice_between_two_is_made_with_the_scale_of_either(cache):
    queries = np.random.default_rng(3).standard_normal((*LEADING, 9, WIDTH)).astype(np.float32)
    found = [
        cj.better_of(*pair)(RNG, *cache, size=SIZE, queries=queries)
        for pair in (
            (scaled(scale=3.0), baselines.top_attention()),
            (scaled(), baselines.top_attention(scale=3.0)),
            (scaled(scale=3.0), baselines.top_attention(scale=3.0)),
        )
    ]
    for each in found[:2]:
        jax.tree.map(np.testing.assert_array_equal, each, found[2])
