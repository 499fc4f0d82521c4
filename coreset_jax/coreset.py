"""The coreset, the protocol of everything that makes one, and attention over it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.attention import accumulation_dtype, attention


class Coreset(NamedTuple):
    """A few weighted key-value pairs that answer like the cache they were taken from.

    Attributes:
      keys: kept keys ``[..., m, d]``, bit-identical to the source for a subset.
      values: kept values ``[..., m, dv]``.
      log_weights: natural logarithm of how many source pairs each stands for ``[..., m]``;
        ``-inf`` in an empty slot; NaN throughout a head whose source held a NaN or an infinity.
      indices: positions in the source ``[..., m]``, int32, distinct, ascending; -1 in an
        empty slot.
      normalizers: ``None``, or the signed normaliser of a refitted pair ``[..., m]``: the
        denominator sums these instead of ones.
    """

    keys: Float[Array, "*heads m d"]
    values: Float[Array, "*heads m dv"]
    log_weights: Float[Array, "*heads m"]
    indices: Int[Array, "*heads m"]
    normalizers: Float[Array, "*heads m"] | None = None


class Compressor(Protocol):
    """What every method of shrinking a cache looks like once its options are set.

    A pure function of its arguments: it may be jitted (``size`` static), vmapped and sharded.
    """

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
        """Keeps at most ``size`` pairs of each head.

        Args:
          rng: a JAX random key; every head gets a fold of its own.
          keys: cached keys ``[..., n, d]``.
          values: cached values ``[..., n, dv]``.
          size: pairs to keep for each head, static.
          lengths: valid pairs of each head ``[...]``; the rest is padding and may hold anything.
          queries: sample queries ``[..., q, d]`` for methods that want them.

        Returns:
          A coreset with ``min(size, n)`` slots a head.
        """
        ...


def gather(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    indices: Int[Array, "*heads m"],
    log_weights: Float[Array, "*heads m"],
) -> Coreset:
    """The coreset of the pairs at ``indices``.

    Args:
      keys: source keys ``[..., n, d]``.
      values: source values ``[..., n, dv]``.
      indices: positions ``[..., m]``; -1 leaves a slot empty (zeros, weight zero).
      log_weights: natural logarithms of the weights ``[..., m]``.

    Raises:
      ValueError: if ``indices`` are not integers or the shapes do not fit.
    """
    validation.check_cache(keys, values)
    validation.check_indices(indices, keys)
    if log_weights.shape != indices.shape:
        raise ValueError(
            "log_weights must have the shape of indices; "
            f"got log_weights {log_weights.shape} and indices {indices.shape}."
        )
    empty = indices < 0
    rows = jnp.where(empty, jnp.zeros_like(indices), indices)[..., None]

    def take(source: Array) -> Array:
        kept = jnp.take_along_axis(source, rows, axis=-2)
        return jnp.where(empty[..., None], jnp.zeros_like(kept), kept)

    return Coreset(
        keys=take(keys),
        values=take(values),
        log_weights=jnp.where(empty, jnp.full_like(log_weights, -jnp.inf), log_weights),
        indices=indices.astype(jnp.int32),
    )


def whole_cache(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    lengths: Int[Array, "*heads"] | None = None,
) -> Coreset:
    """The cache itself as a coreset: every valid pair with weight one.

    Args:
      keys: keys ``[..., n, d]``.
      values: values ``[..., n, dv]``.
      lengths: valid pairs of each head ``[...]``; ``None`` means all.
    """
    validation.check_cache(keys, values)
    validation.check_lengths(lengths, keys)
    dtype = accumulation_dtype(keys, values)
    positions = jax.lax.broadcasted_iota(jnp.int32, keys.shape[:-1], keys.ndim - 2)
    log_weights = jnp.zeros(keys.shape[:-1], dtype)
    if lengths is None:
        return Coreset(keys, values, log_weights, positions)
    inside = positions < jnp.asarray(lengths)[..., None]
    return gather(keys, values, jnp.where(inside, positions, -1), log_weights)


def head_numbers(keys: Float[Array, "*heads n d"]) -> Int[Array, "*heads"]:
    """The flat index of every head, int32 ``[...]``: what its fold of a random key is named after.

    Args:
      keys: keys ``[..., n, d]``. The numbers are made from them, so that they are sharded alike:
        ``jax.vmap`` asks that of the axes it maps.
    """
    numbers = jnp.zeros_like(keys[..., 0, 0], jnp.int32)
    for axis, width in enumerate(numbers.shape):
        numbers = numbers * width + jax.lax.broadcasted_iota(jnp.int32, numbers.shape, axis)
    return numbers


def over_heads(
    compress_head: Callable[..., Coreset],
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    lengths: Int[Array, "*heads"] | None,
    *more: Any,
    at_once: int | None = None,
) -> Coreset:
    """Compresses every head by itself, with a fold of ``rng`` of its own.

    Args:
      compress_head: ``(rng, keys [n, d], values [n, dv], length, *more) -> Coreset`` for one
        head. Pairs from ``length`` on are padding, may hold anything, and must leave no trace in
        the result. Each head masks what it reads of them: masked here, whole caches would be
        copied.
      rng: a JAX random key; the head with flat index ``h`` gets ``fold_in(rng, h)``.
      keys: keys ``[..., n, d]``.
      values: values ``[..., n, dv]``.
      lengths: valid pairs of each head ``[...]``; ``None`` means all.
      *more: further arguments with the leading axes of keys, or ``None``.
      at_once: heads that are looked at together, the others after them; ``None`` means all. Not
        for sharded heads.

    Returns:
      The coresets of all heads. A head with a NaN or an infinity among its valid pairs has NaN
      in all its log-weights.
    """
    leading, count = keys.shape[:-2], keys.shape[-2]
    ragged = lengths is not None
    numbers = head_numbers(keys)
    # Sharded as the keys are, like the numbers.
    lengths = jnp.zeros_like(numbers) + (
        jnp.asarray(lengths).astype(jnp.int32) if ragged else count
    )

    def one_head(number: Array, keys: Array, values: Array, length: Array, *more: Any) -> Coreset:
        coreset = compress_head(jax.random.fold_in(rng, number), keys, values, length, *more)
        padding = ragged & (jnp.arange(count) >= length)[:, None]
        finite = jnp.all(jnp.isfinite(keys) | padding) & jnp.all(jnp.isfinite(values) | padding)
        return coreset._replace(log_weights=jnp.where(finite, coreset.log_weights, jnp.nan))

    arguments = (numbers, keys, values, lengths, *more)
    if at_once is not None and math.prod(leading) > at_once:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(leading) :]), arguments)
        found = jax.lax.map(lambda each: one_head(*each), flat, batch_size=at_once)
        return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[1:]), found)
    for _ in leading:
        one_head = jax.vmap(one_head)
    return one_head(*arguments)


def attend(
    queries: Float[Array, "*heads q d"],
    coreset: Coreset,
    *,
    scale: float | None = None,
    block_size: int | None = None,
) -> Float[Array, "*heads q dv"]:
    r"""Attention of queries over a coreset, in place of the cache that it stands for.

    .. math::
       \mathrm{Attn}'(q) = \frac{\sum_i w_i e^{\mathrm{scale}\langle q,k_i\rangle} v_i}
                                {\sum_i w_i z_i e^{\mathrm{scale}\langle q,k_i\rangle}}

    with :math:`z_i = 1` unless the coreset carries normalizers.

    Args:
      queries: queries ``[..., q, d]`` with the leading axes of the coreset.
      coreset: any compressor's result.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      block_size: pairs per step, see :func:`coreset_jax.attention.attention`.

    Returns:
      Outputs ``[..., q, dv]`` in the dtype of the coreset's values.

    Raises:
      ValueError: if the queries do not fit the coreset's keys.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> coreset = cj.compress(jax.random.key(1), keys, values, size=64)
    >>> cj.attend(keys[:3], coreset).shape
    (3, 16)
    """
    if coreset.normalizers is None:
        return attention(
            queries,
            coreset.keys,
            coreset.values,
            coreset.log_weights,
            scale=scale,
            block_size=block_size,
        )
    # One more value column carries the denominator, so that any softmax kernel can serve it.
    dtype = accumulation_dtype(coreset.keys, coreset.values)
    columns = jnp.concatenate(
        [coreset.values.astype(dtype), coreset.normalizers[..., None].astype(dtype)], axis=-1
    )
    output = attention(
        queries, coreset.keys, columns, coreset.log_weights, scale=scale, block_size=block_size
    )
    return (output[..., :-1] / output[..., -1:]).astype(coreset.values.dtype)
