r"""Kernel halving of attention: halvings by a self-balancing walk on pairs of neighbors.

Carrell, Gong, Shetty, Dwivedi, Mackey, *Low-Rank Thinning*, ICML 2025, arXiv 2502.12063: the
``khcompress`` of its Thinformer. What is called "as published" here is the rule of the authors'
code.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax._src.core.compressor import Compressor, leaf
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.precision import matmul

# The bucket that the authors' code starts from where it oversamples least.
_LEAST_BUCKET = 4


class Round(NamedTuple):
    """What is known of one halving before it runs.

    Attributes:
      slots: pairs that it may find.
      threshold: pairs above which a head takes part, and slots that it leaves.
      bucket: width of the buckets, even.
      pairs: pairs of neighbors in all buckets: as many uniform numbers does the round want.
    """

    slots: int
    threshold: int
    bucket: int
    pairs: int


class Kept(NamedTuple):
    """The pairs that the halvings of one head leave.

    Attributes:
      order: positions in the cache ``[m]``, int32, ascending; only the first ``filled`` mean
        anything.
      weights: how many pairs each stands for ``[m]``; they sum to the length; 0 from ``filled`` on.
      filled: how many pairs are left, in the end ``min(size, length)``.
    """

    order: Int[Array, " m"]
    weights: Float[Array, " m"]
    filled: Int[Array, ""]


def rounds(count: int, size: int) -> tuple[Round, ...]:
    r"""The halvings from ``count`` pairs to ``size``; the last has one bucket of ``2 * size``.

    Buckets double from round to round. For ``count`` a power of four this is the published
    schedule, whose first buckets hold :math:`4^{g+1} = 4 m^2/n` pairs.

    >>> [(each.slots, each.bucket) for each in rounds(4096, 512)]
    [(4096, 256), (2048, 512), (1024, 1024)]
    >>> [(each.slots, each.bucket) for each in rounds(1000, 300)]
    [(1000, 300), (600, 600)]
    """
    schedule, slots = [], count
    for left in reversed(range((-(-count // size) - 1).bit_length())):
        bucket = max(2 * -(-size // 2**left), _LEAST_BUCKET)
        pairs = -(-slots // bucket) * bucket // 2
        schedule.append(Round(slots, size << left, bucket, pairs))
        slots = size << left
    return tuple(schedule)


def _bucket_signs(
    keys: Float[Array, "b d"],
    values: Float[Array, "b dv"],
    active: Float[Array, " b"],
    thresholds: Float[Array, " h"],
    shift: Float[Array, ""],
    offset: Float[Array, ""],
) -> Float[Array, " h"]:
    """Signs of the pairs of one bucket: 1 keeps the first, -1 the second, 0 is not active."""

    def step(pair: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        signs, signed, largest = state

        def two(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, 2 * pair, 2)

        # Two rows of the kernel at a time: a bucket of all pairs never needs its matrix.
        rows = jnp.exp(matmul(two(keys), keys.T) - shift) * (matmul(two(values), values.T) + offset)
        own = jax.lax.dynamic_slice_in_dim(rows, 2 * pair, 2, axis=1)
        length = jnp.sqrt(jnp.maximum(own[0, 0] - own[0, 1] - own[1, 0] + own[1, 1], 0))
        largest = jnp.maximum(largest, length)
        pull = jnp.sum((rows[0] - rows[1]) * signed)
        second = (thresholds[pair] * length * largest <= pull) & (pair > 0)
        sign = jnp.where(second, -1, 1).astype(keys.dtype) * two(active)[0]
        signed = jax.lax.dynamic_update_slice_in_dim(
            signed, jnp.stack([sign, -sign]), 2 * pair, axis=0
        )
        return signs.at[pair].set(sign), signed, largest

    start = (jnp.zeros_like(thresholds), jnp.zeros_like(active), jnp.zeros_like(shift))
    signs, _, _ = jax.lax.fori_loop(0, thresholds.shape[0], step, start)
    return signs


def _halve(
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    kept: Kept,
    uniforms: Float[Array, " pairs"],
    coin: Float[Array, ""],
    failure: Float[Array, ""],
    shift: Float[Array, ""],
    offset: Float[Array, ""],
    this: Round,
    size: int,
) -> Kept:
    """One halving, or as much of one as ``size`` still allows."""
    target = jnp.maximum(-(-kept.filled // 2), jnp.minimum(kept.filled, size))
    # A shorter head joins late, so that it goes through the rounds of its own length.
    target = jnp.where(kept.filled > this.threshold, target, kept.filled)
    halved = 2 * (kept.filled - target)
    width = 2 * this.pairs
    order = jnp.pad(kept.order, (0, width - this.slots))
    weights = jnp.pad(kept.weights, (0, width - this.slots))
    active = jnp.arange(width) < halved

    def in_buckets(array: Array, each: int) -> Array:
        return array.reshape(width // this.bucket, each, *array.shape[1:])

    def rows(source: Array) -> Array:
        taken = jnp.take(source, order, axis=0, mode="clip")
        return in_buckets(jnp.where(active[:, None], taken, 0), this.bucket)

    spread = 0.5 + jnp.log(2 * this.bucket / failure)
    thresholds = spread * (2 * uniforms - 1)
    walk = jax.vmap(_bucket_signs, in_axes=(0, 0, 0, 0, None, None))
    signs = walk(
        rows(keys),
        rows(values),
        in_buckets(active.astype(keys.dtype), this.bucket),
        in_buckets(thresholds, this.bucket // 2),
        shift,
        offset,
    ).reshape(-1)
    # Which half is kept is the toss of one coin for all buckets.
    second = (signs < 0) ^ (coin < 0.5)

    # Pair a leaves its one at place a; what is not halved moves up behind.
    places = jnp.arange(this.threshold)
    chosen = 2 * places + jnp.take(second, places, mode="clip").astype(jnp.int32)
    source = jnp.where(2 * places < halved, chosen, places + halved // 2)
    # The one kept stands for both.
    both = jnp.take(weights, 2 * places, mode="clip") + jnp.take(
        weights, 2 * places + 1, mode="clip"
    )
    alone = jnp.take(weights, source, mode="clip")
    weights = jnp.where(2 * places < halved, both, alone)
    weights = jnp.where(places < target, weights, 0)
    return Kept(jnp.take(order, source, mode="clip"), weights, target)


def halvings(
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    uniforms: Sequence[Float[Array, " pairs"]],
    coins: Float[Array, " rounds"],
    length: Int[Array, ""] | int,
    *,
    size: int,
    scale: ArrayLike,
    delta: float,
) -> Kept:
    """All halvings of one head as a pure function of the random numbers.

    Args:
      keys: keys ``[n, d]``, float32 or wider, zero in padding.
      values: values ``[n, dv]`` of the same dtype.
      uniforms: numbers from ``[0, 1)``, ``rounds(n, size)[i].pairs`` for round ``i``; bucket after
        bucket, the first of a bucket is not used.
      coins: one number from ``[0, 1)`` a round.
      length: valid pairs, at the front.
      size: pairs to keep, static.
      scale: the softmax scale.
      delta: the share of runs in which the walk may fail to be subgaussian.

    Returns:
      The pairs kept.
    """
    count, dtype = keys.shape[0], keys.dtype
    schedule = rounds(count, size)
    inside = jnp.arange(count) < length
    keys = keys * jnp.sqrt(scale)
    shift = jnp.max(jnp.sum(jnp.square(keys), axis=-1))
    offset = jnp.square(jnp.max(jnp.abs(values)))

    # The rounds that this head takes part in, and the first bucket, as if it were alone.
    joins = jnp.asarray(length) > jnp.asarray([each.threshold for each in schedule])
    taken = jnp.maximum(jnp.sum(joins), 1)
    widths = jnp.asarray([each.bucket for each in schedule])
    first = jnp.min(jnp.where(joins, widths, schedule[-1].bucket))
    total = (first * taken).astype(dtype) * jnp.asarray(length, dtype) / delta

    length = jnp.asarray(length, jnp.int32)
    # Made from the length, so that the order is sharded as the heads are.
    order = jnp.minimum(jnp.arange(count, dtype=jnp.int32), length - 1)
    kept = Kept(order, inside.astype(dtype), length)
    for number, this in enumerate(schedule):
        failure = this.bucket**2 / total
        drawn = uniforms[number], coins[number]
        kept = _halve(keys, values, kept, *drawn, failure, shift, offset, this, size)
    return kept


class kernel_halving(Compressor):  # noqa: N801
    r"""Kernel halving of attention, as Thinformer thins a cache (``khcompress``).

    A halving cuts the cache into consecutive buckets of :math:`B` pairs and each bucket into pairs
    of neighbors, of which one stays. With keys :math:`\hat k = \sqrt{\mathrm{scale}}\,k`,

    .. math::
       K_{ij} = e^{\langle\hat k_i,\hat k_j\rangle - \max\|\hat k\|^2}
                \bigl(\langle v_i, v_j\rangle + \max\|v\|_\infty^2\bigr), \qquad
       D_{ab} = K_{2a,2b} - K_{2a,2b+1} - K_{2a+1,2b} + K_{2a+1,2b+1},

    .. math::
       x_0 = 1, \qquad
       x_a = -1 \iff \sqrt{D_{aa}}\,\max_{b\le a}\sqrt{D_{bb}}\;\mathrm{Unif}(-A, A)
             \le \sum_{b<a} x_b D_{ab}, \qquad
       A = \tfrac12 + \log\frac{2B}{\delta'}, \quad \delta' = \frac{\delta B^2}{B_1 R\,n},

    where :math:`R` halvings start from buckets of :math:`B_1` and double them each time. One coin
    a halving, for all buckets, says whether the first of a pair is kept where :math:`x_a = 1` or
    where :math:`x_a = -1`. All weights are :math:`n/m`.

    The authors' code takes :math:`n = 4^k` pairs to :math:`m = 2^{g+k}` with
    :math:`B_1 = 4^{g+1} = 4m^2/n`, so that the last halving has one bucket of :math:`2m`. Here any
    ``n`` and ``size`` are met by the same buckets: the last has :math:`2m` pairs, each halving
    before it half as many, rounded up to an even number and never below 4. A halving of an odd
    number leaves its last pair alone, and the last one halves only the first
    :math:`2(n' - m)` of its :math:`n'` pairs and leaves the others at their weight. The one kept of
    two stands for both, so that weights always sum to the length. A head shorter than the others
    goes through the halvings of its own length.

    In float32 the kernel is zero between keys whose product lies 87 or more below the largest
    squared norm: where some keys are far longer than others, the walk sees nothing of the
    shorter ones, as published.

    Args:
      delta: :math:`\delta`, the share of runs in which the walk may fail to be subgaussian; the
        authors' default is 0.5.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.

    A compressor; see :class:`coreset_jax.Compressor`. It looks at no query.

    Raises:
      ValueError: on bad options.

    References:
      Carrell, Gong, Shetty, Dwivedi, Mackey, *Low-Rank Thinning*, ICML 2025, arXiv 2502.12063,
      Section 4 and Algorithm 1, and the authors' code,
      https://github.com/microsoft/thinformer.
      Shetty, Dwivedi, Mackey, *Distribution Compression in Near-linear Time*, ICLR 2022.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 128, 16))
    >>> compressor = cj.baselines.kernel_halving()
    >>> coreset = compressor(jax.random.key(1), keys, values, size=48)
    >>> coreset.keys.shape, coreset.indices.shape
    ((4, 48, 16), (4, 48))
    >>> print(jnp.exp(coreset.log_weights).sum(axis=-1).round(3))
    [128. 128. 128. 128.]
    """

    delta: float = 0.5
    scale: ArrayLike | None = leaf(default=None)

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_float("delta")

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Halves the head."""
        numbers = [each.pairs for each in rounds(head.count, size)]
        # One draw for all rounds: the random generator would be much of what each compiles.
        drawn = jax.random.uniform(head.key, (sum(numbers) + len(numbers),), head.dtype)
        *uniforms, coins = jnp.split(drawn, np.cumsum(numbers))
        keys, values = head.keys.astype(head.dtype), head.values.astype(head.dtype)
        kept = halvings(
            keys,
            values,
            uniforms,
            coins,
            head.length,
            size=size,
            scale=head.scale,
            delta=self.delta,
        )
        indices = jnp.where(jnp.arange(size) < kept.filled, kept.order, -1)
        info = Info(rounds=jnp.full((), len(numbers), jnp.int32))
        return head.pairs(indices, jnp.log(kept.weights)), info
