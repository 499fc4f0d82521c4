"""From a call with many heads to pure functions of one: the only place that knows of both.

A call is checked once, before anything is traced. Then one program is compiled for its shapes:
every head gets a number, options and a random key of its own, its padding is masked, and it goes
through the compressor, whose stages take as many heads at a time as memory allows
(:mod:`coreset_jax._src.core.turns`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from coreset_jax._src import checks, meshes
from coreset_jax._src.core.coreset import Coreset, packed
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.core.turns import over_axes
from coreset_jax._src.precision import accumulation_dtype

Options = TypeVar("Options")
Result = TypeVar("Result")


class Cache(NamedTuple):
    """Keys and values of all heads, checked.

    Attributes:
      rng: a JAX random key.
      keys: keys ``[..., n, d]``.
      values: values ``[..., n, dv]``.
      lengths: valid pairs of each head ``[...]``; ``None`` means all.
      queries: sample queries ``[..., q, d]``, or ``None``.
      scores: the largest attention weight that any query gave each pair ``[..., n]``, or ``None``.
      measured: whether the errors of fits are wanted; not to be traced.
    """

    rng: Array
    keys: Float[Array, "*heads n d"]
    values: Float[Array, "*heads n dv"]
    lengths: Integer[Array, "*heads"] | None
    queries: Float[Array, "*heads q d"] | None
    scores: Float[Array, "*heads n"] | None
    measured: bool

    @property
    def numbers(self) -> Int[Array, "*heads"]:
        """The flat index of every head, int32: what its random numbers are named after.

        Made from the keys, so that they are sharded alike: ``jax.vmap`` asks that of axes it maps.
        """
        numbers = jnp.zeros_like(self.keys[..., 0, 0], jnp.int32)
        for axis, width in enumerate(numbers.shape):
            numbers = numbers * width + jax.lax.broadcasted_iota(jnp.int32, numbers.shape, axis)
        return numbers

    @property
    def counts(self) -> Int[Array, "*heads"]:
        """Valid pairs of each head, int32, sharded as the keys are."""
        count = self.keys.shape[-2] if self.lengths is None else self.lengths
        return jnp.zeros_like(self.keys[..., 0, 0], jnp.int32) + jnp.asarray(count).astype(
            jnp.int32
        )


@runtime_checkable
class Method(Protocol):
    """What the driver asks of a compressor; see :class:`coreset_jax.Compressor`."""

    @property
    def query_ball(self) -> Any:
        """Radius and softmax scale of the queries it is made for."""

    @property
    def coreset_scale(self) -> Any:
        """The softmax scale that its coresets are read with, ``None`` if it was given none."""

    @property
    def reads_queries(self) -> bool:
        """Whether sample queries change what it returns."""

    @property
    def reads_scores(self) -> bool:
        """Whether scores of the pairs change what it returns."""

    def fills(self, size: int) -> bool:
        """Whether none of ``size`` slots is empty in heads of as many pairs."""

    def check_call(self, keys: Any, size: int, queries: Any) -> None:
        """Raises ``ValueError`` unless a call can be answered."""

    def on_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """The coreset of one head."""

    def on_heads(self, cache: Cache, size: int) -> tuple[Coreset, Info]:
        """The coresets of all heads."""


def check_arguments(
    compressor: Method,
    keys: Any,
    values: Any,
    size: Any,
    lengths: Any,
    queries: Any,
    scores: Any,
) -> None:
    """Raises ``ValueError`` unless a call can be answered; see :class:`coreset_jax.Compressor`."""
    checks.check_cache(keys, values)
    checks.check_size(size)
    checks.check_lengths(lengths, keys)
    checks.check_layout(keys, int(size), lengths)
    if queries is not None:
        checks.check_queries(queries, keys)
    if scores is not None:
        checks.check_scores(scores, keys)
    compressor.check_call(keys, int(size), queries)


def compress(
    compressor: Method,
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    size: int,
    lengths: Integer[Array, "*heads"] | None,
    queries: Float[Array, "*heads q d"] | None,
    scores: Float[Array, "*heads n"] | None,
    measured: bool,
) -> tuple[Coreset, Info]:
    """The coresets of all heads, and what happened; one compiled program for equal shapes."""
    check_arguments(compressor, keys, values, size, lengths, queries, scores)
    dtype = accumulation_dtype(keys, values)
    # Python numbers and arrays share a trace.
    options = jax.tree.map(
        lambda each: each if isinstance(each, jax.Array) else np.asarray(each, dtype), compressor
    )
    queries = queries if compressor.reads_queries else None
    scores = scores if compressor.reads_scores else None
    return _compress(
        options, rng, keys, values, lengths, queries, scores, size=int(size), measured=measured
    )


@functools.partial(jax.jit, static_argnames=("size", "measured"))
def _compress(
    compressor: Method,
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    lengths: Integer[Array, "*heads"] | None,
    queries: Float[Array, "*heads q d"] | None,
    scores: Float[Array, "*heads n"] | None,
    *,
    size: int,
    measured: bool,
) -> tuple[Coreset, Info]:
    cache = Cache(rng, keys, values, lengths, queries, scores, measured)
    coreset, info = compressor.on_heads(cache, size)
    scale = compressor.coreset_scale
    return coreset if scale is None else coreset._replace(scale=spread(scale, cache)), info


def spread(options: Options, cache: Cache) -> Options:
    """Options, one number or one a head, as arrays of one number a head in the dtype of sums."""
    dtype = accumulation_dtype(cache.keys, cache.values)
    zeros = jnp.zeros_like(cache.keys[..., 0, 0], dtype)
    return jax.tree.map(lambda each: zeros + jnp.asarray(each, dtype), options)


def for_each_head(
    function: Callable[..., Result], cache: Cache, query_ball: Any, *more: Any
) -> Result:
    """What a function of a :class:`Head` returns for all of them.

    Args:
      function: a pure function of a head, and of its entries of further arguments.
      cache: all heads.
      query_ball: radius and softmax scale of the queries, one number or one a head.
      *more: pytrees of arrays ``[..., ...]``.
    """
    ragged, axes = cache.lengths is not None, cache.keys.ndim - 2

    def one_head(
        rng: Array, ball: Any, number: Array, pairs: tuple[Any, ...], *more: Any
    ) -> Result:
        head = Head.prepare(
            rng, number, *pairs, ragged=ragged, measured=cache.measured, **ball._asdict()
        )
        return function(head, *more)

    def all_heads(rng: Array, *of_heads: Any) -> Result:
        return over_axes(functools.partial(one_head, rng), axes)(*of_heads)

    pairs = cache.keys, cache.values, cache.counts, cache.queries, cache.scores
    of_heads = spread(query_ball, cache), cache.numbers, pairs, *more
    return meshes.for_heads(all_heads, axes, cache.rng, *of_heads)


def over_heads(compressor: Method, cache: Cache, size: int) -> tuple[Coreset, Info]:
    """Compresses every head by itself, with a random key and options of its own."""

    def compress(head: Head, compressor: Method) -> tuple[Coreset, Info]:
        return compressor.on_head(head, size)

    options = spread(compressor, cache)
    return coresets_of(compress, cache, compressor.query_ball, compressor.fills(size), options)


def coresets_of(
    compress: Callable[..., tuple[Coreset, Info]],
    cache: Cache,
    query_ball: Any,
    fills: bool,
    *more: Any,
) -> tuple[Coreset, Info]:
    """The coresets that a function makes of all heads: empty slots last, and NaN in all or none.

    Arguments are those of :func:`for_each_head`, and whether it leaves no slot empty in heads of as
    many pairs.
    """

    def compress_one(head: Head, *more: Any) -> tuple[Coreset, Info]:
        coreset, info = compress(head, *more)
        if head.ragged or not fills:
            coreset = packed(coreset)
        # A NaN anywhere in a head is one in all of it.
        sound = ~jnp.any(jnp.isnan(coreset.log_weights))
        for array in (head.keys, head.values, head.queries):
            if array is not None:
                sound &= jnp.all(jnp.isfinite(array))
        if head.scores is not None:
            sound &= ~jnp.any(head.inside & jnp.isnan(head.scores))
        coreset = coreset._replace(log_weights=jnp.where(sound, coreset.log_weights, jnp.nan))
        if not head.measured:
            return coreset, Info()
        return coreset, info._replace(rho=head.standardization.rho)

    return for_each_head(compress_one, cache, query_ball, *more)
