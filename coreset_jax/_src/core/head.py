"""One head of a cache as a stage sees it: masked, in units of its own, with its sample queries."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src.attention import default_scale
from coreset_jax._src.core.coreset import Coreset, gather, whole_cache
from coreset_jax._src.geometry.standardize import Standardization, largest_norm, standardize
from coreset_jax._src.precision import accumulation_dtype

_ARRAYS = (
    "rng",
    "number",
    "keys",
    "values",
    "length",
    "queries",
    "scores",
    "query_norm",
    "scale",
    "log_weights",
)
_STATIC = ("ragged", "measured")


@dataclasses.dataclass(frozen=True)
class Head:
    """The pairs of one head, or of a consecutive part of it, ready for a stage.

    Attributes:
      rng: the caller's random key, the same for all heads; a stage draws with :attr:`key`.
      number: number of the head, or of the part among all parts of all heads, int32.
      keys: keys ``[n, d]`` in the dtype of the cache; zeros in padding.
      values: values ``[n, dv]``, likewise.
      length: how many pairs are valid; they come first.
      queries: raw sample queries ``[q, d]``, or ``None``.
      scores: the largest attention weight that any query gave each pair ``[n]``, or ``None``;
        those of padding are not looked at.
      query_norm: largest norm of a raw query.
      scale: the softmax scale.
      log_weights: logarithms of how many pairs each stands for already ``[n]``; ``None`` means one.
        Those of padding are not looked at. Pivots and fits know of them, other stages do not.
      ragged: whether some of the pairs may be padding, static.
      measured: whether somebody wants to know the errors of fits, static: some take long.
    """

    rng: Array
    number: Int[Array, ""]
    keys: Float[Array, "n d"]
    values: Float[Array, "n dv"]
    length: Int[Array, ""]
    queries: Float[Array, "q d"] | None
    scores: Float[Array, " n"] | None
    query_norm: Float[Array, ""]
    scale: Float[Array, ""]
    log_weights: Float[Array, " n"] | None
    ragged: bool
    measured: bool = False

    @classmethod
    def prepare(
        cls,
        rng: Array,
        number: Int[Array, ""],
        keys: Float[Array, "n d"],
        values: Float[Array, "n dv"],
        length: Int[Array, ""],
        queries: Float[Array, "q d"] | None,
        scores: Float[Array, " n"] | None = None,
        *,
        log_weights: Float[Array, " n"] | None = None,
        ragged: bool,
        measured: bool = False,
        rho: Float[Array, ""] | None = None,
        query_norm: Float[Array, ""] | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> "Head":
        """A head of raw pairs, of which those from ``length`` on may hold anything.

        The radius comes from ``rho``, ``query_norm`` or ``queries`` as in
        :func:`coreset_jax.geometry.standardize`.
        """
        if ragged:
            inside = (jnp.arange(keys.shape[0], dtype=jnp.int32) < length)[:, None]
            keys = jnp.where(inside, keys, jnp.zeros_like(keys))
            values = jnp.where(inside, values, jnp.zeros_like(values))
        # Made from the keys, so that both vary over the mesh axes that they do.
        zero = jnp.zeros_like(keys[0, 0], accumulation_dtype(keys, values))
        scale = zero + (default_scale(keys.shape[-1]) if scale is None else scale)
        if rho is not None:
            lengths = length if ragged else None
            query_norm = standardize(keys, values, rho=rho, scale=scale, lengths=lengths).query_norm
        norm = zero + (largest_norm(queries, keys.shape[-1]) if query_norm is None else query_norm)
        pairs = keys, values, length, queries, scores
        return cls(rng, number, *pairs, norm, scale, log_weights, ragged, measured)

    def part(self, **changes: Any) -> "Head":
        """A part of this head as a head of its own: its own units, and the same raw queries.

        Args:
          **changes: its ``number``, ``keys``, ``values``, ``scores``, ``log_weights``, ``length``
            and ``ragged``.
        """
        part = dataclasses.replace(self, **changes)
        inside = part.inside[:, None]
        return dataclasses.replace(
            part,
            keys=jnp.where(inside, part.keys, 0) if part.ragged else part.keys,
            values=jnp.where(inside, part.values, 0) if part.ragged else part.values,
        )

    @functools.cached_property
    def standardization(self) -> Standardization:
        """The unit problem of these pairs."""
        return standardize(
            self.keys,
            self.values,
            query_norm=self.query_norm,
            queries=self.queries,
            scale=self.scale,
            lengths=self.length if self.ragged else None,
            log_weights=self.log_weights,
            narrow=True,
        )

    @property
    def log_masses(self) -> Float[Array, " n"]:
        """Logarithms of how many pairs each stands for; minus infinity for padding."""
        masses = jnp.zeros_like(self.keys[:, 0], self.dtype)
        if self.log_weights is not None:
            masses = masses + self.log_weights.astype(self.dtype)
        return jnp.where(self.inside, masses, -jnp.inf)

    @property
    def key(self) -> Array:
        """A random key of this head's own."""
        return jax.random.fold_in(self.rng, self.number)

    @property
    def count(self) -> int:
        """Pairs, padding included; static."""
        return self.keys.shape[0]

    @property
    def width(self) -> int:
        """Numbers in a key and a value together; static."""
        return self.keys.shape[-1] + self.values.shape[-1]

    @property
    def inside(self) -> Bool[Array, " n"]:
        """Which pairs are no padding."""
        return jnp.arange(self.count, dtype=jnp.int32) < self.length

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of sums."""
        return self.scale.dtype

    def pairs(self, indices: Int[Array, " m"], log_weights: Float[Array, " m"]) -> Coreset:
        """The coreset of the pairs at ``indices``.

        In a ragged head -1, or an index of padding, is an empty slot.
        """
        indices = indices.astype(jnp.int32)
        if not self.ragged:
            return Coreset(self.keys[indices], self.values[indices], log_weights, indices)
        indices = jnp.where(indices < self.length, indices, -1)
        return gather(self.keys, self.values, indices, log_weights)

    def largest(
        self, scores: Float[Array, " n"], slots: int, budget: Int[Array, ""] | None = None
    ) -> Coreset:
        """The coreset of the pairs of largest score, each with weight one; of equal ones the first.

        Args:
          scores: one for each pair ``[n]``; those of padding are not looked at.
          slots: slots of the coreset, static.
          budget: pairs to keep, at most ``slots``; ``None`` means as many.
        """
        # Not top_k, whose choice among equal scores is not the same on every platform.
        places = jnp.zeros_like(scores, jnp.int32) + jnp.arange(self.count, dtype=jnp.int32)
        _, best = jax.lax.sort((jnp.where(self.inside, -scores, jnp.inf), places), num_keys=2)
        weights = jnp.zeros_like(scores[:slots], self.dtype)
        if budget is None:
            # Padding comes last.
            return self.pairs(jnp.sort(best[:slots]), weights)
        held = jnp.arange(slots) < jnp.minimum(budget, self.length)
        indices = jnp.sort(jnp.where(held, best[:slots], self.count))
        indices = jnp.where(indices < self.count, indices, -1)
        return gather(self.keys, self.values, indices, weights)

    def whole(self) -> Coreset:
        """All pairs, each with the weight that it has."""
        coreset = whole_cache(self.keys, self.values, self.length if self.ragged else None)
        if self.log_weights is None:
            return coreset
        return coreset._replace(log_weights=self.log_masses.astype(coreset.log_weights.dtype))


def _rebuilt(statics: tuple[Any, ...], arrays: Iterable[Any]) -> Head:
    # Without the constructor: while JAX handles it, arrays may have more axes, or be anything.
    head = object.__new__(Head)
    for name, value in zip((*_ARRAYS, *_STATIC), (*arrays, *statics), strict=True):
        object.__setattr__(head, name, value)
    return head


jax.tree_util.register_pytree_with_keys(
    Head,
    lambda head: (
        [(jax.tree_util.GetAttrKey(name), getattr(head, name)) for name in _ARRAYS],
        tuple(getattr(head, name) for name in _STATIC),
    ),
    _rebuilt,
)
