"""What all refits share: a compressor first, and then a fit for every head of what it kept."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.coreset import Compressor, Coreset
from coreset_jax.problem import check_radius, radii_of_heads, radius_arrays

# Entries of the matrices that are held at a time.
_ENTRIES = 2**26

FitHead = Callable[..., Coreset]
"""``(keys [n, d], values [n, dv], length, coreset, rho, query_norm, queries, kernel_radius, *,
settings) -> Coreset`` for one head; pairs from ``length`` on are padding and may hold anything."""


def heads_at_once(entries: int) -> int:
    """Heads that may be fitted at a time if each holds a matrix of so many entries."""
    return max(_ENTRIES // entries, 1)


@functools.partial(jax.jit, static_argnames=("fit_head", "settings", "at_once"))
def _fit(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    lengths: Int[Array, "*heads"] | None,
    coreset: Coreset,
    rho: Array | None,
    query_norm: Array | None,
    queries: Float[Array, "*heads q d"] | None,
    kernel_radius: Array | None,
    *,
    fit_head: FitHead,
    settings: Hashable,
    at_once: int,
) -> Coreset:
    one_head = functools.partial(fit_head, settings=settings)
    rho, query_norm, kernel_radius = radii_of_heads(keys, values, rho, query_norm, kernel_radius)
    counts = jnp.zeros_like(keys[..., 0, 0], jnp.int32) + (
        keys.shape[-2] if lengths is None else jnp.asarray(lengths).astype(jnp.int32)
    )
    arguments = (keys, values, counts, coreset, rho, query_norm, queries, kernel_radius)
    leading = keys.shape[:-2]
    if math.prod(leading) <= at_once:
        for _ in leading:
            one_head = jax.vmap(one_head)
        return one_head(*arguments)
    # A few heads after another: their matrices would not fit.
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(leading) :]), arguments)
    fitted = jax.lax.map(lambda each: one_head(*each), flat, batch_size=at_once)
    return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[1:]), fitted)


@dataclasses.dataclass(frozen=True)
class Refitted:
    """A compressor whose coresets are fitted to the whole cache once more.

    Attributes:
      compressor: what picks the keys.
      rho: the query radius, or ``None``.
      query_norm: the same for raw queries, or ``None``.
      kernel_radius: the geometry of the fit, or ``None``.
      scale: the softmax scale, or ``None``.
      fit_head: the fit of one head, a module-level function.
      settings: what of it is fixed at compile time.
      most_entries: ``(n, m) ->`` entries of the matrices that the fit of a head holds.
      needs_queries: whether it cannot do without sample queries, which it then is given.
    """

    compressor: Compressor
    rho: ArrayLike | None
    query_norm: ArrayLike | None
    kernel_radius: ArrayLike | None
    scale: float | None
    fit_head: FitHead
    settings: Hashable
    most_entries: Callable[[int, int], int]
    needs_queries: bool = False

    def __call__(
        self,
        rng: Array,
        keys: Float[Array, "*heads n d"],
        values: Float[Array, "*heads n dv"],
        *,
        size: int,
        lengths: Int[Array, "*heads"] | None = None,
        queries: Float[Array, "*heads q d"] | None = None,
    ) -> Coreset:
        """Compresses and fits; see :class:`~coreset_jax.coreset.Compressor`."""
        validation.check_cache(keys, values)
        validation.check_size(size)
        validation.check_lengths(lengths, keys)
        check_radius(keys, self.rho, self.query_norm, queries, self.scale)
        validation.check_positive("kernel_radius", self.kernel_radius, keys.shape[:-2])
        if self.needs_queries and (queries is None or queries.shape[-2] < 1):
            shape = None if queries is None else queries.shape
            raise ValueError(
                "queries must be given, at least one a head: the fit is to what they hear; got "
                f"{shape} with keys {keys.shape}."
            )
        coreset = self.compressor(rng, keys, values, size=size, lengths=lengths, queries=queries)
        if coreset.normalizers is not None:
            raise ValueError("compressor must return a coreset without normalizers to be refitted.")
        if size >= keys.shape[-2]:
            return coreset
        rho, query_norm, kernel_radius = radius_arrays(
            keys, values, self.rho, self.query_norm, self.kernel_radius
        )
        if not self.needs_queries and (rho is not None or query_norm is not None):
            queries = None
        entries = self.most_entries(keys.shape[-2], coreset.keys.shape[-2])
        return _fit(
            keys,
            values,
            lengths,
            coreset,
            rho,
            query_norm,
            queries,
            kernel_radius,
            fit_head=self.fit_head,
            settings=self.settings,
            at_once=heads_at_once(entries),
        )


def refitted(
    compressor: Compressor,
    fit_head: FitHead,
    settings: Hashable,
    most_entries: Callable[[int, int], int],
    *,
    rho: ArrayLike | None,
    query_norm: ArrayLike | None,
    kernel_radius: ArrayLike | None,
    scale: Any,
    needs_queries: bool = False,
) -> Compressor:
    """A :class:`Refitted`, its options checked; see there."""
    if not callable(compressor):
        raise ValueError(f"compressor must be callable, got {compressor!r}.")
    scale = validation.static_float("scale", scale)
    return Refitted(
        compressor,
        rho,
        query_norm,
        kernel_radius,
        scale,
        fit_head,
        settings,
        most_entries,
        needs_queries,
    )
