"""The certificate against float64 brute force, its own limits, and what a JAX user expects.

Nearly all of the time goes into compilation, so that tests share shapes where they can.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import coreset_jax as cj
from coreset_jax import problem
from coreset_jax.coreset import Coreset, gather, whole_cache
from coreset_jax.guarantees import Certificate, adversary, certificate
from coreset_jax.guarantees.certificate import _certificate
from coreset_jax.guarantees.norms import largest_eigenvalues, spectral_norms, unit_roundoff
from coreset_jax.guarantees.tails import _REACHES, geometric_series
from tests import brute_force


def instance(seed, *, count=300, size=80, width=6, leading=()):
    """Gaussian pairs off the origin, and some of them with uneven weights."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(0.5, 1.0, (*leading, count, width))
    values = rng.normal(-2.0, 1.0, (*leading, count, 4))
    rows = np.sort(np.argsort(rng.random((*leading, count)), axis=-1)[..., :size], axis=-1)
    log_weights = rng.choice(np.log([1.0, 2.0, 4.0]), (*leading, size))
    keys, values, log_weights = (jnp.asarray(a, jnp.float32) for a in (keys, values, log_weights))
    return keys, values, gather(keys, values, jnp.asarray(rows), log_weights)


def refit(coreset, seed):
    """Signed normalizers, and values that belong to them."""
    rng = np.random.default_rng(seed)
    normalizers = jnp.asarray(rng.normal(1, 0.5, coreset.log_weights.shape), jnp.float32)
    return coreset._replace(
        values=1.01 * normalizers[..., None] * coreset.values, normalizers=normalizers
    )


def measure64(keys, values, coreset, reduction):
    """The atoms of the difference in float64, in the same unit problem."""
    center, radius, value_center, value_radius = brute_force.double(
        reduction.key_center,
        reduction.key_radius,
        reduction.value_center,
        reduction.value_radius,
    )
    keys, values, kept_keys, kept_values, log_weights = brute_force.double(
        keys, values, coreset.keys, coreset.values, coreset.log_weights
    )
    normalizers = np.ones(len(kept_keys))
    if coreset.normalizers is not None:
        (normalizers,) = brute_force.double(coreset.normalizers)
    weights = np.exp(log_weights)
    weights /= np.sum(weights * normalizers)
    kept_values = kept_values - normalizers[:, None] * value_center
    vectors = np.concatenate([(values - value_center) / len(keys), -weights[:, None] * kept_values])
    masses = np.concatenate([np.full(len(keys), 1 / len(keys)), -weights * normalizers])
    unit_keys = (np.concatenate([keys, kept_keys]) - center) / radius
    return unit_keys, vectors / value_radius, masses


def series64(rho, reach, start):
    logarithms = [
        2 * (j * math.log(rho) - math.lgamma(j + 1)) - j * math.log(reach)
        for j in range(start, start + 400)
    ]
    return sum(map(math.exp, logarithms))


def shares64(keys, vectors, masses, rho, degrees):
    """What each degree adds at most, by singular values, and the least tail of all kernels."""
    count, width = keys.shape

    def norm(array):
        return np.linalg.norm(array, 2)

    def tensor(degree):
        columns = np.concatenate([vectors, masses[:, None]], axis=1)
        for _ in range(degree):
            columns = (keys[:, :, None] * columns[:, None, :]).reshape(count, -1)
        whole = columns.sum(axis=0).reshape(*[width] * degree, -1)
        return whole[..., :-1], whole[..., -1]

    numerator, denominator = [], []
    for degree in range(4):
        vector, mass = tensor(degree)
        if degree < degrees:
            # The unfoldings whose operator norms are taken, by the number of keys in their rows.
            splits = {0: [0], 1: [1], 2: [1, 2], 3: [2, 3]}[degree]
            norms = [norm(vector.reshape(width**split, -1)) for split in splits]
            numerator.append(rho**degree / math.factorial(degree) * min(norms))
        rows = width ** max(degree - 1, 0)
        denominator.append(rho**degree / math.factorial(degree) * norm(mass.reshape(rows, -1)))
    denominator = [*denominator[:degrees], sum(denominator[degrees:])]

    products = keys @ keys.T
    largest = np.max(np.sum(keys**2, axis=1)) * (1 + 4 * (width + 8) * 2**-24)
    tails, mass_tails = [], []
    for reach in np.asarray(_REACHES) / largest:
        scaled = reach * products
        kernel = scaled**degrees / (1 - scaled)
        tails.append(series64(rho, reach, degrees) * norm(vectors.T @ kernel @ vectors))
        form = masses @ (scaled**4 / (1 - scaled)) @ masses
        mass_tails.append(series64(rho, reach, 4) * form)
    numerator.append(math.sqrt(min(tails)))
    denominator[degrees:] = [sum(denominator[degrees:]) + math.sqrt(min(mass_tails))]
    return np.array(numerator), np.array(denominator)


