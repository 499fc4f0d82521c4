"""The certificate against float64 brute force, its own limits, and what a JAX user expects.

Nearly all of the time goes into compilation, so that tests share two programs, for coresets with
and without normalizers: six heads of 200 pairs, in blocks, with padding that is not finite.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import coreset_jax as cj
from coreset_jax import geometry
from coreset_jax._src.core.coreset import Coreset, SignedCoreset, gather, normalizers
from coreset_jax.guarantees import adversary, certificate
from coreset_jax.guarantees.certificate import _certificate
from coreset_jax.guarantees.norms import largest_eigenvalues, spectral_norms, unit_roundoff
from coreset_jax.guarantees.tails import _REACHES, geometric_series
from tests import brute_force
from tests.guarantees.padded import HEADS, padded_heads, signed

COUNT, SLOTS, WIDTH = 200, 60, 6
RADII = np.array([[0.2, 0.3, 1.0], [2.0, 3.0, 6.0]], np.float32)
cache = partial(padded_heads, count=COUNT + 20, slots=SLOTS)


def instance(seed):
    """Gaussian pairs off the origin, and some of them with uneven weights."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(0.5, 1.0, (*HEADS, COUNT, WIDTH))
    values = rng.normal(-2.0, 1.0, (*HEADS, COUNT, 4))
    rows = np.sort(np.argsort(rng.random((*HEADS, COUNT)), axis=-1)[..., :50], axis=-1)
    return cache(keys, values, rows, rng.choice([1.0, 2.0, 4.0], (*HEADS, 50)))


def bound(keys, values, coreset, *, rho=1.0, scale=1.0, lengths=COUNT, block_size=128, **options):
    rho = np.broadcast_to(np.float32(rho), HEADS)
    lengths = np.broadcast_to(np.int32(lengths), HEADS)
    known = {"rho": rho, "scale": scale, "lengths": lengths}
    return certificate(keys, values, coreset, **known, block_size=block_size, **options)


def unit_problem(keys, values, **options):
    lengths = np.full(HEADS, COUNT, np.int32)
    return jax.jit(geometry.standardize)(keys, values, lengths=lengths, **options)


def found64(keys, values, coreset, rho):
    """The largest errors at random queries of the ball, half of them on its sphere, in float64."""
    queries = np.random.default_rng(0).standard_normal((*HEADS, 400, WIDTH))
    queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
    queries[..., ::2, :] *= np.linspace(0, 1, 200)[:, None]
    radius = rho / np.asarray(unit_problem(keys, values, scale=1.0).key_radius, np.float64)
    queries *= radius[..., None, None]
    given = brute_force.attention(queries, keys[..., :COUNT, :], values[..., :COUNT, :], scale=1.0)
    signs = np.asarray(normalizers(coreset))
    read = brute_force.attention(queries, *coreset[:3], scale=1.0, normalizers=signs)
    return np.linalg.norm(given - read, axis=-1).max(axis=-1)


def measure64(keys, values, coreset, standardization):
    """The atoms of the difference of one head in float64, in the same unit problem."""
    center, radius, _, value_center, value_radius = brute_force.double(*standardization[:5])
    keys, values, kept_keys, kept_values, log_weights, signs = brute_force.double(
        keys[:COUNT], values[:COUNT], *coreset[:3], normalizers(coreset)
    )
    weights = np.exp(log_weights)
    weights /= np.sum(weights * signs)
    kept_values = kept_values - signs[:, None] * value_center
    vectors = np.concatenate([(values - value_center) / len(keys), -weights[:, None] * kept_values])
    masses = np.concatenate([np.full(len(keys), 1 / len(keys)), -weights * signs])
    unit_keys = (np.concatenate([keys, kept_keys]) - center) / radius
    held = np.any(vectors != 0, axis=1)
    return unit_keys[held], vectors[held] / value_radius, masses[held]


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


