"""What methods share that give every pair a score and keep the pairs of largest score.

A method is a score, a frozen dataclass that looks at one head; what stands here makes a
:class:`~coreset_jax.coreset.Compressor` of it. Kept pairs have weight one: what is dropped is
dropped with its mass, as these methods were published.
"""

import dataclasses
import functools
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax import validation
from coreset_jax.attention import accumulation_dtype, default_scale
from coreset_jax.coreset import Compressor, Coreset, gather, over_heads, whole_cache
from coreset_jax.kernels import inner_products

# Attention weights that are held at a time, over all heads.
_WEIGHTS = 2**24


class Head(NamedTuple):
    """What a score may look at.

    Attributes:
      keys: keys ``[n, d]`` in the dtype of the cache; padding may hold anything.
      values: values ``[n, dv]``, likewise.
      inside: which pairs are valid ``[n]``.
      length: how many are; they come first.
      queries: sample queries ``[groups, q, d]``, or ``None`` for a method that wants none.
    """

    keys: Float[Array, "n d"]
    values: Float[Array, "n dv"]
    inside: Bool[Array, " n"]
    length: Int[Array, ""]
    queries: Float[Array, "groups q d"] | None


class Score(Protocol):
    """The score of every pair of a head. Frozen and hashable: it is static under ``jax.jit``."""

    def __call__(self, head: Head, *, size: int, block_size: int) -> Float[Array, " n"]:
        """Scores the pairs; what it says of padding is not looked at.

        Args:
          head: one head of the cache.
          size: pairs that will be kept.
          block_size: queries whose weights over the whole head may be held at a time.
        """
        ...


def mean_attention(
    head: Head, queries: Float[Array, "q d"], *, scale: float | None, block_size: int
) -> Float[Array, " n"]:
    r"""The mean over queries of their attention weights, a few queries at a time.

    .. math::
       a_i = \frac1q \sum_{j=1}^{q} \frac{e^{\mathrm{scale}\langle q_j,k_i\rangle}}
                                        {\sum_l e^{\mathrm{scale}\langle q_j,k_l\rangle}}

    Every query sees all valid pairs: samples have no place in the sequence.

    Args:
      head: one head of the cache.
      queries: raw queries ``[q, d]``.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      block_size: queries whose weights are held at a time.

    Returns:
      The means ``[n]``, in float32 or wider; 0 for padding.
    """
    dtype = accumulation_dtype(head.keys, queries)
    scale = default_scale(head.keys.shape[-1]) if scale is None else scale
    keys, samples = head.keys.astype(dtype), queries.shape[0]
    blocks = -(-samples // block_size)
    # Blocks of nearly one length: little padding.
    width = -(-samples // blocks)
    rows = jnp.pad(queries.astype(dtype), ((0, blocks * width - samples), (0, 0)))
    shares = jnp.where(jnp.arange(blocks * width) < samples, 1 / samples, 0).astype(dtype)

    def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        rows, shares = block
        logits = scale * inner_products(rows, keys)
        weights = jax.nn.softmax(jnp.where(head.inside[None], logits, -jnp.inf), axis=-1)
        return total + jnp.matmul(shares, weights, precision=jax.lax.Precision.HIGHEST), None

    # Made from both, so that it varies over the mesh axes that either does.
    start = jnp.zeros_like(keys[:, 0]) + jnp.zeros_like(rows[0, 0])
    total, _ = jax.lax.scan(
        add, start, (rows.reshape(blocks, width, -1), shares.reshape(blocks, width))
    )
    return total


def _keep_head(
    rng: Array,
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    length: Int[Array, ""],
    queries: Float[Array, "q d"] | None,
    *,
    score: Score,
    groups: int | None,
    size: int,
    block_size: int,
) -> Coreset:
    """The pairs of one head with the largest scores; of equal ones, the first."""
    del rng
    inside = jnp.arange(keys.shape[0]) < length
    if queries is not None and groups is not None:
        queries = queries.reshape(groups, -1, queries.shape[-1])
    head = Head(keys, values, inside, length, queries)
    scores = score(head, size=size, block_size=block_size)
    # Not top_k, whose choice among equal scores is not the same on every platform.
    positions = jnp.zeros_like(scores, jnp.int32) + jnp.arange(scores.shape[0], dtype=jnp.int32)
    _, best = jax.lax.sort((jnp.where(inside, -scores, jnp.inf), positions), num_keys=2)
    indices = jnp.sort(best[:size])
    sound = ~jnp.any(inside & jnp.isnan(scores))
    if queries is not None:
        sound = sound & jnp.all(jnp.isfinite(queries))
    dtype = accumulation_dtype(keys, values)
    log_weights = jnp.where(sound, jnp.zeros_like(scores[:size], dtype), jnp.nan)
    return gather(keys, values, jnp.where(indices < length, indices, -1), log_weights)


@functools.partial(jax.jit, static_argnames=("score", "groups", "size"))
def _keep(
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    lengths: Int[Array, "*heads"] | None,
    queries: Float[Array, "*heads q d"] | None,
    *,
    score: Score,
    groups: int | None,
    size: int,
) -> Coreset:
    block_size = max(_WEIGHTS // max(math.prod(keys.shape[:-1]), 1), 1)
    keep_head = functools.partial(
        _keep_head, score=score, groups=groups, size=size, block_size=block_size
    )
    return over_heads(keep_head, rng, keys, values, lengths, queries)


@dataclasses.dataclass(frozen=True)
class _KeepLargest:
    score: Score
    groups: int | None

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
        validation.check_cache(keys, values)
        validation.check_size(size)
        validation.check_lengths(lengths, keys)
        if self.groups is None:
            queries = None
        else:
            _check_queries(queries, keys, self.groups)
        if size >= keys.shape[-2]:
            return whole_cache(keys, values, lengths)
        return _keep(
            rng,
            keys,
            values,
            lengths,
            queries,
            score=self.score,
            groups=self.groups,
            size=int(size),
        )


def _check_queries(queries: Array | None, keys: Array, groups: int) -> None:
    if queries is None:
        raise ValueError(
            f"queries must be given to this method, [..., q, {keys.shape[-1]}] with the leading "
            f"axes of keys {keys.shape}; got None."
        )
    validation.check_queries(queries, keys)
    if queries.shape[-2] < 1 or queries.shape[-2] % groups:
        raise ValueError(
            f"queries must hold as many samples (axis -2) for each of {groups} groups, and at "
            f"least one; got queries {queries.shape} and keys {keys.shape}."
        )


def keep_largest(score: Score, *, groups: int | None) -> Compressor:
    """The compressor that keeps the pairs of largest score, each with weight one.

    Args:
      score: what the pairs are judged by; equal scores are equal compressors.
      groups: query heads whose samples lie one after another along axis -2, or ``None`` for a
        score that looks at no query.
    """
    return _KeepLargest(score, groups)
