"""Rotary positions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax._src.geometry.rotary import turned
from coreset_jax._src.precision import accumulation_dtype
from coreset_jax.nn.kv_block import numbers


def rotate(
    array: Float[Array, "batch length heads head_dim"],
    positions: Int[Array, "#batch length"],
    base: float,
) -> Float[Array, "batch length heads head_dim"]:
    r"""Rotates queries or keys by their positions.

    Feature :math:`i` of :math:`d` and feature :math:`i + d/2` turn by the angle
    :math:`p\, \mathrm{base}^{-2i/d}` at position :math:`p`, as in Llama and Qwen.

    Args:
      array: queries or keys ``[batch, length, heads, head_dim]``, ``head_dim`` even.
      positions: places in the sequence ``[batch, length]`` or ``[1, length]``.
      base: base of the geometric progression of frequencies.

    Returns:
      The rotated array, in its own dtype; angles are float32, or wider where it is.

    References:
      Su et al., *RoFormer: Enhanced transformer with rotary position embedding*, 2021.

    >>> print(rotate(jnp.array([[[[1.0, 0.0]]]]), jnp.array([[1]]), 1e4).round(4))
    [[[[0.5403 0.8415]]]]
    """
    half = array.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=accumulation_dtype(array)) / half)
    angles = positions[..., None, None].astype(frequencies.dtype) * frequencies[None, None, None]
    return turned(array, angles)


def rotate_behind(
    lengths: Int[Array, " sequences"],
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    base: float | None,
) -> tuple[
    Float[Array, "batch length heads head_dim"], Float[Array, "batch length kv_heads head_dim"]
]:
    """Queries and keys of the next tokens of sequences of these lengths, rotated.

    Args:
      lengths: tokens that came before ``[batch]``.
      query: queries ``[batch, length, heads, head_dim]``.
      key: keys ``[batch, length, kv_heads, head_dim]``.
      base: as for :func:`rotate`; ``None`` rotates nothing.

    Raises:
      ValueError: if there are not as many sequences as lengths.
    """
    if query.shape[0] != lengths.shape[0]:
        raise ValueError(
            f"inputs_q must have the cache's batch {lengths.shape[0]}, got {query.shape[0]}."
        )
    if base is None:
        return query, key
    positions = lengths[:, None] + numbers(query.shape[1])
    return rotate(query, positions, base), rotate(key, positions, base)


@dataclasses.dataclass(frozen=True)
class Rotating:
    """An ``attention_fn`` of Flax that applies rotary positions ``0, 1, ...`` first.

    No closure: modules of equal options are equal, and share their traces.

    Attributes:
      attention_fn: a function of query, key and value, ``[..., length, heads, head_dim]`` each.
      base: as for :func:`rotate`.
    """

    attention_fn: Callable[..., Array]
    base: float

    @property
    def __wrapped__(self) -> Callable[..., Array]:
        """What has the signature, which Flax looks at."""
        return self.attention_fn

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        """What ``attention_fn`` returns for rotated queries and keys."""
        query, key = (
            rotate(array, jnp.arange(array.shape[-3])[None], self.base) for array in (query, key)
        )
        return self.attention_fn(query, key, value, **options)