@pytest.mark.parametrize(
    ("degrees", "has_signs"),
    [
        pytest.param(4, False, marks=pytest.mark.slow),
        (4, True),
        pytest.param(3, False, marks=pytest.mark.slow),
    ],
)
def test_no_share_is_below_its_value_in_float64(degrees, has_signs):
    keys, values, coreset = instance(0)
    coreset = signed(coreset, 0) if has_signs else coreset
    promised = bound(keys, values, coreset, rho=RADII, degrees=degrees)
    unit = unit_problem(keys, values, scale=1.0)
    # What is looked at head by head would be a program each.
    keys, values, coreset, promised, unit = jax.tree.map(
        np.asarray, (keys, values, coreset, promised, unit)
    )
    for head in np.ndindex(HEADS):
        pairs = jax.tree.map(lambda array, head=head: array[head], coreset)
        standardization = type(unit)(*(array[head] for array in unit))
        atoms = measure64(keys[head], values[head], pairs, standardization)
        numerator, denominator = shares64(*atoms, RADII[head], degrees)
        numerator *= standardization.value_radius
        shares = [each[head].astype(np.float64) for each in promised[2:4]]
        assert np.all(shares[0] >= numerator)
        assert np.all(shares[1] >= denominator)
        # And little above: the roots of the traces, and rounding.
        noise = 3e-4 * math.exp(RADII[head])
        np.testing.assert_allclose(shares[0][:-1], numerator[:-1], rtol=0.02, atol=noise)
        # The kernel of the tail is chosen by a diagonal, and the masses take that of the vectors.
        np.testing.assert_allclose(shares[0][-1], numerator[-1], rtol=0.06, atol=noise)
        np.testing.assert_allclose(shares[1], denominator, rtol=0.15, atol=noise)


@pytest.mark.slow
def test_wide_keys_sum_degree_two_over_pairs():
    rng = np.random.default_rng(0)
    keys, values = (jnp.asarray(rng.normal(size=(COUNT, width)), jnp.float32) for width in (68, 4))
    coreset, rho = gather(keys, values, jnp.arange(80), jnp.zeros(80)), 1.5
    promised = certificate(keys, values, coreset, rho=rho, scale=1.0)
    assert promised.numerator.shape == (4,)
    standardization = geometry.standardize(keys, values, rho=rho, scale=1.0)
    unit_keys, vectors, masses = measure64(keys, values, coreset, standardization)
    exact = np.linalg.norm(vectors.T @ (unit_keys @ unit_keys.T) ** 2 @ vectors, 2) ** 0.5
    exact *= rho**2 / 2 * float(standardization.value_radius)
    assert exact <= promised.numerator[2] <= 1.02 * exact
    exact = rho**2 / 2 * np.linalg.norm(unit_keys.T @ (masses[:, None] * unit_keys), 2)
    assert exact <= promised.denominator[2] <= 1.02 * exact


@pytest.mark.slow
def test_double_precision_promises_no_more():
    single = bound(*instance(3), rho=RADII)
    with jax.enable_x64(True):
        exact = jax.tree.map(
            lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, instance(3)
        )
        double = bound(*exact, rho=RADII)
    assert double.error.dtype == jnp.float64
    for name in ("error", "kernel", "numerator", "denominator", "output"):
        small, large = (np.asarray(getattr(each, name)) for each in (double, single))
        assert np.all(small <= large), name
        modest = RADII < 3
        np.testing.assert_allclose(small[modest], large[modest], rtol=0.02, atol=2e-3, err_msg=name)


@pytest.mark.slow
def test_error_follows_from_the_shares_and_the_kernel_promises_less():
    promised = bound(*instance(1), rho=2 * RADII)
    shares = jnp.sum(promised.numerator, axis=-1), jnp.sum(promised.denominator, axis=-1)
    whole = (shares[0] + promised.output * shares[1]) / promised.minimum
    assert np.all(promised.error <= whole * (1 + 1e-5))
    assert np.all(promised.error <= promised.kernel)
    assert np.all((promised.minimum > 0.99) & (promised.minimum <= 1))


def test_a_subset_is_recognized_and_nothing_else_is_taken_for_one():
    keys, values, coreset = instance(4)
    plain = bound(keys, values, coreset)
    # The same measure, with the atoms of both sides kept apart.
    ones = SignedCoreset(*coreset[:4], jnp.ones_like(coreset.log_weights))
    for same in (ones, coreset._replace(indices=coreset.indices * 0)):
        np.testing.assert_allclose(bound(keys, values, same).error, plain.error, rtol=1e-3)
    # Other values behind the same indices.
    other = coreset._replace(values=coreset.values.at[:, :, 0].add(50.0))
    found = found64(keys, values, other, 1.0)
    assert np.all(1.5 * plain.error < found)
    assert np.all(found <= bound(keys, values, other).error)
    # A pair that is there twice, once in place of another.
    twice = jax.tree.map(lambda array: array.at[:, :, 1].set(array[:, :, 0]), coreset)
    assert np.all(found64(keys, values, twice, 1.0) <= bound(keys, values, twice).error)


