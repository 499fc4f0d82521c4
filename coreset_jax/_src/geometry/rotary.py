"""The rotation of rotary positions."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax._src.precision import accumulation_dtype


def turned(
    array: Float[Array, "*lead d"], angles: Float[Array, "*#lead h"]
) -> Float[Array, "*lead d"]:
    r"""Queries or keys turned by some angles.

    Channel :math:`i` turns with channel :math:`i + h`, as in Llama and Qwen; channels from
    :math:`2 h` on stay.

    Args:
      array: queries or keys ``[..., d]``.
      angles: in radians ``[..., h]``, with :math:`2h \le d`.

    Returns:
      The turned array, in its own dtype.
    """
    half = angles.shape[-1]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    wide = array.astype(accumulation_dtype(array))
    first, second, others = jnp.split(wide, [half, 2 * half], axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin, others]
    return jnp.concatenate(parts, axis=-1).astype(array.dtype)
