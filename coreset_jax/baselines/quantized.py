r"""Quantized caches: every kept pair in a few bits a number, alone or behind any compressor.

Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu, *KIVI: A Tuning-Free Asymmetric 2bit Quantization
for KV Cache*, ICML 2024, arXiv 2402.02750: keys by channel, values by token. Plain here, without
its groups of tokens and its recent tokens in full width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coreset_jax._src import checks
from coreset_jax._src.core.compressor import Compressor, Wrapper, leaf
from coreset_jax._src.core.coreset import AnyCoreset, Coreset, SignedCoreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.precision import accumulation_dtype

# A lowest value and a step, each in float32.
_PARAMETER_BYTES = 8


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _through_codes(
    array: Float[Array, "*heads m c"], kept: Bool[Array, "*heads m 1"], bits: int, axis: int
) -> Float[Array, "*heads m c"]:
    """What is read back of an array after affine quantization with one range along ``axis``."""
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


@_through_codes.defjvp
def _(bits: int, axis: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """What was rounded moves as it did before: constants almost everywhere would teach nothing."""
    kept = primals[1]
    return _through_codes(*primals, bits, axis), jnp.where(kept, tangents[0], 0)


def _round_trip(coreset: AnyCoreset, bits: int) -> AnyCoreset:
    """The coreset with its pairs quantized and read back."""
    kept = (coreset.indices >= 0)[..., None]
    keys = _through_codes(coreset.keys, kept, bits, axis=-2)
    values = _through_codes(coreset.values, kept, bits, axis=-1)
    # What overflows in the round trip must not look like an answer.
    finite = jnp.all(jnp.isfinite(keys)) & jnp.all(jnp.isfinite(values))
    log_weights = jnp.where(finite, coreset.log_weights, jnp.nan)
    return coreset._replace(keys=keys, values=values, log_weights=log_weights)


class _everything(Compressor):  # noqa: N801
    """Keeps every pair: a cache is not compressed, but for what is done with the pairs."""

    def check_call(self, keys: Any, size: int, queries: Any) -> None:
        """Raises ``ValueError`` unless every pair has a slot."""
        super().check_call(keys, size, queries)
        if size < keys.shape[-2]:
            raise ValueError(
                "size must be at least n where no compressor is given: alone, quantization keeps "
                f"every pair; got size {size} and keys {keys.shape}."
            )


class quantized(Wrapper):  # noqa: N801
    r"""Keeps what a compressor keeps, or the whole cache, in a few bits a number.

    .. math::
       x \mapsto \ell + s \cdot \mathrm{round}\Bigl(\frac{x - \ell}{s}\Bigr), \qquad
       \ell = \min x, \quad s = \frac{\max x - \min x}{2^{\mathrm{bits}} - 1}

    with one range for every channel of the keys over all kept pairs of a head, and one for every
    value over its channels. No entry moves by more than :math:`s/2`. The coreset holds the numbers
    as they are read back, so that any method of attention takes it; :func:`quantized_bytes` says
    what the codes and ranges would take. Log-weights, indices and normalizers are left alone.

    Args:
      compressor: what is quantized; ``None`` means the whole cache, and then ``size`` must be at
        least ``n``.
      bits: bits of a code, from 2 to 8.

    A compressor; see :class:`coreset_jax.Compressor`. Keys and values are in the dtype of the
    cache, neither bit-identical to it, not even where ``size >= n``. In derivatives,
    rounding counts as if it were not there.

    Raises:
      ValueError: if ``bits`` lies outside 2..8, or on other bad options; when called, as
        ``compressor`` does.

    References:
      Liu et al., *KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache*, ICML 2024,
      arXiv 2402.02750, Section 3.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 128, 16))
    >>> whole = cj.baselines.quantized(bits=4)(jax.random.key(1), keys, values, size=128)
    >>> cj.baselines.quantized_bytes(whole, bits=4) / (keys.nbytes + values.nbytes)
    0.1953125
    >>> compressor = cj.baselines.quantized(cj.balanced(), bits=8)
    >>> compressor(jax.random.key(1), keys, values, size=32).keys.shape
    (4, 32, 16)
    """

    compressor: Compressor = leaf(default=None, kw_only=False)
    bits: int = 8

    def __post_init__(self) -> None:
        """Raises ``ValueError`` on bad options."""
        if self.compressor is None:
            object.__setattr__(self, "compressor", _everything())
        super().__post_init__()

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        _check_bits(self.bits)
        self.static_count("bits")

    @property
    def keeps_pairs(self) -> bool:  # type: ignore[override]
        """Pairs are rounded."""
        return False

    def on_head(self, head: Head, size: int) -> tuple[Any, Info]:
        """What is kept, or the whole head, through its codes and back."""
        coreset, info = self.compressor.on_head(head, size)
        return _round_trip(coreset, self.bits), info


def quantized_bytes(coreset: Coreset | SignedCoreset, bits: int = 8) -> int:
    r"""Bytes that the pairs of a coreset take in quantized form.

    .. math::
       \lceil m d\,\mathrm{bits}/8 \rceil + 8 d + \lceil m d_v\,\mathrm{bits}/8 \rceil + 8 m

    a head: packed codes, and a lowest value and a step in float32 for each channel of the keys and
    for each value. Every slot counts, empty ones too. Log-weights and normalizers come on top, as
    they do without quantization.

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


def _check_bits(bits: Any) -> None:
    checks.check_count("bits", bits, 2)
    if bits > 8:
        raise ValueError(f"bits must be at most 8, got {bits}.")
