"""Rows of a cache: reordered and repeated, emptied, and begun anew."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax.nn import CoresetCache

LENGTHS = np.array([3, 150, 57, 90])


@pytest.fixture(scope="module")
def filled(sequences, empty_cache, subsets):
    """Compressed by random draws, with prompts of several lengths."""
    return empty_cache(subsets).read_and_extend(*sequences, LENGTHS)[1]


def continued(cache, sequences, starts, steps=20):
    """Outputs of the next tokens of some sequences, one at a time, and the cache behind them."""
    outputs = []
    for step in range(steps):
        found, cache = cache.read_and_extend(*sequences.following(starts + step, 1))
        outputs.append(np.asarray(found))
    return np.concatenate(outputs, axis=1), cache


def taken(tree, rows):
    return jax.tree.map(lambda leaf: leaf[rows], tree)


@pytest.mark.parametrize(
    ("reorder", "order"),
    [
        (lambda leaf: leaf[jnp.array([2, 1, 1, 3])], [2, 1, 1, 3]),
        (lambda leaf: jnp.repeat(leaf[1:3], 2, axis=0), [1, 1, 2, 2]),
    ],
    ids=["gathered", "repeated"],
)
def test_reordered_sequences_go_on_bit_by_bit(sequences, filled, reorder, order):
    expected = continued(filled, sequences, LENGTHS)
    reordered = jax.tree.map(reorder, filled)
    found = continued(reordered, sequences.entries(*order), LENGTHS[order])
    chex.assert_trees_all_equal(found, taken(expected, np.array(order)))


def test_reset_rows_are_empty_and_others_as_they_were(sequences, filled, empty_cache, subsets):
    rows = np.array([False, True, False, True])
    spoiled = jax.tree.map(
        lambda leaf: leaf.at[1].set(jnp.nan) if leaf.dtype == jnp.float32 else leaf, filled
    )
    reset = jax.jit(CoresetCache.reset)(spoiled, rows)
    chex.assert_trees_all_equal(taken(reset, rows), taken(empty_cache(subsets), rows))
    chex.assert_trees_all_equal(taken(reset, ~rows), taken(filled, ~rows))
    chex.assert_trees_all_equal(filled.reset(rows), reset)
    for wrong in (rows[:3], rows.astype(int), np.array([1, 3]), True):
        with pytest.raises(ValueError, match="rows must be booleans of shape"):
            filled.reset(wrong)


@pytest.mark.parametrize("filling", [None, np.nan])
def test_a_row_of_length_zero_is_an_empty_one(sequences, filled, empty_cache, subsets, filling):
    """By whatever means it came to be of that length."""
    rows = np.array([False, True, True, False])
    cut = dataclasses.replace(filled, lengths=jnp.where(rows, 0, filled.lengths))
    if filling is not None:
        cut = jax.tree.map(
            lambda leaf: leaf.at[1].set(filling) if leaf.dtype == jnp.float32 else leaf, cut
        )
    expected = filled.reset(rows)
    np.testing.assert_array_equal(cut.positions, expected.positions)
    outputs = cut.attend(*sequences.cut(0, 1)[:1])
    np.testing.assert_array_equal(outputs[rows], 0)
    np.testing.assert_array_equal(outputs[~rows], filled.attend(sequences.queries[:, :1])[~rows])
    starts = np.where(rows, 0, LENGTHS)
    chex.assert_trees_all_equal(
        continued(cut, sequences, starts, 30), continued(expected, sequences, starts, 30)
    )
    again = [each.read_and_extend(*sequences, LENGTHS) for each in (cut, expected)]
    chex.assert_trees_all_equal(*again)


def test_many_pairs_behind_a_row_of_length_zero(sequences, empty_cache):
    """With the default, whose middle takes them all at once."""
    filled = empty_cache().append(*sequences[1:])
    rows = np.array([False, True, False, False])
    cut = dataclasses.replace(filled, lengths=jnp.where(rows, 0, filled.lengths))
    found, expected = (each.append(*sequences[1:], LENGTHS) for each in (cut, filled.reset(rows)))
    chex.assert_trees_all_equal(found, expected)
