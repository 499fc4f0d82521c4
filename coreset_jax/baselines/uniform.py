"""Uniform sampling: the method that every other one has to beat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.attention import accumulation_dtype
from coreset_jax.coreset import Compressor, Coreset, gather, over_heads, whole_cache


def _sample_head(
    rng: Array,
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    length: Int[Array, ""],
    *,
    size: int,
) -> Coreset:
    count = keys.shape[0]
    dtype = accumulation_dtype(keys, values)
    # A lottery: the pairs with the lowest of random tickets are kept, and padding has the highest.
    tickets = jax.random.bits(rng, (count,), jnp.uint32) >> 1
    tickets = jnp.where(jnp.arange(count) < length, tickets, jnp.uint32(2**31))
    drawn = jnp.argsort(tickets)[:size]
    indices = jnp.sort(jnp.where(drawn < length, drawn, count))
    kept = jnp.minimum(length, size)
    log_weights = jnp.full((size,), jnp.log(length.astype(dtype) / kept.astype(dtype)))
    return gather(keys, values, jnp.where(indices < count, indices, -1), log_weights)


@functools.partial(jax.jit, static_argnames="size")
def _sample(
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    lengths: Int[Array, "*heads"] | None,
    *,
    size: int,
) -> Coreset:
    sample_head = functools.partial(_sample_head, size=size)
    return over_heads(sample_head, rng, keys, values, lengths)


@dataclasses.dataclass(frozen=True)
class _Uniform:
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
        del queries
        validation.check_cache(keys, values)
        validation.check_size(size)
        validation.check_lengths(lengths, keys)
        if size >= keys.shape[-2]:
            return whole_cache(keys, values, lengths)
        return _sample(rng, keys, values, lengths, size=int(size))


def uniform() -> Compressor:
    r"""Keeps a uniformly random subset, every pair with the same weight.

    .. math:: S \sim \mathrm{Unif}\{S \subset [n] : |S| = m\}, \qquad w_i = n/m

    The error falls like :math:`1/\sqrt m`, where a balanced coreset's falls like :math:`1/m`.
    Where ``lengths`` are given, a head's length takes the place of :math:`n`, and a head no longer
    than ``size`` is kept whole.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` ``(rng, keys [..., n, d], values [..., n, dv], *,
      size, lengths=None, queries=None) -> Coreset``. Keys and values are float arrays of any
      width; log-weights are float32 or wider. It looks at no query, and ``queries`` are ignored.
      ``size >= n`` returns the cache itself. The call raises ``ValueError`` if shapes do not fit,
      if ``size`` is not a positive integer or if ``lengths`` lie outside ``1..n``.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Section 1.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 128, 16))
    >>> coreset = cj.baselines.uniform()(jax.random.key(1), keys, values, size=32)
    >>> coreset.keys.shape, coreset.indices.shape
    ((4, 32, 16), (4, 32))
    >>> print(jnp.exp(coreset.log_weights).sum(axis=-1).round(3))
    [128. 128. 128. 128.]
    """
    return _Uniform()
