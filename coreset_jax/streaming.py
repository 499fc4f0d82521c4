r"""Coresets of streams: merge and reduce, with the error fed back.

A stream is a pytree of fixed shapes: a buffer of the newest pairs, and a
:class:`~coreset_jax._src.stream.summary.Summary` of everything before. A full buffer joins the
summary, whose lightest pairs are then halved until they fit. Weights double with every halving: a
stream of :math:`n` pairs in :math:`m` slots holds :math:`O(\log n)` classes of weights, nearly all
of its pairs in the highest two, and its error falls like :math:`1/m` as that of a coreset made at
once.

    stream = streaming.merge_and_reduce(size=1024)
    state = stream.init(rng, keys, values)          # shapes and dtypes are all it takes from them
    state = stream.append(state, keys, values)      # [..., b, d]: one pair a head or many
    coreset = stream.coreset(state)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax._src import checks, meshes
from coreset_jax._src.balance import walks
from coreset_jax._src.core.compressor import Compressor
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.turns import over_axes
from coreset_jax._src.precision import log
from coreset_jax._src.stream import summary as summaries
from coreset_jax._src.stream.halvings import (
    check_compressor,
    check_heads,
    options_of_heads,
    stream_scale,
)
from coreset_jax._src.stream.sketch import Pairs, Settings
from coreset_jax._src.stream.summary import Summary

Result = TypeVar("Result")


class StreamState(NamedTuple):
    """A stream of pairs under way, one a head; made by :meth:`merge_and_reduce.init`.

    Attributes:
      summary: what stands for all pairs but the newest.
      buffer: the newest pairs, ``[..., block_size]`` slots.
      filled: pairs in the buffer ``[...]``, int32.
      rngs: random keys ``[...]``, one a head.
    """

    summary: Summary
    buffer: Pairs
    filled: Int[Array, "*heads"]
    rngs: Array


class StreamError(NamedTuple):
    """How wrong a stream may answer, in the units of the values.

    Attributes:
      bound: what no query up to ``query_norm`` exceeds, ``[...]``; loose.
      estimate: what the sketch of the error says instead, ``[...]``; no bound.
    """

    bound: Float[Array, "*heads"]
    estimate: Float[Array, "*heads"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class merge_and_reduce:  # noqa: N801
    """A coreset of a stream of unknown length, in memory that does not grow.

    Its methods are pure functions over a :class:`StreamState`: they may be jitted, scanned, vmapped
    and donated to. Equal streams share their compiled programs.

    Args:
      size: pairs to hold for each head, the buffer included: at least twice ``block_size``.
      block_size: pairs in the buffer, and in a halving; even.
      landmarks: keys that keep the error, besides the pairs: ``landmarks * (d + dv + 1)`` numbers
        a head.
      query_norm: largest norm of a raw query; ``None`` means ``sqrt(d)``.
      scale: the softmax scale, which coresets of the stream carry; ``None`` means that of
        ``compressor``, and ``1/sqrt(d)`` where that has none.
      walk: a function of :mod:`coreset_jax.walks`, or any of the same signature; hashable.
      max_swaps: swaps that may refine a halving after its walk.
      ridge: regularization of the landmarks' Gram matrix, relative to its diagonal.
      compressor: what halves blocks in place of the balancing walk, for comparisons: any subset
        method; it knows nothing of earlier errors.

    Raises:
      ValueError: on bad options, and on a compressor that is signed, needs sample queries or has
        another scale.

    References:
      Kochetkova et al., *BalanceKV: KV cache compression through discrepancy theory*, 2025, for
      merge and reduce; the feedback is this library's (``docs/streaming.md``).

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 1000, 16))
    >>> stream = cj.streaming.merge_and_reduce(size=128, block_size=32)
    >>> state = stream.init(jax.random.key(1), keys, values)
    >>> for start in range(0, 1000, 250):
    ...     end = start + 250
    ...     state = stream.append(state, keys[:, start:end], values[:, start:end])
    >>> coreset = stream.coreset(state)
    >>> coreset.keys.shape, float(jax.numpy.exp(coreset.log_weights[0]).sum().round(2))
    ((4, 128, 16), 1000.0)
    """

    size: int
    block_size: int = 128
    landmarks: int = 128
    query_norm: float | None = None
    scale: float | None = None
    walk: walks.Walk = walks.greedy_pairs
    max_swaps: int = 128
    ridge: float = 1e-4
    compressor: Compressor | None = None

    def __post_init__(self) -> None:
        """Raises ``ValueError`` on bad options."""
        for name, least in (("size", 1), ("block_size", 2), ("landmarks", 1), ("max_swaps", 0)):
            checks.check_count(name, getattr(self, name), least)
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.block_size % 2:
            raise ValueError(f"block_size must be even, got {self.block_size}.")
        if self.size < 2 * self.block_size:
            raise ValueError(
                "size must be at least twice block_size; "
                f"got size {self.size}, block_size {self.block_size}."
            )
        for name in ("query_norm", "scale", "ridge"):
            object.__setattr__(self, name, checks.static_float(name, getattr(self, name)))
        if not callable(self.walk):
            raise ValueError(f"walk must be callable, got {self.walk!r}.")
        check_compressor(self.compressor)
        stream_scale(self.scale, self.compressor)

    def init(
        self,
        rng: Array,
        keys: Float[Array, "*heads n d"],
        values: Float[Array, "*heads n dv"],
    ) -> StreamState:
        """A stream that has seen nothing.

        Args:
          rng: a JAX random key; every head gets a fold of its own.
          keys: arrays like those to come, ``[..., any, d]``: their leading axes, width, dtype and
            sharding are taken, their contents are not.
          values: the same, ``[..., any, dv]``.

        Raises:
          ValueError: if keys and values do not fit each other, or options of the compressor fit
            no head.
        """
        checks.check_cache(keys, values)
        check_heads(self.compressor, keys.shape[:-2], self.block_size, keys.shape[-1])
        return _init(self, rng, keys[..., :1, :], values[..., :1, :])

    def append(
        self,
        state: StreamState,
        keys: Float[Array, "*heads b d"],
        values: Float[Array, "*heads b dv"],
        lengths: Int[Array, "*heads"] | None = None,
    ) -> StreamState:
        """The stream after more pairs have come.

        Until ``size // block_size * block_size`` pairs have come nothing is lost. Appending a pair
        only writes a slot, but for one time in ``block_size``, when a full buffer joins the
        summary. How a stream is cut into calls changes nothing.

        Args:
          state: the stream.
          keys: the next keys of each head ``[..., b, d]``; any ``b``.
          values: their values ``[..., b, dv]``.
          lengths: number of valid ones among them ``[...]``, from 0 on; ``None`` means all.

        Raises:
          ValueError: if shapes or dtypes do not fit the stream or each other.
        """
        checks.check_cache(keys, values)
        self._check(state, keys, values)
        if lengths is not None and jnp.shape(lengths) != keys.shape[:-2]:
            raise ValueError(
                f"lengths must have the leading axes of keys, {keys.shape[:-2]}; "
                f"got lengths {jnp.shape(lengths)} and keys {keys.shape}."
            )
        total = keys.shape[-2]
        counts = jnp.zeros_like(state.filled) + (
            total if lengths is None else jnp.asarray(lengths).astype(jnp.int32)
        )
        return _append(self, state, keys, values, counts)

    @functools.partial(jax.jit, static_argnums=0)
    def coreset(self, state: StreamState) -> Coreset:
        """What stands for the stream so far.

        Returns:
          A coreset with ``size`` slots a head: weights that sum to the pairs that have come, and
          ``indices`` that count from the first of them. NaN log-weights where a NaN or an
          infinity has come. It carries the stream's softmax scale, if that was given.
        """
        scale = stream_scale(self.scale, self.compressor)

        def one_head(state: StreamState) -> Coreset:
            summary = state.summary
            pairs = jax.tree.map(
                lambda old, new: jnp.concatenate([old, new]), summary.pairs, state.buffer
            )
            inside = pairs.weights > 0
            order = jnp.argsort(jnp.where(inside, pairs.positions, jnp.iinfo(jnp.int32).max))
            keys, values, weights, positions = jax.tree.map(lambda array: array[order], pairs)
            inside = (weights > 0)[:, None]
            # The buffer is judged by what it holds; of the rest the sums have seen everything.
            sound = jnp.all(jnp.isfinite(jnp.where(inside, keys, 0)))
            sound &= jnp.all(jnp.isfinite(jnp.where(inside, values, 0)))
            sound &= summaries.is_sound(summary)
            return Coreset(
                jnp.where(inside, keys, jnp.zeros_like(keys)),
                jnp.where(inside, values, jnp.zeros_like(values)),
                jnp.where(sound, log(weights), jnp.nan),
                positions,
                None if scale is None else jnp.full_like(weights[0], scale),
            )

        return _for_heads(one_head, state)

    def merge(self, left: StreamState, right: StreamState) -> StreamState:
        """The stream that saw all of ``left`` and then all of ``right``.

        Args:
          left: a stream of this kind.
          right: another; its first pair comes behind the last of ``left``.

        Raises:
          ValueError: if the two have different shapes.
        """
        shapes = [jax.tree.map(jnp.shape, each) for each in (left, right)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "left and right must be streams of the same shapes; "
                f"got keys {left.summary.pairs.keys.shape} and {right.summary.pairs.keys.shape}."
            )
        return _merge(self, left, right)

    @functools.partial(jax.jit, static_argnums=0)
    def error(self, state: StreamState) -> StreamError:
        """How wrong the stream's coreset may answer queries of norm up to ``query_norm``."""
        settings = self.settings(state.buffer.keys.shape[-1])

        def one_head(state: StreamState) -> StreamError:
            reach = summaries.value_reach(state.summary, state.buffer)
            return StreamError(
                summaries.error_bound(state.summary, reach, settings),
                summaries.error_estimate(state.summary, reach, settings),
            )

        return _for_heads(one_head, state)

    def settings(self, width: int) -> Settings:
        """The settings of a summary for keys of a width."""
        options = {name: getattr(self, name) for name in Settings._fields}
        options["scale"] = stream_scale(self.scale, self.compressor)
        return Settings.at_width(width, **options)

    def _check(
        self,
        state: StreamState,
        keys: Float[Array, "*heads b d"],
        values: Float[Array, "*heads b dv"],
    ) -> None:
        pairs = state.buffer
        for name, given, held in (("keys", keys, pairs.keys), ("values", values, pairs.values)):
            fits = given.shape[:-2] == held.shape[:-2] and given.shape[-1] == held.shape[-1]
            if not fits or given.dtype != held.dtype:
                raise ValueError(
                    f"{name} must fit the stream, {held.dtype} {(*held.shape[:-2], 'b')}"
                    f" x {held.shape[-1]}; got {given.dtype} {given.shape}."
                )


