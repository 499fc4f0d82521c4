r"""An upper bound on a coreset's worst error: no query of the ball does worse.

The difference of two attentions is one exponential sum over the atoms of both. It is bounded
Taylor degree by Taylor degree (:mod:`coreset_jax.guarantees.degrees`), which costs about as much
as a pass of attention and asks nothing of the method that made the coreset.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src import checks, meshes
from coreset_jax._src.core.coreset import Coreset, SignedCoreset
from coreset_jax._src.core.turns import over_axes
from coreset_jax._src.geometry.standardize import Standardization
from coreset_jax._src.precision import accumulation_dtype
from coreset_jax.guarantees.atoms import Atoms, atoms_of, holds_pairs_of
from coreset_jax.guarantees.checks import check_comparison
from coreset_jax.guarantees.degrees import TILE, Moments, bound_degrees, default_degrees
from coreset_jax.guarantees.norms import row_norms, unit_roundoff
from coreset_jax.guarantees.tilt import spread_center, tilted


class Certificate(NamedTuple):
    r"""An upper bound on the error of a coreset over a ball of queries, and what it is made of.

    The difference :math:`E(q) - E_Z(q)\,(\mathrm{Attn}'(q) - \bar v)`, over the normalized
    denominator, is the error; :math:`E` and :math:`E_Z` are what source and coreset disagree by
    in numerator and denominator. ``error`` is at most
    ``(sum(numerator) + output * sum(denominator)) / minimum``.

    Attributes:
      error: the bound ``[...]``, in the units of the values; infinite where nothing can be
        promised, NaN for a head whose source or coreset is not finite.
      kernel: the bound that a single quadratic form of a kernel gives ``[...]``, for comparison.
      numerator: bound on what each Taylor degree adds to the numerator's error
        ``[..., degrees + 1]``, in the units of the values; the last entry is the tail.
      denominator: the same for the denominator's error ``[..., degrees + 1]``, no units.
      output: bound on the coreset's centered output ``[...]``, in the units of the values.
      minimum: lower bound on the source's normalized denominator ``[...]``, about 1.
      rho: radius of the unit queries ``[...]``.
    """

    error: Float[Array, "*heads"]
    kernel: Float[Array, "*heads"]
    numerator: Float[Array, "*heads shares"]
    denominator: Float[Array, "*heads shares"]
    output: Float[Array, "*heads"]
    minimum: Float[Array, "*heads"]
    rho: Float[Array, "*heads"]


def _void(bound: Array) -> Array:
    """The bound, infinite where it came out as no number: that is always true."""
    return jnp.where(jnp.isnan(bound), jnp.inf, bound)


def _minimum(moments: Moments, rho: Float[Array, ""]) -> Float[Array, ""]:
    r"""The least value of a positive sum in the ball, by Jensen's inequality.

    .. math::
       \sum_i \zeta_i e^{\langle q, k_i\rangle}
         \ge M e^{-\rho \|m\| / M}, \qquad M = \sum_i \zeta_i, \quad m = \sum_i \zeta_i k_i
    """
    unit = unit_roundoff(rho.dtype)
    mass = moments.mass - moments.mass_error
    length = row_norms(moments.first) * (1 + 64 * unit) + moments.first_error
    least = mass * jnp.exp(-rho * length / mass * (1 + 8 * unit)) * (1 - 64 * unit)
    return jnp.where(mass > 0, least, 0)


def _error(
    numerator: Array,
    denominator: Array,
    source_minimum: Array,
    coreset_minimum: Array,
    output: Array,
    atoms: Atoms,
) -> Float[Array, ""]:
    r"""The least of the bounds that follow from those on numerator and denominator.

    .. math::
       \mathrm{Attn} - \mathrm{Attn}' = \frac{E - E_Z \mathrm{Attn}'}{Z}
                                      = \frac{E - E_Z \mathrm{Attn}}{Z'}

    and no two outputs are further apart than the values that they are combined of.
    """
    through_source = _void((numerator + output * denominator) / source_minimum)
    source_output = jnp.minimum(atoms.source_norm, _void(output + through_source))
    through_coreset = _void((numerator + source_output * denominator) / coreset_minimum)
    through_coreset = jnp.where(coreset_minimum > 0, through_coreset, jnp.inf)
    values = atoms.source_norm + atoms.coreset_norm
    return jnp.minimum(jnp.minimum(through_source, through_coreset), values)


def _certify_head(
    source: Coreset,
    coreset: Coreset | SignedCoreset,
    standardization: Standardization,
    held: Bool[Array, ""],
    error: Float[Array, ""] | None,
    *,
    blocks: tuple[Int[Array, ""], Int[Array, ""]],
    degrees: int,
    block_size: int,
) -> Certificate:
    """The certificate of one head."""
    atoms = atoms_of(source, coreset, standardization, held, error, block_size)
    unit = unit_roundoff(standardization.rho.dtype)
    # The radius is itself a product of rounded norms.
    rho = standardization.rho * (1 + 2 * (source.keys.shape[-1] + 16) * unit)
    bound = functools.partial(bound_degrees, degrees=degrees, block_size=block_size)
    difference = bound(atoms.difference, rho, blocks[0])
    kept = bound(atoms.coreset, rho, blocks[1])

    # Source minus coreset plus coreset.
    both = Moments(*map(jnp.add, difference.moments, kept.moments))
    source_minimum = _minimum(both, rho)
    convex = jnp.isfinite(atoms.coreset_norm)
    coreset_minimum = jnp.where(convex, _minimum(kept.moments, rho), -jnp.inf)

    def least(denominator: Array) -> Array:
        return jnp.maximum(coreset_minimum, source_minimum - denominator)

    numerator, denominator = jnp.sum(difference.numerator), jnp.sum(difference.denominator)
    minimum = least(denominator)
    reached = jnp.where(minimum > 0, _void(jnp.sum(kept.numerator) / minimum), jnp.inf)
    output = jnp.minimum(reached, atoms.coreset_norm)
    degreewise = _error(numerator, denominator, source_minimum, minimum, output, atoms)
    denominator = difference.denominator_kernel
    kernel = _error(
        difference.numerator_kernel,
        denominator,
        source_minimum,
        least(denominator),
        atoms.coreset_norm,
        atoms,
    )

    def shown(bound: Array, units: Array | float) -> Array:
        bound = _void(units * bound * (1 + 64 * unit))
        return jnp.where(atoms.finite, bound, jnp.nan)

    return Certificate(
        error=shown(jnp.minimum(degreewise, kernel), standardization.value_radius),
        kernel=shown(kernel, standardization.value_radius),
        numerator=shown(difference.numerator, standardization.value_radius),
        denominator=shown(difference.denominator, 1.0),
        output=shown(output, standardization.value_radius),
        minimum=jnp.where(atoms.finite, source_minimum, jnp.nan),
        rho=standardization.rho,
    )


def _certify_heads(
    _: None,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    coreset: Coreset | SignedCoreset,
    query_center: Float[Array, "*heads d"] | None,
    ball: dict[str, Any],
    *,
    degrees: int,
    block_size: int,
) -> Certificate:
    """The certificates of some heads."""
    dtype = accumulation_dtype(keys, values, coreset.keys, coreset.values)
    seen = tilted(keys.astype(dtype), values.astype(dtype), coreset, query_center, **ball)
    count, size, axes = keys.shape[-2], coreset.keys.shape[-2], keys.ndim - 2
    counts = jnp.zeros_like(keys[..., 0, 0], jnp.int32)
    counts += count if ball["lengths"] is None else ball["lengths"].astype(jnp.int32)
    held = over_axes(holds_pairs_of, axes)(coreset, keys, values, counts)
    # One number for all heads, so that their loops stay one loop.
    atoms = jnp.where(jnp.all(held), count, count + size)
    blocks = -(-atoms // block_size), jnp.full_like(atoms, -(-size // block_size))
    head = functools.partial(_certify_head, blocks=blocks, degrees=degrees, block_size=block_size)
    return over_axes(head, axes)(seen.source, seen.coreset, seen.standardization, held, seen.error)


@functools.partial(jax.jit, static_argnames=("degrees", "block_size"))
def _certificate(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    coreset: Coreset | SignedCoreset,
    query_center: Float[Array, "*#heads d"] | None,
    ball: dict[str, Any],
    *,
    degrees: int,
    block_size: int,
) -> Certificate:
    center = spread_center(query_center, keys)
    certify = functools.partial(_certify_heads, degrees=degrees, block_size=block_size)
    return meshes.for_heads(certify, keys.ndim - 2, None, keys, values, coreset, center, ball)


def certificate(
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    coreset: Coreset | SignedCoreset,
    *,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    queries: Float[Array, "*heads q d"] | None = None,
    scale: ArrayLike | None = None,
    lengths: Int[Array, "*heads"] | None = None,
    query_center: Float[Array, "*#heads d"] | None = None,
    degrees: int | None = None,
    block_size: int = 512,
) -> Certificate:
    r"""Bounds the error of a coreset for every query of a ball.

    .. math::
       \sup_{\|q - \mu\| \le R} \| \mathrm{Attn}(q) - \mathrm{Attn}'(q) \|
         \le \frac{\sup\|E\| + \sup\|\mathrm{Attn}' - \bar v\| \, \sup|E_Z|}{\min Z}, \qquad
       R = \frac{\rho}{\mathrm{scale} \cdot \max_i \|k_i - \bar k\|}

    where in the unit problem
    :math:`E(q) = \frac1n \sum_i e^{\langle q,k_i\rangle} v_i - \frac1W \sum_i w_i
    e^{\langle q,k'_i\rangle} v'_i` and :math:`E_Z` is the same without values. Each supremum is
    bounded degree by degree (:func:`coreset_jax.guarantees.degrees.bound_degrees`), that of the
    coreset's own output too: where values have many directions it is far below the largest of
    them. The same split with source and coreset exchanged, and the distance of the values, are
    taken where they promise less. It holds for any weighted pairs, however they were found; a
    signed coreset needs a denominator that cannot vanish, and has no promise otherwise.

    About a mean query :math:`\mu` the pairs of both sides count
    :math:`e^{\mathrm{scale}\langle\mu, k_i\rangle}` times as much, their means are weighted like
    that, and the radius is that of the queries' distances from :math:`\mu`. Queries of pretrained
    models are far from centered: what can be promised about zero there is nothing.

    The promise is about exact attention over the numbers given, and the arithmetic here is rounded
    upwards in all its sums. With ``u`` the unit roundoff of float32 the allowance is about
    ``600 u e^rho`` of the largest value for 16384 pairs, which is seen only where an error is as
    small as that; x64 takes it away.

    Time is that of all inner products of the pairs, each computed once, and so quadratic in ``n``;
    memory above a copy of the cache in unit form is a few blocks a head.

    Args:
      keys: the source's keys ``[..., n, d]``.
      values: the source's values ``[..., n, dv]``.
      coreset: what any compressor made of them, signed ones included.
      rho: radius of the unit queries, see :func:`coreset_jax.geometry.standardize`.
      query_norm: or the radius of the raw queries. Each is a scalar or ``[...]``.
      queries: or sample raw queries ``[..., q, d]`` whose largest norm is the radius; with none
        of the three the radius of the raw queries is ``sqrt(d)``.
      scale: the softmax scale, a scalar or ``[...]``; ``None`` means the coreset's, and where that
        has none ``1/sqrt(d)``. Any other than the coreset's is an error.
      lengths: valid pairs of each head ``[...]``; ``None`` means all.
      query_center: the middle :math:`\mu` of the ball, ``[..., d]``, of which ``rho`` and
        ``query_norm`` are radii then, and from which the distance of sample ``queries`` counts;
        ``None`` means zero.
      degrees: Taylor degrees bounded apart, 3 or 4, static; ``None`` means 4 for narrow keys and 3
        where the tensor of degree 3, ``d^3 dv / 2`` numbers, would cost more than the rest.
      block_size: pairs of a block, static; rounded up to a multiple of 128.

    Returns:
      The bound, with the share of every degree. It grows like :math:`e^\rho` or faster: beyond
      ``rho`` of about 5 it seldom says more than that outputs lie among the values.

    Raises:
      ValueError: if shapes do not fit, a radius is not positive or named twice, ``degrees`` is
        neither 3 nor 4, or ``block_size`` is not positive.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Sections 4 and 5, for
      the kernel and the unit problem; the bounds by degree are this library's.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> coreset = cj.balanced(rho=1.0)(jax.random.key(1), keys, values, size=64)
    >>> promise = certificate(keys, values, coreset, rho=1.0)
    >>> found = cj.guarantees.adversary(jax.random.key(2), keys, values, coreset, rho=1.0)
    >>> bool(found.error < promise.error < 3 * found.error)
    True
    """
    ball: dict[str, Any] = {
        "rho": rho,
        "query_norm": query_norm,
        "queries": queries,
        "scale": scale,
        "lengths": lengths,
    }
    ball["scale"] = check_comparison(keys, values, coreset, query_center, **ball)
    # What is compared is the unit problem, into which the scale goes.
    coreset = coreset._replace(scale=None)
    checks.check_count("block_size", block_size)
    if degrees is None:
        degrees = default_degrees(keys.shape[-1], values.shape[-1])
    elif isinstance(degrees, bool) or degrees not in (3, 4):
        raise ValueError(f"degrees must be 3 or 4, got {degrees!r}.")
    # A block of padding would be work for nothing.
    block_size = TILE * -(-min(block_size, keys.shape[-2]) // TILE)
    return _certificate(
        keys,
        values,
        coreset,
        query_center,
        ball,
        degrees=int(degrees),
        block_size=block_size,
    )