@pytest.mark.slow
@pytest.mark.parametrize("refitted", [False, True])
@pytest.mark.parametrize("degrees", [3, 4])
def test_no_share_is_below_its_value_in_float64(degrees, refitted):
    for seed, rho in enumerate((0.3, 2.0, 6.0)):
        keys, values, coreset = instance(seed)
        if refitted:
            coreset = refit(coreset, seed)
        bound = certificate(keys, values, coreset, rho=rho, scale=1.0, degrees=degrees)
        reduction = problem.reduce(keys, values, rho=rho, scale=1.0)
        atoms = measure64(keys, values, coreset, reduction)
        numerator, denominator = shares64(*atoms, rho, degrees)
        numerator *= float(reduction.value_radius)
        assert np.all(np.asarray(bound.numerator, np.float64) >= numerator)
        assert np.all(np.asarray(bound.denominator, np.float64) >= denominator)
        # And little above: the roots of the traces, and rounding.
        noise = 3e-4 * math.exp(rho)
        np.testing.assert_allclose(bound.numerator, numerator, rtol=0.02, atol=noise)
        # The masses take the kernel that is best for the vectors.
        np.testing.assert_allclose(bound.denominator, denominator, rtol=0.15, atol=noise)


@pytest.mark.slow
def test_wide_keys_sum_degree_two_over_pairs():
    keys, values, coreset = instance(0, width=68)
    rho = 1.5
    bound = certificate(keys, values, coreset, rho=rho, scale=1.0)
    assert bound.numerator.shape == (4,)
    reduction = problem.reduce(keys, values, rho=rho, scale=1.0)
    unit_keys, vectors, masses = measure64(keys, values, coreset, reduction)
    exact = np.linalg.norm(vectors.T @ (unit_keys @ unit_keys.T) ** 2 @ vectors, 2) ** 0.5
    exact *= rho**2 / 2 * float(reduction.value_radius)
    assert exact <= bound.numerator[2] <= 1.02 * exact
    exact = rho**2 / 2 * np.linalg.norm(unit_keys.T @ (masses[:, None] * unit_keys), 2)
    assert exact <= bound.denominator[2] <= 1.02 * exact
    found = adversary(jax.random.key(0), keys, values, coreset, rho=rho, scale=1.0, starts=8)
    assert found.error <= bound.error


@pytest.mark.slow
def test_double_precision_promises_no_more():
    bounds = []
    for double in (False, True):
        with jax.enable_x64(double):
            cache = instance(3)
            if double:
                cache = jax.tree.map(
                    lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, cache
                )
            bounds.append(certificate(*cache, rho=2.0, scale=1.0))
    single, double = bounds
    assert double.error.dtype == jnp.float64
    for name in ("error", "kernel", "numerator", "denominator", "output"):
        small, large = (np.asarray(getattr(bound, name)) for bound in (double, single))
        assert np.all(small <= large), name
        np.testing.assert_allclose(small, large, rtol=0.02, atol=2e-3, err_msg=name)


def test_error_follows_from_the_shares_and_the_kernel_promises_less():
    for seed, rho in enumerate((0.2, 1.0, 3.0, 12.0)):
        bound = certificate(*instance(seed), rho=rho, scale=1.0)
        whole = jnp.sum(bound.numerator) + bound.output * jnp.sum(bound.denominator)
        assert bound.error <= whole / bound.minimum * (1 + 1e-5)
        assert bound.error <= bound.kernel
        assert 0.99 < bound.minimum <= 1