def _for_heads(function: Callable[..., Result], *of_heads: Any) -> Result:
    """What a function of one head returns for all of them, each on the device that has it."""
    axes = of_heads[0].filled.ndim

    def all_heads(_: None, *of_heads: Any) -> Result:
        return over_axes(function, axes)(*of_heads)

    return meshes.for_heads(all_heads, axes, None, *of_heads)


def _init(
    stream: merge_and_reduce,
    rng: Array,
    keys: Float[Array, "*heads 1 d"],
    values: Float[Array, "*heads 1 dv"],
) -> StreamState:
    def one_head(rng: Array, keys: Array, values: Array) -> StreamState:
        key, value = keys[0], values[0]
        summary = summaries.empty(stream.size - stream.block_size, stream.landmarks, key, value)
        buffer = summaries.empty(stream.block_size, 1, key, value).pairs
        return StreamState(summary, buffer, jnp.zeros_like(summary.absorbed), rng)

    axes = keys.ndim - 2

    def all_heads(_: None, *of_heads: Array) -> StreamState:
        return over_axes(one_head, axes)(*of_heads)

    rngs = jax.random.split(rng, keys.shape[:-2])
    return meshes.for_heads(all_heads, axes, None, rngs, keys, values)


@functools.partial(jax.jit, static_argnames="stream")
def _append(
    stream: merge_and_reduce,
    state: StreamState,
    keys: Float[Array, "*heads b d"],
    values: Float[Array, "*heads b dv"],
    counts: Int[Array, "*heads"],
) -> StreamState:
    def all_heads(_: None, state: StreamState, *new: Array) -> StreamState:
        return _append_heads(stream, state, *new)

    return meshes.for_heads(all_heads, state.filled.ndim, None, state, keys, values, counts)


