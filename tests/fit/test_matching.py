"""Matching: the formulas, never worse for the samples, and better for other queries as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import refit
from coreset_jax._src.core.coreset import emptied, gather
from coreset_jax._src.core.head import Head
from coreset_jax._src.fit import query_targets
from tests import brute_force
from tests.compressors import newest, sampled, signed
from tests.compressors import refit as fit_to

RNG = jax.random.key(0)
COUNT, SIZE, WIDTH, VALUE_WIDTH = 60, 12, 5, 4
REFITS = {"matching": refit.matching, "attention_matching": refit.attention_matching}


def fit_by(make, coreset, keys, values, queries, lengths=None, **options):
    """What a refit makes of a coreset of one head or several."""
    one = keys.ndim == 2
    if one:
        keys, values, queries, coreset = jax.tree.map(
            lambda leaf: leaf[None], (keys, values, queries, coreset)
        )
    found, _ = fit_to(make(sampled(), **options), keys, values, coreset, queries, lengths)
    return jax.tree.map(lambda leaf: leaf[0], found) if one else found


def attend(queries, keys, values, log_weights, scale):
    """Weighted attention, and logarithms of the denominators, in float64."""
    queries, keys, values = (np.asarray(array, np.float64) for array in (queries, keys, values))
    with np.errstate(invalid="ignore"):
        scores = scale * queries @ keys.T + np.asarray(log_weights, np.float64)
    top = scores.max(axis=-1, keepdims=True)
    masses = np.exp(scores - top)
    totals = masses.sum(axis=-1, keepdims=True)
    return masses @ values / totals, top + np.log(totals)


def miss(queries, keys, values, coreset, scale=WIDTH**-0.5):
    """Mean squared error of a coreset of one head over some queries."""
    exact, _ = attend(queries, keys, values, np.zeros(len(keys)), scale)
    read, _ = attend(queries, *coreset[:3], scale)
    return np.mean(np.sum((read - exact) ** 2, axis=-1))


def corrected(queries, keys, values, coreset, scale, strength):
    """Columns of a head by the formulas: log-weights and values."""
    queries, keys, values = (np.asarray(array, np.float64) for array in (queries, keys, values))
    marks = np.asarray(coreset.keys, np.float64)
    weights = np.exp(np.asarray(coreset.log_weights, np.float64))[:, None]
    # The geometry of the fit.
    norms = np.linalg.norm(keys - keys.mean(axis=0), axis=1)
    spread = np.sqrt(np.mean(norms**2))
    rho = scale * norms.max() * np.linalg.norm(queries, axis=1).max()
    radius = min(rho / norms.max() ** 2, 3 / spread**2)
    centered = np.sqrt(radius) * (marks - keys.mean(axis=0))
    lift = np.exp(np.sum(centered**2, axis=1) / 2)[:, None]
    lengths = np.linalg.norm(centered, axis=1, keepdims=True)
    drawn_in = centered / np.maximum(1, lengths / (2 * np.sqrt(radius) * spread))
    kernel = np.exp(-np.sum((drawn_in[:, None] - drawn_in) ** 2, axis=-1) / 2)

    # The last eighth of the samples is not fitted to.
    queries = queries[: -(len(queries) // 8)]
    exact, totals = attend(queries, keys, values, np.zeros(len(keys)), scale)
    outputs = exact - values.mean(axis=0)
    shares = np.exp(scale * queries @ marks.T - totals) / lift.T
    masses = shares @ (lift * weights)
    weights = weights * masses.sum() / np.sum(masses**2)
    numerator = lift * weights * (np.asarray(coreset.values, np.float64) - values.mean(axis=0))
    price = strength * np.trace(shares.T @ shares) / np.trace(kernel) * kernel
    inverse = np.linalg.inv(shares.T @ shares + price) @ shares.T
    after = lift * weights + inverse @ (1 - shares @ (lift * weights))
    after = np.maximum(after, 0.1 * lift * np.minimum(weights, weights.mean()))
    numerator = numerator + inverse @ ((shares @ after) * outputs - shares @ numerator)
    fitted = numerator / after + values.mean(axis=0)
    return np.log(after / lift)[:, 0], fitted


def draw(seed=0, count=COUNT, samples=40):
    """A head and samples of queries, in float64."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((count, WIDTH)) + 0.5
    return keys, rng.standard_normal((count, VALUE_WIDTH)), rng.standard_normal((samples, WIDTH))