def test_the_scale_is_the_coresets():
    keys, values, coreset = instance(4)
    carried = coreset._replace(scale=1.0)
    expected = bound(keys, values, coreset, scale=1.0)
    for scale in (None, 1.0):
        np.testing.assert_array_equal(
            bound(keys, values, carried, scale=scale).error, expected.error
        )
    with pytest.raises(ValueError, match=r"made for, 1; got 0\.5"):
        bound(keys, values, carried, scale=0.5)


@pytest.mark.slow
def test_heads_with_scales_of_their_own_are_heads_of_other_keys():
    keys, values, coreset = instance(4)
    scales = np.array([[0.3, 0.5, 0.8], [1.0, 1.5, 2.0]], np.float32)
    found = bound(keys, values, coreset._replace(scale=scales), scale=None)
    factors = scales[..., None, None]
    longer = coreset._replace(keys=factors * coreset.keys)
    expected = bound(factors * keys, values, longer)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_denominator_that_may_vanish_has_no_bound():
    keys, values, coreset = instance(5)
    center = np.mean(keys[..., :COUNT, :], axis=-2, keepdims=True)
    distances = np.linalg.norm(coreset.keys - center, axis=-1) * (coreset.indices >= 0)
    furthest = np.arange(SLOTS) == np.argmax(distances, axis=-1)[..., None]
    signs = np.where(furthest, -1, 1).astype(np.float32)
    vanishing = SignedCoreset(*coreset[:4], jnp.asarray(signs))
    rho = np.array([[20.0, 20.0, 20.0], [0.1, 0.1, 0.1]])
    promised = bound(keys, values, vanishing, rho=rho)
    assert np.all(np.isposinf(promised.error[0]))
    assert np.all(np.isfinite(promised.error[1]))
    empty = coreset._replace(log_weights=jnp.full_like(coreset.log_weights, -jnp.inf))
    assert np.all(np.isposinf(bound(keys, values, empty).error))


def test_any_radius_gives_a_number_or_infinity():
    keys, values, coreset = instance(6)
    rho = np.array([[1e-20, 5.0, 25.0], [90.0, 1e4, 1e30]])
    promised = bound(keys, values, coreset, rho=rho)
    assert not any(np.any(np.isnan(field)) for field in promised)
    # Positive weights: no output leaves the convex hull of the values.
    assert np.all(promised.error <= 2.001 * unit_problem(keys, values).value_radius)
    assert not np.any(np.isnan(bound(keys, values, signed(coreset, 0), rho=rho).error))


def test_pairs_whose_weight_underflows_still_count():
    """A far key makes up for any weight, and attention reads logarithms."""
    line = np.eye(WIDTH)[0]
    keys, values = np.outer([-1.0, 1.0], line), np.outer([-1.0, 1.0], np.ones(4))
    keys, values, coreset = cache(keys, values, np.array([0, 1, -1]), 1.0)
    coreset = coreset._replace(
        keys=coreset.keys.at[:, :, 2, 0].set(5.0), values=coreset.values.at[:, :, 2].set(50.0)
    )
    faint = np.reshape([-60.0, -86.0, -90.0, -100.0, -150.0, -1000.0], HEADS)
    kept = coreset._replace(log_weights=coreset.log_weights.at[:, :, 2].set(faint))
    for rho in (1.0, 30.0, 500.0):
        promised = bound(keys, values, kept, rho=rho, lengths=2).error
        queries = np.broadcast_to(np.linspace(-rho, rho, 2001)[:, None] * line, (*HEADS, 2001, 6))
        given = brute_force.attention(queries, keys[:, :, :2], values[:, :, :2], scale=1.0)
        read = brute_force.attention(queries, *kept[:3], scale=1.0)
        assert np.all(np.linalg.norm(given - read, axis=-1).max(axis=-1) <= promised)


def test_scaling_values_scales_the_promise():
    keys, values, coreset = instance(3)
    plain = bound(keys, values, coreset).error
    factors = np.reshape([1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30], HEADS).astype(np.float32)
    wide = factors[..., None, None]
    found = bound(keys, wide * values, coreset._replace(values=wide * coreset.values)).error
    np.testing.assert_allclose(found / factors, plain, rtol=1e-3)


