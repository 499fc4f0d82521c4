"""Queries that a coreset may answer badly: where a search for the worst one starts.

Everything here is in the unit problem of :func:`coreset_jax.geometry.standardize`, of one head.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax._src.attention import finish, partial_attention
from coreset_jax._src.core.coreset import Coreset, SignedCoreset, normalizers
from coreset_jax._src.geometry.solves import one_by_one

# Pairs that stand for the whole source where a guess is all that is needed.
_SAMPLE = 256


def unit_vectors(vectors: Float[Array, "s width"]) -> Float[Array, "s width"]:
    """The vectors scaled to norm one; zero where a vector is zero or not finite."""
    norms = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    usable = jnp.isfinite(norms) & (norms > 0)
    ones = jnp.ones_like(norms)
    return jnp.where(usable, vectors / jnp.where(usable, norms, ones), jnp.zeros_like(vectors))


def _imbalance(source: Coreset, coreset: Coreset | SignedCoreset) -> Float[Array, " n"]:
    r"""What the two sides disagree by at each source pair, :math:`y_i = 1/n - w_i / \sum w`."""
    weights = jnp.exp(coreset.log_weights - jnp.max(coreset.log_weights))
    masses = weights * normalizers(coreset)
    count = source.keys.shape[0]
    # An index of -1 would count from the end; one past the end is dropped.
    rows = jnp.where(coreset.indices < 0, count, coreset.indices)
    kept = jnp.zeros_like(source.log_weights).at[rows].add(masses / jnp.sum(masses), mode="drop")
    return jax.nn.softmax(source.log_weights) - kept


def _peaks(
    imbalance: Float[Array, " n"],
    source: Coreset,
    sample: Int[Array, " sample"],
    rho: Float[Array, ""],
    block_size: int,
) -> Float[Array, " n"]:
    r"""The error to expect where each key's own direction asks, if only that key makes it.

    .. math::
       \frac{a_i}{1 + a_i} \|v_i - \mathrm{Attn}(q_i)\|, \qquad
       a_i = \frac{|y_i| e^{\langle q_i, k_i\rangle}}{Z(q_i) / n}, \qquad
       q_i = \rho\,\frac{k_i}{\|k_i\|}

    with Attn and Z of a sample of the pairs, so that all keys can be looked at.
    """
    keys, values = source.keys[sample], source.values[sample]
    log_weights = jax.nn.log_softmax(source.log_weights[sample])

    def expected(place: Int[Array, ""]) -> Float[Array, ""]:
        key, value, weight = source.keys[place], source.values[place], jnp.abs(imbalance[place])
        state = partial_attention(
            rho * unit_vectors(key[None]), keys, values, log_weights, scale=1.0
        )
        background = state.maximum[0] + jnp.log(state.total[0])
        share = jax.nn.sigmoid(jnp.log(weight) + rho * jnp.linalg.norm(key) - background)
        return share * jnp.linalg.norm(value - finish(state)[0])

    count = imbalance.shape[0]
    # Places and not the pairs themselves: batches of those would be copies.
    return jax.lax.map(expected, jnp.arange(count), batch_size=min(block_size, count))


def _jacobian(pairs: Coreset | SignedCoreset) -> Float[Array, "dv d"]:
    """The derivative of attention by the query, where the query is 0."""
    weights = jnp.exp(pairs.log_weights - jnp.max(pairs.log_weights))
    signs = normalizers(pairs)
    total = jnp.sum(weights * signs)
    output = weights @ pairs.values / total
    residuals = weights[:, None] * (pairs.values - signs[:, None] * output)
    return residuals.T @ pairs.keys / total


def _right_singular_vectors(matrix: Float[Array, "dv d"]) -> Float[Array, "vectors d"]:
    return jnp.linalg.svd(matrix, full_matrices=False)[2]


def candidates(
    rng: Array,
    source: Coreset,
    coreset: Coreset | SignedCoreset,
    rho: Float[Array, ""],
    count: int,
    *,
    block_size: int,
) -> Float[Array, "count d"]:
    """Points of the unit ball that a worst query may be near, one kind after another.

    Keys that one side weighs more than the other, chosen by what they can attract and at random;
    the singular vectors of the first degree of the error; random points.

    Args:
      rng: a JAX random key.
      source: all pairs of one head, in unit form, with a log-weight of ``-inf`` on padding.
      coreset: its coreset, in the same form.
      rho: radius of the unit queries.
      count: points wanted, at least 8.
      block_size: keys looked at together.
    """
    pairs, width = source.keys.shape
    dtype = source.keys.dtype
    draw_rng, direction_rng = jax.random.split(rng)
    # The places of the largest of perturbed logarithms are a draw in proportion to their weights.
    gumbels = jax.random.gumbel(draw_rng, (pairs,), dtype)

    def largest(scores: Float[Array, " n"], limit: int) -> Int[Array, " places"]:
        return jax.lax.top_k(scores, min(limit, pairs))[1]

    # At a large radius the worst query singles out a key that the two sides weigh differently.
    imbalance = _imbalance(source, coreset)
    sample = largest(source.log_weights + gumbels, _SAMPLE)
    expected = _peaks(imbalance, source, sample, rho, block_size)
    peaks = unit_vectors(source.keys[largest(expected, count // 4)])
    others = largest(jnp.log(jnp.abs(imbalance)) + gumbels, count // 8)
    others = unit_vectors(source.keys[others])

    # At a small radius it is the right singular vector of the error's derivative at the center.
    singular = one_by_one(_right_singular_vectors)(_jacobian(source) - _jacobian(coreset))
    singular = singular[: count // 8]

    # The rest at all radii: where scores saturate the worst query may lie inside.
    fixed = [peaks, others, -others, singular, -singular]
    remaining = count - sum(points.shape[0] for points in fixed)
    directions = unit_vectors(jax.random.normal(direction_rng, (remaining, width), dtype))
    radii = jnp.linspace(0.0, 1.0, remaining, dtype=dtype)
    return jnp.concatenate([*fixed, directions * radii[:, None]])
