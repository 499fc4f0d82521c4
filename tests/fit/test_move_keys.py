"""Moved keys: steps that go where the error falls, and coresets that are never worse for it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import fitting
from coreset_jax._src.fit import coefficients as fits
from coreset_jax._src.fit import newton
from coreset_jax._src.geometry.kernel_geometry import fitting_geometry
from coreset_jax.geometry import standardize
from coreset_jax.guarantees import adversary

RNG = jax.random.key(0)


def kernel(left, right):
    squares = np.sum((left[:, None] - right[None]) ** 2, axis=-1)
    return np.exp(-squares / 2)


def error(keys, columns, marks, behind):
    """The squared error in the kernel, in float64."""
    cross = np.sum(behind * (kernel(marks, keys) @ columns))
    return (
        np.sum(columns * (kernel(keys, keys) @ columns))
        - 2 * cross
        + np.sum(behind * (kernel(marks, marks) @ behind))
    )


def small_problem(seed=0, count=40, size=6):
    rng = np.random.default_rng(seed)
    keys, columns = rng.standard_normal((count, 3)), rng.standard_normal((count, 2)) + 0.5
    marks = keys[rng.permutation(count)[:size]]
    return keys, columns, marks


def problem(keys, columns, marks, free, keep=False):
    """A source with features of norm one, and the best fit behind some keys."""
    # What the source does not carry itself: features are lifted to norm one by their coefficients.
    lowered = columns * np.exp(-np.sum(np.square(keys), axis=1, keepdims=True) / 2)
    source = fits.blocks_of(jnp.asarray(keys), jnp.asarray(lowered), jnp.zeros(()))
    fit = fits.project_onto(source, jnp.asarray(marks), jnp.asarray(free), keep)
    return source, fits.fit_coefficients(fit, jnp.asarray(free))


@pytest.mark.slow
def test_coefficients_are_the_best_ones(x64):
    keys, columns, marks = small_problem()
    free = np.ones(len(marks), bool)
    source, fit = problem(keys, columns, marks, free)
    best = np.linalg.solve(kernel(marks, marks), kernel(marks, keys) @ columns)
    np.testing.assert_allclose(fit.coefficients, best, rtol=1e-9)
    # Squared norm of the source less what is captured is the error.
    norm = np.sum(columns * (kernel(keys, keys) @ columns))
    np.testing.assert_allclose(source.energy(), norm, rtol=1e-9)
    for behind in (best, best + 0.1):
        np.testing.assert_allclose(
            norm - fit.captured(jnp.asarray(behind)), error(keys, columns, marks, behind), rtol=1e-9
        )


@pytest.mark.slow
def test_what_is_not_free_is_left_out(x64):
    keys, columns, marks = small_problem()
    free = np.arange(len(marks)) % 2 == 0
    source, fit = problem(keys, columns, marks, free)
    _, alone = problem(keys, columns, marks[free], np.ones(free.sum(), bool))
    np.testing.assert_allclose(fit.coefficients[free], alone.coefficients, rtol=1e-9)
    np.testing.assert_array_equal(fit.coefficients[~free], 0)
    step = newton.newton_step(source, jnp.asarray(marks), jnp.asarray(free), fit)
    np.testing.assert_allclose(step[~free], 0, atol=1e-12)


@pytest.mark.parametrize("best", [True, False])
def test_steps_go_down_the_slope(best, x64):
    """Every key's step points against the derivative of the error with respect to it."""
    for seed in range(4):
        keys, columns, marks = small_problem(seed)
        free = np.ones(len(marks), bool) if best else np.arange(len(marks)) != 2
        source, fit = problem(keys, columns, marks, free)
        if not best:
            # Forces on a key that is not where they balance have a sum.
            wrong = 0.3 * np.random.default_rng(seed).standard_normal(fit.coefficients.shape)
            fit = fit._replace(coefficients=fit.coefficients + free[:, None] * wrong)
        step = np.asarray(newton.newton_step(source, jnp.asarray(marks), jnp.asarray(free), fit))
        behind = np.asarray(fit.coefficients)
        slope = np.zeros_like(marks)
        for place in np.ndindex(*marks.shape):
            nudge = np.zeros_like(marks)
            nudge[place] = 1e-5
            slope[place] = (
                error(keys, columns, marks + nudge, behind)
                - error(keys, columns, marks - nudge, behind)
            ) / 2e-5
        np.testing.assert_allclose(step[~free], 0, atol=1e-12)
        step, slope = step[free], slope[free]
        cosines = np.sum(step * -slope, axis=1) / (
            np.linalg.norm(step, axis=1) * np.linalg.norm(slope, axis=1)
        )
        np.testing.assert_allclose(cosines, 1, atol=1e-5)
        assert np.all(np.linalg.norm(step, axis=1) <= 0.5 + 1e-9)


