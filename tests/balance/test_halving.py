"""One halving of a whole cache: exact counts, and an error that is what it says."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import walks
from coreset_jax._src.balance.fields import UnitPairs
from coreset_jax._src.balance.halving import Level, halve

COUNT, BLOCK, WIDTH = 26, 8, 3


class VectorField(NamedTuple):
    """A discrepancy of plain vectors, and the coefficients that made it."""

    radius: jax.Array
    total: jax.Array
    coefficients: jax.Array

    def gram(self, pairs):
        return pairs.keys @ pairs.keys.T

    def read(self, pairs):
        return pairs.keys @ self.total

    def add(self, pairs, signs):
        return self._replace(
            total=self.total + signs @ pairs.keys,
            coefficients=self.coefficients.at[pairs.indices].add(signs),
        )

    def halve(self):
        return self._replace(total=self.total / 2, coefficients=self.coefficients / 2)


@pytest.fixture(scope="module")
def vectors():
    return jnp.asarray(np.random.default_rng(0).standard_normal((COUNT, WIDTH)), jnp.float32)


def start(left):
    """Pairs in the order of the source, the first ``left`` of them meant."""
    field = VectorField(jnp.ones(()), jnp.zeros(WIDTH), jnp.zeros(COUNT))
    return Level(jnp.arange(COUNT), jnp.zeros(COUNT, bool), jnp.asarray(left), field)


def halver(vectors, walk=walks.greedy_pairs, max_swaps=4):
    def load(indices, inside):
        return UnitPairs(
            jnp.where(inside[:, None], vectors[indices], 0.0), jnp.zeros((BLOCK, 1)), indices
        )

    def run(level, target, passes=1):
        blocks = (2 * (level.left - target) + BLOCK - 1) // BLOCK
        return halve(
            jax.random.key(0),
            level,
            load,
            jnp.int32(target),
            jnp.int32(blocks),
            jnp.int32(passes),
            walk=walk,
            block_size=BLOCK,
            max_swaps=max_swaps,
        )

    return run


TARGETS = np.array(
    [(left, target) for left in range(1, COUNT + 1) for target in range(-(-left // 2), left + 1)]
)


@pytest.fixture(scope="module", params=["greedy_pairs", "self_balancing"])
def halved(request, vectors):
    """One halving for every number of pairs and every number to be left."""
    run = halver(vectors, getattr(walks, request.param))
    return jax.device_get(
        jax.jit(jax.vmap(lambda left, target: run(start(left), target)))(*TARGETS.T)
    )


def cases(halved):
    for case, (left, target) in enumerate(TARGETS):
        level = jax.tree.map(lambda leaf, case=case: leaf[case], halved)
        yield left, target, level, level.indices[:target]


def test_exactly_the_target_is_left_in_order(halved):
    for left, target, level, kept in cases(halved):
        assert level.left == target
        assert np.all(np.diff(kept) > 0)
        assert kept[-1] < left
        # Half of those that were halved, and all of the rest.
        half = np.count_nonzero(kept < 2 * (left - target))
        assert half == left - target
        assert not np.any(level.indices[target:])


def test_weights_double_where_pairs_were_halved(halved):
    for left, target, level, kept in cases(halved):
        halved_pairs = 2 * (left - target)
        rest = left - halved_pairs
        # Halved throughout (but for an odd one), all weigh the same, and nothing is marked.
        expected = kept < halved_pairs if rest > 1 else np.zeros(target, bool)
        np.testing.assert_array_equal(level.doubled[:target], expected)
        assert not np.any(level.doubled[target:])


def test_the_field_is_the_error_of_the_kept_set(halved, vectors):
    for left, target, level, kept in cases(halved):
        halved_pairs = 2 * (left - target)
        rest = left - halved_pairs
        weights = np.zeros(COUNT)
        weights[kept] = 1.0
        weights[halved_pairs:left] = 1.0 if rest == 1 and 2 * target > left else 0.5
        source = np.where(np.arange(COUNT) < left, 0.5, 0.0)
        np.testing.assert_array_equal(level.field.coefficients, weights - source)
        np.testing.assert_allclose(
            level.field.total, level.field.coefficients @ vectors, rtol=1e-5, atol=1e-5
        )


def test_errors_of_several_levels_are_counted_against_the_source(vectors):
    run = jax.jit(halver(vectors))
    level = jax.jit(lambda: start(COUNT))()
    # An odd number on the way, whose odd one out is kept.
    for depth, target in enumerate((13, 7, 4, 2, 1), start=1):
        level = run(level, target)
        expected = np.full(COUNT, -(0.5**depth))
        expected[level.indices[:target]] += 1.0
        np.testing.assert_allclose(level.field.coefficients, expected, rtol=1e-6)


def test_every_further_pass_lowers_the_error(vectors):
    run = halver(vectors, max_swaps=1)
    levels = jax.jit(jax.vmap(lambda passes: run(start(24), 12, passes)))(np.array([1, 2, 3, 8]))
    energies = np.sum(np.square(levels.field.coefficients @ np.asarray(vectors)), axis=1)
    assert np.all(np.diff(energies) <= 1e-6)
    assert energies[-1] < energies[0]


def test_blocks_continue_the_walk_of_those_before(vectors):
    """Greedy pairs in blocks of eight are greedy pairs over the whole."""

    @jax.jit
    def both(vectors):
        level = halver(vectors, max_swaps=0)(start(COUNT), 13)
        field = jnp.zeros(COUNT)
        return level, walks.greedy_pairs(jax.random.key(0), vectors @ vectors.T, field, COUNT)

    level, signs = both(vectors)
    np.testing.assert_array_equal(level.indices[:13], np.flatnonzero(signs > 0))
