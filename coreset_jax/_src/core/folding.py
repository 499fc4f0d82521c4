"""Log-weights as channels of the keys, for attention that takes no bias."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from coreset_jax._src import checks
from coreset_jax._src.attention import default_scale
from coreset_jax._src.core.coreset import Coreset, SignedCoreset, scale_of

# The score of an empty slot, or what of it a narrow dtype can hold: its weight is zero in float32.
_NO_SCORE = -1e4


def fold_weights(
    coreset: Coreset, *, width: int, scale: ArrayLike | None = None
) -> tuple[Float[Array, "*heads m width"], Float[Array, "*heads m dv"]]:
    r"""Wider keys whose scores hold the log-weights, and the values, for kernels without a bias.

    .. math:: \mathrm{scale}\,\langle (q, 1, 1, 0), (k_i, a_i, b_i, 0)\rangle
              = \mathrm{scale}\,\langle q, k_i\rangle + \log w_i

    Kernels of 128 channels pad heads of 64, which leaves room. One spare channel holds the rounded
    :math:`a_i`; a second one holds the remainder :math:`b_i`. In bfloat16 one channel alone is off
    by about :math:`2^{-9}` of a log-weight, and two are off by :math:`2^{-17}`. Call the kernel
    with the scale of the narrow keys, since its own default is that of the wide ones, and with
    queries of :func:`fold_queries`.

    Args:
      coreset: a coreset ``[..., m]``, not signed.
      width: channels of the result, more than ``d``.
      scale: the softmax scale; ``None`` means that of the coreset, and ``1/sqrt(d)`` of its own
        ``d`` if it has none.

    Returns:
      Keys ``[..., m, width]`` in the dtype of the coreset's, and its values. An empty slot has a
      score of about -10000.

    Raises:
      ValueError: if the coreset is signed, ``width`` leaves no room, or the scale is not the
        coreset's.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 512, 16))
    >>> coreset = cj.compress(jax.random.key(1), keys, values, size=64)
    >>> wide_keys, wide_values = cj.fold_weights(coreset, width=32)
    >>> wide_queries = cj.fold_queries(queries, width=32)
    >>> outputs = cj.attention(wide_queries, wide_keys, wide_values, scale=16**-0.5)
    >>> bool(abs(outputs - cj.attend(queries, coreset)).max() < 1e-5)
    True
    """
    if isinstance(coreset, SignedCoreset):
        raise ValueError("coreset must not be signed: its normalizers fit into no channel.")
    room = _room(width, coreset.keys.shape)
    scale = scale_of(coreset, scale)
    scale = default_scale(coreset.keys.shape[-1]) if scale is None else scale
    dtype, limits = coreset.keys.dtype, jnp.finfo(coreset.keys.dtype)
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), coreset.keys.shape[:-2])[..., None]
    weights = jnp.where(jnp.isneginf(coreset.log_weights), _NO_SCORE, coreset.log_weights)
    channel = jnp.clip(weights / scale, float(limits.min) / 2, float(limits.max) / 2)
    high = channel.astype(dtype)
    low = (channel - high.astype(channel.dtype)).astype(dtype)
    folded = [high[..., None], low[..., None]][:room]
    empty = jnp.zeros((*coreset.log_weights.shape, room - len(folded)), dtype)
    return jnp.concatenate([coreset.keys, *folded, empty], axis=-1), coreset.values


def fold_queries(
    queries: Float[Array, "*heads q d"], *, width: int
) -> Float[Array, "*heads q width"]:
    """Wider queries, for the keys of :func:`fold_weights`.

    Args:
      queries: queries ``[..., q, d]``.
      width: channels of the result, more than ``d``.

    Returns:
      Queries ``[..., q, width]``: themselves, a one or two ones, and zeros.

    Raises:
      ValueError: if ``width`` leaves no room.
    """
    checks.check_floating("queries", queries)
    room = _room(width, queries.shape)
    ones = jnp.ones((*queries.shape[:-1], min(room, 2)), queries.dtype)
    zeros = jnp.zeros((*queries.shape[:-1], room - ones.shape[-1]), queries.dtype)
    return jnp.concatenate([queries, ones, zeros], axis=-1)


def _room(width: int, shape: tuple[int, ...]) -> int:
    """Channels that are left for weights."""
    checks.check_count("width", width)
    if width <= shape[-1]:
        raise ValueError(f"width must be more than the {shape[-1]} of {shape}, got {width}.")
    return width - shape[-1]
