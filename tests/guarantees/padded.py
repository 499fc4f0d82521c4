"""Six heads with padding that is not finite, and coresets of them with empty slots."""

import jax
import jax.numpy as jnp
import numpy as np

from coreset_jax._src.core.coreset import gather, with_normalizers

HEADS = (2, 3)


def padded_heads(keys, values, indices, weights, *, count, slots):
    """Keys and values of ``count`` pairs, and the coreset of those at ``indices``.

    Arrays may come without the leading axes: all heads are the same then.
    """

    def behind(array, width, filling, axis):
        array = np.broadcast_to(array, (*HEADS, *np.shape(array)[axis:]))
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, width - array.shape[axis])
        return np.pad(array, widths, constant_values=filling)

    weights = np.broadcast_to(weights, np.shape(indices))
    keys = jnp.asarray(behind(keys, count, np.nan, -2), jnp.float32)
    values = jnp.asarray(behind(values, count, np.inf, -2), jnp.float32)
    log_weights = jnp.asarray(np.log(behind(weights, slots, 1, -1)), jnp.float32)
    rows = jnp.asarray(behind(indices, slots, -1, -1))
    return keys, values, jax.jit(gather)(keys, values, rows, log_weights)


def signed(coreset, seed):
    """Normalizers of either sign, and values that belong to them."""
    rng = np.random.default_rng(seed)
    normalizers = jnp.asarray(rng.normal(1, 0.5, coreset.log_weights.shape), jnp.float32)
    values = 1.01 * normalizers[..., None] * coreset.values
    return with_normalizers(coreset._replace(values=values), normalizers)
