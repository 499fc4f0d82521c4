"""How budgets become sizes: the few that are tried, and which of them every head gets."""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax._src import meshes


def check_axes(name: str, axes: int | Sequence[int]) -> tuple[int, ...]:
    """``axes`` as a tuple; raises ``ValueError`` unless they are one or more static integers."""
    several = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    if not several or any(isinstance(axis, bool) or not isinstance(axis, int) for axis in several):
        raise ValueError(f"{name} must be one or more static Python ints, got {axes!r}.")
    return several


def resolve_axes(name: str, axes: Sequence[int], leading: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of leading axes, counted from the front and in order.

    Args:
      name: the argument's name, for the error.
      axes: leading axes; negative ones count from the last of them, usually the heads.
      leading: the shape of the leading axes.

    Raises:
      ValueError: if there is no such leading axis, or one is named twice.
    """
    count, shown = len(leading), f"got {name} {tuple(axes)} and leading axes {leading}."
    if any(not -count <= axis < count for axis in axes):
        raise ValueError(f"{name} must name leading axes of keys, here {count} of them; {shown}")
    found = tuple(sorted(axis % count for axis in axes))
    if len(set(found)) < len(found):
        raise ValueError(f"{name} must not repeat; {shown}")
    return found


def grid(
    size: int, count: int, least: float, max_multiple: float, num_sizes: int
) -> tuple[int, ...]:
    r"""The sizes at which heads are compressed, of constant ratio below and above ``size``.

    .. math:: m\,a^{i/s}, \; m, \; m\,b^{i/s}, \qquad i = 1, \dots, s

    rounded down, within ``1..n`` and each once.

    Args:
      size: :math:`m`, at most ``count``.
      count: pairs of a head, :math:`n`.
      least: floor of a head's budget as a share of ``size``, :math:`a`.
      max_multiple: its cap as a multiple of ``size``, :math:`b`.
      num_sizes: sizes on either side, :math:`s`.

    >>> grid(64, 1000, 0.5, 2.0, 2)
    (32, 45, 64, 90, 128)
    >>> grid(64, 100, 0.5, 2.0, 2)
    (32, 45, 64, 90, 100)
    """
    ratios = [
        bound ** (i / num_sizes) for bound in (least, max_multiple) for i in range(num_sizes + 1)
    ]
    return tuple(sorted({min(max(int(size * ratio), 1), count) for ratio in ratios}))


def count_largest(
    scores: Float[Array, "*heads n"], axes: tuple[int, ...], *, mean: int, most: int
) -> Int[Array, "*heads"]:
    """How many of the largest scores of all heads that share a budget fall to each of them.

    Args:
      scores: one for each pair ``[..., n]``; one that is not finite is never counted.
      axes: axes over which a budget is shared, ascending.
      mean: scores that are counted, for each head in the mean.
      most: and for one head, at most.

    Returns:
      Counts, int32 ``[...]``. Of equal scores those that are higher in their own head come first,
      so that equal heads share them alike.

    >>> print(count_largest(jnp.array([[9.0, 8.0, 3.0], [7.0, 2.0, 1.0]]), (0,), mean=2, most=3))
    [3 1]
    """
    if not math.prod(scores.shape[axis] for axis in axes) * most:
        return jnp.zeros_like(scores[..., 0], jnp.int32)

    def all_heads(_: None, scores: Array) -> Array:
        last = tuple(range(-len(axes) - 1, -1))
        moved = jnp.moveaxis(scores, axes, last)
        shape = moved.shape[:-1]
        heads = math.prod(shape[axis + 1] for axis in last)
        falling = jnp.where(jnp.isfinite(moved), -moved, jnp.inf)
        falling = jnp.sort(falling, axis=-1)[..., :most]
        rows = falling.reshape(math.prod(shape[: -len(axes)]), heads * most)

        def count(row: Float[Array, " hm"]) -> Int[Array, " h"]:
            places = jnp.zeros_like(row, jnp.int32) + jnp.arange(heads * most, dtype=jnp.int32)
            row, _, owners = jax.lax.sort((row, places % most, places // most), num_keys=3)
            largest = (places < heads * mean) & jnp.isfinite(row)
            nothing = jnp.zeros_like(places, shape=(heads,))
            return nothing.at[owners].add(largest.astype(jnp.int32))

        return jnp.moveaxis(jax.vmap(count)(rows).reshape(shape), tuple(range(-len(axes), 0)), axes)

    return meshes.for_heads(all_heads, scores.ndim - 1, None, scores, together=axes)


def split(
    shares: Float[Array, "*heads"],
    lengths: Int[Array, "*heads"],
    axes: tuple[int, ...],
    *,
    sizes: tuple[int, ...],
    size: int,
) -> Int[Array, "*heads"]:
    r"""Sizes near to given proportions, and never more pairs than ``size`` a head in the mean.

    Heads begin at the least size :math:`g_0`, and go on from :math:`g_k` to :math:`g_{k+1}` in the
    order of

    .. math:: \frac{s_h}{\sqrt{g_k g_{k+1}}},

    the largest first, as long as the pairs suffice. So every head has the size whose ratio to
    :math:`\lambda s_h` is nearest to one, for the largest :math:`\lambda` that can be paid for, and
    what is left over is spent on further steps, in the same order, that still fit. Pairs of
    heads that are shorter than their size go to the others.

    Args:
      shares: :math:`s_h \ge 0`, ``[...]``, to any common factor. One that is not finite counts as
        zero.
      lengths: valid pairs of each head ``[...]``, int32.
      axes: axes over which a budget is shared, ascending.
      sizes: :math:`g_0 < g_1 < \dots`, the first at most ``size``.
      size: mean budget.

    Returns:
      For each head the number of its size in ``sizes``, int32 ``[...]``.
    """

    def all_heads(_: None, shares: Array, lengths: Array) -> Array:
        last = tuple(range(-len(axes), 0))
        heads = math.prod(shares.shape[axis] for axis in axes)
        moved = [jnp.moveaxis(each, axes, last) for each in (shares, lengths)]
        shape = moved[0].shape
        rows = [each.reshape(math.prod(shape) // heads if heads else 0, heads) for each in moved]
        one_budget = functools.partial(_split, sizes=sizes, total=heads * size)
        return jnp.moveaxis(jax.vmap(one_budget)(*rows).reshape(shape), last, axes)

    return meshes.for_heads(all_heads, shares.ndim, None, shares, lengths, together=axes)


def _split(
    shares: Float[Array, " h"],
    lengths: Int[Array, " h"],
    *,
    sizes: tuple[int, ...],
    total: int,
) -> Int[Array, " h"]:
    """The split of one budget; see :func:`split`."""
    kept = jnp.minimum(jnp.asarray(sizes, jnp.int32)[:, None], lengths[None])
    # A head that does not know its share keeps the least, and the others do not mind.
    shares = jnp.where(jnp.isfinite(shares) & (shares > 0), shares, 0)
    middles = [math.sqrt(small * large) for small, large in itertools.pairwise(sizes)]
    urgency = shares[None] / jnp.asarray(middles, shares.dtype)[:, None]
    step, head = (
        jax.lax.broadcasted_iota(jnp.int32, urgency.shape, axis) + jnp.zeros_like(kept[1:])
        for axis in (0, 1)
    )
    columns = (-urgency, step, head, kept[1:] - kept[:-1])
    _, step, head, costs = jax.lax.sort(tuple(map(jnp.ravel, columns)), num_keys=3)

    def upgrade(
        state: tuple[Array, Array], this: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        levels, left = state
        step, head, cost = this
        fits = (levels[head] == step) & (cost <= left)
        levels = levels.at[head].add(fits.astype(jnp.int32))
        return (levels, left - jnp.where(fits, cost, 0)), None

    start = (jnp.zeros_like(lengths), total - jnp.sum(kept[0]))
    (levels, _), _ = jax.lax.scan(upgrade, start, (step, head, costs))
    return levels
