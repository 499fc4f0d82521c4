"""A key-value cache of fixed size: sinks, a compressed middle, and a window of recent pairs.

The first pairs of a sequence and the newest ones are kept exactly. What leaves the window joins
the middle, a coreset of everything in between, whose weights enter attention as a bias on the
scores. Shapes never change, so a decoding step is traced once.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from coreset_jax._src.stream.halvings import check_heads
from coreset_jax._src.stream.summary import Summary
from coreset_jax.nn import checks, joining, kv_block
from coreset_jax.nn import middle as middles
from coreset_jax.nn.config import CacheConfig
from coreset_jax.nn.grouped import Part, attend, by_head
from coreset_jax.nn.kv_block import KVBlock
from coreset_jax.nn.placing import for_sequences


@struct.dataclass
class CoresetCache:
    """The compressed cache of one attention layer: a pytree of fixed shapes.

    All methods are pure: they return a new cache. Two caches that share their arrays are a fork,
    and cost nothing. Batch entries are independent of each other. A NaN or an infinity makes the
    outputs of its head NaN as long as it is held, and for good once it has joined the middle.

    Queries, keys and values are ``[batch, length, heads, width]`` in all methods, as in Flax.
    Arrays ``[batch, heads, length, width]``, as :func:`coreset_jax.compress` has them, must be
    transposed, by ``swapaxes(1, 2)``. They are refused where shapes tell, which they do not where
    there are as many tokens as heads, and for queries alone, where tokens are a multiple of the kv
    heads.

    All arrays start with the batch: ``jax.tree.map(lambda leaf: leaf[order], cache)`` reorders or
    repeats sequences, as a beam search does, and each goes on as it would have in its old row.

    Attributes:
      sinks: the first pairs of each sequence.
      middle: what stands for the pairs between, one summary of a stream a head.
      recent: the newest pairs of each sequence, oldest first.
      filled: number of valid pairs of ``recent`` ``[batch]``.
      lengths: pairs that have come ``[batch]``. A sequence of length 0 is an empty one, whatever
        else its row holds.
      rng: data of a random key ``[batch, 2]``, the same for every sequence, for compressors that
        want one.
      config: the options.

    >>> import jax
    >>> from coreset_jax.nn import CacheConfig, CoresetCache
    >>> queries = jax.random.normal(jax.random.key(0), (1, 1000, 4, 8))
    >>> keys, values = jax.random.normal(jax.random.key(1), (2, 1, 1000, 2, 8))
    >>> config = CacheConfig(size=96, window=16, block_size=16)
    >>> cache = CoresetCache.init(config, jax.random.key(2), keys, values)
    >>> outputs, cache = cache.read_and_extend(queries, keys, values)
    >>> outputs, cache = cache.read_and_extend(queries[:, :1], keys[:, :1], values[:, :1])
    >>> outputs.shape, int(cache.lengths[0])
    ((1, 1, 4, 8), 1001)
    """

    sinks: KVBlock
    middle: Summary
    recent: KVBlock
    filled: Int[Array, " batch"]
    lengths: Int[Array, " batch"]
    rng: UInt32[Array, "batch words"]
    config: CacheConfig = struct.field(pytree_node=False)

    @classmethod
    def init(
        cls,
        config: CacheConfig,
        rng: Array,
        keys: Float[Array, "batch length kv_heads head_dim"],
        values: Float[Array, "batch length kv_heads value_dim"],
    ) -> "CoresetCache":
        """An empty cache for keys and values like these.

        Args:
          config: the options.
          rng: a JAX random key.
          keys: arrays like those to come, ``[batch, any, kv_heads, head_dim]``; shape, dtype and
            sharding are taken, contents are not.
          values: the same, ``[batch, any, kv_heads, value_dim]``.

        Raises:
          ValueError: if keys and values do not fit each other, options of the compressor fit no
            head, or there are more than 256 kv heads of at most as many places.
        """
        checks.check_pairs(keys, values)
        checks.check_example(keys)
        check_heads(config.compressor, keys.shape[2:3], config.block_size, keys.shape[3])
        bits = jnp.broadcast_to(jax.random.bits(rng, (1, 2), jnp.uint32), (keys.shape[0], 2))

        def empty(nothing: CoresetCache, keys: Array, values: Array, bits: Array) -> CoresetCache:
            words = jnp.zeros_like(keys[:, 0, 0, :1], bits.dtype) + bits
            return cls._empty(nothing.config, words, keys, values)

        nothing = cast(Any, cls)(*[None] * 6, config)
        return for_sequences(empty)(nothing, keys[:, :1], values[:, :1], bits)

    @classmethod
    def _empty(
        cls, config: CacheConfig, words: Array, keys: Array, values: Array
    ) -> "CoresetCache":
        key, value = (by_head(array)[..., 0, :] for array in (keys, values))
        # Two arrays, or they could not both be donated.
        filled, lengths = (jnp.zeros_like(key[:, 0, 0], jnp.int32) for _ in range(2))
        return cls(
            kv_block.empty(config.sinks, key, value),
            middles.empty(config, key, value),
            kv_block.empty(config.num_recent, key, value),
            filled,
            lengths,
            words,
            config,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the cache."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def positions(self) -> Int[Array, "batch kv_heads size"]:
        """Places in the sequence of the pairs held, -1 in empty slots: sinks, middle, recent."""
        return _positions(self)

    def reset(self, rows: Bool[Array, " batch"]) -> "CoresetCache":
        """A cache with room for new sequences: some rows are empty, the others as they were.

        Args:
          rows: boolean ``[batch]``, true where a new sequence begins; may be traced.

        Raises:
          ValueError: if ``rows`` are not booleans, one a sequence.

        >>> import jax, jax.numpy as jnp
        >>> from coreset_jax.nn import CacheConfig, CoresetCache
        >>> keys, values = jax.random.normal(jax.random.key(0), (2, 3, 20, 2, 8))
        >>> cache = CoresetCache.init(CacheConfig(size=196), jax.random.key(1), keys, values)
        >>> cache.append(keys, values).reset(jnp.array([False, True, False])).lengths.tolist()
        [20, 0, 20]
        """
        checks.check_rows(rows, self.lengths.shape)
        return _reset(self, rows)

    def prefill(
        self,
        keys: Float[Array, "batch length kv_heads head_dim"],
        values: Float[Array, "batch length kv_heads value_dim"],
        lengths: Int[Array, " batch"] | None = None,
        queries: Float[Array, "batch asked heads head_dim"] | None = None,
    ) -> "CoresetCache":
        """A cache that holds a prompt, compressed at once; whatever was in it is gone.

        Args:
          keys: keys of the prompt, positions applied ``[batch, length, kv_heads, head_dim]``.
          values: values ``[batch, length, kv_heads, value_dim]``.
          lengths: valid pairs of each sequence ``[batch]``, from 0 on; the rest is padding and
            may hold anything. ``None`` means all.
          queries: sample queries for compressors that want them
            ``[batch, any, heads, head_dim]``.

        Raises:
          ValueError: if shapes, dtypes or lengths do not fit the cache, or the prompt is longer
            than ``max_length``.
        """
        checks.check_new_pairs(keys, values, lengths, self.recent)
        self._check_prompt(keys)
        if queries is not None:
            checks.check_queries(queries, self.recent)
        return _prefill(self, keys, values, lengths, queries)

    def append(
        self,
        keys: Float[Array, "batch length kv_heads head_dim"],
        values: Float[Array, "batch length kv_heads value_dim"],
        lengths: Int[Array, " batch"] | None = None,
    ) -> "CoresetCache":
        """The cache after the next pairs: one in decoding, or many.

        Args:
          keys: the next keys, positions applied ``[batch, length, kv_heads, head_dim]``.
          values: their values ``[batch, length, kv_heads, value_dim]``.
          lengths: number of valid ones among them ``[batch]``, from 0 on; ``None`` means all.

        Raises:
          ValueError: if shapes, dtypes or lengths do not fit the cache.
        """
        checks.check_new_pairs(keys, values, lengths, self.recent)
        return _append(self, keys, values, lengths, None)

    def attend(
        self,
        queries: Float[Array, "batch length heads head_dim"],
        keys: Float[Array, "batch length kv_heads head_dim"] | None = None,
        values: Float[Array, "batch length kv_heads value_dim"] | None = None,
        lengths: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch length heads value_dim"]:
        """Attention over the cache, and causally over pairs that are about to be appended.

        Args:
          queries: queries, positions applied ``[batch, length, heads, head_dim]``; head ``h``
            reads key-value head ``h // (heads // kv_heads)``.
          keys: the keys that come with the queries, one each, or ``None``. Query ``i`` reads the
            cache and the first ``i + 1`` of these.
          values: their values.
          lengths: number of valid ones among them ``[batch]``; outputs behind that mean nothing.

        Returns:
          Outputs in the dtype of the values; zero where there is nothing to attend to.

        Raises:
          ValueError: if shapes, dtypes or lengths do not fit the cache or each other.
        """
        checks.check_queries(queries, self.recent)
        if (keys is None) != (values is None):
            raise ValueError("keys and values must be given together.")
        if keys is None and lengths is not None:
            raise ValueError("lengths go with keys and values, which are not given.")
        if keys is not None:
            checks.check_new_pairs(keys, values, lengths, self.recent)
            checks.check_one_each(queries, keys)
        return _attend(self, queries, keys, values, lengths)

    def read_and_extend(
        self,
        queries: Float[Array, "batch length heads head_dim"],
        keys: Float[Array, "batch length kv_heads head_dim"],
        values: Float[Array, "batch length kv_heads value_dim"],
        lengths: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch length heads value_dim"], "CoresetCache"]:
        """What an attention layer does with new tokens: they attend, and join the cache.

        More than one token for a sequence of which the cache holds nothing are a prompt, and
        compressed at once.

        Args:
          queries: as for :meth:`attend`.
          keys: as for :meth:`attend`.
          values: as for :meth:`attend`.
          lengths: as for :meth:`attend`.

        Returns:
          The outputs, and the cache behind these tokens.

        Raises:
          ValueError: as for :meth:`attend`, and if more tokens come at once than ``max_length``.
        """
        outputs = self.attend(queries, keys, values, lengths)
        self._check_prompt(keys)
        if keys.shape[1] == 1:
            return outputs, _append(self, keys, values, lengths, None)
        return outputs, _extend(self, queries, keys, values, lengths)

    def _check_prompt(self, keys: Array) -> None:
        limit = self.config.max_length
        if limit is not None and keys.shape[1] > limit:
            raise ValueError(
                f"the prompt must not be longer than max_length {limit}; got keys {keys.shape}."
            )


# Compiled here, so that calls that are not under jit do not compile anew each time.


@jax.jit
@functools.partial(for_sequences, like="pairs")
def _positions(cache: CoresetCache) -> Array:
    sinks = kv_block.numbers(cache.config.sinks)
    sinks = jnp.where(sinks < cache.lengths[:, None], sinks, -1)
    filled = _filled(cache)[:, None]
    recent = kv_block.numbers(cache.config.num_recent)
    recent = jnp.where(recent < filled, cache.lengths[:, None] - filled + recent, -1)
    outgrown = _outgrown(cache)[:, None, None]
    middle = jnp.where(outgrown, middles.positions(cache.middle), -1)
    zeros = jnp.zeros_like(cache.middle.absorbed)[..., None]
    sinks, recent = (zeros + part[:, None] for part in (sinks, recent))
    return jnp.concatenate([sinks, middle, recent], axis=-1).astype(jnp.int32)


@jax.jit
@for_sequences
def _reset(cache: CoresetCache, rows: Array) -> CoresetCache:
    keys, values = map(by_head, cache.recent)
    return joining.chosen(rows, CoresetCache._empty(cache.config, cache.rng, keys, values), cache)


@jax.jit
@functools.partial(for_sequences, draws=True)
def _prefill(
    cache: CoresetCache,
    keys: Array,
    values: Array,
    lengths: Array | None,
    queries: Array | None,
    heads: Array,
) -> CoresetCache:
    config = cache.config
    lengths = _counts(cache, keys, lengths)
    spared = jnp.minimum(lengths, config.sinks)
    first = jnp.maximum(lengths - config.num_recent, spared)
    prompt = KVBlock(by_head(keys), by_head(values))
    return dataclasses.replace(
        cache,
        sinks=kv_block.cut(prompt, config.sinks, jnp.zeros_like(lengths), lengths),
        middle=middles.compress(config, cache.rng, prompt, first - spared, heads, queries),
        recent=kv_block.cut(prompt, config.num_recent, first, lengths),
        filled=lengths - first,
        lengths=lengths,
    )


@jax.jit
@functools.partial(for_sequences, draws=True)
def _append(
    cache: CoresetCache,
    keys: Array,
    values: Array,
    lengths: Array | None,
    queries: Array | None,
    heads: Array,
) -> CoresetCache:
    counts = _counts(cache, keys, lengths)
    total = keys.shape[1]
    if total > cache.config.block_size and cache.config.middle and cache.config.compressor is None:
        cache = _reset(cache, _left(cache))
        new = KVBlock(by_head(keys), by_head(values))
        return joining.append_many(cache, new, counts, heads, queries)
    width = min(total, cache.config.block_size)
    pieces = -(-total // width)
    padding = ((0, 0), (0, 0), (0, pieces * width - total), (0, 0))
    new = KVBlock(*(jnp.pad(by_head(array), padding) for array in (keys, values)))

    def piece(number: Array | int, cache: CoresetCache) -> CoresetCache:
        start = number * width
        inside = jnp.clip(counts - start, 0, width)
        # A batch decodes in step: as a rule all sequences are full at once, and most steps none.
        full = _filled(cache) + inside > cache.config.num_recent
        left = _left(cache)
        cache = jax.lax.cond(
            jnp.any(full | left),
            lambda: joining.flush(_reset(cache, left), full, heads),
            lambda: cache,
        )
        pairs = (jax.lax.dynamic_slice_in_dim(array, start, width, 2) for array in new)
        return joining.write(cache, KVBlock(*pairs), inside)

    return piece(0, cache) if pieces == 1 else jax.lax.fori_loop(0, pieces, piece, cache)


@jax.jit
@functools.partial(for_sequences, like="tokens")
def _attend(
    cache: CoresetCache,
    queries: Array,
    keys: Array | None,
    values: Array | None,
    lengths: Array | None,
) -> Array:
    new = None
    if keys is not None and values is not None:
        new = KVBlock(by_head(keys), by_head(values))
        if lengths is not None:
            start, end = jnp.zeros_like(cache.lengths), _counts(cache, keys, lengths)
            new = kv_block.cut(new, keys.shape[1], start, end)
    scale = cache.config.settings(queries.shape[-1]).scale
    outputs = attend(queries, _held(cache), new, scale)
    return outputs.astype(cache.recent.values.dtype)


@jax.jit
@functools.partial(for_sequences, draws=True)
def _extend(
    cache: CoresetCache,
    queries: Array,
    keys: Array,
    values: Array,
    lengths: Array | None,
    heads: Array,
) -> CoresetCache:
    count = keys.shape[1]
    # The last queries of a prompt are the best sample there is of those to come.
    ends = _counts(cache, keys, lengths)
    sample = min(count, max(cache.config.window, 1))
    places = jnp.maximum(ends[:, None] - sample + kv_block.numbers(sample), 0)
    asked = jnp.take_along_axis(queries, places[:, :, None, None], axis=1)
    asked = jnp.where((ends > 0)[:, None, None, None], asked, jnp.zeros_like(asked))
    starts = cache.lengths == 0

    def started() -> CoresetCache:
        return joining.chosen(
            starts, _prefill(cache, keys, values, lengths, asked, heads=heads), cache
        )

    cache = jax.lax.cond(jnp.any(starts), started, lambda: cache)
    others = jnp.where(starts, 0, ends)
    return jax.lax.cond(
        jnp.all(starts),
        lambda: cache,
        lambda: _append(cache, keys, values, others, asked, heads=heads),
    )


def _held(cache: CoresetCache) -> list[Part]:
    """All that is held, with its log-weights."""

    def exact(block: KVBlock, counts: Array) -> Part:
        inside = kv_block.numbers(block.keys.shape[2]) < counts[:, None]
        # Weights of the middle are absolute: a pair that is exact stands for itself.
        weights = jnp.where(inside, 0.0, -jnp.inf)[:, None]
        return *block, jnp.broadcast_to(weights, block.keys.shape[:3])

    parts = [exact(cache.recent, _filled(cache))]
    if cache.config.middle:
        pairs, outgrown = cache.middle.pairs, _outgrown(cache)[:, None, None]
        weights = jnp.where(outgrown, middles.log_weights(cache.middle), -jnp.inf)
        parts.append((pairs.keys, pairs.values, weights))
    if cache.config.sinks:
        parts.append(exact(cache.sinks, cache.lengths))
    return parts


def _outgrown(cache: CoresetCache) -> Bool[Array, " batch"]:
    """Whether sequences are longer than their sinks; others hold nothing else."""
    return cache.lengths > cache.config.sinks


def _left(cache: CoresetCache) -> Bool[Array, " batch"]:
    """Which rows were emptied by their length alone, and hold what must not be appended to."""
    return ~_outgrown(cache) & ((cache.filled > 0) | jnp.any(cache.middle.absorbed > 0, axis=1))


def _filled(cache: CoresetCache) -> Int[Array, " batch"]:
    """Number of valid recent pairs, whatever is left of a sequence that was there before."""
    return jnp.where(_outgrown(cache), cache.filled, 0)


def _counts(cache: CoresetCache, keys: Array, lengths: Array | None) -> Int[Array, " batch"]:
    """Number of valid ones among some pairs, sharded as the cache."""
    count = keys.shape[1] if lengths is None else jnp.asarray(lengths).astype(jnp.int32)
    return jnp.zeros_like(cache.lengths) + count
