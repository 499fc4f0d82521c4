r"""The geometry of a balance: in which kernel pairs are told apart, and how much each part counts.

Any geometry gives a valid coreset. The theorem's is the kernel of radius :math:`\rho` on unit keys;
these measured better, above all where keys have heavy tails (``docs/balancing.md``).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax._src.geometry.kernels import exponential_kernel
from coreset_jax._src.geometry.standardize import Standardization
from coreset_jax._src.precision import matmul, root

# Keys that lie further out, in units of the root mean square, are drawn in to there.
REACH = 2.0

# The kernel and the values of a fit, in units of the root mean squares of keys and values.
_FITTING_RADIUS = 3.0
_FITTING_GAIN = 10.0

# Keys whose kernel with some centers is held at a time.
_MOMENTS_BLOCK = 2048


class Geometry(NamedTuple):
    r"""The geometry in which a unit problem is balanced.

    Attributes:
      standardization: the unit problem.
      reach: norm of a unit key at which the geometry ends,
        :math:`\min(1, 2 \sqrt{\mathrm{mean}_i \|k_i\|^2})`, ``[...]``.
      radius: the kernel radius on keys that are scaled to norm one there, ``[...]``.
      value_gain: factor of the values, the root of :func:`default_value_weight`, ``[...]``.
    """

    standardization: Standardization
    reach: Float[Array, "*heads"]
    radius: Float[Array, "*heads"]
    value_gain: Float[Array, "*heads"]

    def keys(self, keys: Float[Array, "*heads n d"]) -> Float[Array, "*heads n d"]:
        """Raw keys in this geometry: norm at most one, those beyond the reach drawn in."""
        norms = root(self._unit_squares(keys))
        shrink = 1 / jnp.maximum(norms, self.reach[..., None])
        return self.standardization.unit_keys(keys) * shrink[..., None]

    def restore_keys(self, keys: Float[Array, "*heads n d"]) -> Float[Array, "*heads n d"]:
        """The inverse of :meth:`keys`, for those that were not drawn in."""
        return self.standardization.restore_keys(self.reach[..., None, None] * keys)

    def true_squares(self, keys: Float[Array, "*heads n d"]) -> Float[Array, "*heads n"]:
        """Squared norms of raw keys in the units of this geometry, none of them drawn in."""
        return self._unit_squares(keys) * (1 / jnp.square(self.reach))[..., None]

    def _unit_squares(self, keys: Float[Array, "*heads n d"]) -> Float[Array, "*heads n"]:
        return jnp.sum(jnp.square(self.standardization.unit_keys(keys)), axis=-1)

    @property
    def level(self) -> Float[Array, "*heads"]:
        """Half the squared norm of a scaled key at the root mean square."""
        return self.radius * jnp.square(self.standardization.key_spread / self.reach) / 2

    def scaled(self, keys: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Raw keys of one head, scaled so that the kernel has no radius."""
        return jnp.sqrt(self.radius) * self.keys(keys)

    def restore_scaled(self, scaled: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """The inverse of :meth:`scaled`, for keys that were not drawn in."""
        return self.restore_keys(scaled / jnp.sqrt(self.radius))

    def log_lift(self, scaled: Float[Array, "n d"]) -> Float[Array, " n"]:
        """Logarithms of the norms of features, over that of one at the root mean square.

        The Gaussian kernel has features of norm one: their norms go into the coefficients.
        """
        return jnp.sum(jnp.square(scaled), axis=-1) / 2 - self.level

    def moments(
        self,
        centers: Float[Array, "l d"],
        keys: Float[Array, "n d"],
        columns: Float[Array, "n c"],
    ) -> Float[Array, "l c"]:
        r"""What a measure looks like from some places: :math:`\sum_i E_{l k_i} c_i`, of one head.

        In blocks: the pairs may be all those of a cache.

        Args:
          centers: keys of this geometry ``[l, d]``.
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
            kernel = exponential_kernel(centers, self.keys(rows), self.radius)
            return moments + matmul(kernel, part)

        moments = jnp.zeros_like(columns, shape=(centers.shape[0], columns.shape[1]))
        if whole == 1:
            moments = add(0, block, moments)
        else:
            moments = jax.lax.fori_loop(0, whole, lambda i, m: add(i * block, block, m), moments)
        return add(whole * block, count % block, moments) if count % block else moments

    def values(self, values: Float[Array, "*heads n dv"]) -> Float[Array, "*heads n dv"]:
        """Raw values in this geometry."""
        unit = self.standardization.unit_values(values)
        return self.value_gain[..., None, None] * unit

    def coefficients(self, values: Float[Array, "n dv"]) -> Float[Array, "n dv1"]:
        """``[values, 1]`` in this geometry: what a pair adds to numerator and denominator."""
        scaled = self.values(values)
        return jnp.concatenate([scaled, jnp.ones_like(scaled[:, :1])], axis=-1)

    def restore_values(self, values: Float[Array, "*heads n dv"]) -> Float[Array, "*heads n dv"]:
        """The inverse of :meth:`values`."""
        return self.standardization.restore_values(values / self.value_gain[..., None, None])


def balancing_geometry(
    standardization: Standardization, kernel_radius: Float[Array, "*heads"] | None = None
) -> Geometry:
    r"""The geometry for a unit problem.

    A kernel :math:`e^{r \langle k, l \rangle}` that can hold one key far out has no digits left
    for all the others, so that keys beyond twice the root mean square are balanced as if they lay
    there. No balance can make good for the loss of such a key in any case.

    Args:
      standardization: the unit problem.
      kernel_radius: the radius on unit keys ``[...]``; ``None`` means
        :func:`default_kernel_radius`.
    """
    radius = default_kernel_radius(standardization) if kernel_radius is None else kernel_radius
    spread = jnp.where(standardization.key_spread > 0, standardization.key_spread, 1.0)
    reach = jnp.minimum(REACH * spread, 1.0)
    gain = jnp.sqrt(default_value_weight(standardization))
    return Geometry(standardization, reach, radius * jnp.square(reach), gain)


def fitting_geometry(
    standardization: Standardization, kernel_radius: Float[Array, "*heads"] | None = None
) -> Geometry:
    r"""The geometry in which keys are chosen and moved for a refit.

    .. math:: r = \min(\rho,\; 3 / \mathrm{mean}_i \|k_i\|^2), \qquad
              \omega = 100 / \mathrm{mean}_i \|v_i\|^2

    A fit has as many free numbers as it has columns to fit, and can afford a sharper kernel than a
    balance. The denominator is the easiest of its columns, and hardly needs a say in where keys go.

    Args:
      standardization: the unit problem.
      kernel_radius: the radius on unit keys ``[...]``; ``None`` means the one above.
    """
    spread = jnp.where(standardization.key_spread > 0, standardization.key_spread, 1.0)
    if kernel_radius is None:
        kernel_radius = jnp.minimum(standardization.rho, _FITTING_RADIUS / jnp.square(spread))
    geometry = balancing_geometry(standardization, kernel_radius)
    values = jnp.where(standardization.value_spread > 0, standardization.value_spread, 1.0)
    return geometry._replace(value_gain=_FITTING_GAIN / values)


def default_kernel_radius(standardization: Standardization) -> Float[Array, "*heads"]:
    r"""The kernel radius that a balance uses where none is given.

    .. math:: r = \min(\rho,\; 2 / \mathrm{mean}_i \|k_i\|^2)

    for unit keys: the paper's :math:`r = \rho` for small radii, and never more than 2 in units of
    the keys' own spread. Beyond that, a kernel tells apart more directions than there are signs
    to balance them: at radii from 1 to 20, larger ones did no better and mostly worse.

    Args:
      standardization: a cache's unit problem.
    """
    spread = jnp.where(standardization.key_spread > 0, standardization.key_spread, 1.0)
    return jnp.minimum(standardization.rho, 2 / jnp.square(spread))


def default_value_weight(standardization: Standardization) -> Float[Array, "*heads"]:
    r"""How much more the numerator counts in a balance than the denominator.

    .. math:: \omega = 8 / \mathrm{mean}_i \|v_i\|^2

    for unit values. The denominator's error reaches the result only multiplied by the centered
    attention output, an average that is small beside the values themselves; weights between 8 and
    30 take 10 to 20 % off the error of equal ones.

    Args:
      standardization: a cache's unit problem.
    """
    spread = jnp.where(standardization.value_spread > 0, standardization.value_spread, 1.0)
    return 8 / jnp.square(spread)
