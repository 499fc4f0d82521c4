r"""Compression to a size by the default method, or to an error that is certified.

The default is chosen here, by what the caller has (:func:`compress`).
:func:`compress_to_error` halves the cache by :class:`coreset_jax.balanced` as long as a certificate
allows it: what comes back answers every query of the ball within the error asked for, and half of
it could not be shown to.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax._src import checks
from coreset_jax._src.core.compressor import Compressor
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.scale import shared_scale
from coreset_jax._src.geometry.standardize import standardize
from coreset_jax.attending import attended
from coreset_jax.balancing import balanced
from coreset_jax.choosing import better_of
from coreset_jax.fitting import fitted
from coreset_jax.guarantees.certificate import Certificate, certificate
from coreset_jax.guarantees.checks import positive_number
from coreset_jax.guarantees.sizes import reachable_error

# What a certificate is worth, over the error that theory predicts: where to begin the search.
_LOOSENESS = 2.0


class Certified(NamedTuple):
    """A coreset and what it promises.

    Attributes:
      coreset: the coreset.
      certificate: its certificate; ``certificate.error`` is at most the ``eps`` asked for.
    """

    coreset: Coreset
    certificate: Certificate


class OutOfReachError(ValueError):
    """No coreset of at most half the pairs could be certified to the error asked for.

    Attributes:
      smallest: what half of the pairs, the most that the search tries, are certified to; infinite
        where nothing can be promised at all.
    """

    def __init__(self, eps: float, smallest: float, size: int) -> None:
        found = (
            f"are certified to {smallest:g}. Ask for that, or for a smaller ball of queries."
            if math.isfinite(smallest)
            else "cannot be certified to anything. Ask for a smaller ball of queries."
        )
        super().__init__(f"eps {eps:g} is out of reach: {size} pairs a head, half of them, {found}")
        self.smallest = smallest


def compress(
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    *,
    size: int,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    queries: Float[Array, "*heads q d"] | None = None,
    scores: Float[Array, "*heads n"] | None = None,
    scale: ArrayLike | None = None,
    lengths: Int[Array, "*heads"] | None = None,
) -> Coreset:
    """A coreset of ``size`` pairs a head, by the method that suits what is given.

    - Nothing but the cache: :class:`coreset_jax.fitted`.
    - ``queries``, which may be some of a prompt's last alone: the same, matched to them.
    - ``queries`` and ``scores``, for which queries were observed that ask for all of the cache
      (:mod:`coreset_jax.queries`): for each head the better of :class:`coreset_jax.attended` and
      the same again (:class:`coreset_jax.better_of`).

    Where heads may share one budget, call :class:`coreset_jax.attended` with ``axes``.

    Heads come before pairs: ``[batch, heads, n, d]``. Arrays ``[batch, length, heads, d]``, as Flax
    and :class:`coreset_jax.nn.CoresetCache` have them, must be transposed, by ``swapaxes(-2, -3)``.
    They are refused where shapes give them away: four axes or more, at most ``size`` and 256 heads,
    and more places than both. Elsewhere heads would be taken for pairs.

    Args:
      rng: a JAX random key; every head gets a fold of its own.
      keys: cached keys ``[..., n, d]``, any float dtype.
      values: cached values ``[..., n, dv]``.
      size: pairs to keep for each head, static.
      rho: the paper's query radius, in the unit problem; a scalar or ``[...]``.
      query_norm: largest norm of a raw query instead; a scalar or ``[...]``.
      queries: sample queries ``[..., q, d]``: the coreset is matched to their attention; and unless
        a radius is given, their largest norm is that. If none of the three is given,
        ``query_norm`` is ``sqrt(d)``.
      scores: the largest attention weight that any query gave each pair ``[..., n]``; beside
        ``queries`` only.
      scale: the softmax scale, a scalar or ``[...]``; ``None`` means ``1/sqrt(d)``. The coreset
        carries it, and :func:`coreset_jax.attend` reads it with it.
      lengths: valid pairs of each head ``[...]``; the rest is padding and may hold anything.

    Returns:
      The coreset, with ``min(size, n)`` slots a head; read it with :func:`coreset_jax.attend`. For
      diagnostics call ``cj.fitted(...).with_info``.

    Raises:
      ValueError: on ill-fitting shapes, a ``size`` below 1, ``lengths`` outside ``1..n``, a
        radius that is not positive, or ``scores`` without ``queries``, before any tracing.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Theorem 4.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> coreset = cj.compress(jax.random.key(1), keys, values, size=64)
    >>> coreset.indices.shape
    (64,)
    """
    compressor: Compressor = fitted(rho=rho, query_norm=query_norm, scale=scale)
    if scores is not None:
        if queries is None:
            raise ValueError("scores need queries beside them, those that they were found for.")
        compressor = better_of(attended(scale=scale), compressor)
    return compressor(rng, keys, values, size=size, lengths=lengths, queries=queries, scores=scores)


def compress_to_error(
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    *,
    eps: float,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    queries: Float[Array, "*heads q d"] | None = None,
    scale: ArrayLike | None = None,
    lengths: Int[Array, "*heads"] | None = None,
    compressor: Compressor | None = None,
) -> Certified:
    r"""The smallest coreset that is certified to an error, among sizes halved again and again.

    The sizes are the longest head's length, halved, and the coreset that comes back is certified,

    .. math:: \sup_{\|q\| \le R} \|\mathrm{Attn}(q) - \mathrm{Attn}'(q)\| \le \varepsilon

    for every head, where half of it is not. The search begins at the size that theory predicts and
    takes a few compressions, each compiled for its size.

    Args:
      rng: a JAX random key; every head gets a fold of its own.
      keys: cached keys ``[..., n, d]``, any float dtype.
      values: cached values ``[..., n, dv]``.
      eps: the largest error, in the units of the values.
      rho: the paper's query radius, in the unit problem; a scalar or ``[...]``.
      query_norm: largest norm of a raw query instead; a scalar or ``[...]``.
      queries: sample queries ``[..., q, d]``, whose largest norm is the radius unless one is given.
        If none of the three is given, ``query_norm`` is ``sqrt(d)``.
      scale: the softmax scale, a scalar or ``[...]``; ``None`` means that of ``compressor``, and
        ``1/sqrt(d)`` where that has none. The coreset carries it.
      lengths: valid pairs of each head ``[...]``; the rest is padding and may hold anything.
      compressor: the method; ``None`` means :class:`coreset_jax.balanced` for this radius.

    Returns:
      The coreset with its certificate.

    Raises:
      ValueError: as :func:`compress`; under a transformation of JAX (a size cannot depend on traced
        data), or if the cache is not finite.
      OutOfReachError: a ``ValueError`` too, if half of the pairs cannot be certified to ``eps``; it
        carries the smallest error that they can.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Theorem 4.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> found = cj.compress_to_error(jax.random.key(1), keys, values, eps=0.1, rho=1.0)
    >>> bool(found.certificate.error <= 0.1), found.coreset.keys.shape
    (True, (256, 16))
    """
    if compressor is None:
        compressor = balanced(rho=rho, query_norm=query_norm, scale=scale)
    given = (rng, keys, values, eps, rho, query_norm, queries, scale, lengths, compressor)
    if any(checks.is_traced(array) for array in jax.tree.leaves(given)):
        raise ValueError("eps chooses a size by the data, and cannot be traced; call compress.")
    eps = positive_number("eps", eps)
    scale = shared_scale("compressor and certificate", compressor.coreset_scale, scale)
    ball: dict[str, Any] = {"rho": rho, "query_norm": query_norm, "scale": scale}
    ball |= {"queries": queries, "lengths": lengths}
    # Checks all arguments, before anything is compressed.
    standardization = standardize(keys, values, **ball)
    longest = keys.shape[-2] if lengths is None else int(np.max(np.asarray(lengths)))
    halves = [-(-longest // 2**level) for level in range(1, max(longest - 1, 1).bit_length() + 1)]

    def attempt(size: int) -> Certified:
        coreset = compressor(rng, keys, values, size=size, lengths=lengths, queries=queries)
        if coreset.scale is None and scale is not None:
            # A method that knows of no scale, for one that a reader must know.
            dtype = standardization.rho.dtype
            coreset = coreset._replace(scale=jnp.full(keys.shape[:-2], scale, dtype))
        return Certified(coreset, certificate(keys, values, coreset, **ball))

    def predicted(size: int) -> float:
        width = max(keys.shape[-1], values.shape[-1])
        return max(
            _LOOSENESS * float(extent) * _theory(width, float(rho), size)
            for rho, extent in zip(
                np.ravel(standardization.rho), np.ravel(standardization.value_radius), strict=True
            )
        )

    likely = [level for level, half in enumerate(halves) if predicted(half) <= eps]
    return _search(attempt, halves, likely[-1] if likely else 0, eps)


def _theory(width: int, rho: float, size: int) -> float:
    """What Theorem 4 promises; infinite where there is nothing to be had."""
    if not 0 < rho < 500:
        return math.inf
    return reachable_error(width, rho, size)


def _search(
    attempt: Callable[[int], Certified], halves: list[int], level: int, eps: float
) -> Certified:
    """The result for a size of ``halves`` that is certified where the next one is not."""

    def worst(result: Certified) -> float:
        error = float(jnp.max(result.certificate.error))
        if math.isnan(error):
            raise ValueError("keys, values and the coreset of them must be finite to be certified.")
        return error

    result = attempt(halves[level])
    error = worst(result)
    if error <= eps:
        while level + 1 < len(halves):
            smaller = attempt(halves[level + 1])
            if worst(smaller) > eps:
                break
            level, result = level + 1, smaller
        return result
    while error > eps:
        if level == 0:
            raise OutOfReachError(eps, error, halves[0])
        level -= 1
        result = attempt(halves[level])
        error = worst(result)
    return result
