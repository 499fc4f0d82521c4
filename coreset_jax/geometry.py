r"""The geometry of a balance: in which kernel pairs are told apart, and how much each part counts.

Any geometry gives a valid coreset. The theorem's is the kernel of radius :math:`\rho` on unit keys;
these measured better, above all where keys have heavy tails (``docs/balancing.md``).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax.kernels import exponential_kernel
from coreset_jax.problem import (
    Reduction,
    restore_keys,
    restore_values,
    unit_keys,
    unit_values,
)

# Keys that lie further out, in units of the root mean square, are drawn in to there.
REACH = 2.0

# The kernel and the values of a fit, in units of the root mean squares of keys and values.
_FITTING_RADIUS = 3.0
_FITTING_GAIN = 10.0

# Keys whose kernel with some marks is held at a time.
_MOMENTS_BLOCK = 2048


class Geometry(NamedTuple):
    r"""The geometry in which a unit problem is balanced.

    Attributes:
      reduction: the unit problem.
      reach: norm of a unit key at which the geometry ends,
        :math:`\min(1, 2 \sqrt{\mathrm{mean}_i \|k_i\|^2})`, ``[...]``.
      radius: the kernel radius on keys that are scaled to norm one there, ``[...]``.
      value_gain: factor of the values, the root of :func:`default_value_weight`, ``[...]``.
    """

    reduction: Reduction
    reach: Float[Array, "*heads"]
    radius: Float[Array, "*heads"]
    value_gain: Float[Array, "*heads"]

    def keys(self, keys: Float[Array, "*heads n d"]) -> Float[Array, "*heads n d"]:
        """Raw keys in this geometry: norm at most one, those beyond the reach drawn in."""
        unit = unit_keys(self.reduction, keys.astype(self.radius.dtype))
        norms = jnp.sqrt(jnp.sum(jnp.square(unit), axis=-1, keepdims=True))
        return unit / jnp.maximum(norms, self.reach[..., None, None])

    def restore_keys(self, keys: Float[Array, "*heads n d"]) -> Float[Array, "*heads n d"]:
        """The inverse of :meth:`keys`, for those that were not drawn in."""
        return restore_keys(self.reduction, self.reach[..., None, None] * keys)

    def true_squares(self, keys: Float[Array, "*heads n d"]) -> Float[Array, "*heads n"]:
        """Squared norms of raw keys in the units of this geometry, none of them drawn in."""
        unit = unit_keys(self.reduction, keys.astype(self.radius.dtype))
        return jnp.sum(jnp.square(unit / self.reach[..., None, None]), axis=-1)

    def moments(
        self,
        marks: Float[Array, "l d"],
        keys: Float[Array, "n d"],
        columns: Float[Array, "n c"],
    ) -> Float[Array, "l c"]:
        r"""What a measure looks like from some places: :math:`\sum_i E_{l k_i} c_i`, of one head.

        In blocks: the pairs may be all those of a cache.

        Args:
          marks: keys of this geometry ``[l, d]``.
          keys: raw keys ``[n, d]``.
          columns: :math:`c_i`, ``[n, c]``.
        """
        count = keys.shape[0]
        block = min(count, _MOMENTS_BLOCK)
        whole = count // block

        def add(start: Array | int, width: int, moments: Array) -> Array:
            rows, part = (
                jax.lax.dynamic_slice_in_dim(array, start, width) for array in (keys, columns)
            )
            kernel = exponential_kernel(marks, self.keys(rows), self.radius)
            return moments + jnp.matmul(kernel, part, precision=jax.lax.Precision.HIGHEST)

        moments = jnp.zeros_like(columns, shape=(marks.shape[0], columns.shape[1]))
        if whole == 1:
            moments = add(0, block, moments)
        else:
            moments = jax.lax.fori_loop(0, whole, lambda i, m: add(i * block, block, m), moments)
        return add(whole * block, count % block, moments) if count % block else moments

    def values(self, values: Float[Array, "*heads n dv"]) -> Float[Array, "*heads n dv"]:
        """Raw values in this geometry."""
        unit = unit_values(self.reduction, values.astype(self.radius.dtype))
        return self.value_gain[..., None, None] * unit

    def restore_values(self, values: Float[Array, "*heads n dv"]) -> Float[Array, "*heads n dv"]:
        """The inverse of :meth:`values`."""
        return restore_values(self.reduction, values / self.value_gain[..., None, None])


def balancing_geometry(
    reduction: Reduction, kernel_radius: Float[Array, "*heads"] | None = None
) -> Geometry:
    r"""The geometry for a unit problem.

    A kernel :math:`e^{r \langle k, l \rangle}` that can hold one key far out has no digits left
    for all the others, so that keys beyond twice the root mean square are balanced as if they lay
    there. No balance can make good for the loss of such a key in any case.

    Args:
      reduction: the unit problem.
      kernel_radius: the radius on unit keys ``[...]``; ``None`` means
        :func:`default_kernel_radius`.
    """
    radius = default_kernel_radius(reduction) if kernel_radius is None else kernel_radius
    spread = jnp.where(reduction.key_spread > 0, reduction.key_spread, 1.0)
    reach = jnp.minimum(REACH * spread, 1.0)
    gain = jnp.sqrt(default_value_weight(reduction))
    return Geometry(reduction, reach, radius * jnp.square(reach), gain)


def fitting_geometry(
    reduction: Reduction, kernel_radius: Float[Array, "*heads"] | None = None
) -> Geometry:
    r"""The geometry in which keys are chosen and moved for a refit.

    .. math:: r = \min(\rho,\; 3 / \mathrm{mean}_i \|k_i\|^2), \qquad
              \omega = 100 / \mathrm{mean}_i \|v_i\|^2

    A fit has as many free numbers as it has columns to fit, and can afford a sharper kernel than a
    balance. The denominator is the easiest of its columns, and hardly needs a say in where keys go.

    Args:
      reduction: the unit problem.
      kernel_radius: the radius on unit keys ``[...]``; ``None`` means the one above.
    """
    spread = jnp.where(reduction.key_spread > 0, reduction.key_spread, 1.0)
    if kernel_radius is None:
        kernel_radius = jnp.minimum(reduction.rho, _FITTING_RADIUS / jnp.square(spread))
    geometry = balancing_geometry(reduction, kernel_radius)
    values = jnp.where(reduction.value_spread > 0, reduction.value_spread, 1.0)
    return geometry._replace(value_gain=_FITTING_GAIN / values)


def default_kernel_radius(reduction: Reduction) -> Float[Array, "*heads"]:
    r"""The kernel radius that a balance uses where none is given.

    .. math:: r = \min(\rho,\; 2 / \mathrm{mean}_i \|k_i\|^2)

    for unit keys: the paper's :math:`r = \rho` for small radii, and never more than 2 in units of
    the keys' own spread. Beyond that, a kernel tells apart more directions than there are signs
    to balance them: at radii from 1 to 20, larger ones did no better and mostly worse.

    Args:
      reduction: a cache's unit problem.
    """
    spread = jnp.where(reduction.key_spread > 0, reduction.key_spread, 1.0)
    return jnp.minimum(reduction.rho, 2 / jnp.square(spread))


def default_value_weight(reduction: Reduction) -> Float[Array, "*heads"]:
    r"""How much more the numerator counts in a balance than the denominator.

    .. math:: \omega = 8 / \mathrm{mean}_i \|v_i\|^2

    for unit values. The denominator's error reaches the result only multiplied by the centered
    attention output, an average that is small beside the values themselves; weights between 8 and
    30 take 10 to 20 % off the error of equal ones.

    Args:
      reduction: a cache's unit problem.
    """
    spread = jnp.where(reduction.value_spread > 0, reduction.value_spread, 1.0)
    return 8 / jnp.square(spread)