def made_up(seed, keys, values, size=SIZE):
    """A coreset with keys and values of its own, and weights that are anything."""
    rng = np.random.default_rng(seed)
    places = np.sort(rng.permutation(keys.shape[-2])[:size])
    near = [
        array[..., places, :] + 0.3 * rng.standard_normal((size, array.shape[-1]))
        for array in (keys, values)
    ]
    log_weights = np.broadcast_to(rng.uniform(0, 3, size), near[0].shape[:-1])
    indices = np.broadcast_to(places.astype(np.int32), log_weights.shape)
    return cj.Coreset(*near, log_weights, indices)


def test_targets_under_a_cap_are_brute_force(x64):
    """Scores are capped as they are, and not behind the shift by centered keys."""
    soft_cap, (keys, values, queries) = 0.5, draw(3)
    keys += 2
    coreset = made_up(0, keys, values)
    arrays = map(jnp.asarray, (keys, values, COUNT, queries))
    head = Head.prepare(RNG, jnp.int32(0), *arrays, ragged=False)
    targets = query_targets.evaluate(head, coreset.keys, np.ones(SIZE, bool), soft_cap)
    exact = brute_force.attention(queries, keys, values, soft_cap=soft_cap)
    found = head.standardization.restore_values(targets.outputs())
    np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-10)
    read = brute_force.attention(queries, *coreset[:3], soft_cap=soft_cap)
    expected = np.mean(np.sum((read - exact) ** 2, axis=-1))
    error = np.mean(targets.squared_errors(coreset.values, coreset.log_weights))
    unit = head.standardization.value_radius
    np.testing.assert_allclose(error * unit**2, expected, rtol=1e-9)


@pytest.mark.slow
def test_columns_are_those_of_the_formulas(x64):
    keys, values, queries = draw(1)
    # One far out, which the kernel draws in.
    keys[7] *= 4
    far = made_up(0, keys, values)
    far.keys[3] = keys[7]
    for dtype, tolerance in ((np.float64, 1e-8), (np.float32, 3e-2)):
        for strength in (0.05, 3.0):
            for start in (far, made_up(2, keys, values)):
                head = [jnp.asarray(array, dtype) for array in (keys, values, queries)]
                before = cj.Coreset(*(jnp.asarray(each, dtype) for each in start[:3]), start[3])
                after = fit_by(refit.matching, before, *head, strength=strength, scale=0.6)
                log_weights, fitted = corrected(head[2], *head[:2], before, 0.6, strength)
                np.testing.assert_array_equal(after.keys, before.keys)
                np.testing.assert_allclose(after.log_weights, log_weights, atol=tolerance)
                most = tolerance * np.abs(fitted).max()
                np.testing.assert_allclose(after.values, fitted, atol=most)


@pytest.mark.slow
def test_plain_matching_is_the_baseline_behind_its_keys(x64):
    keys, values, queries = map(jnp.asarray, draw(2))
    expected = cj.baselines.attention_matching()(RNG, keys, values, size=SIZE, queries=queries)
    kept = gather(keys, values, expected.indices, jnp.zeros(SIZE))
    found = fit_by(refit.attention_matching, kept, keys, values, queries)
    for name in ("keys", "values", "log_weights"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-8)