def test_a_kernel_that_was_kept_makes_the_same_step(x64, monkeypatch):
    keys, columns, marks = small_problem()
    # Several blocks, the last of them filled up.
    monkeypatch.setattr(fits, "BLOCK", 16)
    free = np.arange(len(marks)) != 2
    source, without = problem(keys, columns, marks, free)
    _, kept = problem(keys, columns, marks, free, keep=True)
    assert without.seen is None
    assert kept.seen.shape == (3, 6, 14)
    marks, free = jnp.asarray(marks), jnp.asarray(free)
    taken = [newton.newton_step(source, marks, free, fit) for fit in (without, kept)]
    np.testing.assert_allclose(*taken, rtol=1e-12)
    monkeypatch.setattr(fits, "MOST_KEPT", 6 * 3 * 14 - 1)
    assert fits.project_onto(source, marks, free, keep=True).seen is None


def test_steps_begin_with_a_fit_and_end_with_a_move(x64):
    keys, columns, marks = small_problem()
    free = np.ones(len(marks), bool)
    source, fit = problem(keys, columns, marks, free)
    behind = jnp.asarray(np.random.default_rng(1).standard_normal((len(marks), 2)))
    one = newton.descend(source, jnp.asarray(marks), behind, jnp.asarray(free), 1)
    np.testing.assert_allclose(one.fit.coefficients, fit.coefficients, rtol=1e-9)
    np.testing.assert_allclose(one.captured, fit.captured(behind), rtol=1e-9)
    step = newton.newton_step(source, jnp.asarray(marks), jnp.asarray(free), fit)
    np.testing.assert_allclose(one.centers, marks + 0.6 * step, rtol=1e-9)
    # The fit of the second step is that of where the first one led.
    two = newton.descend(source, jnp.asarray(marks), behind, jnp.asarray(free), 2)
    _, there = problem(keys, columns, np.asarray(one.centers), free)
    np.testing.assert_allclose(two.fit.coefficients, there.coefficients, rtol=1e-9)
    np.testing.assert_allclose(two.captured, one.captured, rtol=1e-12)


