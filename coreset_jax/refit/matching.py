r"""Matching: weights and values that answer sample queries as the whole cache does.

Where it is known what will be asked, what stands behind a coreset's keys can be fitted to that.
Samples alone do not say enough: with no more of them than pairs, a fit answers them exactly and
nothing else. What a fit in the kernel put there says the rest, and :func:`matching` corrects it by
what the samples hear.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.coreset import Compressor, Coreset
from coreset_jax.geometry import fitting_geometry
from coreset_jax.kernels import gaussian_kernel, one_by_one
from coreset_jax.problem import Reduction, reduce, restore_values
from coreset_jax.refit.projection import columns_of
from coreset_jax.refit.samples import (
    Hearing,
    hear,
    matched_log_weights,
    matched_values,
    unless_worse,
)
from coreset_jax.refit.wrapper import refitted

HIGHEST = jax.lax.Precision.HIGHEST

# The ridge of a correction, in roundings of the largest eigenvalue (at most the largest sum of a
# row).
_ROUNDINGS = 64

# No weight falls below this share of the mean, or of what it was where that was less: pairs that
# stand for themselves alone may stay as light as they are.
_LEAST_WEIGHT = 0.1

# Largest logarithm of the norm of a feature, above that at the root mean square.
_MOST_LIFT = 30.0

# Of a head, samples or pairs of the cache that are held against the kept keys at a time, about; and
# how much more of memory than that a head is given.
_BLOCK = 2048
_SHARE = 32


class _Settings(NamedTuple):
    """What of a correction is fixed at compile time."""

    scale: float | None
    strength: float


class _PlainSettings(NamedTuple):
    """What of a plain attention matching is fixed at compile time."""

    scale: float | None
    ridge: float
    bound: float
    steps: int


def correct(
    normal: Float[Array, "m m"],
    shares: Float[Array, "q m"],
    unit: Float[Array, ""],
    outputs: Float[Array, "q c"],
    columns: Float[Array, "m c1"],
    least: Float[Array, " m"],
) -> Float[Array, "m c1"]:
    r"""Columns with a denominator nearer to one, and a numerator nearer to what that asks of it.

    .. math::
       w' = \max\bigl(\mathrm{least},\; w + N^{-1} P^T (1 - P w)\bigr), \qquad
       U' = U + N^{-1} P^T \bigl( (P w') \cdot Y - P U \bigr)

    for columns :math:`[U, w]`. Where no weights bring the denominator to one, the numerator is
    still fitted to make the right ratio with it.

    Args:
      normal: :math:`N`, positive definite ``[m, m]``.
      shares: :math:`P`, in any unit ``[q, m]``.
      unit: what a share of one is in that unit.
      outputs: :math:`Y`, ``[q, c]``.
      columns: numerator, and denominator last ``[m, c + 1]``.
      least: what no weight may fall below ``[m]``.

    Returns:
      The columns ``[m, c + 1]``; NaN where ``normal`` is not positive definite to rounding.
    """
    factor = jax.scipy.linalg.cho_factor(normal)

    def change(missing: Array) -> Array:
        return jax.scipy.linalg.cho_solve(factor, jnp.matmul(shares.T, missing, precision=HIGHEST))

    heard = jnp.matmul(shares, columns, precision=HIGHEST)
    weights = columns[:, -1:] + change(unit - heard[:, -1:])
    weights = jnp.maximum(weights, least[:, None])
    masses = jnp.matmul(shares, weights, precision=HIGHEST)
    numerator = columns[:, :-1] + change(masses * outputs - heard[:, :-1])
    return jnp.concatenate([numerator, weights], axis=-1)


def _ask(
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    length: Int[Array, ""],
    coreset: Coreset,
    rho: Float[Array, ""] | None,
    query_norm: Float[Array, ""] | None,
    queries: Float[Array, "q d"],
    scale: float | None,
) -> tuple[Reduction, Hearing]:
    """The unit problem of a head, and what its samples hear."""
    inside = jnp.arange(keys.shape[0]) < length
    # Padding may hold anything.
    keys = jnp.where(inside[:, None], keys, jnp.zeros_like(keys))
    values = jnp.where(inside[:, None], values, jnp.zeros_like(values))
    reduction = reduce(
        keys,
        values,
        rho=rho,
        query_norm=query_norm,
        queries=queries,
        scale=scale,
        lengths=length,
    )
    return reduction, hear(reduction, queries, keys, values, inside, coreset)


def _match_head(
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    length: Int[Array, ""],
    coreset: Coreset,
    rho: Float[Array, ""] | None,
    query_norm: Float[Array, ""] | None,
    queries: Float[Array, "q d"],
    kernel_radius: Float[Array, ""] | None,
    *,
    settings: _Settings,
) -> Coreset:
    """The coreset of one head, corrected by what its samples hear."""
    reduction, hearing = _ask(
        keys, values, length, coreset, rho, query_norm, queries, settings.scale
    )
    geometry = fitting_geometry(reduction, kernel_radius)
    dtype = geometry.radius.dtype
    held = jnp.isfinite(coreset.log_weights)
    count = jnp.sum(held).astype(dtype)
    root = jnp.sqrt(geometry.radius)
    marks = jnp.where(held[:, None], root * geometry.keys(coreset.keys), 0)
    weights = jnp.where(held, jnp.exp(coreset.log_weights.astype(dtype)), 0)

    # Features of norm one: their norms go into the columns, and out of the shares. Keys far out
    # count as what they are, or the shares of the heaviest would be all that the trace sees.
    level = jnp.square(root * reduction.key_spread / geometry.reach) / 2
    norms = geometry.radius * geometry.true_squares(coreset.keys) / 2 - level
    lift = jnp.where(held, jnp.minimum(norms, _MOST_LIFT), 0)
    heights = jnp.exp(lift)[:, None]
    columns = heights * weights[:, None] * columns_of(geometry, coreset.values)
    totals = hearing.cache.maximum + jnp.log(hearing.cache.total)
    shares = hearing.scores - totals[:, None] - lift[None]
    # In the unit in which their squares sum to the number of pairs, as those of the kernel's
    # diagonal do.
    top = jnp.max(shares)
    shares = jnp.exp(shares - top)
    unit = jnp.sqrt(count / jnp.sum(jnp.square(shares)))
    shares = unit * shares
    unit *= jnp.exp(-top)

    # Attention does not see a common factor: the one with which the mass is the cache's.
    heard = jnp.matmul(shares, columns[:, -1], precision=HIGHEST)
    common = unit * jnp.sum(heard) / jnp.sum(jnp.square(heard))
    columns, weights = common * columns, common * weights
    kernel = jnp.where(held[:, None] & held[None], gaussian_kernel(marks, marks), 0)
    normal = jnp.matmul(shares.T, shares, precision=HIGHEST) + settings.strength * kernel
    ridge = _ROUNDINGS * jnp.finfo(dtype).eps * jnp.max(jnp.sum(normal, axis=-1))
    # Empty slots keep a matrix that can be solved.
    normal += jnp.diag(jnp.where(held, ridge, 1).astype(dtype))
    outputs = geometry.value_gain * hearing.outputs()
    least = _LEAST_WEIGHT * jnp.minimum(weights, jnp.sum(weights) / count)
    after = one_by_one(correct)(normal, shares, unit, outputs, columns, heights[:, 0] * least)

    masses = jnp.where(held, after[:, -1], 1)
    log_weights = jnp.where(held, jnp.log(masses) - lift, -jnp.inf)
    chosen = geometry.restore_values(after[:, :-1] / masses[:, None])
    return unless_worse(hearing, length, coreset, chosen, log_weights)


def _match_plainly(
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    length: Int[Array, ""],
    coreset: Coreset,
    rho: Float[Array, ""] | None,
    query_norm: Float[Array, ""] | None,
    queries: Float[Array, "q d"],
    kernel_radius: Float[Array, ""] | None,
    *,
    settings: _PlainSettings,
) -> Coreset:
    """The coreset of one head with weights and values fitted to its samples alone."""
    del kernel_radius
    reduction, hearing = _ask(
        keys, values, length, coreset, rho, query_norm, queries, settings.scale
    )
    held = jnp.isfinite(coreset.log_weights)
    log_weights = matched_log_weights(
        jnp.exp(hearing.scores - hearing.cache.maximum[:, None]),
        hearing.cache.total,
        bound=settings.bound,
        steps=settings.steps,
    )
    # An empty slot has a score that leaves nothing of its weight.
    shares = jax.nn.softmax(hearing.scores + log_weights[None], axis=-1)
    outputs = restore_values(reduction, hearing.outputs())
    chosen = matched_values(shares, outputs, ridge=settings.ridge)
    log_weights = jnp.where(held, log_weights, -jnp.inf)
    return unless_worse(hearing, length, coreset, chosen, log_weights)


def _matrices(count: int, size: int) -> int:
    """Entries of the matrices of a head; samples are not known, and seldom more than these."""
    return _SHARE * size * max(size, min(count, _BLOCK))


def matching(
    compressor: Compressor,
    *,
    rho: ArrayLike | None = None,
    query_norm: ArrayLike | None = None,
    scale: float | None = None,
    kernel_radius: ArrayLike | None = None,
    strength: float = 1.0,
) -> Compressor:
    r"""Corrects what a compressor put behind its keys by what sample queries hear.

    With the columns :math:`W = [w_s v_s,\; w_s]` of the coreset, values centred as in the geometry
    of the fit, the shares of its keys :math:`x_s` and the exact outputs of the samples,

    .. math::
       P_{qs} = \frac{e^{\mathrm{scale}\langle q, x_s\rangle}}
                     {\sum_i e^{\mathrm{scale}\langle q, k_i\rangle}}, \qquad
       y_q = \mathrm{Attn}(q),

    weights come first, and then the numerator that makes the right ratio with them,

    .. math::
       N = P^T P + \mathrm{strength} \cdot
           \frac{\mathrm{tr}\, P^T P}{\mathrm{tr}\, G}\, G, \qquad
       w' = w + N^{-1} P^T (1 - P w), \qquad
       [w'_s v'_s] = [w_s v_s] + N^{-1} P^T \bigl( (P w') \cdot y - P [w_s v_s] \bigr),

    with :math:`G_{st} = e^{-\|x_s - x_t\|^2 / 2}` the kernel of
    :func:`coreset_jax.geometry.fitting_geometry`: columns are multiplied by
    :math:`e^{\|x_s\|^2 / 2}`, the norms of the features, and shares divided by them.
    :math:`G` is the price of a change, in the kernel in which the coreset was fitted to the whole
    cache: what the samples say nothing of stays as it was. Before all this the weights are given
    the common factor that brings :math:`P w` nearest to one; attention does not see it.

    Weights stay positive: at least a tenth of the mean, or of what they were where that is less.
    Where all this does not lessen the mean squared error of attention over the samples, the coreset
    is returned as it was.

    Args:
      compressor: what makes the coreset; any that returns positive weights.
        :func:`coreset_jax.refit.relocation` and :func:`coreset_jax.refit.nystrom` leave what such a
        correction is made for.
      rho: the radius of unit queries, for the kernel alone, a scalar or ``[...]``; see
        :func:`coreset_jax.compression.balanced`.
      query_norm: largest norm of a raw query instead. If neither is given, the call's sample
        ``queries`` decide.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      kernel_radius: the geometry of :math:`G`, a scalar or ``[...]``; ``None`` means that of
        :func:`coreset_jax.geometry.fitting_geometry`.
      strength: how much :math:`G` counts beside the samples. A large one leaves the coreset as it
        was, and 0 cannot be.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` that wants sample queries. Keys are the
      compressor's, bit by bit; values are not the source's any more, and weights need not sum to
      the length: their mass is what the samples say. A head with a NaN or an infinity among its
      samples gets NaN log-weights. Time is that of ``q * n`` scores and
      :math:`O((q + m) m^2)` a head; memory a few ``q * m`` and ``m * m`` matrices for a few heads
      at a time.

    Raises:
      ValueError: on bad options here; when called, as ``compressor`` does, if ``queries`` are not
        given, empty or ill-fitting, and if the compressor returns normalizers.

    References:
      Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284,
      for fits to what samples hear; Schröder, Mackey, *WildCat*, 2026, arXiv 2602.10056, for the
      fit in the kernel that is corrected.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 512, 16))
    >>> compressor = cj.refit.matching(cj.refit.relocation(cj.pivoted()))
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64, queries=queries)
    >>> coreset.keys.shape
    (64, 16)
    """
    settings = _Settings(
        validation.static_float("scale", scale), validation.static_float("strength", strength)
    )
    return refitted(
        compressor,
        _match_head,
        settings,
        _matrices,
        rho=rho,
        query_norm=query_norm,
        kernel_radius=kernel_radius,
        scale=scale,
        needs_queries=True,
    )


def attention_matching(
    compressor: Compressor,
    *,
    ridge: float = 1e-5,
    bound: float = 3.0,
    steps: int = 2,
    scale: float | None = None,
) -> Compressor:
    r"""Fits weights and values to sample queries alone, behind the keys that a compressor keeps.

    It is :func:`coreset_jax.baselines.attention_matching` with other keys; see there for the
    formulas and the options. Where the fit does not lessen the mean squared error of attention over
    the samples, the coreset is returned as it was.

    The fit knows nothing of queries unlike the samples, and wants a few times as many of them as
    there are pairs kept. :func:`matching` does with fewer.

    Args:
      compressor: what makes the coreset; any that returns positive weights.
      ridge: regularisation of the values, relative to the largest eigenvalue.
      bound: largest absolute log-weight.
      steps: gradient steps after the clip.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` that wants sample queries. Keys are the
      compressor's, bit by bit; values are not the source's any more, and weights need not sum to
      the length. A head with a NaN or an infinity among its samples gets NaN log-weights. Time and
      memory are those of :func:`matching`.

    Raises:
      ValueError: on bad options here; when called, as ``compressor`` does, if ``queries`` are not
        given, empty or ill-fitting, and if the compressor returns normalizers.

    References:
      Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 512, 16))
    >>> compressor = cj.refit.attention_matching(cj.baselines.uniform())
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64, queries=queries)
    >>> bool((coreset.keys == keys[coreset.indices]).all())
    True
    """
    validation.check_count("steps", steps, 0)
    settings = _PlainSettings(
        validation.static_float("scale", scale),
        validation.static_float("ridge", ridge),
        validation.static_float("bound", bound),
        int(steps),
    )
    return refitted(
        compressor,
        _match_plainly,
        settings,
        _matrices,
        rho=None,
        query_norm=None,
        kernel_radius=None,
        scale=scale,
        needs_queries=True,
    )