def families(seed):
    """Heads of all sorts: plain, repeated, of low rank, heavy-tailed, of one key, mute, of one."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((8, COUNT, WIDTH))
    values = rng.standard_normal((8, COUNT, VALUE_WIDTH))
    keys[1] = keys[1][rng.integers(0, 5, COUNT)]
    keys[2] = keys[2][:, :1] * np.ones(WIDTH)
    keys[3] *= rng.standard_cauchy((COUNT, 1))
    keys[4] = 1.0
    values[5] = 0.0
    keys[6], values[6] = keys[0, 0], values[0, 0]
    values[7] *= rng.standard_cauchy((COUNT, 1))
    return jnp.asarray(keys, jnp.float32), jnp.asarray(values, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFITS)
@pytest.mark.parametrize("size", [1, SIZE])
def test_never_worse_for_the_samples(name, size):
    starts = [cj.baselines.uniform(), cj.baselines.streaming_llm(), refit.move_keys(cj.pivoted())]
    gained = 0
    for seed, (start, count) in enumerate(zip(starts, (5, 1, 80), strict=True)):
        keys, values = families(seed)
        queries = jax.random.normal(jax.random.key(seed), (len(keys), count, WIDTH))
        before = start(RNG, keys, values, size=size, queries=queries)
        after = fit_by(REFITS[name], before, keys, values, queries)
        assert np.all(np.isfinite(after.values))
        assert np.all(np.isfinite(after.log_weights))
        np.testing.assert_array_equal(after.keys, before.keys)
        np.testing.assert_array_equal(after.indices, before.indices)
        for head in range(len(keys)):
            # Samples that were held back judge, and where there are none all of them.
            asked = queries[head]
            asked = asked[-max(count // 8, 2) :] if name == "matching" else asked
            pairs = asked, keys[head], values[head]
            first, second = (miss(*pairs, coreset_of(head, each)) for each in (before, after))
            # Up to the rounding of float32.
            assert second <= first * (1 + 1e-3) + 1e-10 * np.max(np.square(values[head]))
            gained += second < 0.9 * first
    # A match leaves a coreset alone that has a single sample.
    assert gained >= (12 if size > 1 and name != "matching" else 6)


@pytest.mark.slow
def test_a_large_strength_leaves_the_columns():
    keys, values, queries = (array.astype(np.float32) for array in draw(3))
    before = jax.tree.map(np.float32, made_up(3, keys, values))
    before = before._replace(indices=np.arange(SIZE, dtype=np.int32))
    after = fit_by(refit.matching, before, keys, values, queries, strength=1e6)
    # All but a common factor, which attention does not see.
    change = after.log_weights - before.log_weights
    np.testing.assert_allclose(change, np.full(SIZE, change[0]), atol=1e-4)
    np.testing.assert_allclose(after.values, before.values, atol=1e-4)


@pytest.mark.slow
def test_a_common_factor_of_the_weights_is_not_seen():
    keys, values, queries = (array.astype(np.float32) for array in draw(4))
    before = sampled()(RNG, keys, values, size=SIZE)
    light = before._replace(log_weights=before.log_weights - 5)
    first, second = (
        fit_by(refit.matching, each, keys, values, queries) for each in (before, light)
    )
    np.testing.assert_allclose(first.log_weights, second.log_weights, atol=1e-4)


def asked(seed, far):
    """Clusters of keys; with some far out, on which attention is sharp."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((8, 16))
    keys = centers[rng.integers(0, 8, 1024)] + 0.6 * rng.standard_normal((1024, 16))
    values = rng.standard_normal((1024, 16)) + keys @ rng.standard_normal((16, 16)) / 4
    if far:
        keys[rng.choice(1024, 20, replace=False)] *= 3
    queries = rng.standard_normal((2, 512, 16))
    return tuple(jnp.asarray(array, jnp.float32) for array in (keys, values, *queries))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("far", "count", "most"),
    [(False, 16, 1.02), (False, 64, 0.96), (False, 512, 0.88), (True, 512, 0.96)],
)
def test_better_for_queries_that_are_no_samples(far, count, most):
    start = refit.move_keys(cj.pivoted())
    ratios = []
    for seed in range(2):
        keys, values, sample, fresh = asked(seed, far)
        sample = sample[:count]
        before = start(RNG, keys, values, size=64, queries=sample)
        read = [
            miss(fresh, keys, values, fit_by(make, before, keys, values, sample), 0.25)
            for make in (refit.matching, refit.attention_matching)
        ]
        ratios.append(np.sqrt(np.array(read) / miss(fresh, keys, values, before, 0.25)))
    matched, plain = np.mean(ratios, axis=0)
    assert matched < most
    # With as many samples as pairs or fewer, they alone do not say enough.
    assert plain > (2 if count <= 64 else 1) * matched


