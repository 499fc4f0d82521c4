"""How budgets become sizes: the few that are tried, the split, and the choice head by head."""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.coreset import Coreset


def check_compressor(compressor: object) -> None:
    """Raises ``ValueError`` unless ``compressor`` can be called."""
    if not callable(compressor):
        raise ValueError(f"compressor must be callable, got {compressor!r}.")


def check_share(name: str, share: float) -> float:
    """``share`` as a float; raises ``ValueError`` unless it is static and in ``(0, 1]``."""
    value = float(validation.static_float(name, _given(name, share)))
    if value > 1:
        raise ValueError(f"{name} must be at most 1, got {share!r}.")
    return value


def check_multiple(name: str, multiple: float) -> float:
    """``multiple`` as a float; raises ``ValueError`` unless it is static and at least 1."""
    value = float(validation.static_float(name, _given(name, multiple)))
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {multiple!r}.")
    return value


def _given(name: str, value: float | None) -> float:
    if value is None:
        raise ValueError(f"{name} must be a number, got None.")
    return value


def check_axes(axes: int | Sequence[int]) -> tuple[int, ...]:
    """``axes`` as a tuple; raises ``ValueError`` unless they are static integers, no two alike."""
    several = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    if not several or any(isinstance(axis, bool) or not isinstance(axis, int) for axis in several):
        raise ValueError(f"axes must be one or more static Python ints, got {axes!r}.")
    return several


def resolve_axes(
    name: str, axes: Sequence[int], keys: Float[Array, "*heads n d"]
) -> tuple[int, ...]:
    """Numbers of leading axes of keys, counted from the front and in order.

    Args:
      name: the argument's name, for the error.
      axes: leading axes; negative ones count from the last of them, usually the heads.
      keys: keys ``[..., n, d]``.

    Raises:
      ValueError: if keys have no such leading axis, or one is named twice.
    """
    leading = keys.ndim - 2
    if any(not -leading <= axis < leading for axis in axes):
        raise ValueError(
            f"{name} must name leading axes of keys, of which there are {leading}; "
            f"got {name} {tuple(axes)} and keys {keys.shape}."
        )
    found = tuple(sorted(axis % leading for axis in axes))
    if len(set(found)) < len(found):
        raise ValueError(f"{name} must not repeat; got {name} {tuple(axes)} and keys {keys.shape}.")
    return found


def grid(size: int, count: int, least: float, most: float, steps: int) -> tuple[int, ...]:
    r"""The sizes at which heads are compressed, of constant ratio below and above ``size``.

    .. math:: m\,\mathrm{least}^{i/s}, \; m, \; m\,\mathrm{most}^{i/s}, \qquad i = 1, \dots, s

    rounded down, within ``1..n`` and each once.

    Args:
      size: :math:`m`, at most ``count``.
      count: pairs of a head, :math:`n`.
      least: floor of a head's budget as a share of ``size``.
      most: its cap as a multiple of ``size``.
      steps: :math:`s`, sizes on either side.

    >>> grid(64, 1000, 0.5, 2.0, 2)
    (32, 45, 64, 90, 128)
    >>> grid(64, 100, 0.5, 2.0, 2)
    (32, 45, 64, 90, 100)
    """
    sizes = {size}
    for step in range(1, steps + 1):
        sizes.add(int(size * least ** (step / steps)))
        sizes.add(int(size * most ** (step / steps)))
    return tuple(sorted({min(max(each, 1), count) for each in sizes}))


def _split(
    shares: Float[Array, " h"],
    lengths: Int[Array, " h"],
    *,
    sizes: tuple[int, ...],
    total: int,
) -> Int[Array, " h"]:
    """The split of one budget; see :func:`split`."""
    heads, upgrades = shares.shape[0], len(sizes) - 1
    kept = jnp.minimum(jnp.asarray(sizes, jnp.int32)[:, None], lengths[None])
    left = total - jnp.sum(kept[0])
    # A head that does not know its share keeps the least, and the others do not mind.
    shares = jnp.where(jnp.isfinite(shares) & (shares > 0), shares, 0)
    middles = [math.sqrt(small * large) for small, large in itertools.pairwise(sizes)]
    urgency = shares[None] / jnp.asarray(middles, shares.dtype)[:, None]
    zeros = jnp.zeros_like(urgency, jnp.int32)
    step = zeros + jnp.arange(upgrades, dtype=jnp.int32)[:, None]
    head = zeros + jnp.arange(heads, dtype=jnp.int32)[None]
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

    start = (jnp.zeros_like(lengths), left)
    (levels, _), _ = jax.lax.scan(upgrade, start, (step, head, costs))
    return levels


