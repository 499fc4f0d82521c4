r"""The field: the pull of an accumulated discrepancy on pairs that have no sign yet.

The discrepancy :math:`D = \sum_i c_i w_i` of coefficients :math:`c` over a cache pulls on a pair
by :math:`\langle w, D\rangle`. A walk that starts from this field continues a balance instead of
beginning its own. Two representations of :math:`D` offer the same functions:

- :class:`ExactField` keeps the coefficients themselves: a read is a pass over the cache, like
  attention, and never holds more than a block of the Gram matrix;
- :class:`LandmarkField` keeps the discrepancy as seen by a few landmark keys: reads and updates
  cost the same whatever the length of the cache, and discrepancies of different pairs add.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax._src.geometry.kernels import exponential_kernel, simultaneous_gram
from coreset_jax._src.geometry.solves import regularized_inverse
from coreset_jax._src.precision import matmul

# Source pairs in one step of an exact read: few steps, and a block that fits in a cache.
_READ_BLOCK = 4096


class UnitPairs(NamedTuple):
    """Some pairs of a unit problem.

    Attributes:
      keys: unit keys ``[b, d]``.
      values: unit values ``[b, dv]``.
      indices: their places in the cache ``[b]``.
    """

    keys: Float[Array, "b d"]
    values: Float[Array, "b dv"]
    indices: Int[Array, " b"]


class ExactField(NamedTuple):
    """A discrepancy as coefficients over the whole cache.

    Attributes:
      source: the unit pairs of the cache ``[n]``.
      radius: kernel radius, a scalar.
      coefficients: coefficients ``[n]``.
    """

    source: UnitPairs
    radius: Float[Array, ""]
    coefficients: Float[Array, " n"]

    @classmethod
    def empty(cls, source: UnitPairs, radius: Float[Array, ""]) -> "ExactField":
        """The field of no discrepancy over a cache."""
        return cls(source, radius, jnp.zeros_like(source.keys[:, 0]))

    def gram(self, pairs: UnitPairs) -> Float[Array, "b b"]:
        """The Gram matrix of some pairs in the geometry of the field."""
        return _gram(pairs, pairs, self.radius)

    def read(self, pairs: UnitPairs) -> Float[Array, " b"]:
        """The pull on each pair: a row block of the Gram matrix times the coefficients."""
        count = self.coefficients.shape[0]
        width = min(_READ_BLOCK, count)
        whole = count // width

        def add(start: Array | int, width: int, total: Array) -> Array:
            source, coefficients = jax.tree.map(
                lambda array: jax.lax.dynamic_slice_in_dim(array, start, width),
                (self.source, self.coefficients),
            )
            gram = _gram(pairs, source, self.radius)
            return total + matmul(gram, coefficients)

        total = jnp.zeros_like(pairs.keys[:, 0])
        total = jax.lax.fori_loop(0, whole, lambda i, t: add(i * width, width, t), total)
        return add(whole * width, count % width, total) if count % width else total

    def add(self, pairs: UnitPairs, signs: Float[Array, " b"]) -> "ExactField":
        """The field after ``signs`` times these pairs have joined the discrepancy."""
        return self._replace(coefficients=self.coefficients.at[pairs.indices].add(signs))

    def halve(self) -> "ExactField":
        """The field of half the discrepancy."""
        return self._replace(coefficients=self.coefficients / 2)


class LandmarkField(NamedTuple):
    r"""A discrepancy as the landmarks see it.

    With landmarks :math:`l` and :math:`E_{kl} = e^{r(\langle k, l\rangle - 1)}`, the state is
    :math:`F = \sum_i c_i E_{l k_i} [v_i, 1]`, a linear sketch, and the pull on a pair is

    .. math:: \tfrac12 \langle [v, 1],\; E_{kL} (E_{LL} + \lambda I)^{-1} F\rangle

    which is the Nystrom approximation of the exact field.

    Attributes:
      landmarks: unit keys ``[l, d]``.
      radius: kernel radius, a scalar.
      solver: :math:`(E_{LL} + \lambda I)^{-1}`, ``[l, l]``.
      moments: :math:`F^\top`, ``[dv + 1, l]``: the products with it run along its rows.
    """

    landmarks: Float[Array, "l d"]
    radius: Float[Array, ""]
    solver: Float[Array, "l l"]
    moments: Float[Array, "dv1 l"]

    @classmethod
    def empty(
        cls,
        landmarks: Float[Array, "l d"],
        radius: Float[Array, ""],
        value_width: int,
        *,
        ridge: float,
    ) -> "LandmarkField":
        r"""The field of no discrepancy, seen from these landmarks.

        Args:
          landmarks: unit keys ``[l, d]``; repetitions are harmless.
          radius: kernel radius, a scalar.
          value_width: width of the values.
          ridge: :math:`\lambda`, relative to the mean of the diagonal of :math:`E_{LL}`.
        """
        gram = exponential_kernel(landmarks, landmarks, radius)
        solver = regularized_inverse(gram, ridge)
        # Derived from the landmarks, so that it varies over the same mesh axes.
        moments = jnp.zeros_like(landmarks, shape=(value_width + 1, landmarks.shape[0]))
        return cls(landmarks, radius, solver, moments)

    def gram(self, pairs: UnitPairs) -> Float[Array, "b b"]:
        """The Gram matrix of some pairs in the geometry of the field."""
        return _gram(pairs, pairs, self.radius)

    def read(self, pairs: UnitPairs) -> Float[Array, " b"]:
        """The pull on each pair."""
        kernel = exponential_kernel(pairs.keys, self.landmarks, self.radius)
        # The solver is symmetric.
        solved = matmul(self.moments, self.solver)
        pulls = matmul(kernel, solved.T)
        return (jnp.sum(pulls[:, :-1] * pairs.values, axis=-1) + pulls[:, -1]) / 2.0

    def add(self, pairs: UnitPairs, signs: Float[Array, " b"]) -> "LandmarkField":
        """The field after ``signs`` times these pairs have joined the discrepancy."""
        kernel = exponential_kernel(pairs.keys, self.landmarks, self.radius)
        ones = jnp.ones_like(pairs.values[:, :1])
        signed = signs[:, None] * jnp.concatenate([pairs.values, ones], axis=-1)
        return self._replace(moments=self.moments + matmul(signed.T, kernel))

    def halve(self) -> "LandmarkField":
        """The field of half the discrepancy."""
        return self._replace(moments=self.moments / 2)


Field = ExactField | LandmarkField


def _gram(left: UnitPairs, right: UnitPairs, radius: Float[Array, ""]) -> Float[Array, "a b"]:
    # Weight 0 for the keys: the denominator balances them already, and on spheres and on real
    # caches alike the extra term costs 10 to 30 % of the error by spending signs on them twice.
    return simultaneous_gram(left.keys, left.values, right.keys, right.values, radius, 0.0)