def test_samples_that_were_held_back_judge_and_are_not_fitted_to():
    keys, values, _ = (np.float32(array) for array in draw(8, count=2 * COUNT))
    keys, values = (array.reshape(2, COUNT, -1) for array in (keys, values))
    before = newest()(RNG, keys, values, size=SIZE)
    queries = np.random.default_rng(8).standard_normal((2, 64, WIDTH)).astype(np.float32)
    # In the first head the last eighth asks as the others do, in the second for what no other
    # does: for the newest pairs, which are all that is kept.
    queries[1, -8:] = 30 * keys[1, -1]
    after, info = fit_to(refit.matching(sampled()), keys, values, before, queries)
    np.testing.assert_array_equal(info.matched, [1, 0])
    np.testing.assert_array_equal(info.accepted, np.asarray(info.matched) == 1)
    untouched = [jax.tree.map(lambda leaf: leaf[1], each) for each in (before, after)]
    jax.tree.map(np.testing.assert_array_equal, *untouched)
    # What is fitted does not depend on them, as long as they say yes.
    queries[0, -8:] = queries[0, -16:-8]
    again, info = fit_to(refit.matching(sampled()), keys, values, before, queries)
    assert info.matched[0] == 1
    np.testing.assert_allclose(again.values[0], after.values[0], rtol=1e-3, atol=1e-4)


def coreset_of(head, coreset):
    return jax.tree.map(lambda array: array[head], coreset)


