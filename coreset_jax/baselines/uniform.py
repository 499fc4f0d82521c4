"""Uniform sampling: the method that every other one has to beat."""

import jax
import jax.numpy as jnp

from coreset_jax._src.core.compressor import Compressor
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info


class uniform(Compressor):  # noqa: N801
    r"""Keeps a uniformly random subset, every pair with the same weight.

    .. math:: S \sim \mathrm{Unif}\{S \subset [n] : |S| = m\}, \qquad w_i = n/m

    The error falls like :math:`1/\sqrt m`, where a balanced coreset's falls like :math:`1/m`.
    Where ``lengths`` are given, a head's length takes the place of :math:`n`, and a head no longer
    than ``size`` is kept whole.

    A compressor; see :class:`coreset_jax.Compressor`. It looks at no query.

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

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Keeps the pairs with the lowest of random tickets; padding has the highest."""
        count, length = head.count, head.length
        tickets = jax.random.bits(head.key, (count,), jnp.uint32) >> 1
        tickets = jnp.where(head.inside, tickets, jnp.uint32(2**31))
        drawn = jnp.argsort(tickets)[:size]
        indices = jnp.sort(jnp.where(drawn < length, drawn, count)).astype(jnp.int32)
        weight = jnp.log(length.astype(head.dtype) / jnp.minimum(length, size).astype(head.dtype))
        return head.pairs(indices, jnp.full((size,), weight)), Info()
