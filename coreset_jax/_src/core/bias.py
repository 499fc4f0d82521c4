"""A coreset for attention that takes a bias: log-weights in the layout of the scores."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from coreset_jax._src import checks, meshes
from coreset_jax._src.attention import default_scale
from coreset_jax._src.core.coreset import Coreset, SignedCoreset, scale_of


def attention_bias(
    coreset: Coreset,
    *,
    num_query_heads: int | None = None,
    query_length: int = 1,
    scale: ArrayLike | None = None,
) -> Float[Array, "*batch query_heads query_length m"]:
    """What to add to the scores of a coreset's keys, ``-inf`` for empty slots.

    It is the ``bias`` of ``jax.nn.dot_product_attention`` and its like, beside keys and values of
    the coreset ``[batch, m, kv_heads, d]``, and wants as many numbers as there are query heads.
    Of the implementations there, XLA's takes it as it is; cuDNN's broadcasts nothing over queries
    and needs their number in ``query_length``. Attention that caps its scores must add the bias
    behind the cap, as :func:`coreset_jax.attend` does.

    Args:
      coreset: a coreset of heads ``[..., kv_heads, m]``.
      num_query_heads: query heads, a multiple of ``kv_heads``; query head ``h`` reads key-value
        head ``h // (num_query_heads // kv_heads)``. ``None`` means ``kv_heads``.
      query_length: queries of a head, all of whom have the same bias; 1 is broadcast to any number.
      scale: the softmax scale that this attention is called with; ``None`` means ``1/sqrt(d)``. It
        does not change the bias: a coreset that was made for another one is refused, or has a bias
        of NaN where that cannot be seen under ``jit``.

    Returns:
      The bias ``[..., num_query_heads, query_length, m]``, in the dtype of the log-weights.

    Raises:
      ValueError: if the coreset has no axis of heads, is signed, or was made for another scale, or
        if the query heads are no multiple of its heads.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 1, 4, 512, 16))
    >>> coreset = cj.baselines.uniform()(jax.random.key(1), keys, values, size=64)
    >>> queries = jax.random.normal(jax.random.key(2), (1, 3, 8, 16))
    >>> outputs = jax.nn.dot_product_attention(
    ...     queries,
    ...     coreset.keys.swapaxes(1, 2),
    ...     coreset.values.swapaxes(1, 2),
    ...     bias=cj.attention_bias(coreset, num_query_heads=8),
    ... )
    >>> outputs.shape
    (1, 3, 8, 16)
    """
    if isinstance(coreset, SignedCoreset):
        raise ValueError("coreset must not be signed: its normalizers are no bias; call attend.")
    weights = coreset.log_weights
    if weights.ndim < 2:
        raise ValueError(
            f"coreset must have log_weights [..., kv_heads, m]; got {weights.shape}, without heads."
        )
    weights = _read_with(coreset, scale)
    heads = weights.shape[-2]
    num_query_heads = heads if num_query_heads is None else num_query_heads
    checks.check_count("num_query_heads", num_query_heads)
    checks.check_count("query_length", query_length)
    if num_query_heads % heads:
        raise ValueError(
            f"num_query_heads must be a multiple of the coreset's {heads} heads, got "
            f"{num_query_heads}."
        )
    return _bias(weights, group=num_query_heads // heads, query_length=query_length)


def _read_with(coreset: Coreset, scale: ArrayLike | None) -> Float[Array, "*heads m"]:
    """The log-weights, NaN in heads that turn out to be made for another scale."""
    if coreset.scale is None:
        checks.check_positive("scale", scale, coreset.keys.shape[:-2])
        return coreset.log_weights
    if scale is None and not checks.is_known(coreset.scale):
        raise ValueError(
            "scale must be given, that of the attention the bias is for: the coreset was made for "
            "one, which is traced."
        )
    scale = scale_of(coreset, default_scale(coreset.keys.shape[-1]) if scale is None else scale)
    if checks.is_known(scale):
        return coreset.log_weights
    return jnp.where(jnp.isnan(jnp.asarray(scale))[..., None], jnp.nan, coreset.log_weights)


@functools.partial(jax.jit, static_argnames=("group", "query_length"))
def _bias(weights: Float[Array, "*batch kv_heads m"], *, group: int, query_length: int) -> Array:
    def all_heads(_: None, weights: Array) -> Array:
        bias = jnp.repeat(weights, group, axis=-2)[..., None, :]
        return jnp.broadcast_to(bias, (*bias.shape[:-2], query_length, bias.shape[-1]))

    return meshes.for_heads(all_heads, weights.ndim - 1, None, weights)