@pytest.mark.parametrize("name", REFITS)
def test_ragged_heads_are_heads_of_their_own(name):
    keys, values, queries = (array.astype(np.float32) for array in draw(5, count=4 * COUNT))
    keys, values = (array.reshape(4, COUNT, -1) for array in (keys, values))
    queries = queries.reshape(4, 10, WIDTH)
    lengths = np.array([COUNT, 40, SIZE, 5])
    inside = (np.arange(COUNT) < lengths[:, None])[..., None]
    dirty = [np.where(inside, array, np.float32(np.nan)) for array in (keys, values)]
    before = jax.device_get(newest()(RNG, *dirty, size=SIZE, lengths=lengths))
    # The last two slots of one that is fitted are empty.
    holes = np.zeros((4, SIZE), bool)
    holes[1, -2:] = True
    before = jax.device_get(emptied(before, holes))
    after = fit_by(REFITS[name], before, *dirty, queries, lengths)
    np.testing.assert_array_equal(after.keys, before.keys)
    # Padding leaves no trace.
    clean = fit_by(REFITS[name], before, keys, values, queries, lengths)
    jax.tree.map(np.testing.assert_array_equal, after, clean)
    # What is kept whole stays as it is, and empty slots stay empty.
    for short in (2, 3):
        jax.tree.map(
            np.testing.assert_array_equal, coreset_of(short, after), coreset_of(short, before)
        )
    assert np.all(np.isneginf(after.log_weights[1, -2:]))
    assert not np.any(after.values[1, -2:])
    # A head cut to its length, with a coreset without empty slots.
    single = jax.tree.map(lambda leaf: leaf[1, :-2], before)
    found = fit_by(REFITS[name], single, keys[1, :40], values[1, :40], queries[1])
    assert not np.allclose(found.log_weights, single.log_weights, atol=0.01)
    np.testing.assert_allclose(after.log_weights[1, :-2], found.log_weights, atol=2e-3)
    np.testing.assert_allclose(after.values[1, :-2], found.values, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_half_precision():
    keys, values = jax.random.normal(RNG, (2, 2, 400, 8)).astype(jnp.bfloat16)
    queries = jax.random.normal(jax.random.key(3), (2, 2, 100, 8)).astype(jnp.bfloat16)
    before = newest()(RNG, keys, values, size=40)
    after = fit_by(refit.matching, before, keys, values, queries[0])
    assert after.keys.dtype == after.values.dtype == jnp.bfloat16
    assert after.log_weights.dtype == jnp.float32
    np.testing.assert_array_equal(after.keys.view(jnp.uint16), before.keys.view(jnp.uint16))
    for head in range(2):
        first, second = (
            miss(queries[0, head], keys[head], values[head], coreset_of(head, each), 8**-0.5)
            for each in (before, after)
        )
        assert second < 0.9 * first


def test_the_cache_is_asked_in_blocks(monkeypatch):
    keys, values, queries = (array.astype(np.float32) for array in draw(6))

    def targets(keys, values, queries):
        head = Head.prepare(
            RNG, jnp.int32(0), keys, values, jnp.int32(COUNT), queries, ragged=False
        )
        found = query_targets.evaluate(head, keys[:SIZE], jnp.arange(SIZE) < SIZE - 1)
        outputs = head.standardization.restore_values(found.outputs())
        return outputs, found.cache.maximum + jnp.log(found.cache.total), found.scores

    exact, _ = attend(queries, keys, values, np.zeros(COUNT), WIDTH**-0.5)
    centered = keys - keys.mean(axis=0)
    _, totals = attend(queries, centered, values, np.zeros(COUNT), WIDTH**-0.5)
    # One block for all, and blocks of seven pairs, the last one not full.
    for scores in (2**20, 7 * len(queries)):
        monkeypatch.setattr(query_targets, "_SCORES", scores)
        outputs, found, kept = jax.jit(lambda *given: targets(*given))(keys, values, queries)
        np.testing.assert_allclose(outputs, exact, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found, totals[:, 0], rtol=1e-5)
        expected = WIDTH**-0.5 * queries @ centered[: SIZE - 1].T
        np.testing.assert_allclose(kept[:, :-1], expected, rtol=1e-3, atol=1e-5)
        assert np.all(np.isneginf(kept[:, -1]))


@pytest.mark.parametrize("name", REFITS)
def test_bad_calls_are_refused(name):
    keys, values = jnp.ones((2, 40, 4))
    compressor = REFITS[name](sampled())
    for queries, message in [
        (None, "queries must be given"),
        (keys[:0], "queries must be given"),
        (keys[:, :3], "queries must have the width"),
        (keys[None], "queries must have the rank"),
    ]:
        with pytest.raises(ValueError, match=message):
            compressor(RNG, keys, values, size=8, queries=queries)
    with pytest.raises(ValueError, match="normalizers"):
        REFITS[name](signed())


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("matching", {"strength": 0.0}, "strength must be positive"),
        ("matching", {"strength": float("nan")}, "strength must be finite"),
        ("matching", {"scale": -1.0}, "scale must be positive"),
        ("attention_matching", {"ridge": 0.0}, "ridge must be positive"),
        ("attention_matching", {"bound": -1.0}, "bound must be positive"),
        (
            "attention_matching",
            {"gradient_steps": 1.5},
            "gradient_steps must be a static Python int",
        ),
    ],
)
def test_bad_options_are_refused(name, option, message):
    with pytest.raises(ValueError, match=message):
        REFITS[name](cj.balanced(), **option)
    with pytest.raises(ValueError, match="compressor must be a Compressor"):
        REFITS[name](None)
