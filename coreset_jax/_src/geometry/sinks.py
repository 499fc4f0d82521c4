r"""Keys that attention goes to whatever is asked, told from the others without any query.

Pretrained models send the attention that nothing asks for to a few tokens: the first one, and in
many heads some later ones that carry as little. Queries point away from the mean key and towards
the keys of these tokens (Park et al., *KeyDiff*, 2025, arXiv 2504.15364, for the first half), so
that such keys stand apart from all others in their angle to the mean:

.. math:: z_i = \frac{c_i - \operatorname{mean} c}{\operatorname{std} c} < -4, \qquad
          c_i = \frac{\langle k_i, \bar k\rangle}{\|k_i\| \|\bar k\|}

On SmolLM2-135M three keys of 3584 in the median head are such, and in many heads they have nine
tenths of the attention. Among Gaussian keys there is hardly ever one.

A bias that keys of a model have in a few channels, such as those of Qwen 2.5, may be so long that
angles say nothing of all other channels. These few are left out.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coreset_jax._src.geometry.channels import median_channel

# In standard deviations of the cosines.
_APART = 4.0

# Channels in which keys are so many times as long as in the median one say nothing of sinks. On
# SmolLM2-135M none is 18 times as long.
_LONGEST = 32.0


def likely_sinks(keys: Float[Array, "n d"], inside: Bool[Array, " n"]) -> Bool[Array, " n"]:
    """Which keys of one head stand apart from all others, on the far side of the mean.

    Args:
      keys: raw keys, those of padding zero, in the dtype of sums.
      inside: which pairs are no padding.
    """
    count = jnp.sum(inside, dtype=keys.dtype)
    lengths = jnp.sum(jnp.abs(keys), axis=0)
    longest = _LONGEST * median_channel(lengths, lengths > 0)
    keys = jnp.where(lengths > longest, 0, keys)
    unit, center = _directions(keys), _directions(jnp.sum(keys, axis=0, keepdims=True))
    cosines = jnp.sum(unit * center, axis=-1)
    mean = jnp.sum(jnp.where(inside, cosines, 0)) / count
    offsets = jnp.where(inside, cosines - mean, 0)
    deviation = jnp.sqrt(jnp.sum(jnp.square(offsets)) / count)
    return inside & (offsets < -_APART * deviation)


def _directions(rows: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows of norm one, zero where they are zero, whatever squares would under- or overflow."""
    tiny = jnp.finfo(rows.dtype).tiny
    rows = rows / jnp.maximum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True), tiny)
    norms = jnp.sqrt(jnp.sum(jnp.square(rows), axis=-1, keepdims=True))
    return rows / jnp.maximum(norms, tiny)