def test_a_subset_is_recognised_and_nothing_else_is_taken_for_one():
    keys, values, coreset = instance(4)
    bound = partial(certificate, keys, values, rho=1.0, scale=1.0)
    plain = bound(coreset)
    # The same measure, with the atoms of both sides kept apart.
    ones = jnp.ones_like(coreset.log_weights)
    np.testing.assert_allclose(bound(coreset._replace(normalizers=ones)).error, plain.error, 1e-3)
    np.testing.assert_allclose(
        bound(coreset._replace(indices=coreset.indices * 0)).error, plain.error, 1e-3
    )
    # Other values behind the same indices.
    other = coreset._replace(values=coreset.values.at[0].add(50.0))
    found = adversary(jax.random.key(0), keys, values, other, rho=1.0, scale=1.0, starts=8)
    assert 2 * plain.error < found.error <= bound(other).error
    # A pair that is there twice, once in place of another.
    twice = jax.tree.map(lambda array: array.at[1].set(array[0]), coreset)
    found = adversary(jax.random.key(0), keys, values, twice, rho=1.0, scale=1.0, starts=8)
    assert found.error <= bound(twice).error


def test_a_denominator_that_may_vanish_has_no_bound():
    keys, values, coreset = instance(5)
    normalizers = jnp.ones_like(coreset.log_weights)
    furthest = jnp.argmax(jnp.linalg.norm(coreset.keys - jnp.mean(keys, axis=0), axis=-1))
    refitted = coreset._replace(normalizers=normalizers.at[furthest].set(-1.0))
    bound = partial(certificate, keys, values, refitted, scale=1.0)
    assert jnp.isposinf(bound(rho=20.0).error)
    assert jnp.isfinite(bound(rho=0.1).error)
    empty = coreset._replace(log_weights=jnp.full_like(coreset.log_weights, -jnp.inf))
    assert jnp.isposinf(certificate(keys, values, empty, rho=1.0).error)


@pytest.mark.parametrize("rho", [1e-20, 5.0, 25.0, 90.0, 1e4, 1e30])
def test_any_radius_gives_a_number_or_infinity(rho):
    keys, values, coreset = instance(6)
    unit = problem.reduce(keys, values)
    bound = certificate(keys, values, coreset, rho=rho)
    assert not any(jnp.any(jnp.isnan(field)) for field in bound)
    # Positive weights: no output leaves the convex hull of the values.
    assert bound.error <= 2.001 * unit.value_radius
    assert not jnp.isnan(certificate(keys, values, refit(coreset, 0), rho=rho).error)


@pytest.mark.parametrize("faint", [-60.0, -86.0, -90.0, -100.0, -150.0, -1000.0])
def test_pairs_whose_weight_underflows_still_count(faint):
    """A far key makes up for any weight, and attention reads logarithms."""
    keys = values = jnp.array([[-1.0], [1.0]])
    kept = Coreset(
        jnp.array([[-1.0], [1.0], [5.0]]),
        jnp.array([[-1.0], [1.0], [50.0]]),
        jnp.array([0.0, 0.0, faint]),
        jnp.array([0, 1, -1]),
    )
    for rho in (1.0, 30.0, 500.0):
        promised = float(certificate(keys, values, kept, rho=rho, scale=1.0).error)
        queries = np.linspace(-rho, rho, 2001)[:, None]
        given = brute_force.attention(queries, keys, values, scale=1.0)
        read = brute_force.attention(queries, *kept[:3], scale=1.0)
        assert np.max(np.abs(given - read)) <= promised


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20, 1e30])
def test_scaling_values_scales_the_promise(factor):
    keys, values, kept = instance(3)
    plain = certificate(keys, values, kept, rho=1.0).error
    scaled = kept._replace(values=jnp.float32(factor) * kept.values)
    found = certificate(keys, jnp.float32(factor) * values, scaled, rho=1.0).error
    np.testing.assert_allclose(found / factor, plain, rtol=1e-3)