def test_masses_are_fitted_again_where_some_are_short(x64):
    keys, columns, marks = small_problem()
    free = jnp.ones(len(marks), bool)
    _, fit = problem(keys, columns, marks, free)

    def with_least(least):
        least = fits.LeastMasses(jnp.asarray(least), jnp.asarray(-1e9))
        return fits.fit_with_least_masses(fit, free, least)

    enough = np.full(len(marks), float(jnp.min(fit.coefficients[:, -1])) - 1e-9)
    again, masses = with_least(enough)
    np.testing.assert_allclose(again.coefficients, fit.coefficients, rtol=1e-12)
    np.testing.assert_allclose(masses, fit.coefficients[:, -1], rtol=1e-12)
    # One that is held takes its share from the others, which are the best beside it.
    least = enough - 1
    least[2] = float(fit.coefficients[2, -1]) + 0.05
    _, masses = with_least(least)
    others = np.arange(len(marks)) != 2
    gram = kernel(marks, marks)
    target = kernel(marks, keys) @ columns[:, -1] - gram[:, 2] * least[2]
    best = np.linalg.solve(gram[np.ix_(others, others)], target[others])
    assert masses[2] == least[2]
    if np.all(best >= least[others]):
        np.testing.assert_allclose(masses[others], best, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
def test_moves_and_a_fit_are_no_worse_than_where_they_began(steps):
    """In parts of their own, whatever the cache is like: nothing else judges the last step."""
    compressor = cj.chunked(
        fitting._move_pivots(cj.pivoted(), newton_steps=steps, last_fit=False), chunk_size=6
    )
    compressor = cj.refit.move_keys(compressor, newton_steps=0)
    for seed in range(2):
        keys, values = families(seed)
        before = cj.chunked(cj.pivoted(), chunk_size=6)(jax.random.key(seed), keys, values, size=12)
        after = compressor(jax.random.key(seed), keys, values, size=12)
        assert bool(jnp.all(jnp.isfinite(after.keys)))
        for head in (0, 1, 2, 4):
            first, second = (
                energy(keys[head], values[head], cj.Coreset(*(a[head] for a in each[:4])))
                for each in (before, after)
            )
            assert second <= 1.001 * first + 1e-3


def families(seed, count=80, width=5, value_width=4):
    """Heads of all sorts: plain, clustered, repeated, heavy-tailed, of low rank, of one key."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((7, count, width))
    values = rng.standard_normal((7, count, value_width))
    keys[1] = 0.01 * keys[1] + keys[1][rng.integers(0, 4, count)]
    keys[2] = keys[2][rng.integers(0, 5, count)]
    keys[3] *= rng.standard_cauchy((count, 1))
    keys[4] = keys[4][:, :1] * np.ones(width)
    keys[5] = 1.0
    values[5] *= 1e-3
    values[6] = 0.0
    return jnp.asarray(keys, jnp.float32), jnp.asarray(values, jnp.float32)


def energy(keys, values, coreset):
    """The error of a coreset in the kernel of the fit, heavy pairs where they truly lie."""
    geometry = fitting_geometry(standardize(keys, values))
    scale = np.sqrt(float(geometry.radius) / float(geometry.reach) ** 2)
    unit = np.asarray(keys - geometry.standardization.key_center, np.float64)
    unit = unit / float(geometry.standardization.key_radius) * scale
    marks = np.asarray(coreset.keys - geometry.standardization.key_center, np.float64)
    marks = marks / float(geometry.standardization.key_radius) * scale

    def columns(values):
        moved = np.asarray(geometry.values(values), np.float64)
        return np.concatenate([moved, np.ones((len(moved), 1))], axis=1)

    behind = np.exp(np.asarray(coreset.log_weights, np.float64))[:, None] * columns(coreset.values)
    both, places = np.concatenate([columns(values), -behind]), np.concatenate([unit, marks])
    return np.sum(both * (np.exp(places @ places.T) @ both))


@pytest.mark.slow
@pytest.mark.parametrize("start", [cj.baselines.uniform(), cj.pivoted()])
def test_never_much_worse_and_mostly_far_better(start):
    compressor = cj.refit.move_keys(start)
    gains = []
    for seed in range(3):
        keys, values = families(seed)
        before = start(jax.random.key(seed), keys, values, size=12)
        after = compressor(jax.random.key(seed), keys, values, size=12)
        assert bool(jnp.all(jnp.isfinite(after.keys)))
        assert bool(jnp.all(jnp.isfinite(after.values)))
        # No value is far from where all others are.
        center = jnp.mean(values, axis=1, keepdims=True)
        farthest = jnp.max(jnp.linalg.norm(values - center, axis=-1), axis=-1, keepdims=True)
        assert np.all(jnp.linalg.norm(after.values - center, axis=-1) <= 4.01 * farthest + 1e-5)
        # Where keys lie beyond the reach of the kernel of the fit, it does not speak for others.
        for head in (0, 1, 2, 4):
            first, second = (
                energy(keys[head], values[head], cj.Coreset(*(a[head] for a in each[:4])))
                for each in (before, after)
            )
            norm = energy(
                keys[head],
                values[head],
                after._replace(
                    keys=after.keys[head],
                    values=after.values[head],
                    log_weights=jnp.full(12, -jnp.inf),
                    indices=after.indices[head],
                ),
            )
            assert second <= first + 1e-3 * norm
            gains.append(second / max(first, 1e-3 * norm))
    assert np.median(gains) < 0.2


def test_heavy_pairs_stay_what_they_are():
    keys, values = jax.random.normal(RNG, (2, 400, 8))
    far = jnp.array([7, 123, 399])
    keys = keys.at[far].mul(8)
    coreset = cj.refit.move_keys(cj.pivoted())(RNG, keys, values, size=40)
    places = jnp.searchsorted(coreset.indices, far)
    np.testing.assert_array_equal(coreset.keys[places], keys[far])
    np.testing.assert_array_equal(coreset.values[places], values[far])
    weights = np.exp(coreset.log_weights)
    np.testing.assert_array_equal(weights[places], 1)
    assert not np.array_equal(coreset.keys, keys[coreset.indices])


@pytest.mark.slow
def test_heavy_pairs_come_from_the_source_whatever_they_were_made_into():
    keys, values = jax.random.normal(RNG, (2, 400, 8))
    far = jnp.array([7, 123, 399])
    keys = keys.at[far].mul(8)
    rounded = cj.baselines.quantized(cj.pivoted(), bits=2)
    coreset = cj.refit.move_keys(rounded)(RNG, keys, values, size=40)
    places = jnp.searchsorted(coreset.indices, far)
    np.testing.assert_array_equal(coreset.keys[places], keys[far])
    np.testing.assert_array_equal(coreset.values[places], values[far])


@pytest.mark.slow
def test_large_values_in_a_narrow_dtype_stay_finite():
    keys, values = jax.random.normal(RNG, (2, 1024, 16))
    for factor, dtype in ((3000, jnp.float16), (1e37, jnp.float32)):
        coreset = cj.fitted()(RNG, keys.astype(dtype), (factor * values).astype(dtype), size=64)
        assert bool(jnp.all(jnp.isfinite(coreset.values)))
        assert bool(jnp.all(jnp.isfinite(cj.attend(keys[:9].astype(dtype), coreset))))


@pytest.mark.slow
def test_without_steps_keys_stay():
    keys, values = jax.random.normal(RNG, (2, 3, 200, 8))
    start = cj.balanced()
    coreset = cj.refit.move_keys(start, newton_steps=0)(RNG, keys, values, size=25)
    subset = start(RNG, keys, values, size=25)
    np.testing.assert_allclose(coreset.keys, subset.keys, atol=1e-5)
    np.testing.assert_array_equal(coreset.indices, subset.indices)


@pytest.mark.slow
@pytest.mark.parametrize("rho", [1.0, 4.0])
def test_worst_error_is_a_fraction_of_that_of_the_fit_that_stays(rho):
    pairs = jax.random.normal(jax.random.key(1), (2, 4096, 16))
    keys, values = pairs / jnp.linalg.norm(pairs, axis=-1, keepdims=True)
    subset = cj.balanced(rho=rho)
    still = cj.refit.nystrom(subset)
    moved = cj.fitted(rho=rho)
    errors = [
        float(adversary(RNG, keys, values, coreset, rho=rho, starts=16, steps=20).error)
        for coreset in (each(RNG, keys, values, size=256) for each in (subset, still, moved))
    ]
    assert errors[2] < 0.9 * errors[1]
    assert errors[2] < 0.3 * errors[0]


@pytest.mark.slow
def test_ragged_heads_are_heads_of_their_own():
    keys, values = jax.random.normal(RNG, (2, 4, 150, 6))
    lengths = jnp.array([150, 90, 20, 5])
    dirty = [
        jnp.where((jnp.arange(150) < lengths[:, None])[..., None], array, jnp.nan)
        for array in (keys, values)
    ]
    compressor = cj.refit.move_keys(cj.baselines.uniform())
    coreset = compressor(RNG, *dirty, size=16, lengths=lengths)
    subset = cj.baselines.uniform()(RNG, *dirty, size=16, lengths=lengths)
    np.testing.assert_array_equal(coreset.indices, subset.indices)
    for head, length in enumerate(np.asarray(lengths)):
        held = np.asarray(coreset.indices[head]) >= 0
        assert bool(jnp.all(jnp.isfinite(coreset.values[head])))
        assert np.all(np.isfinite(coreset.log_weights[head][held]))
        if length <= 16:
            np.testing.assert_array_equal(coreset.keys[head], subset.keys[head])
            np.testing.assert_array_equal(coreset.log_weights[head], subset.log_weights[head])


@pytest.mark.slow
def test_half_precision_is_fitted_where_it_is_rounded_to():
    keys, values = jax.random.normal(RNG, (2, 2, 400, 8))
    halves = [array.astype(jnp.bfloat16) for array in (keys, values)]
    queries = jax.random.normal(jax.random.key(3), (2, 50, 8))
    coreset = cj.fitted()(RNG, *halves, size=50)
    assert coreset.keys.dtype == coreset.values.dtype == jnp.bfloat16
    assert coreset.log_weights.dtype == jnp.float32
    wide = [array.astype(jnp.float32) for array in halves]
    exact = cj.attention(queries, *wide)

    def miss(coreset):
        return float(jnp.mean(jnp.linalg.norm(cj.attend(queries, coreset) - exact, axis=-1)))

    read = coreset._replace(keys=coreset.keys.astype(float), values=coreset.values.astype(float))
    assert miss(read) < 1.3 * miss(cj.fitted()(RNG, *wide, size=50))


@pytest.mark.slow
def test_one_trace_for_equal_shapes():
    chex.clear_trace_counter()
    compress = jax.jit(
        chex.assert_max_traces(
            lambda rng, keys, values: cj.fitted(rho=2.0)(rng, keys, values, size=20), n=1
        )
    )
    for seed in range(2):
        keys, values = jax.random.normal(jax.random.key(seed), (2, 2, 200, 8))
        compress(jax.random.key(seed), keys, values)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="compressor"):
        cj.refit.move_keys(None)
    with pytest.raises(ValueError, match="newton_steps"):
        cj.refit.move_keys(cj.balanced(), newton_steps=-1)
    with pytest.raises(ValueError, match="scale"):
        cj.refit.move_keys(cj.balanced(), scale=0.0)
    keys, values = jnp.ones((2, 40, 4))
    with pytest.raises(ValueError, match="normalizers"):
        cj.refit.move_keys(cj.baselines.wildcat())(RNG, keys, values, size=8)
