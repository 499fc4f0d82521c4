r"""One halving of a whole cache, block by block, with the field carried from block to block.

Halving a cache keeps the pairs whose sign is +1; the discrepancy
:math:`D = \sum_i x_i w_i` is twice the kept half minus the whole. Blocks balanced on their own
leave residuals that add up like noise, and the error of a coreset of size m then falls only like
:math:`1/\sqrt m`. Here each block starts from the pull of everything before it, in its own level
and in the levels before: with :math:`c_i` the error of the kept set against the source, in units
of a kept pair's weight, one level maps :math:`c \mapsto (c + x)/2`, so that the field that one
level ends with, halved, is the field that the next one starts from.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from coreset_jax._src.balance.fields import Field, UnitPairs
from coreset_jax._src.balance.walks import Walk, swap_refinement

Loader = Callable[[Int[Array, " b"], Bool[Array, " b"]], UnitPairs]


class Level(NamedTuple):
    """The pairs that are left after some halvings.

    Attributes:
      indices: their places in the source ``[n]``; entries from ``left`` on are unused.
      doubled: which of them carry twice the weight of the others ``[n]``.
      left: number of valid entries, a scalar.
      field: the error of the level against the source, in units of a pair's weight.
    """

    indices: Int[Array, " n"]
    doubled: Bool[Array, " n"]
    left: Int[Array, ""]
    field: Field


def halve(
    rng: Array,
    level: Level,
    load: Loader,
    target: Int[Array, ""],
    blocks: Int[Array, ""],
    passes: Int[Array, ""],
    *,
    walk: Walk,
    block_size: int,
    max_swaps: int,
) -> Level:
    r"""Halves the first :math:`2(\mathrm{left} - \mathrm{target})` pairs of a level.

    The other pairs keep their weight, so that any target between half the pairs and all of them
    can be met. If they are the odd one of a level that is halved throughout, it counts as kept
    (its weight doubles with the others'). The pairs that are left then stand for one pair more
    than there were, and the field says so: attention divides that common factor out, but the
    levels after this one balance against it. To take it out would need the pull of the mean pair,
    another pass over the cache, for an effect of order one over the pairs left.

    The first pass walks through the blocks; each further pass takes a block's signs out of the
    field, refines them by swaps against everything else, and puts them back.

    Args:
      rng: a JAX random key.
      level: the pairs that are left; those to be halved come first.
      load: reads unit pairs at given places of the source; where its mask is false it must
        return zeros.
      target: pairs to be left, at least half of those there are.
      blocks: blocks to go through, at least as many as the pairs to be halved need.
      passes: passes over the blocks, at least one.
      walk: the walk that picks the signs.
      block_size: pairs in a block, even.
      max_swaps: swaps in a block at most, on each pass.

    Returns:
      The next level, in the order of this one.
    """
    width = level.indices.shape[0]
    dtype = level.field.radius.dtype
    halved = 2 * (level.left - target)
    rest = level.left - halved
    lone = rest == 1
    padded = -(-width // block_size) * block_size
    indices = jnp.pad(level.indices, (0, padded - width))

    # The odd pair out is kept before anything is balanced against it.
    single = jax.lax.dynamic_slice_in_dim(indices, halved, 1)
    field = level.field.add(load(single, lone[None]), lone[None].astype(dtype))

    def step(number: Array, carry: tuple[Array, Field]) -> tuple[Array, Field]:
        signs, field = carry
        start = number % blocks * block_size
        first = number < blocks
        count = jnp.clip(halved - start, 0, block_size)
        pairs = load(
            jax.lax.dynamic_slice_in_dim(indices, start, block_size),
            jnp.arange(block_size) < count,
        )
        old = jax.lax.dynamic_slice_in_dim(signs, start, block_size).astype(dtype)
        field = jax.lax.cond(first, lambda: field, lambda: field.add(pairs, -old))
        gram = field.gram(pairs)
        pull = field.read(pairs)
        walk_rng = jax.random.fold_in(rng, number)
        new = jax.lax.cond(first, lambda: walk(walk_rng, gram, pull, count), lambda: old)
        if max_swaps:
            new = swap_refinement(gram, pull, new, max_swaps=max_swaps)
        signs = jax.lax.dynamic_update_slice_in_dim(signs, new.astype(jnp.int8), start, 0)
        return signs, field.add(pairs, new)

    # Derived from the indices, so that the carry has their sharding and mesh axes.
    signs = jnp.zeros_like(indices, dtype=jnp.int8)
    signs, field = jax.lax.fori_loop(0, blocks * passes, step, (signs, field))

    signs = signs[:width]
    kept = (jnp.arange(width) < level.left) & (signs >= 0)
    doubled = jnp.where(rest > 1, level.doubled | (signs > 0), level.doubled)
    slots = jnp.where(kept, jnp.cumsum(kept) - 1, width)
    return Level(
        jnp.zeros_like(level.indices).at[slots].set(level.indices, mode="drop"),
        jnp.zeros_like(level.doubled).at[slots].set(doubled, mode="drop"),
        target,
        field.halve(),
    )