@pytest.mark.slow
def test_the_whole_cache_has_no_error_and_padding_no_part():
    keys, values, coreset = instance(7)

    def padded(array, fill, count):
        width = [(0, count - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, width, constant_values=fill)

    given = padded(keys, jnp.nan, 340), padded(values, jnp.inf, 340)
    bound = partial(certificate, *given, rho=1.0, lengths=jnp.asarray(300))
    assert bound(whole_cache(*given, jnp.asarray(300))).error < 1e-3
    slots = Coreset(
        padded(coreset.keys, 0.0, 90),
        padded(coreset.values, 0.0, 90),
        padded(coreset.log_weights, -jnp.inf, 90),
        padded(coreset.indices, -1, 90),
    )
    plain = certificate(keys, values, coreset, rho=1.0)
    np.testing.assert_allclose(bound(slots).error, plain.error, rtol=1e-3)


@pytest.mark.slow
def test_heads_are_independent_and_one_that_is_not_finite_is_nan():
    keys, values, coreset = instance(8, leading=(2, 3))
    query_norm = jnp.asarray([[0.5, 1.0, 2.0], [4.0, 8.0, 16.0]])
    changed = keys.at[0, 1, 5, 1].set(jnp.nan)
    log_weights = coreset.log_weights.at[1, 2].set(jnp.nan)
    broken = certificate(
        changed, values, coreset._replace(log_weights=log_weights), query_norm=query_norm
    )
    assert broken.numerator.shape == (2, 3, 5)
    for name in ("error", "kernel", "output", "minimum"):
        expected = [[False, True, False], [False, False, True]]
        np.testing.assert_array_equal(jnp.isnan(getattr(broken, name)), expected)
    for head in ((0, 0), (0, 2), (1, 1)):
        pairs = jax.tree.map(lambda array, head=head: array[head], coreset)
        one = certificate(keys[head], values[head], pairs, query_norm=query_norm[head])
        np.testing.assert_allclose(one.error, broken.error[head], rtol=1e-3)


def test_half_precision_is_bounded_in_float32_and_everything_may_be_traced():
    keys, values, coreset = jax.tree.map(
        lambda array: array.astype(jnp.bfloat16) if array.dtype == jnp.float32 else array,
        instance(9),
    )
    coreset = gather(keys, values, coreset.indices, jnp.zeros(80))
    bound = jax.jit(lambda cache, rho: certificate(*cache, rho=rho))((keys, values, coreset), 1.0)
    assert isinstance(bound, Certificate)
    assert all(field.dtype == jnp.float32 for field in bound)
    exact = jax.tree.map(
        lambda array: array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array,
        (keys, values, coreset),
    )
    np.testing.assert_allclose(bound.error, certificate(*exact, rho=1.0).error, rtol=1e-5)


def test_equal_shapes_trace_once():
    keys, values, coreset = instance(10)
    certificate(keys, values, coreset, rho=1.0, scale=1.0)
    traced = _certificate._cache_size()
    for seed, rho in enumerate((2.0, 3.5)):
        certificate(keys + seed, values, coreset, rho=rho, scale=0.5 + seed, block_size=513 + seed)
    assert _certificate._cache_size() == traced


@pytest.mark.slow
def test_sharded_heads_give_what_whole_ones_give():
    keys, values, coreset = instance(11, leading=(4,))
    bound = partial(certificate, rho=1.0, scale=1.0)
    heads = PartitionSpec("heads")
    mesh = jax.make_mesh((4,), ("heads",), axis_types=(AxisType.Explicit,))
    cache = jax.device_put((keys, values, coreset), NamedSharding(mesh, heads))
    sharded = jax.shard_map(bound, mesh=mesh, in_specs=heads, out_specs=heads)
    errors = jax.jit(sharded)(*cache).error
    np.testing.assert_allclose(errors, bound(keys, values, coreset).error, 1e-4)


def test_memory_does_not_grow_with_pairs_of_pairs():
    count, size, width = 65536, 8192, 64
    floats = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    indices = jax.ShapeDtypeStruct((size,), jnp.int32)
    coreset = Coreset(floats((size, width)), floats((size, width)), floats((size,)), indices)
    cache = floats((count, width)), floats((count, width)), coreset, 1.0
    lowered = _certificate.lower(*cache, None, None, None, None, degrees=3, block_size=512)
    memory = lowered.compile().memory_analysis().temp_size_in_bytes
    # Two copies of the cache in unit form and a few blocks; all inner products would be 17 GB.
    assert memory < 4 * 4 * 2 * (count + size) * width + 32e6


def test_norms_are_bounded_from_above_and_closely():
    rng = np.random.default_rng(0)
    matrices = [
        rng.normal(size=(40, 30)),
        np.outer(rng.normal(size=20), rng.normal(size=50)),
        1e25 * rng.normal(size=(3, 70)),
        1e-25 * np.eye(30),
        np.zeros((5, 5)),
    ]
    matrices = [matrix.astype(np.float32) for matrix in matrices]
    exact = np.array([np.linalg.norm(matrix.astype(np.float64), 2) for matrix in matrices])
    bounds = np.asarray(spectral_norms([jnp.asarray(matrix) for matrix in matrices]), np.float64)
    assert np.all(exact <= bounds)
    assert np.all(bounds <= 1.01 * exact)
    symmetric = rng.normal(size=(30, 30)) @ np.diag(rng.normal(size=30)) @ rng.normal(size=(30, 30))
    symmetric = (symmetric + symmetric.T).astype(np.float32)
    (bound,) = np.asarray(largest_eigenvalues([jnp.asarray(symmetric)]), np.float64)
    exact = np.linalg.norm(symmetric.astype(np.float64), 2)
    assert exact <= bound <= 1.02 * exact


def test_series_are_bounded_from_above_or_refused():
    reaches = jnp.asarray(_REACHES, jnp.float32)
    for rho in (0.01, 1.0, 5.0, 20.0):
        bounds = np.asarray(geometric_series(jnp.float32(rho), reaches, 3), np.float64)
        exact = np.array([series64(rho, float(reach), 3) for reach in np.asarray(reaches)])
        assert np.all(exact <= bounds)
        assert np.all(bounds[np.isfinite(bounds)] <= 1.001 * exact[np.isfinite(bounds)] + 1e-30)
    assert np.all(np.isinf(geometric_series(jnp.float32(200.0), reaches, 3)))
    assert unit_roundoff(jnp.dtype(jnp.float32)) == 2**-24


@pytest.mark.slow
def test_is_close_to_what_the_adversary_finds():
    keys, values = jax.random.normal(jax.random.key(0), (2, 16384, 32))
    keys, values = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (keys, values))
    for rho, most in ((1.0, 3.0), (2.0, 7.0), (3.0, 15.0)):
        coreset = cj.balanced(rho=rho, scale=1.0)(jax.random.key(1), keys, values, size=1024)
        known = {"rho": rho, "scale": 1.0}
        found = adversary(jax.random.key(2), keys, values, coreset, **known)
        bound = certificate(keys, values, coreset, **known)
        assert found.error <= bound.error <= most * found.error


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keys": jnp.zeros((300, 5))}, "coreset"),
        ({"values": jnp.zeros((299, 4))}, "values"),
        ({"values": jnp.zeros((300, 3))}, "coreset"),
        ({"keys": jnp.zeros((2, 300, 6)), "values": jnp.zeros((2, 300, 4))}, "coreset"),
        ({"rho": 0.0}, "rho"),
        ({"rho": 1.0, "query_norm": 1.0}, "query_norm"),
        ({"queries": jnp.zeros((3, 5))}, "queries"),
        ({"scale": 0.0}, "scale"),
        ({"lengths": jnp.asarray(301)}, "lengths"),
        ({"degrees": 5}, "degrees"),
        ({"degrees": True}, "degrees"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_bad_input_is_refused(change, named):
    keys, values, coreset = instance(12)
    arguments = {"keys": keys, "values": values, "coreset": coreset} | change
    with pytest.raises(ValueError, match=named):
        certificate(**arguments)
