"""Attention from attention over parts, against attention over everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax._src.core.coreset import emptied
from tests import brute_force

RNG = np.random.default_rng(0)
QUERIES, WIDTH, VALUE_WIDTH, PARTS, SLOTS = 3, 4, 5, 4, 8
CASES = 1000


@jax.jit
def merged(queries, keys, values, log_weights):
    """Every case by parts, and every case at once; the parts are the axis behind the cases."""
    apart = [
        cj.attention(queries, keys[:, i], values[:, i], log_weights[:, i], return_lse=True)
        for i in range(PARTS)
    ]
    pairs = cj.merge_attention([cj.merge_attention(apart[:2]), cj.merge_attention(apart[2:])])
    together = [each.reshape(len(each), -1, *each.shape[3:]) for each in (keys, values)]
    weights = log_weights.reshape(len(log_weights), -1)
    whole = cj.attention(queries, *together, weights, return_lse=True)
    return cj.merge_attention(apart), pairs, whole


def test_a_thousand_cases():
    """Empty parts, ragged ones, and scores that exponentials overflow at."""
    queries = RNG.normal(size=(CASES, QUERIES, WIDTH)).astype(np.float32)
    keys = RNG.normal(size=(CASES, PARTS, SLOTS, WIDTH)).astype(np.float32)
    # A fifth of the cases has scores of up to 500, and a fifth parts that are far from each other.
    keys[: CASES // 5] *= 100
    keys[CASES // 5 : 2 * CASES // 5] *= np.geomspace(1, 30, PARTS)[:, None, None]
    values = RNG.normal(size=(CASES, PARTS, SLOTS, VALUE_WIDTH)).astype(np.float32)
    log_weights = RNG.normal(size=(CASES, PARTS, SLOTS)).astype(np.float32)
    counts = RNG.integers(-2, SLOTS + 1, (CASES, PARTS))
    log_weights[np.arange(SLOTS) >= counts[..., None]] = -np.inf
    log_weights[0] = -np.inf
    parts, pairs, whole = merged(queries, keys, values, log_weights)
    norms = np.linalg.norm(values, axis=-1).max(axis=(1, 2))[:, None]
    for found in (parts, pairs):
        errors = np.linalg.norm(found[0] - whole[0], axis=-1) / norms
        assert errors.max() <= 1e-5
        np.testing.assert_array_equal(np.isneginf(found[1]), np.isneginf(whole[1]))
        held = ~np.isneginf(whole[1])
        np.testing.assert_allclose(found[1][held], whole[1][held], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(parts[0][0], 0)


def test_log_sum_exps_are_those_of_float64():
    queries, keys, values = RNG.normal(size=(3, 2, 30, WIDTH)).astype(np.float32)
    log_weights = RNG.normal(size=(2, 30)).astype(np.float32)
    scores = np.einsum("hqd,hnd->hqn", *brute_force.double(queries, keys)) * 0.7
    expected = np.log(np.exp(scores + log_weights[:, None]).sum(axis=-1))
    for block_size in (None, 7):
        outputs, lse = cj.attention(
            queries, keys, values, log_weights, scale=0.7, block_size=block_size, return_lse=True
        )
        np.testing.assert_allclose(lse, expected, atol=1e-5)
        exact = brute_force.attention(queries, keys, values, log_weights, scale=0.7)
        np.testing.assert_allclose(outputs, exact, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_coreset_and_what_follows(packed):
    """As if the new pairs had been put behind those of the coreset."""
    keys, values = RNG.normal(size=(2, 3, 40, WIDTH)).astype(np.float32)
    new_keys, new_values = RNG.normal(size=(2, 3, 6, WIDTH)).astype(np.float32)
    queries = RNG.normal(size=(3, QUERIES, WIDTH)).astype(np.float32)
    coreset = cj.baselines.uniform()(jax.random.key(0), keys, values, size=10)
    coreset = emptied(coreset, jnp.arange(10) >= jnp.array([10, 4, 0])[:, None])
    held = cj.pack(coreset, page_size=4) if packed else coreset
    outputs, lse = cj.merge_attention(
        [
            cj.attend(queries, held, return_lse=True),
            cj.attention(queries, new_keys, new_values, return_lse=True),
        ]
    )
    exact = brute_force.attention(
        queries,
        np.concatenate([coreset.keys, new_keys], axis=1),
        np.concatenate([coreset.values, new_values], axis=1),
        np.concatenate([coreset.log_weights, np.zeros((3, 6))], axis=1),
    )
    np.testing.assert_allclose(outputs, exact, atol=1e-5)
    assert lse.dtype == jnp.float32


def test_packed_coresets_are_attended_to_as_they_were():
    keys, values = RNG.normal(size=(2, 3, 40, WIDTH)).astype(np.float32)
    queries = RNG.normal(size=(3, QUERIES, WIDTH)).astype(np.float32)
    coreset = cj.baselines.uniform()(jax.random.key(0), keys, values, size=10)
    options = {"soft_cap": 1.5, "sink_logits": jnp.array([0.1, -1.0, 2.0]), "scale": 0.7}
    np.testing.assert_allclose(
        cj.attend(queries, cj.pack(coreset), **options),
        cj.attend(queries, coreset, **options),
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="queries must be"):
        cj.attend(queries[0], cj.pack(coreset))


def test_dtypes_and_derivatives():
    outputs = jnp.asarray(RNG.normal(size=(2, 3, VALUE_WIDTH)), jnp.bfloat16)
    lse = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32).at[1, 0].set(-jnp.inf)
    found, total = cj.merge_attention(list(zip(outputs, lse, strict=True)))
    assert (found.dtype, total.dtype) == (jnp.bfloat16, jnp.float32)
    slopes = jax.grad(
        lambda lse: jnp.sum(cj.merge_attention(list(zip(outputs, lse, strict=True)))[0])
    )(lse)
    assert np.isfinite(slopes).all()


def test_bad_parts_are_refused():
    outputs, lse = jnp.zeros((3, 4)), jnp.zeros(3)
    with pytest.raises(ValueError, match="empty"):
        cj.merge_attention([])
    with pytest.raises(ValueError, match=r"\(\(3, 4\), \(3,\)\)"):
        cj.merge_attention([(outputs, lse), (outputs[:2], lse)])
    with pytest.raises(ValueError, match="parts must be"):
        cj.merge_attention([(outputs, lse[:2])])
    keys, values = RNG.normal(size=(2, 40, WIDTH)).astype(np.float32)
    signed = cj.baselines.wildcat()(jax.random.key(0), keys, values, size=8)
    with pytest.raises(ValueError, match="return_lse"):
        cj.attend(keys, signed, return_lse=True)
