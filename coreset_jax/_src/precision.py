"""In which precision sums and products are formed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
    """The dtype of scores and sums: float32, or wider where an input is wider."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))


def matmul(left: Float[Array, "..."], right: Float[Array, "..."]) -> Float[Array, "..."]:
    """The matrix product, in the full precision of its factors.

    Accelerators would otherwise round float32 factors to 10 or 8 bits of mantissa.
    """
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def inner_products(left: Float[Array, "a d"], right: Float[Array, "b d"]) -> Float[Array, "a b"]:
    """All inner products of the rows of two arrays, ``[a, b]``."""
    return matmul(left, right.T)


def root(squares: Float[Array, "..."]) -> Float[Array, "..."]:
    """The square root, with a derivative of 0 at 0, where that of a norm has none."""
    zero = squares == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


def log(weights: Float[Array, "..."]) -> Float[Array, "..."]:
    """The logarithm, with a derivative of 0 at 0: an empty slot stays empty."""
    zero = weights == 0
    return jnp.where(zero, -jnp.inf, jnp.log(jnp.where(zero, 1, weights)))
