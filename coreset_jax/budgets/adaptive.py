"""AdaKV's split: a head's budget is how many of the layer's largest scores fall to it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.baselines.scores import Head, mean_attention
from coreset_jax.budgets.split import (
    check_axes,
    check_compressor,
    check_multiple,
    check_share,
    grid,
    resolve_axes,
    select,
    split,
)
from coreset_jax.coreset import Compressor, Coreset

# Attention weights that are held at a time, over all heads.
_WEIGHTS = 2**24


@functools.partial(jax.jit, static_argnames=("axes", "size", "safeguard", "scale"))
def _shares(
    keys: Float[Array, "*heads n d"],
    lengths: Int[Array, "*heads"] | None,
    queries: Float[Array, "*heads q d"],
    *,
    axes: tuple[int, ...],
    size: int,
    safeguard: float,
    scale: float | None,
) -> Float[Array, "*heads"]:
    """The budget of every head before it is rounded to a size."""
    count = keys.shape[-2]
    counts = jnp.zeros_like(keys[..., 0, 0], jnp.int32) + (
        count if lengths is None else jnp.asarray(lengths).astype(jnp.int32)
    )
    block_size = max(_WEIGHTS // max(math.prod(keys.shape[:-1]), 1), 1)

    def one_head(keys: Array, length: Array, queries: Array) -> Array:
        inside = jnp.arange(count) < length
        keys = jnp.where(inside[:, None], keys, jnp.zeros_like(keys))
        head = Head(keys, keys, inside, length, None)
        scores = mean_attention(head, queries, scale=scale, block_size=block_size)
        # A head that is not finite has no part in this.
        return jnp.where(inside & jnp.isfinite(scores), scores, -jnp.inf)

    for _ in keys.shape[:-2]:
        one_head = jax.vmap(one_head)
    scores = one_head(keys, counts, queries)

    last = tuple(range(-len(axes) - 1, -1))
    moved = jnp.moveaxis(scores, axes, last)
    heads = math.prod(moved.shape[axis] for axis in last)
    rows = moved.reshape(math.prod(moved.shape[: -1 - len(axes)]), heads * count)

    def count_largest(row: Array) -> Array:
        places = jnp.arange(heads * count, dtype=jnp.int32)
        # Of equal scores those of earlier pairs first, so that equal heads share them alike.
        keys_of_sort = (-row, places % count, places // count)
        falling, _, owners = jax.lax.sort(keys_of_sort, num_keys=3)
        largest = (places < heads * size) & jnp.isfinite(falling)
        return jnp.zeros_like(row, shape=(heads,)).at[owners].add(largest.astype(row.dtype))

    found = jax.vmap(count_largest)(rows).reshape(moved.shape[:-1])
    # The last axis of scores, the pairs, is gone.
    found = jnp.moveaxis(found, tuple(range(-len(axes), 0)), axes)
    return safeguard * size + (1 - safeguard) * found


@dataclasses.dataclass(frozen=True)
class _Adaptive:
    compressor: Compressor
    safeguard: float
    most: float
    steps: int
    axes: tuple[int, ...]
    scale: float | None

    def __call__(
        self,
        rng: Array,
        keys: Float[Array, "*heads n d"],
        values: Float[Array, "*heads n dv"],
        *,
        size: int,
        lengths: Int[Array, "*heads"] | None = None,
        queries: Float[Array, "*heads q d"] | None = None,
    ) -> Coreset:
        validation.check_cache(keys, values)
        validation.check_size(size)
        validation.check_lengths(lengths, keys)
        axes = resolve_axes("axes", self.axes, keys)
        if queries is None:
            raise ValueError(
                f"queries must be given to this split, [..., q, {keys.shape[-1]}] with the "
                f"leading axes of keys {keys.shape}; got None."
            )
        validation.check_queries(queries, keys)
        if queries.shape[-2] < 1:
            raise ValueError(
                f"queries must not be empty; got queries {queries.shape} and keys {keys.shape}."
            )
        compress = functools.partial(
            self.compressor, rng, keys, values, lengths=lengths, queries=queries
        )
        count = keys.shape[-2]
        if size >= count:
            return compress(size=size)
        sizes = grid(int(size), count, self.safeguard, self.most, self.steps)
        shares = _shares(
            keys,
            lengths,
            queries,
            axes=axes,
            size=int(size),
            safeguard=self.safeguard,
            scale=self.scale,
        )
        levels = split(shares, lengths, count, axes, sizes=sizes, size=int(size))
        return select(levels, [compress(size=each) for each in sizes])


def adaptive(
    compressor: Compressor,
    *,
    safeguard: float = 0.2,
    most: float = 2.0,
    steps: int = 3,
    axes: int | tuple[int, ...] = -1,
    scale: float | None = None,
) -> Compressor:
    r"""Budgets of the heads of a layer by how many of its largest scores they hold, as in AdaKV.

    With :math:`a_{hi}` the mean attention weight of pair :math:`i` over the sample queries of head
    :math:`h`, and :math:`T` the :math:`H m` largest of the :math:`H n` scores of a layer,

    .. math:: m_h = \alpha m + (1 - \alpha)\, |\{ i : (h, i) \in T \}|

    for the mean :math:`m` = ``size``. Each head then has the nearest of a few sizes, by ratio,
    between :math:`\alpha m` and ``most`` times :math:`m`
    (:func:`coreset_jax.budgets.split.split`), so that a layer never keeps more than :math:`H m`
    pairs: sizes must be static under ``jax.jit``. (The authors keep :math:`m_h` exactly, in arrays
    without empty slots, and judge pairs by the pooled scores of SnapKV's window.)

    Time is that of one compression at each of the ``2 * steps + 1`` sizes, each compiled apart,
    plus the sample queries' attention and a sort of the :math:`H n` scores; memory that of the
    coresets of all sizes. A head has, bit by bit, what the compressor keeps of it at its size.

    Args:
      compressor: any compressor; it is handed the ``queries`` too.
      safeguard: :math:`\alpha`, the share of ``size`` that every head has for sure, in ``(0, 1]``;
        the authors' is 0.2. With 1 all heads are alike.
      most: largest budget of a head, a multiple of ``size``, at least 1.
      steps: sizes tried on either side of ``size``.
      axes: the leading axes of keys whose heads share a budget: the last by default.
      scale: the softmax scale of the scores; ``None`` means ``1/sqrt(d)``.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` ``(rng, keys [..., n, d], values [..., n, dv], *,
      size, lengths=None, queries [..., q, d]) -> Coreset`` with ``min(most * size, n)`` slots a
      head. It is query-informed: ``queries`` are raw queries with the leading axes of keys, those
      of a group one after another. A head whose scores are not finite has the least. Normalizers
      pass through, and ``size >= n`` returns what the compressor returns. The call raises
      ``ValueError`` without ``queries``, if keys have no such axes, and as the compressor does.

    Raises:
      ValueError: if ``compressor`` cannot be called, or an option is not a static number in its
        range.

    References:
      Feng et al., *Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for
      Efficient LLM Inference*, NeurIPS 2025, arXiv 2407.11550, Algorithms 1 and 2, and the
      authors' code, https://github.com/FFY0/AdaKV.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 2, 512, 16))
    >>> keys = keys * jnp.array([0.3, 3.0])[:, None, None]  # flat attention, and peaks
    >>> compressor = cj.budgets.adaptive(cj.baselines.top_attention())
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64, queries=queries)
    >>> coreset.keys.shape
    (2, 128, 16)
    >>> print((coreset.indices >= 0).sum(axis=-1))
    [ 21 101]
    """
    check_compressor(compressor)
    validation.check_count("steps", steps)
    return _Adaptive(
        compressor,
        check_share("safeguard", safeguard),
        check_multiple("most", most),
        int(steps),
        check_axes(axes),
        validation.static_float("scale", scale),
    )
