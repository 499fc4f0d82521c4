r"""Caches that cannot be compressed, and the game that shows it.

Random bits are hidden in values behind keys that hardly overlap, so that a query at a key reads
the bits behind it. Whoever answers such queries from a coreset holds the bits in it, and a coreset
has no room for them: the lower bounds of *Nearly Optimal Attention Coresets*, Section 6, played
out. Keys, random signs and everything else are public; only the bits are not.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from coreset_jax._src import checks
from coreset_jax._src.attention import attention
from coreset_jax._src.core.attend import attend
from coreset_jax._src.core.coreset import Coreset, SignedCoreset, scale_of
from coreset_jax._src.precision import accumulation_dtype, matmul
from coreset_jax.guarantees.checks import positive_number

# A coreset's error, per coordinate, over the value of a bit: half of the threshold's distance.
_ERROR_PER_SIGNAL = 1 / 4

# Codewords in units of e^(2 rho): noise of deviation 0.18 where the threshold is 0.5 away.
_CODEWORDS_PER_SQUARE = 1 / 16

# Codewords or pairs that are looked at together.
_BLOCK = 256

# The softmax scale of the game: radii of its queries are those of the unit problem.
_SCALE = 1.0


class HardInstance(NamedTuple):
    r"""A cache that hides :math:`N d` random bits behind N codewords.

    Attributes:
      keys: keys ``[..., n, dk]`` of norm one, pairs of the same codeword after one another.
      values: values ``[..., n, d]`` of norm at most one.
      queries: the query that reads all d bits of a codeword, :math:`\rho c_i`, ``[..., N, dk]``.
        Their softmax scale is 1.
      signs: public random signs ``[..., N, d]``.
      bits: the bits ``[..., N, d]``.
      thresholds: half of what a bit that is set adds to its coordinate ``[..., N]``.
      coherence: the largest :math:`|\langle c_i, c_l \rangle|` of two codewords ``[...]``, at
        most :math:`1/\rho`.
    """

    keys: Float[Array, "*heads n dk"]
    values: Float[Array, "*heads n d"]
    queries: Float[Array, "*heads N dk"]
    signs: Float[Array, "*heads N d"]
    bits: Bool[Array, "*heads N d"]
    thresholds: Float[Array, "*heads N"]
    coherence: Float[Array, "*heads"]


class GameResult(NamedTuple):
    """How well bits were read from a coreset.

    Attributes:
      success: the share of all bits that were read correctly ``[...]``; one half is guessing. NaN
        where an output was not finite.
      error: the largest error of attention among the queries of the game ``[...]``.
    """

    success: Float[Array, "*heads"]
    error: Float[Array, "*heads"]


def code_size(key_width: int, rho: float) -> int:
    r"""How many random codewords may be told apart in a width: the paper's spherical code.

    .. math:: N (N - 1) \, e^{-d_k / (2 \rho^2)} \le \tfrac12

    Random signs over :math:`\sqrt{d_k}` overlap by more than :math:`1/\rho` with probability
    :math:`2 e^{-d_k/(2\rho^2)}` at most (Hoeffding), so that N of them are a code at every other
    draw or more often. This is :math:`e^{c \delta^2 d_k}` with :math:`\delta = 1/\rho`, c near 1/4.

    Args:
      key_width: :math:`d_k`.
      rho: radius of the queries.

    >>> code_size(512, 4.0)
    2108
    """
    checks.check_count("key_width", key_width)
    pairs = math.exp(key_width / (2 * positive_number("rho", rho) ** 2)) / 2
    return math.floor(0.5 + math.sqrt(0.25 + pairs))


def code_width(codewords: int, rho: float) -> int:
    """The smallest width in which so many random codewords may be told apart.

    Args:
      codewords: N, at least 2.
      rho: radius of the queries.

    >>> code_width(2108, 4.0), code_width(2109, 4.0)
    (512, 513)
    """
    checks.check_count("codewords", codewords, 2)
    logarithm = math.log(2 * codewords * (codewords - 1))
    return math.ceil(2 * positive_number("rho", rho) ** 2 * logarithm)


def coreset_codewords(width: int, rho: float, eps: float) -> int:
    r"""Codewords of :func:`coreset_instance`; its pairs are ``width`` times as many.

    .. math:: N = \Big\lfloor \min\!\Big( \frac{e^{\rho}}{4 \varepsilon \sqrt d},\;
                  \frac{e^{2 \rho}}{16} \Big) \Big\rfloor

    Args:
      width: width of the values, d.
      rho: radius of the queries.
      eps: the error at which a coreset begins to lose bits.

    >>> coreset_codewords(32, 4.0, 0.02)
    120
    """
    checks.check_count("width", width)
    rho, eps = positive_number("rho", rho), positive_number("eps", eps)
    by_error = _ERROR_PER_SIGNAL * math.exp(rho) / (eps * math.sqrt(width))
    return math.floor(min(by_error, _CODEWORDS_PER_SQUARE * math.exp(2 * rho)))


def sketch_codewords(rho: float, eps: float) -> int:
    r"""Codewords, and pairs, of :func:`sketch_instance`.

    .. math:: N = \Big\lfloor \min\!\Big( \frac{e^{\rho}}{4 \varepsilon},\;
                  \frac{e^{2 \rho}}{16} \Big) \Big\rfloor

    Args:
      rho: radius of the queries.
      eps: the error at which a sketch begins to lose bits.

    >>> sketch_codewords(4.0, 0.1)
    136
    """
    return coreset_codewords(1, rho, eps)


def _overlaps(codewords: Float[Array, "N dk"], rho: Array) -> tuple[Array, Array]:
    """The coherence of a code, and the share of its own codeword in the softmax of each query."""

    def one(place: Array) -> tuple[Array, Array]:
        products = matmul(codewords, codewords[place])
        overlaps = jnp.where(places == place, 0, jnp.abs(products))
        return jnp.max(overlaps), jax.nn.softmax(rho * products)[place]

    places = jnp.arange(codewords.shape[0])
    overlaps, shares = jax.lax.map(one, places, batch_size=min(_BLOCK, codewords.shape[0]))
    return jnp.max(overlaps), shares


@functools.partial(
    jax.jit, static_argnames=("codewords", "key_width", "width", "dtype", "one_bit_a_pair")
)
def _instance(
    rng: Array,
    rho: Float[Array, ""],
    *,
    codewords: int,
    key_width: int,
    width: int,
    dtype: jnp.dtype,
    one_bit_a_pair: bool,
) -> HardInstance:
    code_rng, sign_rng, bit_rng = jax.random.split(rng, 3)
    wide = jnp.promote_types(dtype, jnp.float32)

    def draw(state: tuple[Array, ...]) -> tuple[Array, ...]:
        rng, draw_rng = jax.random.split(state[0])
        signs = jax.random.rademacher(draw_rng, (codewords, key_width), jnp.int8)
        code = (signs.astype(wide) * key_width**-0.5).astype(dtype)
        return rng, code, *_overlaps(code.astype(wide), rho)

    # Drawn as a whole until it is a code, at most twice on the average.
    _, code, coherence, shares = jax.lax.while_loop(
        lambda state: ~(state[2] <= 1 / rho), draw, draw((code_rng,))
    )
    signs = jax.random.rademacher(sign_rng, (codewords, width), dtype)
    bits = jax.random.bernoulli(bit_rng, 0.5, (codewords, width))
    shown = signs * bits.astype(dtype)
    if one_bit_a_pair:
        keys = jnp.repeat(code, width, axis=0)
        # Row (i, j) has its one entry in column j.
        values = (shown[:, :, None] * jnp.eye(width, dtype=dtype)).reshape(-1, width)
        bit = 1 / width
    else:
        keys, values, bit = code, shown * jnp.asarray(width**-0.5, dtype), width**-0.5
    queries, thresholds = rho * code.astype(wide), shares * bit / 2
    return HardInstance(keys, values, queries, signs, bits, thresholds, coherence)


def _checked_instance(
    rng: Array,
    codewords: int,
    width: int,
    rho: float,
    key_width: int | None,
    dtype: DTypeLike,
    *,
    one_bit_a_pair: bool,
) -> HardInstance:
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating dtype, got {dtype}.")
    if codewords < 2:
        raise ValueError(
            f"rho = {rho:g} and eps leave {codewords} codewords, and two are the least; "
            "take a larger rho or a smaller eps."
        )
    if key_width is None:
        key_width = code_width(codewords, rho)
    elif code_size(key_width, rho) < codewords:
        raise ValueError(
            f"key_width = {key_width} has room for {code_size(key_width, rho)} codewords at "
            f"rho = {rho:g}; {codewords} take {code_width(codewords, rho)}."
        )
    return _instance(
        rng,
        jnp.asarray(rho, jnp.promote_types(dtype, jnp.float32)),
        codewords=codewords,
        key_width=int(key_width),
        width=int(width),
        dtype=dtype,
        one_bit_a_pair=one_bit_a_pair,
    )


def coreset_instance(
    rng: Array,
    width: int,
    rho: float,
    eps: float,
    *,
    key_width: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> HardInstance:
    r"""The instance of Theorem 7, hard for coresets: one bit a pair.

    .. math::
       k_{(i,j)} = c_i, \qquad v_{(i,j)} = \sigma_{ij} b_{ij} e_j, \qquad
       i \le N, \; j \le d, \; n = N d

    Codewords :math:`c_i` are random signs over :math:`\sqrt{d_k}`, redrawn until no two overlap by
    more than :math:`1/\rho`. With :math:`Z_i = \sum_l e^{\rho \langle c_i, c_l \rangle}`, the query
    :math:`\rho c_i` shows in coordinate j, times :math:`\sigma_{ij}`, the bit as
    :math:`e^\rho b_{ij} / (d Z_i)`, over the noise of the other codewords, of deviation
    :math:`\sqrt{N/2} / (d Z_i)` or little more. The d pairs of a codeword share their key, and
    about half of them are equal altogether, with a value of zero.

    Args:
      rng: a JAX random key.
      width: width of the values, d.
      rho: radius of the queries, a Python number.
      eps: sets the number of codewords, see :func:`coreset_codewords`.
      key_width: width of the keys; ``None`` is the smallest that holds the code,
        :func:`code_width`.
      dtype: dtype of keys and values; thresholds and queries are float32 or wider.

    Returns:
      The instance, with :math:`N d` pairs.

    Raises:
      ValueError: if ``width`` or ``key_width`` is not a positive integer, ``rho`` or ``eps`` not
        positive, if they leave less than two codewords, or if ``key_width`` is too small for them.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Theorem 7.

    >>> import jax
    >>> instance = coreset_instance(jax.random.key(0), 8, 3.0, 0.1)
    >>> instance.keys.shape, instance.values.shape, instance.bits.shape
    ((136, 114), (136, 8), (17, 8))
    """
    codewords = coreset_codewords(width, rho, eps)
    return _checked_instance(rng, codewords, width, rho, key_width, dtype, one_bit_a_pair=True)


def sketch_instance(
    rng: Array,
    width: int,
    rho: float,
    eps: float,
    *,
    key_width: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> HardInstance:
    r"""The instance of Theorem 6, hard for every sketch: as many bits a pair as values are wide.

    .. math::
       k_i = c_i, \qquad v_i = \frac{1}{\sqrt d} \sum_j \sigma_{ij} b_{ij} e_j, \qquad
       i \le N = n

    As :func:`coreset_instance`, but for a signal of :math:`e^\rho b_{ij} / (\sqrt d Z_i)` over
    noise of deviation :math:`\sqrt{N/2} / (\sqrt d Z_i)`. To leave out a pair is to lose d bits.

    Args:
      rng: a JAX random key.
      width: width of the values, d.
      rho: radius of the queries, a Python number.
      eps: sets the number of codewords, see :func:`sketch_codewords`.
      key_width: as in :func:`coreset_instance`, like the errors raised.
      dtype: likewise.

    Returns:
      The instance, with N pairs.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Theorem 6.

    >>> import jax
    >>> instance = sketch_instance(jax.random.key(0), 8, 3.0, 0.25)
    >>> instance.keys.shape, instance.values.shape, instance.bits.shape
    ((20, 120), (20, 8), (20, 8))
    """
    checks.check_count("width", width)
    codewords = sketch_codewords(rho, eps)
    return _checked_instance(rng, codewords, width, rho, key_width, dtype, one_bit_a_pair=False)


def decode(
    instance: HardInstance, outputs: Float[Array, "*heads N d"]
) -> Bool[Array, "*heads N d"]:
    r"""Bob's guess of all bits: is the signal more than half there?

    .. math:: \hat b_{ij} = [\, \sigma_{ij} \, \mathrm{Attn}(\rho c_i)_j > \theta_i \,]

    Args:
      instance: the instance, of which only public parts are read: signs and thresholds.
      outputs: attention of ``instance.queries``, over anything, ``[..., N, d]``.

    Raises:
      ValueError: if there is not one output for each bit.
    """
    if outputs.shape != instance.bits.shape:
        raise ValueError(
            "outputs must be one row for each query of the instance; "
            f"got outputs {outputs.shape} and bits {instance.bits.shape}."
        )
    signs = instance.signs.astype(accumulation_dtype(outputs))
    return signs * outputs > instance.thresholds[..., None]


@jax.jit
def _play(instance: HardInstance, coreset: Coreset | SignedCoreset) -> GameResult:
    dtype = accumulation_dtype(instance.queries, coreset.keys, coreset.values)
    # Outputs have the dtype of the values, in which a signal of 1/d may be rounded away.
    coreset = coreset._replace(values=coreset.values.astype(dtype))
    outputs = attend(instance.queries, coreset, scale=_SCALE, block_size=_BLOCK)
    cache = instance.keys, instance.values.astype(dtype)
    exact = attention(instance.queries, *cache, scale=_SCALE, block_size=_BLOCK)
    success = jnp.mean((decode(instance, outputs) == instance.bits).astype(dtype), axis=(-2, -1))
    finite = jnp.all(jnp.isfinite(outputs), axis=(-2, -1))
    error = jnp.max(jnp.linalg.norm(outputs - exact, axis=-1), axis=-1)
    return GameResult(jnp.where(finite, success, jnp.nan), error)


def index_game(
    rng: Array,
    instance: HardInstance,
    compressor: Callable[..., Coreset | SignedCoreset],
    size: int,
) -> GameResult:
    """Alice compresses the cache, Bob reads all its bits from the coreset.

    In expectation no subset of ``size`` weighted pairs allows a success above
    :func:`coreset_jax.guarantees.sizes.decoding_bound`. A method that does better has a bug, or
    told Bob more than a coreset.

    Args:
      rng: a JAX random key for the compressor; not the one of the instance.
      instance: of :func:`coreset_instance` or :func:`sketch_instance`; those of a ``vmap`` over
        random keys play one game each.
      compressor: any method, called as a :class:`coreset_jax.Compressor`.
      size: pairs that it may keep.

    Returns:
      The share of bits read correctly, and the largest error at the queries asked.

    Raises:
      ValueError: if ``size`` is not a positive integer, if the coreset was made for another softmax
        scale than 1, or whatever the compressor raises.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Section 6.

    >>> import jax, coreset_jax as cj
    >>> instance = sketch_instance(jax.random.key(0), 64, 4.0, 0.1)
    >>> for size in (136, 68):
    ...     result = index_game(jax.random.key(1), instance, cj.baselines.uniform(), size)
    ...     print(f"{result.success:.1%} of the bits from {size} pairs")
    100.0% of the bits from 136 pairs
    74.5% of the bits from 68 pairs
    """
    checks.check_size(size)
    coreset = compressor(rng, instance.keys, instance.values, size=size)
    # Here, where a scale that differs can still be seen.
    scale_of(coreset, _SCALE)
    return _play(instance, coreset)
