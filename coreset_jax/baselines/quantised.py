r"""Quantised caches: every kept pair in a few bits a number, alone or behind any compressor.

Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu, *KIVI: A Tuning-Free Asymmetric 2bit Quantization
for KV Cache*, ICML 2024, arXiv 2402.02750: keys by channel, values by token. Plain here, without
its groups of tokens and its recent tokens in full width.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax import validation
from coreset_jax.attention import accumulation_dtype
from coreset_jax.coreset import Compressor, Coreset, whole_cache

# A lowest value and a step, each in float32.
_PARAMETER_BYTES = 8


def _through_codes(
    array: Float[Array, "*heads m c"], kept: Bool[Array, "*heads m 1"], bits: int, axis: int
) -> Float[Array, "*heads m c"]:
    """What is read back of an array after affine quantisation with one range along ``axis``."""
    dtype = accumulation_dtype(array)
    wide = array.astype(dtype)
    low = jnp.min(jnp.where(kept, wide, jnp.inf), axis=axis, keepdims=True)
    high = jnp.max(jnp.where(kept, wide, -jnp.inf), axis=axis, keepdims=True)
    levels = 2**bits - 1
    # Divided before they are subtracted: a range of both signs must not overflow.
    step = high / levels - low / levels
    codes = jnp.round((wide - low) / jnp.where(step > 0, step, 1))
    codes = jnp.clip(codes, 0, levels)
    return jnp.where(kept, low + codes * step, 0).astype(array.dtype)


def _round_trip(coreset: Coreset, bits: int) -> Coreset:
    """The coreset with its pairs quantised and read back."""
    kept = (coreset.indices >= 0)[..., None]
    keys = _through_codes(coreset.keys, kept, bits, axis=-2)
    values = _through_codes(coreset.values, kept, bits, axis=-1)
    finite = jnp.all(jnp.isfinite(keys), axis=(-2, -1)) & jnp.all(
        jnp.isfinite(values), axis=(-2, -1)
    )
    log_weights = jnp.where(finite[..., None], coreset.log_weights, jnp.nan)
    return coreset._replace(keys=keys, values=values, log_weights=log_weights)


@functools.partial(jax.jit, static_argnames="bits")
def _quantise(coreset: Coreset, *, bits: int) -> Coreset:
    return _round_trip(coreset, bits)


@dataclasses.dataclass(frozen=True)
class _Quantised:
    compressor: Compressor | None
    bits: int

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
        if self.compressor is not None:
            coreset = self.compressor(
                rng, keys, values, size=size, lengths=lengths, queries=queries
            )
        elif size < keys.shape[-2]:
            raise ValueError(
                "size must be at least n where no compressor is given: alone, quantisation keeps "
                f"every pair; got size {size} and keys {keys.shape}."
            )
        else:
            coreset = whole_cache(keys, values, lengths)
        return _quantise(coreset, bits=self.bits)


def quantised(compressor: Compressor | None = None, bits: int = 8) -> Compressor:
    r"""Keeps what a compressor keeps, or the whole cache, in a few bits a number.

    .. math::
       x \mapsto \ell + s \cdot \mathrm{round}\Bigl(\frac{x - \ell}{s}\Bigr), \qquad
       \ell = \min x, \quad s = \frac{\max x - \min x}{2^{\mathrm{bits}} - 1}

    with one range for every channel of the keys over all kept pairs of a head, and one for every
    value over its channels. No entry moves by more than :math:`s/2`. The coreset holds the numbers
    as they are read back, so that any method of attention takes it; :func:`quantised_bytes` says
    what the codes and ranges would take. Log-weights, indices and normalizers are left alone.

    Args:
      compressor: what is quantised; ``None`` means the whole cache, and then ``size`` must be at
        least ``n``.
      bits: bits of a code, from 2 to 8.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` ``(rng, keys [..., n, d], values [..., n, dv], *,
      size, lengths=None, queries=None) -> Coreset``, with keys and values in the dtype of the
      cache, neither bit-identical to it, not even where ``size >= n``. It looks at no query, and
      hands ``queries`` to ``compressor``. A head with a NaN or an infinity among its kept pairs
      gets NaN log-weights. The call raises ``ValueError`` as ``compressor`` does, and without one
      if ``size`` is below ``n``.

    Raises:
      ValueError: if ``compressor`` is not callable or ``bits`` lies outside 2..8.

    References:
      Liu et al., *KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache*, ICML 2024,
      arXiv 2402.02750, Section 3.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 128, 16))
    >>> whole = cj.baselines.quantised(bits=4)(jax.random.key(1), keys, values, size=128)
    >>> cj.baselines.quantised_bytes(whole, bits=4) / (keys.nbytes + values.nbytes)
    0.1953125
    >>> compressor = cj.baselines.quantised(cj.balanced(), bits=8)
    >>> compressor(jax.random.key(1), keys, values, size=32).keys.shape
    (4, 32, 16)
    """
    if compressor is not None and not callable(compressor):
        raise ValueError(f"compressor must be callable or None, got {compressor!r}.")
    _check_bits(bits)
    return _Quantised(compressor, int(bits))


def quantised_bytes(coreset: Coreset, bits: int = 8) -> int:
    r"""Bytes that the pairs of a coreset take in quantised form.

    .. math::
       \lceil m d\,\mathrm{bits}/8 \rceil + 8 d + \lceil m d_v\,\mathrm{bits}/8 \rceil + 8 m

    a head: packed codes, and a lowest value and a step in float32 for each channel of the keys and
    for each value. Every slot counts, empty ones too. Log-weights and normalizers come on top, as
    they do without quantisation.

    Args:
      coreset: a coreset with keys ``[..., m, d]`` and values ``[..., m, dv]``, or its
        ``jax.eval_shape``.
      bits: bits of a code, from 2 to 8.

    Returns:
      The bytes of all heads together.

    Raises:
      ValueError: if ``bits`` lies outside 2..8.
    """
    _check_bits(bits)
    *leading, size, width = coreset.keys.shape
    value_width = coreset.values.shape[-1]
    codes = -(-size * width * bits // 8) + -(-size * value_width * bits // 8)
    return math.prod(leading) * (codes + _PARAMETER_BYTES * (width + size))


def _check_bits(bits: int) -> None:
    validation.check_count("bits", bits, 2)
    if bits > 8:
        raise ValueError(f"bits must be at most 8, got {bits}.")
