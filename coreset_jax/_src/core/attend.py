"""Attention of queries over a coreset of any kind."""

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from coreset_jax._src import checks
from coreset_jax._src.attention import attention, results, with_sinks
from coreset_jax._src.core.coreset import Coreset, SignedCoreset, scale_of
from coreset_jax._src.core.packed import (
    PackedCoreset,
    check_packed_queries,
    partial_attention_packed,
)
from coreset_jax._src.precision import accumulation_dtype


def attend(
    queries: Float[Array, "*heads q d"],
    coreset: Coreset | SignedCoreset | PackedCoreset,
    *,
    scale: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    sink_logits: Float[Array, "..."] | None = None,
    block_size: int | None = None,
    return_lse: bool = False,
) -> Any:
    r"""Attention of queries over a coreset, in place of the cache that it stands for.

    .. math::
       \mathrm{Attn}'(q) = \frac{\sum_i w_i e^{\mathrm{scale}\langle q,k_i\rangle} v_i}
                                {\sum_i w_i z_i e^{\mathrm{scale}\langle q,k_i\rangle}}

    with :math:`z_i = 1` unless the coreset is signed and carries normalizers, and with capped
    scores and a sink logit in the denominator where they are given.

    Args:
      queries: queries ``[..., q, d]`` with the leading axes of the coreset.
      coreset: any compressor's result, or a packed one (:func:`coreset_jax.pack`).
      scale: the softmax scale, a scalar or ``[...]``. ``None`` means the one that the coreset was
        made for, ``coreset.scale``, and ``1/sqrt(d)`` if it has none. Any other than the coreset's
        is an error; under ``jit`` or ``vmap``, where it cannot be seen, outputs are NaN in heads
        whose scale differs.
      soft_cap: the cap of scores, see :func:`coreset_jax.attention`.
      sink_logits: learned logits of the denominator, see :func:`coreset_jax.attention`.
      block_size: pairs per step, see :func:`coreset_jax.attention`. Packed coresets are read page
        by page.
      return_lse: whether to return the log-sum-exp too, see :func:`coreset_jax.attention`.

    Returns:
      Outputs ``[..., q, dv]`` in the dtype of the coreset's values; with ``return_lse`` the pair of
      these and the log-sum-exp ``[..., q]``.

    Raises:
      ValueError: if queries or sink logits do not fit the coreset's keys, if the scale is not the
        coreset's, and on sink logits or ``return_lse`` beside a signed coreset.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> coreset = cj.compress(jax.random.key(1), keys, values, size=64)
    >>> cj.attend(keys[:3], coreset).shape
    (3, 16)
    """
    if isinstance(coreset, PackedCoreset):
        check_packed_queries(queries, coreset)
        checks.check_positive("soft_cap", soft_cap)
        if block_size is not None:
            checks.check_count("block_size", block_size)
        checks.check_sink_logits(sink_logits, queries)
        state = partial_attention_packed(queries, coreset, scale=scale, soft_cap=soft_cap)
        return results(with_sinks(state, sink_logits), coreset.values.dtype, return_lse)
    scale = scale_of(coreset, scale)
    options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "block_size": block_size}
    pairs = coreset.keys, coreset.values, coreset.log_weights
    if not isinstance(coreset, SignedCoreset):
        return attention(queries, *pairs, sink_logits=sink_logits, return_lse=return_lse, **options)
    if sink_logits is not None or return_lse:
        raise ValueError(
            "sink_logits and return_lse must not be given for a signed coreset, whose denominator "
            "may have any sign."
        )
    # One more value column carries the denominator, so that any softmax kernel can serve it.
    dtype = accumulation_dtype(coreset.keys, coreset.values)
    columns = jnp.concatenate(
        [each.astype(dtype) for each in (coreset.values, coreset.normalizers[..., None])], axis=-1
    )
    output = attention(queries, coreset.keys, columns, coreset.log_weights, **options)
    return (output[..., :-1] / output[..., -1:]).astype(coreset.values.dtype)
