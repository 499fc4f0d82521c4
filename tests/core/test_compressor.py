"""Compressors as values: options that are checked, hashed, traced, and made one's own."""

import dataclasses
import functools
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import refit
from coreset_jax._src.core.compressor import leaf
from tests.compressors import asking, newest, sampled, signed

RNG = jax.random.key(0)
HEADS, COUNT, SIZE, WIDTH = 3, 20, 8, 4


class keeps_first(cj.Compressor):  # noqa: N801
    """What a user writes."""

    def compress_head(self, head, size):
        return head.pairs(jnp.arange(size), jnp.zeros(size, head.dtype)), cj.Info()


class weighing(cj.Compressor):  # noqa: N801
    """The first pairs, with options of all sorts in their weights."""

    rho: float | None = leaf(default=None)
    query_norm: float | None = leaf(default=None)
    scale: float | None = leaf(default=None)
    factor: float = leaf(default=1.0)
    shift: float = 0.0
    rounds: int = 1

    def validate(self):
        self.static_float("shift", positive=False)
        self.static_count("rounds")

    def compress_head(self, head, size):
        weight = self.factor * head.scale * head.query_norm + self.shift + self.rounds
        return head.pairs(jnp.arange(size), jnp.full(size, weight, head.dtype)), cj.Info()


@pytest.fixture(scope="module")
def cache():
    return np.random.default_rng(0).standard_normal((2, HEADS, COUNT, WIDTH)).astype(np.float32)


def test_equal_options_are_equal_compressors():
    radii = np.array([1.0, 2.0, 3.0])
    alike = [
        (weighing(), weighing()),
        (weighing(rho=2), weighing(rho=jnp.float32(2.0))),
        (weighing(rho=radii), weighing(rho=jnp.asarray(radii))),
        (weighing(rounds=np.int64(3)), weighing(rounds=3)),
        (weighing(shift=1), weighing(shift=np.float32(1.0))),
        (
            cj.chunked(weighing(scale=2.0), chunk_size=4),
            cj.chunked(weighing(scale=2), chunk_size=4),
        ),
    ]
    for one, other in alike:
        assert one == other
        assert hash(one) == hash(other)
        assert {one: "found"}[other] == "found"
    different = [
        weighing(),
        weighing(rho=2.0),
        weighing(query_norm=2.0),
        weighing(rho=radii),
        weighing(rho=radii[:1]),
        weighing(rounds=2),
        sampled(),
        cj.chunked(sampled(), chunk_size=4),
        cj.chunked(sampled(), chunk_size=5),
        cj.chunked(newest(), chunk_size=4),
    ]
    assert len(set(different)) == len(different)
    assert weighing() != "weighing()"
    assert sampled() != newest()