def _append_heads(
    stream: merge_and_reduce, state: StreamState, keys: Array, values: Array, counts: Array
) -> StreamState:
    """The state of some heads after more pairs."""
    total = keys.shape[-2]
    width = min(total, stream.block_size)
    pieces = -(-total // width)

    def pad(array: Array) -> Array:
        widths = [(0, 0)] * (array.ndim - 2) + [(0, pieces * width - total), (0, 0)]
        return jnp.pad(array, widths)

    keys, values = pad(keys), pad(values)

    def piece(number: Array, state: StreamState) -> StreamState:
        start = number * width
        inside = jnp.clip(counts - start, 0, width)
        new = (
            jax.lax.dynamic_slice_in_dim(keys, start, width, axis=-2),
            jax.lax.dynamic_slice_in_dim(values, start, width, axis=-2),
        )
        room = jnp.minimum(stream.block_size - state.filled, inside)
        state = _write(state, new, jnp.zeros_like(room), room)
        # A batch decodes in step: as a rule all heads are full at once, and most steps none is.
        full = inside > room
        state = jax.lax.cond(jnp.any(full), lambda: _flush(stream, state, full), lambda: state)
        return _write(state, new, room, inside)

    return jax.lax.fori_loop(0, pieces, piece, state)


def _write(
    state: StreamState,
    new: tuple[Float[Array, "*heads w d"], Float[Array, "*heads w dv"]],
    starts: Int[Array, "*heads"],
    stops: Int[Array, "*heads"],
) -> StreamState:
    """Puts the new pairs from ``starts`` to ``stops`` behind those in the buffer: there is room."""

    def one_head(
        state: StreamState, keys: Array, values: Array, start: Array, stop: Array
    ) -> StreamState:
        buffer, filled = state.buffer, state.filled
        numbers = jnp.arange(keys.shape[0], dtype=jnp.int32)
        places = filled + numbers - start
        inside = (numbers >= start) & (numbers < stop)
        slots = jnp.where(inside, places, buffer.weights.shape[0])
        pairs = Pairs(
            keys,
            values,
            jnp.ones_like(keys[:, 0], buffer.weights.dtype),
            state.summary.absorbed + places,
        )
        buffer = jax.tree.map(lambda old, rows: old.at[slots].set(rows, mode="drop"), buffer, pairs)
        return state._replace(buffer=buffer, filled=filled + stop - start)

    return over_axes(one_head, state.filled.ndim)(state, *new, starts, stops)


def _flush(stream: merge_and_reduce, state: StreamState, full: Array) -> StreamState:
    """The state with the buffers of the heads that are ``full`` in their summaries."""
    settings = stream.settings(state.buffer.keys.shape[-1])

    def one_head(compressor: Compressor | None, state: StreamState, full: Array) -> StreamState:
        rng, absorb_rng = jax.random.split(state.rngs)
        own = settings._replace(compressor=compressor)
        summary = summaries.absorb(absorb_rng, state.summary, state.buffer, own)
        cleared = state.buffer._replace(
            weights=jnp.zeros_like(state.buffer.weights),
            positions=jnp.full_like(state.buffer.positions, -1),
        )
        flushed = StreamState(summary, cleared, jnp.zeros_like(state.filled), rng)
        return jax.tree.map(lambda new, old: jnp.where(full, new, old), flushed, state)

    compressors = options_of_heads(stream.compressor, state.summary.ledger.key_radius)
    return over_axes(one_head, state.filled.ndim)(compressors, state, full)


@functools.partial(jax.jit, static_argnames="stream")
def _merge(stream: merge_and_reduce, left: StreamState, right: StreamState) -> StreamState:
    def all_heads(_: None, left: StreamState, right: StreamState) -> StreamState:
        return _merge_heads(stream, left, right)

    return meshes.for_heads(all_heads, left.filled.ndim, None, left, right)


def _merge_heads(stream: merge_and_reduce, left: StreamState, right: StreamState) -> StreamState:
    """The merged states of some heads."""
    settings = stream.settings(left.buffer.keys.shape[-1])
    left = _flush(stream, left, left.filled > 0)

    def one_head(
        compressor: Compressor | None, left: StreamState, right: StreamState
    ) -> StreamState:
        rng, join_rng = jax.random.split(left.rngs)
        own = settings._replace(compressor=compressor)
        summary = summaries.join(join_rng, left.summary, right.summary, own)
        moved = jnp.where(
            right.buffer.weights > 0, right.buffer.positions + left.summary.absorbed, -1
        )
        return StreamState(summary, right.buffer._replace(positions=moved), right.filled, rng)

    compressors = options_of_heads(stream.compressor, left.summary.ledger.key_radius)
    return over_axes(one_head, left.filled.ndim)(compressors, left, right)