def split(
    shares: Float[Array, "*heads"],
    lengths: Int[Array, "*heads"] | None,
    count: int,
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
      lengths: valid pairs ``[...]``, or ``None`` for ``count`` everywhere.
      count: slots of a head.
      axes: axes over which a budget is shared, ascending.
      sizes: :math:`g_0 < g_1 < \dots`, the first at most ``size``.
      size: mean budget.

    Returns:
      For each head the number of its size in ``sizes``, int32 ``[...]``.
    """
    # Made from the shares, so that they vary over the mesh axes that those do.
    lengths = jnp.zeros_like(shares, jnp.int32) + (
        count if lengths is None else jnp.asarray(lengths).astype(jnp.int32)
    )
    return _split_all(shares, lengths, axes=axes, sizes=sizes, size=size)


@functools.partial(jax.jit, static_argnames=("axes", "sizes", "size"))
def _split_all(
    shares: Float[Array, "*heads"],
    lengths: Int[Array, "*heads"],
    *,
    axes: tuple[int, ...],
    sizes: tuple[int, ...],
    size: int,
) -> Int[Array, "*heads"]:
    last = tuple(range(-len(axes), 0))
    heads = math.prod(shares.shape[axis] for axis in axes)
    moved = [jnp.moveaxis(each, axes, last) for each in (shares, lengths)]
    shape = moved[0].shape
    rows = [each.reshape(math.prod(shape) // heads if heads else 0, heads) for each in moved]
    one_budget = functools.partial(_split, sizes=sizes, total=heads * size)
    return jnp.moveaxis(jax.vmap(one_budget)(*rows).reshape(shape), last, axes)


def pad(coreset: Coreset, slots: int) -> Coreset:
    """The coreset with empty slots behind its own; a head that is NaN has NaN there too.

    Args:
      coreset: any coreset, ``[..., m]``.
      slots: slots that it shall have, at least ``m``.
    """
    more = slots - coreset.indices.shape[-1]
    if not more:
        return coreset

    def behind(array: Array, axis: int, filling: float) -> Array:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, more)
        return jnp.pad(array, widths, constant_values=filling)

    sick = jnp.all(jnp.isnan(coreset.log_weights), axis=-1, keepdims=True)
    log_weights = behind(coreset.log_weights, -1, -np.inf)
    normalizers = coreset.normalizers
    return Coreset(
        keys=behind(coreset.keys, -2, 0),
        values=behind(coreset.values, -2, 0),
        log_weights=jnp.where(sick, jnp.nan, log_weights),
        indices=behind(coreset.indices, -1, -1),
        normalizers=None if normalizers is None else behind(normalizers, -1, 1),
    )


def alike(coresets: Sequence[Coreset], slots: int) -> list[Coreset]:
    """Coresets of as many slots each, with normalizers in all of them or in none."""
    padded = [pad(coreset, slots) for coreset in coresets]
    given = [each.normalizers for each in padded if each.normalizers is not None]
    if not given:
        return padded
    # A cache that was kept whole has none, and its denominators sum ones.
    return [
        each
        if each.normalizers is not None
        else each._replace(normalizers=jnp.ones_like(each.log_weights, given[0].dtype))
        for each in padded
    ]


@jax.jit
def select(levels: Int[Array, "*heads"], coresets: Sequence[Coreset]) -> Coreset:
    """Of some coresets of all heads the one that each head has chosen.

    Args:
      levels: number of the coreset, ``[...]``.
      coresets: their slots ascend; the result has those of the last.
    """
    chosen, *others = alike(coresets, coresets[-1].indices.shape[-1])
    for number, other in enumerate(others, 1):

        def take(one: Array, another: Array, number: int = number) -> Array:
            here = levels.reshape(*levels.shape, *[1] * (one.ndim - levels.ndim)) == number
            return jnp.where(here, another, one)

        chosen = jax.tree.map(take, chosen, other)
    return chosen
