"""The coreset itself: gathered from a source, rearranged, and read by attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax._src.core import coreset as module
from coreset_jax._src.core.coreset import Coreset, SignedCoreset
from tests import brute_force

LEADING, COUNT, SIZE, WIDTH, VALUE_WIDTH = (2, 3), 11, 6, 4, 5
LENGTHS = np.array([[1, 5, COUNT], [2, 10, 4]])

attend = jax.jit(cj.attend, static_argnames="block_size")


@pytest.fixture(scope="module")
def cache():
    rng = np.random.default_rng(0)
    shapes = [(*LEADING, COUNT, width) for width in (WIDTH, VALUE_WIDTH)]
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).standard_normal((*LEADING, 7, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def coreset(cache):
    """Some pairs, some empty slots, and weights of their own."""
    rng = np.random.default_rng(2)
    indices = np.sort(np.argsort(rng.random((*LEADING, COUNT)), axis=-1)[..., :SIZE], axis=-1)
    indices[0, 1, 4:] = -1
    log_weights = rng.standard_normal((*LEADING, SIZE)).astype(np.float32)
    return jax.device_get(jax.jit(module.gather)(*cache, indices, log_weights))


@pytest.fixture(scope="module")
def signed(coreset):
    """The same with normalizers, some of them negative, and a denominator that is not."""
    normalizers = np.random.default_rng(3).uniform(-0.2, 2, (*LEADING, SIZE)).astype(np.float32)
    normalizers[..., 0] = 3.0
    return SignedCoreset(*coreset[:4], np.where(coreset.indices < 0, 0, normalizers))


def test_gather_copies_the_pairs_bit_by_bit(cache, coreset):
    for head in np.ndindex(*LEADING):
        kept = np.flatnonzero(coreset.indices[head] >= 0)
        rows = coreset.indices[head][kept]
        for taken, source in zip(coreset[:2], cache, strict=True):
            np.testing.assert_array_equal(taken[head][kept], source[head][rows])
    assert coreset.indices.dtype == np.int32


def test_empty_slots_hold_zeros_of_weight_zero(coreset):
    empty = coreset.indices < 0
    assert empty.sum() == 2
    assert not np.any(coreset.keys[empty])
    assert not np.any(coreset.values[empty])
    np.testing.assert_array_equal(np.isneginf(coreset.log_weights), empty)


def test_attend_is_weighted_attention(coreset, queries):
    for scale in (None, 1.5):
        for block_size in (None, 4):
            outputs = attend(queries, coreset, scale=scale, block_size=block_size)
            expected = brute_force.attention(queries, *coreset[:3], scale=scale)
            np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_attend_divides_by_the_normalizers(coreset, signed, queries):
    expected = brute_force.attention(queries, *coreset[:3], normalizers=signed.normalizers)
    for block_size in (None, 4):
        outputs = attend(queries, signed, block_size=block_size)
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    ones = signed._replace(normalizers=np.ones_like(coreset.log_weights))
    plain = brute_force.attention(queries, *coreset[:3])
    np.testing.assert_allclose(attend(queries, ones), plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(module.normalizers(signed), signed.normalizers)
    np.testing.assert_array_equal(module.normalizers(coreset), np.ones(coreset.indices.shape))


def test_attend_caps_scores_and_adds_sink_logits(coreset, signed, queries):
    sinks = np.linspace(-1, 2, 6, dtype=np.float32).reshape(LEADING)
    rows = np.broadcast_to(sinks[..., None], queries.shape[:-1])
    found = attend(queries, coreset, soft_cap=0.7, sink_logits=sinks)
    expected = brute_force.attention(queries, *coreset[:3], soft_cap=0.7, sink_logits=rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    options = {"normalizers": signed.normalizers, "soft_cap": 0.7}
    expected = brute_force.attention(queries, *coreset[:3], **options)
    found = attend(queries, signed, soft_cap=0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="sink_logits"):
        attend(queries, signed, sink_logits=sinks)


def test_attend_keeps_half_precision(coreset, signed, queries):
    asked = queries.astype(jnp.bfloat16)
    for each in (coreset, signed):
        halves = each._replace(
            keys=each.keys.astype(jnp.bfloat16), values=each.values.astype(jnp.bfloat16)
        )
        outputs = attend(asked, halves)
        assert outputs.dtype == jnp.bfloat16
        normalizers = signed.normalizers if each is signed else None
        expected = brute_force.attention(asked, *halves[:3], normalizers=normalizers)
        np.testing.assert_allclose(
            np.float32(outputs), expected, rtol=2**-7, atol=2**-7 * (each is signed) + 1e-5
        )


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_the_whole_cache_answers_exactly(cache, queries, lengths):
    whole = jax.jit(module.whole_cache)(*cache, lengths)
    counts = np.full(LEADING, COUNT) if lengths is None else lengths
    inside = np.arange(COUNT) < counts[..., None]
    np.testing.assert_array_equal(whole.indices, np.where(inside, np.arange(COUNT), -1))
    np.testing.assert_array_equal(whole.log_weights, np.where(inside, 0.0, -np.inf))
    expected = brute_force.attention(queries, *cache, np.where(inside, 0.0, -np.inf))
    np.testing.assert_allclose(attend(queries, whole), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_slots_are_emptied_padded_packed_and_joined(signed, queries):
    """Every way to rearrange slots answers like the pairs that are left."""
    dropped = np.zeros((*LEADING, SIZE), bool)
    dropped[..., [1, 4]] = True
    dropped[1, 1] = False

    @jax.jit
    def arrange(coreset):
        holes = module.emptied(coreset, dropped)
        packed = module.packed(holes)
        halves = [
            jax.tree.map(lambda leaf, part=part: leaf[:, :, part], holes)
            for part in (slice(2), slice(2, SIZE))
        ]
        return holes, packed, module.padded(packed, 9), module.concatenated(halves, 9)

    for coreset in (signed, Coreset(*signed[:4])):
        holes, packed, padded, joined = jax.device_get(arrange(coreset))
        empty = dropped | (coreset.indices < 0)
        for name, leaf in holes._asdict().items():
            if leaf is None:  # no scale
                continue
            filling = {"log_weights": -np.inf, "indices": -1}.get(name, 0)
            np.testing.assert_array_equal(leaf[empty], np.full_like(leaf[empty], filling))
            np.testing.assert_array_equal(leaf[~empty], getattr(coreset, name)[~empty])
        for head in np.ndindex(*LEADING):
            held = np.flatnonzero(~empty[head])
            np.testing.assert_array_equal(
                packed.indices[head],
                np.pad(coreset.indices[head][held], (0, SIZE - len(held)), constant_values=-1),
            )
        more = {"normalizers": coreset.normalizers} if coreset is signed else {}
        weights = np.where(empty, -np.inf, coreset.log_weights)
        expected = brute_force.attention(queries, *coreset[:2], weights, **more)
        for each in (holes, packed, padded, joined):
            assert type(each) is type(coreset)
            np.testing.assert_allclose(attend(queries, each), expected, rtol=1e-4, atol=1e-4)
        for wide in (padded, joined):
            np.testing.assert_array_equal(wide.indices[..., SIZE:], -1)
            np.testing.assert_array_equal(wide.log_weights[..., SIZE:], -np.inf)
    # What is NaN is NaN in the new slots as well.
    log_weights = signed.log_weights.copy()
    log_weights[:, 1] = np.nan
    sick = signed._replace(log_weights=log_weights)
    wide = jax.jit(lambda coreset: module.padded(coreset, 9))(sick)
    assert np.all(np.isnan(wide.log_weights[:, 1]))
    assert not np.any(np.isnan(wide.log_weights[:, [0, 2]]))