def test_compressors_are_frozen_and_copied_with_checks():
    compressor = weighing(rho=2.0, rounds=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        compressor.rho = 1.0
    assert dataclasses.replace(compressor, rho=3.0) == weighing(rho=3.0, rounds=3)
    with pytest.raises(ValueError, match="rho must be positive"):
        dataclasses.replace(compressor, rho=-1.0)
    assert pickle.loads(pickle.dumps(compressor)) == compressor
    assert "rho=2.0" in repr(compressor)
    assert "rounds=3" in repr(compressor)
    assert (type(weighing(rounds=np.int64(3)).rounds), type(weighing(shift=1).shift)) == (
        int,
        float,
    )


def test_options_are_given_by_their_names():
    for make in (
        lambda: weighing(1.0),
        lambda: cj.balanced(1.0),
        lambda: cj.fitted(512),
        lambda: cj.keep_ends(sampled(), 4),
        lambda: refit.weights(sampled(), 0.1),
    ):
        with pytest.raises(TypeError, match="positional"):
            make()
    for make in (
        lambda: weighing(radius=1.0),
        lambda: cj.balanced(steps=3),
        lambda: cj.chunked(sampled(), most=8),
        lambda: sampled(rho=1.0, sizes=2),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            make()
    # The inner compressor is the one that needs no name.
    assert cj.chunked(compressor=sampled()) == cj.chunked(sampled())
    with pytest.raises(TypeError, match="compressor"):
        cj.chunked()
    for given in (None, 3, sampled, lambda *pairs: pairs):
        with pytest.raises(ValueError, match="compressor must be a Compressor"):
            cj.chunked(given)


def test_the_radius_is_named_once():
    for make in (
        weighing,
        cj.balanced,
        cj.pivoted,
        cj.fitted,
        functools.partial(refit.weights, sampled()),
    ):
        for rho, norm in ((1.0, 1.0), (np.ones(3), 2.0)):
            with pytest.raises(ValueError, match="rho and query_norm both name the query radius"):
                make(rho=rho, query_norm=norm)
    # An outer radius is the one of the fit, and that of the compressor inside stays its own.
    outer = refit.weights(weighing(rho=1.0, scale=0.5), query_norm=2.0)
    assert outer.query_ball == (None, 2.0, 0.5)
    assert refit.weights(weighing(rho=1.0), scale=0.25).query_ball == (1.0, None, 0.25)
    assert cj.chunked(weighing(rho=1.0)).query_ball == (1.0, None, None)


def test_options_are_leaves_of_a_pytree(cache):
    radii = np.float32([1.0, 2.0, 3.0])
    compressor = cj.chunked(weighing(query_norm=radii, rounds=2), chunk_size=4)
    (leaves, treedef) = jax.tree.flatten(compressor)
    assert [np.shape(each) for each in leaves] == [(3,), ()]
    assert jax.tree.unflatten(treedef, leaves) == compressor
    doubled = jax.tree.map(lambda each: 2 * each, compressor)
    assert doubled == cj.chunked(weighing(query_norm=2 * radii, factor=2.0, rounds=2), chunk_size=4)
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(compressor)
    ]
    assert paths == [".compressor.query_norm", ".compressor.factor"]

    def weights(compressor, keys, values):
        return compressor(RNG, keys, values, size=SIZE).log_weights[:, 0]

    compress = jax.jit(chex.assert_max_traces(weights, n=1))
    for norm, scale in ((2.0, 0.5), (3.0, 4.0)):
        found = compress(weighing(query_norm=norm, scale=scale), *cache)
        np.testing.assert_allclose(found, norm * scale + 1, rtol=1e-6)
        same = weighing(query_norm=norm, scale=scale)(RNG, *cache, size=SIZE)
        np.testing.assert_allclose(same.log_weights[:, 0], found, rtol=1e-6)

    def traced(norm, scale):
        return weights(weighing(query_norm=norm, scale=scale), *cache)

    inside = jax.jit(chex.assert_max_traces(traced, n=1))
    for norm, scale in ((radii, 0.5), (2 * radii, 4.0)):
        np.testing.assert_allclose(inside(norm, scale), norm * scale + 1, rtol=1e-6)


def test_options_that_are_arrays_are_one_number_or_one_a_head(cache):
    for compressor in (
        weighing(factor=np.ones(2)),
        cj.chunked(weighing(rho=np.ones((3, 1)))),
        refit.weights(sampled(), kernel_radius=np.ones(4)),
    ):
        with pytest.raises(ValueError, match=r"must be a scalar or have shape \(3,\)"):
            compressor(RNG, *cache, size=SIZE)
    for value in (0.0, -1.0, np.nan, np.inf, "2", True, 1j, np.array([1.0, -1.0, 1.0])):
        for name in ("rho", "factor"):
            with pytest.raises(ValueError, match=f"{name} must be"):
                weighing(**{name: value})
    for name, value in (("rounds", 0), ("rounds", 1.0), ("rounds", True), ("rounds", None)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            weighing(**{name: value})
    for value in ("1", np.nan, None, 1j):
        with pytest.raises(ValueError, match="shift must be"):
            weighing(shift=value)
    with pytest.raises(ValueError, match="shift is fixed at compile time"):
        jax.jit(lambda shift: weighing(shift=shift))(1.0)


def test_a_compressor_of_five_lines_does_everything(cache):
    """Ragged heads, NaN, jit, vmap, other compressors around it: none of it is its own work."""
    lengths = np.array([COUNT, 12, 3])
    coreset = keeps_first()(RNG, *cache, size=SIZE, lengths=lengths)
    held = np.arange(SIZE) < lengths[:, None]
    # It does not know of lengths: where a head is shorter, what it asks for is an empty slot.
    np.testing.assert_array_equal(coreset.indices, np.where(held, np.arange(SIZE), -1))
    np.testing.assert_array_equal(coreset.log_weights, np.where(held, 0, -np.inf))
    np.testing.assert_array_equal(coreset.keys[held], cache[0][:, :SIZE][held])
    broken = cache.copy()
    broken[0, 1, COUNT - 1] = np.nan
    weights = keeps_first()(RNG, *broken, size=SIZE).log_weights
    np.testing.assert_array_equal(np.isnan(weights).all(axis=1), [False, True, False])
    whole = keeps_first()(RNG, *cache, size=COUNT)
    np.testing.assert_array_equal(whole.indices, np.broadcast_to(np.arange(COUNT), (3, COUNT)))

    chunks = cj.chunked(keeps_first(), chunk_size=4)(RNG, *cache, size=SIZE)
    np.testing.assert_array_equal(chunks.indices[0], [0, 1, 2, 3, 10, 11, 12, 13])
    ends = cj.keep_ends(keeps_first(), sinks=1, recent_fraction=0.25)(RNG, *cache, size=SIZE)
    np.testing.assert_array_equal(ends.indices[0], [0, 1, 2, 3, 4, 5, 18, 19])
    refitted, info = refit.weights(keeps_first()).with_info(RNG, *cache, size=SIZE)
    np.testing.assert_array_equal(refitted.indices, coreset.indices[:1].repeat(3, axis=0))
    assert np.all(info.accepted)
    assert np.all(np.sum(np.exp(refitted.log_weights), axis=-1) > 1.5 * SIZE)


def test_traits_go_through_wrappers():
    names = (
        "needs_queries",
        "keeps_pairs",
        "signed",
        "of_products",
        "reads_queries",
    )

    def traits(compressor):
        return {name for name in names if getattr(compressor, name)}

    assert traits(sampled()) == {"keeps_pairs"}
    assert traits(asking()) == {"keeps_pairs", "needs_queries", "reads_queries"}
    assert traits(weighing()) == {"keeps_pairs", "reads_queries"}
    # A radius that is known needs no samples.
    for known in ({"rho": 1.0}, {"query_norm": 1.0}, {"query_norm": np.ones(3)}):
        assert traits(weighing(**known)) == {"keeps_pairs"}
    for wrap in (cj.chunked, cj.keep_ends):
        for inner in (sampled(), asking(), weighing(), signed(), weighing(rho=np.ones(3))):
            assert traits(wrap(inner)) == traits(inner)
            assert wrap(inner).composite
    assert not cj.balanced().composite
    assert not refit.weights(sampled()).composite
    assert refit.weights(sampled()).keeps_pairs
    assert not refit.nystrom(sampled()).keeps_pairs
    assert not cj.fitted().keeps_pairs
    assert refit.matching(sampled()).needs_queries


def test_queries_are_demanded_where_they_are_needed(cache):
    message = re.escape("queries must be given to asking")
    for compressor in (asking(), cj.chunked(asking(), chunk_size=4), cj.keep_ends(asking())):
        for queries in (None, cache[0][:, :0]):
            with pytest.raises(
                ValueError, match="queries must be given to " + type(compressor).__name__
            ):
                compressor(RNG, *cache, size=SIZE, queries=queries)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(asking(), size=SIZE), RNG, *cache)
