"""Synthetic caches whose distribution is known."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Instance(NamedTuple):
    """One head's keys and values."""

    keys: Float[Array, "n d"]
    values: Float[Array, "n dv"]


def gaussian(rng: Array, count: int, width: int, value_width: int) -> Instance:
    """Standard normal keys and values, as in a fresh model.

    Args:
      rng: a JAX random key.
      count: pairs, n.
      width: width of the keys, d.
      value_width: width of the values, dv.

    Returns:
      float32 keys ``[n, d]`` and values ``[n, dv]``.
    """
    key_rng, value_rng = jax.random.split(rng)
    return Instance(
        jax.random.normal(key_rng, (count, width), jnp.float32),
        jax.random.normal(value_rng, (count, value_width), jnp.float32),
    )


def unit_sphere(rng: Array, count: int, width: int, value_width: int) -> Instance:
    r"""Keys and values uniform on unit spheres, :math:`\|k_i\| = \|v_i\| = 1`; see `gaussian`.

    The hardest shape for the unit problem short of a planted instance: no key is closer to the
    mean than any other, and no value is smaller.

    >>> keys, values = unit_sphere(jax.random.key(0), 100, 16, 8)
    >>> bool(jnp.allclose(jnp.linalg.norm(keys, axis=-1), 1.0))
    True
    """
    keys, values = gaussian(rng, count, width, value_width)
    return Instance(
        keys / jnp.linalg.norm(keys, axis=-1, keepdims=True),
        values / jnp.linalg.norm(values, axis=-1, keepdims=True),
    )


INSTANCES: dict[str, Callable[[Array, int, int, int], Instance]] = {
    function.__name__: function for function in (gaussian, unit_sphere)
}