def test_the_whole_cache_has_no_error():
    rng = np.random.default_rng(7)
    keys, values = rng.normal(size=(COUNT, WIDTH)), rng.normal(size=(COUNT, 4))
    found = cache(keys, values, np.arange(50), 1.0)
    # What is behind the length is no part of the source: here other pairs, and no numbers.
    assert np.all(bound(*found, lengths=50).error < 1e-3)
    assert np.all(bound(*found, lengths=51).error > 2e-3)


def test_one_head_that_is_not_finite_is_nan_and_the_others_are_not():
    keys, values, coreset = instance(8)
    plain = bound(keys, values, coreset)
    keys = keys.at[0, 1, 5, 1].set(jnp.nan)
    coreset = coreset._replace(log_weights=coreset.log_weights.at[1, 2].set(jnp.nan))
    broken = bound(keys, values, coreset)
    assert broken.numerator.shape == (*HEADS, 5)
    expected = np.array([[False, True, False], [False, False, True]])
    for name in ("error", "kernel", "output", "minimum"):
        np.testing.assert_array_equal(jnp.isnan(getattr(broken, name)), expected)
    np.testing.assert_allclose(broken.error[~expected], plain.error[~expected], rtol=1e-3)


def test_equal_shapes_trace_once():
    keys, values, coreset = instance(10)
    bound(keys, values, coreset)
    traced = _certificate._cache_size()
    for seed, rho in enumerate((2.0, 3.5)):
        bound(keys + seed, values, coreset, rho=rho, scale=0.5 + seed, block_size=100 + seed)
    assert _certificate._cache_size() == traced


@pytest.mark.slow
def test_sharded_heads_in_half_precision_give_what_whole_ones_in_single_precision_give():
    keys, values, coreset = instance(11)
    coreset = coreset._replace(log_weights=jnp.where(coreset.indices < 0, -jnp.inf, 0))

    def cast(dtype, arrays):
        floating = (jnp.bfloat16, jnp.float32)
        return jax.tree.map(lambda a: a.astype(dtype) if a.dtype in floating else a, arrays)

    halves = cast(jnp.bfloat16, (keys, values, coreset))
    heads = PartitionSpec("heads")
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Explicit,))
    arrays = jax.device_put((*halves, jnp.full(HEADS, COUNT)), NamedSharding(mesh, heads))
    sharded = jax.shard_map(
        lambda *each: certificate(*each[:3], rho=1.0, scale=1.0, lengths=each[3], block_size=128),
        mesh=mesh,
        in_specs=heads,
        out_specs=heads,
    )
    promised = jax.jit(sharded)(*arrays)
    assert all(field.dtype == jnp.float32 for field in promised)
    whole = bound(*cast(jnp.float32, halves))
    np.testing.assert_allclose(promised.error, whole.error, rtol=1e-4)


@pytest.mark.slow
def test_memory_does_not_grow_with_pairs_of_pairs():
    count, size, width = 65536, 8192, 64
    floats = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    indices = jax.ShapeDtypeStruct((size,), jnp.int32)
    coreset = Coreset(floats((size, width)), floats((size, width)), floats((size,)), indices)
    ball = {"rho": 1.0, "query_norm": None, "queries": None, "scale": None, "lengths": None}
    cache = floats((count, width)), floats((count, width)), coreset, None, ball
    lowered = _certificate.lower(*cache, degrees=3, block_size=512)
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
    bounds = np.asarray(jax.jit(spectral_norms)(matrices), np.float64)
    assert np.all(exact <= bounds)
    assert np.all(bounds <= 1.01 * exact)
    symmetric = rng.normal(size=(30, 30)) @ np.diag(rng.normal(size=30)) @ rng.normal(size=(30, 30))
    symmetric = (symmetric + symmetric.T).astype(np.float32)
    (found,) = np.asarray(jax.jit(largest_eigenvalues)([symmetric]), np.float64)
    exact = np.linalg.norm(symmetric.astype(np.float64), 2)
    assert exact <= found <= 1.02 * exact


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
        promised = certificate(keys, values, coreset, **known)
        assert found.error <= promised.error <= most * found.error


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
    keys, values = jnp.ones((300, 6)), jnp.ones((300, 4))
    coreset = gather(keys, values, jnp.arange(80), jnp.zeros(80))
    arguments = {"keys": keys, "values": values, "coreset": coreset} | change
    with pytest.raises(ValueError, match=named):
        certificate(**arguments)
