r"""Gram matrices of the balancing problem, block by block.

The pair :math:`(k_i, v_i)` of a unit problem has the infinite-dimensional feature

.. math::
   w_i = \bigoplus_{j \ge 0} \alpha_j\, k_i^{\otimes j} \otimes v_i,
   \qquad \alpha_j^2 = e^{-r} r^j / j!

whose inner products are :math:`e^{r(\langle k_i,k_l\rangle-1)}\langle v_i,v_l\rangle`: a Gram
matrix is all that any walk needs. :math:`r` is the *kernel radius*.
(*Nearly Optimal Attention Coresets*, Sections 4 and 5.)
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax._src.precision import inner_products

Scalar = Float[Array, ""] | float


def exponential_kernel(
    left_keys: Float[Array, "a d"], right_keys: Float[Array, "b d"], radius: Scalar
) -> Float[Array, "a b"]:
    r"""The kernel :math:`e^{r(\langle k,l\rangle - 1)}` of unit keys, at most 1.

    Args:
      left_keys: unit keys ``[a, d]``.
      right_keys: unit keys ``[b, d]``.
      radius: the kernel radius :math:`r`, a scalar.
    """
    return jnp.exp(radius * (inner_products(left_keys, right_keys) - 1.0))


def gaussian_kernel(left: Float[Array, "a d"], right: Float[Array, "b d"]) -> Float[Array, "a b"]:
    r"""The kernel :math:`e^{-\|x - y\|^2 / 2}`, one on equal keys: exponential, and normalized.

    Args:
      left: keys ``[a, d]``, scaled by the root of the kernel radius.
      right: keys ``[b, d]``, likewise.
    """
    halves = [jnp.sum(jnp.square(keys), axis=-1) / 2 for keys in (left, right)]
    # Rounding must not make it more than one.
    exponents = inner_products(left, right) - halves[0][:, None] - halves[1][None]
    return jnp.exp(jnp.minimum(exponents, 0))


def simultaneous_gram(
    left_keys: Float[Array, "a d"],
    left_values: Float[Array, "a dv"],
    right_keys: Float[Array, "b d"],
    right_values: Float[Array, "b dv"],
    radius: Scalar,
    key_weight: float = 1.0,
) -> Float[Array, "a b"]:
    r"""Gram matrix that balances numerator, denominator and keys at once.

    .. math::
       G_{il} = \frac{1}{2 + \omega} \left[ e^{r(\langle k_i,k_l\rangle-1)}
                (\langle v_i,v_l\rangle + 1) + \omega \langle k_i,k_l\rangle \right]

    The three features are concatenated; the factor keeps the norm of the whole at most one.
    The theorem has :math:`\omega = 1`. The denominator's own first Taylor degree holds the keys
    already, with weight :math:`r e^{-r}`, so that :math:`\omega = 0` keeps them balanced too.

    Args:
      left_keys: unit keys ``[a, d]``.
      left_values: unit values ``[a, dv]``.
      right_keys: unit keys ``[b, d]``.
      right_values: unit values ``[b, dv]``.
      radius: the kernel radius :math:`r`, a scalar.
      key_weight: :math:`\omega`, at least 0.

    Returns:
      The block ``[a, b]`` of the Gram matrix; its diagonal is at most 1.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Theorem 5.

    >>> import jax.numpy as jnp
    >>> key, value = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    >>> simultaneous_gram(key, value, key, value, 2.0)
    Array([[1.]], dtype=float32)
    """
    products = inner_products(left_keys, right_keys)
    kernel = jnp.exp(radius * (products - 1.0))
    gram = kernel * (inner_products(left_values, right_values) + 1.0)
    return (gram + key_weight * products) / (2.0 + key_weight) if key_weight else gram / 2.0
