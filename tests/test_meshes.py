"""Arrays on meshes: the results of one device, each part of them on the device of its heads."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import coreset_jax as cj
from coreset_jax import baselines, budgets, fitted, geometry, guarantees, queries, streaming
from coreset_jax._src.core import turns
from tests.compressors import sampled

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")

BATCH, HEADS, COUNT, WIDTH, SIZE = 2, 4, 96, 8, 24
BY_HEAD = PartitionSpec("batch", "head")
RNG = jax.random.key(0)
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.fixture(params=KINDS)
def mesh(request):
    kinds = (KINDS[request.param],) * 2
    return jax.make_mesh((2, 2), BY_HEAD, axis_types=kinds, devices=jax.devices()[:4])


@pytest.fixture(scope="module")
def arrays():
    """Keys, values, sample queries, scores and lengths."""
    rng = np.random.default_rng(0)
    keys, values = np.float32(rng.standard_normal((2, BATCH, HEADS, COUNT, WIDTH)))
    samples = np.float32(rng.standard_normal((BATCH, HEADS, 6, WIDTH)))
    scores = np.float32(np.abs(rng.standard_normal((BATCH, HEADS, COUNT))))
    lengths = np.array([[5, 20, 96, 70], [96, 3, 50, 96]], np.int32)
    return {"k": keys, "v": values, "q": samples, "s": scores, "l": lengths}


def place(mesh, tree, spec=BY_HEAD):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def check(found, expected, mesh, **tolerance):
    """The values of one device, sharded over batch and heads."""
    for leaf in jax.tree.leaves(found):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, BY_HEAD), leaf.ndim), leaf.shape
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), **tolerance)


def sample(keys, values, lengths=None):
    return sampled()(RNG, keys, values, size=SIZE, lengths=lengths)


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_nothing_leaves_its_device(mesh, arrays, at_once, monkeypatch):
    """Heads are gone through one by one, several or all at a time, those of each device there."""
    # As many heads as a device has, or fewer: the budget is that of one device.
    budget = at_once * sampled().workspace(COUNT, SIZE, 2 * WIDTH)
    monkeypatch.setattr(turns, "_BUDGETS", dict.fromkeys(("cpu", "gpu", "tpu"), budget))
    given = arrays["k"], arrays["v"], arrays["l"]
    # The budget is read when a program is traced.
    jax.clear_caches()
    compiled = jax.jit(sample).lower(*place(mesh, given)).compile()
    expected = sample(*given)
    check(compiled(*place(mesh, given)), expected, mesh, rtol=1e-6)
    text = compiled.as_text()
    assert not any(each in text for each in ("all-gather", "all-reduce", "all-to-all", "permute"))


@pytest.mark.parametrize("known", ["context", "arrays"])
@pytest.mark.parametrize("compiled", ["jit", "eager"])
def test_calls_with_and_without_a_context(mesh, arrays, known, compiled):
    given = arrays["k"], arrays["v"], arrays["l"]
    expected = sample(*given)
    call = jax.jit(sample) if compiled == "jit" else sample
    with jax.set_mesh(mesh) if known == "context" else contextlib.nullcontext():
        check(call(*place(mesh, given)), expected, mesh, rtol=1e-6)


def test_arrays_that_lie_elsewhere_come_along(arrays):
    """Keys decide where a head is: whatever else is given may lie anywhere."""
    kinds = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), BY_HEAD, axis_types=kinds, devices=jax.devices()[:4])
    keys = place(mesh, arrays["k"])
    values = place(mesh, arrays["v"], PartitionSpec("batch"))
    lengths, samples = arrays["l"], place(mesh, arrays["q"], PartitionSpec(None, "head"))
    expected = sample(arrays["k"], arrays["v"], lengths)
    coreset = sample(keys, values, lengths)
    check(coreset, expected, mesh, rtol=1e-6)
    found = cj.attend(samples, jax.tree.map(jnp.asarray, expected))
    np.testing.assert_allclose(found, cj.attend(arrays["q"], expected), rtol=1e-5, atol=1e-6)
    check(cj.attend(samples, coreset), found, mesh, rtol=1e-5, atol=1e-6)


def attend(keys, values, samples, lengths):
    coreset = sample(keys, values, lengths)
    lse = cj.attention_bias(coreset, num_query_heads=2 * HEADS, query_length=3)
    whole = cj.attention(samples, keys, values, lengths=lengths, block_size=40)
    return cj.attend(samples, coreset), cj.attend(samples, coreset, block_size=5), whole, lse


def bounds(keys, values, samples, lengths):
    coreset = sample(keys, values, lengths)
    ball = {"queries": samples, "lengths": lengths, "query_center": samples[..., 0, :]}
    promise = guarantees.certificate(keys, values, coreset, **ball)
    worst = guarantees.adversary(RNG, keys, values, coreset, starts=4, steps=3, **ball)
    return promise.error, worst.error


def stream(keys, values, samples, lengths):
    parts = streaming.merge_and_reduce(size=32, block_size=8, landmarks=8)
    state = parts.append(parts.init(RNG, keys, values), keys, values, lengths)
    joined = parts.merge(
        state, parts.append(parts.init(RNG, keys, values), keys[..., :3, :], values[..., :3, :])
    )
    return parts.coreset(joined), parts.error(joined)


def one_budget(axes, keys, values, samples, lengths):
    looked_up = baselines.kvzip(axes=axes)(
        RNG, keys, values, size=SIZE, queries=samples, lengths=lengths
    )
    split = budgets.adaptive(baselines.top_attention(), axes=axes, num_sizes=1)
    layered = budgets.pyramid(sampled(), axis=axes[0])
    return (
        looked_up,
        split(RNG, keys, values, size=SIZE, queries=samples),
        layered(RNG, keys, values, size=SIZE),
    )


def measures(keys, values, samples, lengths):
    observed = queries.observe(queries.empty(keys, count=4), samples, keys, lengths=lengths)
    unit = geometry.standardize(keys, values, queries=samples, lengths=lengths)
    # The scale is a constant, which the compiler puts anywhere.
    measured = unit.rho, unit.key_center, unit.value_radius
    return (
        observed.queries,
        observed.scores,
        measured,
        geometry.calibrate(keys, samples, lengths=lengths),
    )


def slopes(keys, values, samples, lengths):
    def loss(keys, values):
        return jnp.sum(
            cj.attend(samples, fitted()(RNG, keys, values, size=SIZE, queries=samples)) ** 2
        )

    return jax.grad(loss, argnums=(0, 1))(keys, values)


@pytest.mark.parametrize(
    "function",
    [
        attend,
        measures,
        pytest.param(functools.partial(one_budget, (-1,)), id="one_budget", marks=pytest.mark.slow),
        pytest.param(functools.partial(one_budget, (0, 1)), id="one_budget_for_all"),
        pytest.param(bounds, marks=pytest.mark.slow),
        pytest.param(stream, marks=pytest.mark.slow),
        pytest.param(slopes, marks=pytest.mark.slow),
    ],
)
def test_results_are_those_of_one_device_and_stay_with_their_heads(function, mesh, arrays):
    given = [arrays[name] for name in "kvql"]
    expected = jax.jit(function)(*given)
    check(jax.jit(function)(*place(mesh, given)), expected, mesh, rtol=1e-3, atol=1e-4)


def test_a_sharded_sequence_is_refused(mesh, arrays):
    """Before anything is done, and under Explicit axes where arrays are traced as well."""
    keys, values, samples = (arrays[name] for name in "kvq")
    cut = place(mesh, keys, PartitionSpec("batch", None, "head"))
    coreset = cj.Coreset(keys, values, keys[..., 0], np.zeros(keys.shape[:-1], np.int32))
    parts = streaming.merge_and_reduce(size=32, block_size=8)
    stretched = cj.Coreset(cut, values, keys[..., 0], coreset.indices)
    calls = {
        "keys": (
            lambda cut: fitted()(RNG, cut, values, size=SIZE),
            lambda cut: cj.compress(RNG, cut, values, size=SIZE),
            lambda cut: cj.attention(samples, cut, values),
            lambda cut: cj.attend(samples, stretched._replace(keys=cut)),
            lambda cut: guarantees.certificate(cut, values, coreset, rho=1.0),
            lambda cut: guarantees.adversary(RNG, cut, values, coreset, rho=1.0),
            lambda cut: parts.init(RNG, cut, values),
            lambda cut: queries.empty(cut),
            lambda cut: geometry.standardize(cut, values),
        ),
        "values": (lambda cut: cj.balanced()(RNG, keys, cut, size=SIZE),),
        "scores": (
            lambda cut: cj.compress(
                RNG, keys, values, size=SIZE, queries=samples, scores=cut[..., 0]
            ),
        ),
    }
    for name, functions in calls.items():
        for function in functions:
            message = f"{name} must not be sharded along the sequence.* 48 of 96.*batch or heads"
            with pytest.raises(ValueError, match=message):
                function(cut)
            if AxisType.Explicit in mesh.axis_types:
                with pytest.raises(ValueError, match=message):
                    jax.eval_shape(function, cut)
    whole = place(mesh, keys, PartitionSpec())
    assert sample(whole, values).keys.shape == (BATCH, HEADS, SIZE, WIDTH)


def test_equal_meshes_share_a_program_and_none_costs_one_device_any(mesh, arrays, programs):
    given = arrays["k"], arrays["v"]
    sample(*given)
    sample(*place(mesh, given))
    before = programs()
    sample(*given)
    sample(*place(mesh, given))
    assert programs() == before
    # One device has the program that it had: nothing in it knows of devices.
    text = str(jax.make_jaxpr(sample)(*given))
    assert not any(each in text for each in ("shard_map", "reshard", "custom_partitioning"))
