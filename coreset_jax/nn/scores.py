"""Attention functions of Flax whose scores are capped, or that have learned sink logits."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coreset_jax._src.attention import capped, default_scale
from coreset_jax._src.precision import accumulation_dtype


def check_takes_bias(attention_fn: Callable[..., Array]) -> None:
    """Raises ``ValueError`` unless an attention function takes a bias on its scores."""
    if "bias" not in inspect.signature(attention_fn).parameters:
        raise ValueError(
            "attention_fn must take a bias where soft_cap or use_sink_logits is given; "
            f"got {attention_fn!r}."
        )


@dataclasses.dataclass(frozen=True)
class Capping:
    """An ``attention_fn`` of Flax that caps the scores first.

    Capped scores are handed on as a bias, beside queries of zero. No closure: modules of equal
    options are equal, and share their traces.

    Attributes:
      attention_fn: a function of query, key and value, ``[..., length, heads, head_dim]`` each,
        and of a bias.
      soft_cap: as for :func:`coreset_jax.attention`.

    Raises:
      ValueError: if the function takes no bias.
    """

    attention_fn: Callable[..., Array]
    soft_cap: float

    def __post_init__(self) -> None:
        """Raises ``ValueError`` if the function takes no bias."""
        check_takes_bias(self.attention_fn)

    @property
    def __wrapped__(self) -> Callable[..., Array]:
        """What has the signature, which Flax looks at."""
        return self.attention_fn

    def __call__(
        self, query: Array, key: Array, value: Array, bias: Array | None = None, **options: Any
    ) -> Array:
        """What ``attention_fn`` returns for capped scores."""
        kv_heads, width = key.shape[-2:]
        grouped = query.reshape(*query.shape[:-2], kv_heads, -1, width)
        scores = default_scale(width) * jnp.einsum(
            "...qhgd,...khd->...hgqk",
            grouped,
            key,
            precision=options.get("precision"),
            preferred_element_type=accumulation_dtype(query, key),
        )
        shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
        scores = capped(scores.reshape(shape), self.soft_cap)
        if bias is not None:
            scores = scores + bias.astype(scores.dtype)
        return self.attention_fn(jnp.zeros_like(query), key, value, bias=scores, **options)


def attend_with_sinks(
    attention_fn: Callable[..., Array],
    sink_logits: Float[Array, " heads"],
    query: Float[Array, "*batch queries heads head_dim"],
    key: Float[Array, "*batch length kv_heads head_dim"],
    value: Float[Array, "*batch length kv_heads value_dim"],
    *,
    mask: Bool[Array, "..."] | None = None,
    is_causal: bool = False,
    **options: Any,
) -> Float[Array, "*batch queries heads value_dim"]:
    """What an attention function of Flax returns with sink logits in its denominators.

    A key of zeros is put behind the others, whose value is zero and whose bias is the logit.

    Args:
      attention_fn: a function of query, key and value and of a bias.
      sink_logits: one a query head ``[heads]``.
      query: queries ``[..., queries, heads, head_dim]``.
      key: keys ``[..., length, kv_heads, head_dim]``.
      value: values ``[..., length, kv_heads, value_dim]``.
      mask: which pairs queries see, to be broadcast to ``[..., heads, queries, length]``.
      is_causal: whether a query sees no later pairs than its own.
      **options: of the function.
    """
    length = key.shape[-3]
    bias = jnp.zeros((*sink_logits.shape, 1, length + 1), accumulation_dtype(query, key))
    bias = bias.at[:, 0, length].set(sink_logits.astype(bias.dtype))
    bias = bias.reshape((1,) * (query.ndim - 3) + bias.shape)
    key, value = (
        jnp.pad(array, [(0, 0)] * (array.ndim - 3) + [(0, 1), (0, 0), (0, 0)])
        for array in (key, value)
    )
    if is_causal:
        causal = jnp.tri(query.shape[-3], length, dtype=bool)
        causal = causal.reshape((1,) * (query.ndim - 2) + causal.shape)
        mask = causal if mask is None else causal & mask.astype(bool)
    if mask is not None:
        mask = jnp.broadcast_to(mask.astype(bool), (*mask.shape[:-1], length))
        mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, 1)], constant_values=True)
    return attention_fn(query, key, value, bias=bias, mask=mask, **options)
