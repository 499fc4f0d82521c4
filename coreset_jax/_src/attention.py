"""Softmax attention over key-value pairs that carry log-weights, and partial states that merge.

Everything here is exact: it is what a coreset is compared with, and what reads a coreset.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer

from coreset_jax._src import checks, meshes
from coreset_jax._src.precision import accumulation_dtype


class PartialAttention(NamedTuple):
    r"""Attention over a part of the pairs, in a form that merges exactly with other parts.

    With scores :math:`s_i`, ``maximum`` is :math:`M = \max_i s_i`, ``total`` is
    :math:`\sum_i e^{s_i - M}` and ``output`` is :math:`\sum_i e^{s_i - M} v_i`.
    A part without pairs has ``maximum`` :math:`-\infty` and zeros.
    """

    maximum: Float[Array, "*heads q"]
    total: Float[Array, "*heads q"]
    output: Float[Array, "*heads q dv"]


def default_scale(width: int) -> float:
    r"""The softmax scale :math:`1/\sqrt d` of ``jax.nn.dot_product_attention``."""
    return width**-0.5


def partial_attention(
    queries: Float[Array, "*heads q d"],
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    log_weights: Float[Array, "*#heads n"] | None = None,
    *,
    scale: ArrayLike | None = None,
    visible: Bool[Array, "#q n"] | None = None,
) -> PartialAttention:
    r"""Attention over these pairs alone, ready to be merged with other pairs.

    .. math:: s_i = \mathrm{scale}\,\langle q, k_i\rangle + \log w_i

    Args:
      queries: queries ``[..., q, d]``.
      keys: keys ``[..., n, d]``.
      values: values ``[..., n, dv]``.
      log_weights: natural logarithms of the pairs' weights ``[..., n]``; ``-inf`` leaves a
        pair out. ``None`` weighs every pair 1.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      visible: which pairs each query may see ``[q, n]``; ``None`` means all.

    Returns:
      The partial state, in float32 or wider.
    """
    dtype = accumulation_dtype(queries, keys, values)
    scale = default_scale(keys.shape[-1]) if scale is None else scale
    scores = scale * jnp.einsum(
        "...qd,...nd->...qn",
        queries,
        keys,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    if log_weights is not None:
        scores = scores + log_weights[..., None, :].astype(dtype)
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    maximum = jnp.max(scores, axis=-1)
    # A part whose pairs all have weight zero must give zeros, not the NaN of (-inf) - (-inf).
    shift = jnp.where(jnp.isneginf(maximum), jnp.zeros_like(maximum), maximum)
    masses = jnp.exp(scores - jax.lax.stop_gradient(shift)[..., None])
    output = jnp.einsum(
        "...qn,...nv->...qv",
        masses,
        values,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    return PartialAttention(jax.lax.stop_gradient(maximum), jnp.sum(masses, axis=-1), output)


def merge(left: PartialAttention, right: PartialAttention) -> PartialAttention:
    """The partial state of two disjoint sets of pairs; associative and commutative.

    Args:
      left: the state of one set.
      right: the state of the other, of the same shapes.

    Returns:
      The state of the union.
    """
    maximum = jnp.maximum(left.maximum, right.maximum)
    shift = jnp.where(jnp.isneginf(maximum), jnp.zeros_like(maximum), maximum)
    left_factor = jnp.exp(left.maximum - shift)
    right_factor = jnp.exp(right.maximum - shift)
    return PartialAttention(
        maximum,
        left.total * left_factor + right.total * right_factor,
        left.output * left_factor[..., None] + right.output * right_factor[..., None],
    )


def finish(state: PartialAttention) -> Float[Array, "*heads q dv"]:
    """The attention output of a partial state; zero where it holds no pair at all."""
    empty = state.total == 0
    total = jnp.where(empty, jnp.ones_like(state.total), state.total)
    return state.output / total[..., None]


def length_log_weights(
    lengths: Integer[Array, "*heads"], count: int, dtype: jnp.dtype
) -> Float[Array, "*heads n"]:
    """Log-weights that are 0 for the first ``lengths`` of ``count`` pairs and ``-inf`` after."""
    inside = jnp.arange(count) < jnp.asarray(lengths)[..., None]
    return jnp.where(inside, jnp.zeros((), dtype), jnp.full((), -jnp.inf, dtype))


def attention(
    queries: Float[Array, "*heads q d"],
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    log_weights: Float[Array, "*#heads n"] | None = None,
    *,
    lengths: Integer[Array, "*heads"] | None = None,
    scale: ArrayLike | None = None,
    block_size: int | None = None,
) -> Float[Array, "*heads q dv"]:
    r"""Softmax attention over weighted pairs.

    .. math::
       \mathrm{Attn}(q) = \frac{\sum_i w_i e^{\mathrm{scale}\langle q,k_i\rangle} v_i}
                               {\sum_i w_i e^{\mathrm{scale}\langle q,k_i\rangle}}

    Args:
      queries: queries ``[..., q, d]``.
      keys: keys ``[..., n, d]``.
      values: values ``[..., n, dv]``.
      log_weights: natural logarithms of the weights ``[..., n]``; ``None`` means all 0.
      lengths: number of valid pairs of each head ``[...]``; ``None`` means ``n``.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      block_size: pairs per step; scores are then held for one block at a time
        (``q * block_size`` instead of ``q * n`` numbers). ``None`` takes all at once.

    Returns:
      Outputs ``[..., q, dv]`` in the dtype of ``values``.

    Raises:
      ValueError: if ranks, leading axes, widths or lengths do not fit.

    >>> import jax.numpy as jnp
    >>> keys, values = jnp.zeros((4, 2)), jnp.arange(8.0).reshape(4, 2)
    >>> attention(jnp.ones((1, 2)), keys, values)
    Array([[3., 4.]], dtype=float32)
    """
    checks.check_cache(keys, values)
    checks.check_queries(queries, keys)
    checks.check_lengths(lengths, keys)
    checks.check_positive("scale", scale)
    if block_size is not None:
        checks.check_count("block_size", block_size)
    if log_weights is not None and log_weights.shape != keys.shape[:-1]:
        raise ValueError(
            f"log_weights must have shape {keys.shape[:-1]}, one for each pair; "
            f"got log_weights {log_weights.shape} and keys {keys.shape}."
        )
    count = keys.shape[-2]
    dtype = accumulation_dtype(queries, keys, values)
    queries, keys, values, log_weights, lengths = meshes.alike(
        keys.ndim - 2, queries, keys, values, log_weights, lengths
    )
    if lengths is not None:
        mask = length_log_weights(lengths, count, dtype)
        # Padding may hold anything, and 0 * NaN is NaN: it must leave the sums altogether.
        inside = (mask == 0)[..., None]
        keys = jnp.where(inside, keys, jnp.zeros_like(keys))
        values = jnp.where(inside, values, jnp.zeros_like(values))
        log_weights = mask if log_weights is None else jnp.where(inside[..., 0], log_weights, mask)
    if block_size is None or block_size >= count:
        state = partial_attention(queries, keys, values, log_weights, scale=scale)
        return finish(state).astype(values.dtype)

    if log_weights is None:
        log_weights = jnp.zeros_like(keys[..., 0], dtype)
    whole = count // block_size * block_size

    def part(start: Int[Array, ""] | int, width: int) -> PartialAttention:
        def rows(array: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, start, width, axis)

        return partial_attention(
            queries, rows(keys, -2), rows(values, -2), rows(log_weights, -1), scale=scale
        )

    state = part(whole, count - whole) if whole < count else part(0, block_size)
    starts = jnp.arange(0 if whole < count else block_size, whole, block_size)
    state, _ = jax.lax.scan(
        lambda carry, start: (merge(carry, part(start, block_size)), None), state, starts
    )
    return finish(state).astype(values.dtype)
