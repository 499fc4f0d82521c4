r"""BalanceKV: halvings by a self-balancing walk inside independent blocks of the cache.

Kochetkova, Sheth, Han, Zandieh, Kapralov, *Streaming Attention Approximation via Discrepancy
Theory*, NeurIPS 2025, arXiv 2502.07861. What is called "as published" here is the rule of the
authors' code, which differs in places from the rule of the paper.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src.core.compressor import Compressor, leaf
from coreset_jax._src.core.coreset import Coreset, gather
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.precision import matmul

# Added to the inner product of two values: the part of the kernel that balances the denominator.
_VALUE_OFFSET = 0.025 + 1e-8


class Kept(NamedTuple):
    """The pairs that the halvings of one head leave, in the order in which the last one left them.

    Attributes:
      order: positions in the cache ``[m]``, int32; only the first ``filled`` mean anything.
      weights: powers of two ``[m]``, their sum at most the length; 0 from ``filled`` on.
      filled: how many pairs are left, in the end ``min(size, length)``.
    """

    order: Int[Array, " m"]
    weights: Float[Array, " m"]
    filled: Int[Array, ""]


def round_slots(count: int, size: int) -> tuple[int, ...]:
    """Slots before the first halving and after each: halved, rounded down, until ``size`` is met.

    >>> round_slots(1000, 125), round_slots(1000, 300), round_slots(7, 7)
    ((1000, 500, 250, 125), (1000, 500, 300), (7,))
    """
    slots = [count]
    while slots[-1] > size:
        slots.append(max(slots[-1] // 2, size))
    return tuple(slots)


def _block_signs(
    keys: Float[Array, "b d"],
    values: Float[Array, "b dv"],
    active: Bool[Array, " b"],
    uniforms: Float[Array, " b"],
    scale: ArrayLike,
    options: "balance_kv",
) -> Float[Array, " b"]:
    """Signs of one block. Pairs that are not active come last and have zero keys."""
    dtype = keys.dtype
    if options.corrected:
        total = jnp.maximum(jnp.sum(active, dtype=dtype), 1)
    else:
        # The authors' code fills a short block with zero keys and averages over these as well.
        total = jnp.full((), options.block_size, dtype)
    centered = keys - jnp.sum(keys, axis=0, keepdims=True) / total
    exponents = options.temperature * scale * matmul(centered, centered.T) - options.beta
    if options.corrected:
        # Infinities of opposite sign add up to NaN. Far below them the step is certain anyway.
        exponents = jnp.minimum(exponents, math.log(float(jnp.finfo(dtype).max)) / 2)
    gram = jnp.exp(exponents) * (matmul(values, values.T) + _VALUE_OFFSET)

    def step(index: Array, signs: Array) -> Array:
        # The sum runs over undecided pairs too, whose sign is 0. It matters where the kernel has
        # overflowed: 0 * inf is NaN, no draw is below NaN, and the sign is -1, as published.
        probability = 0.5 - options.gamma * jnp.sum(gram[index] * signs)
        if options.corrected:
            # A probability, as the walk has it; no draw from [0, 1) can tell the difference.
            probability = jnp.clip(probability, 0.0, 1.0)
        sign = jnp.where(uniforms[index] < probability, 1.0, -1.0).astype(dtype)
        return signs.at[index].set(sign)

    first = jnp.zeros_like(uniforms).at[0].set(1.0)
    return jax.lax.fori_loop(1, keys.shape[0], step, first)


def _halve(
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    kept: Kept,
    uniforms: Float[Array, " slots"],
    size: int,
    scale: ArrayLike,
    options: "balance_kv",
) -> Kept:
    """One halving, or as much of one as ``size`` still allows."""
    slots = kept.order.shape[0]
    position = jnp.arange(slots)
    target = jnp.maximum(kept.filled // 2, jnp.minimum(kept.filled, size))
    # Halving this many pairs and leaving the others at their weight meets the target.
    halved = jnp.minimum(2 * (kept.filled - target), kept.filled)
    active = position < halved
    keys = jnp.where(active[:, None], jnp.take(keys, kept.order, axis=0, mode="clip"), 0)
    values = jnp.take(values, kept.order, axis=0, mode="clip") * kept.weights[:, None]

    width = min(options.block_size, slots)
    blocks = -(-slots // width)

    def in_blocks(array: Array) -> Array:
        padding = [(0, blocks * width - slots)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(blocks, width, *array.shape[1:])

    walk = jax.vmap(functools.partial(_block_signs, scale=scale, options=options))
    signs = walk(in_blocks(keys), in_blocks(values), in_blocks(active), in_blocks(uniforms))
    signs = signs.reshape(-1)[:slots]

    # The cut: where the majority sign has come up for half the pairs, and the later of the two
    # places if both signs have. Up to it the majority goes, after it everything stays. (Sorted
    # places say where the h-th sign is; cumulative sums would take three times as long to compile.)
    each_sign = active[None] & jnp.stack([signs > 0, signs < 0])
    places = jnp.sort(jnp.where(each_sign, position[None], slots), axis=-1)
    places = jnp.take(places, halved // 2 - 1, axis=-1, mode="clip")
    half_plus, half_minus = jnp.where(places < slots, places, -1)
    cut = jnp.maximum(half_plus, half_minus)
    dropped = jnp.where(half_plus > half_minus, 1.0, -1.0).astype(signs.dtype)
    factor = jnp.where(active & (position <= cut), jnp.where(signs == dropped, 0.0, 2.0), 1.0)
    factor = jnp.where(position < kept.filled, factor, 0.0).astype(kept.weights.dtype)

    # Doubled pairs first, then untouched ones, each in their old order: the next round's blocks.
    operands = (-factor, kept.order, kept.weights * factor)
    _, order, weights = jax.lax.sort(operands, is_stable=True, num_keys=1)
    remaining = position[: max(slots // 2, size)] < target
    order, weights = order[: remaining.shape[0]], weights[: remaining.shape[0]]
    return Kept(order, jnp.where(remaining, weights, 0), target)


def halvings(
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    uniforms: Sequence[Float[Array, " slots"]],
    length: Int[Array, ""] | int,
    *,
    size: int,
    scale: ArrayLike,
    options: "balance_kv",
) -> Kept:
    r"""All halvings of one head as a pure function of the random numbers.

    Args:
      keys: keys ``[n, d]``, float32 or wider.
      values: values ``[n, dv]`` of the same dtype.
      uniforms: numbers from ``[0, 1)``, one array a halving, as long as the slots before it
        (``round_slots(n, size)[:-1]``); block after block, the first of a block is not used.
      length: valid pairs, at the front.
      size: pairs to keep, static.
      scale: the softmax scale.
      options: the compressor, of whose options those that are static are read.

    Returns:
      The pairs kept, with the weights as the walk leaves them.
    """
    count = keys.shape[0]
    start = (jnp.arange(count) < length).astype(keys.dtype)
    kept = Kept(jnp.arange(count, dtype=jnp.int32), start, jnp.asarray(length, jnp.int32))
    for numbers in uniforms:
        kept = _halve(keys, values, kept, numbers, size, scale, options)
    return kept


def as_coreset(
    kept: Kept,
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    length: Int[Array, ""] | int,
    options: "balance_kv",
) -> Coreset:
    """Puts the weights that the halvings left where the variant has them.

    Args:
      kept: what the halvings of this head left.
      keys: keys ``[n, d]``, in the dtype of the cache.
      values: values ``[n, dv]``.
      length: valid pairs.
      options: the compressor.
    """
    count, size = keys.shape[0], kept.order.shape[0]
    indices = jnp.where(jnp.arange(size) < kept.filled, kept.order, count)
    indices, weights = jax.lax.sort((indices, kept.weights), num_keys=1)
    indices = jnp.where(indices < count, indices, -1)
    total = jnp.asarray(length, weights.dtype)
    if options.corrected:
        # The cut leaves the weights a few percent short of the length; attention does not see
        # the common factor, a merge with other parts of the cache would.
        log_weights = jnp.log(weights) + jnp.log(total / jnp.sum(weights))
        return gather(keys, values, indices, log_weights)
    mean_weight = total / kept.filled.astype(weights.dtype)
    coreset = gather(keys, values, indices, jnp.full((size,), jnp.log(mean_weight)))
    weighted = coreset.values.astype(weights.dtype) * (weights / mean_weight)[:, None]
    return coreset._replace(values=weighted.astype(values.dtype))


class balance_kv(Compressor):  # noqa: N801
    r"""BalanceKV as published, or with the weights where they belong.

    A halving cuts the cache into consecutive blocks. In each, with keys :math:`\hat k` centered by
    the mean of the block and values :math:`\hat v` multiplied by their weight so far,

    .. math::
       G_{ij} = e^{\mathrm{temperature}\,\cdot\,\mathrm{scale}\,\langle\hat k_i,\hat k_j\rangle
                   - \beta}\,\bigl(\langle\hat v_i,\hat v_j\rangle + 0.025\bigr), \qquad
       x_1 = 1, \quad P(x_i = 1) = \tfrac12 - \gamma \sum_{j<i} G_{ij} x_j .

    Over all the signs, let the cut be where the majority sign comes up for the
    :math:`\tfrac n2`-th time. Up to it the other sign is kept with twice its weight, after it
    everything is kept as it is. The doubled pairs come first in the next halving, and weights
    :math:`w` multiply; after :math:`t` halvings the answer to a query is

    .. math::
       \frac{\sum_i e^{s_i} (w_i/2^t) v_i}{\sum_i e^{s_i}} \;\text{ as published,} \qquad
       \frac{\sum_i w_i e^{s_i} v_i}{\sum_i w_i e^{s_i}} \;\text{ corrected.}

    *As published* the values of the coreset carry :math:`w_i/2^t`, so they are **not** those of
    the source, and the log-weights are flat. Numerator and denominator then disagree by a few
    percent. Step probabilities are not clipped, and where float32 overflows the kernel (at
    temperature 1, centered keys of norm above :math:`9.4\,d^{1/4}`) nearly all such keys are lost.

    *Corrected*, values are bit-identical to the source and log-weights are :math:`\log w_i`
    scaled so that the weights sum to the length; step probabilities are clipped, which changes no
    sign because the draws come from :math:`[0, 1)`; the kernel is bounded instead of
    overflowing; a short block is centered by its own mean. The walk, and with it the loss to a
    balanced cache, is the same.

    The authors' code halves :math:`t` times, to :math:`\lfloor n/2^t \rfloor` pairs. Here any size
    is met: the last halving takes only the first :math:`2(n'-m')` of the :math:`n'` pairs, and
    :math:`n/m` stands for :math:`2^t`.

    Args:
      corrected: weigh numerator and denominator alike.
      temperature: multiplies the logits of the kernel. The authors' defaults are 1 with blocks
        of 128; their notebook has 0.1 with blocks of 256.
      block_size: pairs that are balanced together; a walk of this many sequential steps.
      gamma: step size of the walk, the inverse of twice its constant :math:`c`.
      beta: taken from the exponent; the same as ``gamma`` times :math:`e^{-\beta}`.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.

    A compressor; see :class:`coreset_jax.Compressor`. It looks at no query.

    Raises:
      ValueError: on bad options; all numbers but ``beta`` must be positive.

    References:
      Kochetkova, Sheth, Han, Zandieh, Kapralov, *Streaming Attention Approximation via
      Discrepancy Theory*, NeurIPS 2025, arXiv 2502.07861, Section 3, and the authors' code,
      https://github.com/ksheth96/BalanceKV.
      Alweiss, Liu, Sawhney, *Discrepancy minimization via a self-balancing walk*, STOC 2021.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 128, 16))
    >>> compressor = cj.baselines.balance_kv(corrected=True, block_size=32)
    >>> coreset = compressor(jax.random.key(1), keys, values, size=48)
    >>> coreset.keys.shape, coreset.indices.shape
    ((4, 48, 16), (4, 48))
    >>> print(jnp.exp(coreset.log_weights).sum(axis=-1).round(3))
    [128. 128. 128. 128.]
    """

    corrected: bool = False
    temperature: float = 1.0
    block_size: int = 128
    gamma: float = 4.0
    beta: float = 0.0
    scale: ArrayLike | None = leaf(default=None)

    @property
    def keeps_pairs(self) -> bool:  # type: ignore[override]
        """As published, weights are multiplied into the values."""
        return self.corrected

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        if not isinstance(self.corrected, bool):
            raise ValueError(f"corrected must be True or False, got {self.corrected!r}.")
        self.static_count("block_size")
        self.static_float("temperature")
        self.static_float("gamma")
        self.static_float("beta", positive=False)

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Halves the head, and puts the weights where the variant has them."""
        slots = round_slots(head.count, size)[:-1]
        # One draw for all rounds: the random generator would be much of what each compiles.
        drawn = jax.random.uniform(head.key, (sum(slots),), head.dtype)
        uniforms = jnp.split(drawn, np.cumsum(slots)[:-1])
        keys, values = head.keys.astype(head.dtype), head.values.astype(head.dtype)
        kept = halvings(
            keys, values, uniforms, head.length, size=size, scale=head.scale, options=self
        )
        coreset = as_coreset(kept, head.keys, head.values, head.length, self)
        return coreset, Info(rounds=jnp.full((), len(slots), jnp.int32))

    def workspace(self, count: int, size: int, width: int) -> int:
        """The Gram matrices of all blocks, and the cache in the dtype of sums."""
        del size
        return count * (min(self.block_size, count) + 2 * width)
