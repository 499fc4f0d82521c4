"""A key-value cache of fixed size: sinks, a compressed middle, and a window of recent pairs.

The first pairs of a sequence and the newest ones are kept exactly. What leaves the window joins
the middle, a coreset of everything in between, whose weights enter attention as a bias on the
scores. Shapes never change, so a decoding step is traced once.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from coreset_jax._src.stream.halvings import check_heads
from coreset_jax._src.stream.summary import Summary
from coreset_jax.nn import checks, steps
from coreset_jax.nn.config import CacheConfig
from coreset_jax.nn.kv_block import KVBlock
from coreset_jax.nn.prefix import LayerPrefix


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

    The softmax scale is ``config.scale``, for compressing and for reading alike: methods take none.

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
      prefix: compressed documents that the sequences begin with, or ``None``; ``lengths`` are those
        of what came behind them.
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
    prefix: LayerPrefix | None
    config: CacheConfig = struct.field(pytree_node=False)

    @classmethod
    def init(
        cls,
        config: CacheConfig,
        rng: Array,
        keys: Float[Array, "batch length kv_heads head_dim"],
        values: Float[Array, "batch length kv_heads value_dim"],
        prefix: LayerPrefix | None = None,
    ) -> "CoresetCache":
        """An empty cache for keys and values like these.

        Args:
          config: the options.
          rng: a JAX random key.
          keys: arrays like those to come, ``[batch, any, kv_heads, head_dim]``; shape, dtype and
            sharding are taken, contents are not.
          values: the same, ``[batch, any, kv_heads, value_dim]``.
          prefix: what the sequences begin with (:func:`coreset_jax.nn.of_layer`).

        Raises:
          ValueError: if keys and values do not fit each other or the prefix, options of the
            compressor fit no head, or there are more than 256 kv heads of at most as many places.
        """
        checks.check_pairs(keys, values)
        checks.check_example(keys)
        check_heads(config.compressor, keys.shape[2:3], config.block_size, keys.shape[3])
        words = jnp.broadcast_to(jax.random.bits(rng, (1, 2), jnp.uint32), (keys.shape[0], 2))
        arrays = [field.name for field in dataclasses.fields(cls) if field.name != "config"]
        nothing = cls(**dict.fromkeys(arrays), config=config)  # type: ignore[arg-type]
        cache: CoresetCache = steps.empty(nothing, keys[:, :1], values[:, :1], words)
        if prefix is None:
            return cache
        checks.check_prefix(prefix, cache.recent, config.settings(keys.shape[3]).scale)
        return dataclasses.replace(cache, prefix=prefix)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the cache."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def next_positions(self) -> Int[Array, " batch"]:
        """Where the next token of each sequence stands: behind its prefix and all that came."""
        return self.lengths if self.prefix is None else self.lengths + self.prefix.lengths

    @property
    def positions(self) -> Int[Array, "batch kv_heads size"]:
        """Places of the pairs held, behind the prefix, -1 in empty slots: sinks, middle, recent."""
        found: Array = steps.positions(self)
        return found

    def reset(self, rows: Bool[Array, " batch"]) -> "CoresetCache":
        """A cache with room for new sequences: some rows are empty, the others as they were.

        Behind a prefix a new sequence begins with the document of its row.

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
        return steps.reset(self, rows)

    def reordered(self, order: Int[Array, " beams"]) -> "CoresetCache":
        """A cache of some sequences of this one, each as often as it is named.

        A prefix that all sequences share is not repeated, as it would be by
        ``jax.tree.map(lambda leaf: leaf[order], cache)``.

        Args:
          order: rows ``[beams]``, integers; may be traced.

        Raises:
          ValueError: if ``order`` are no integers, or not of rank 1, or name no row.

        >>> import jax, jax.numpy as jnp
        >>> from coreset_jax.nn import CacheConfig, CoresetCache
        >>> keys, values = jax.random.normal(jax.random.key(0), (2, 3, 20, 2, 8))
        >>> cache = CoresetCache.init(CacheConfig(size=196), jax.random.key(1), keys, values)
        >>> cache.reordered(jnp.array([2, 2, 0, 1])).lengths.shape
        (4,)
        """
        checks.check_order(order, self.lengths.shape[0])
        return steps.reordered(self, jnp.asarray(order))

    def rolled_back(self, lengths: Int[Array, " batch"]) -> "CoresetCache":
        """The cache without its newest pairs, as speculative decoding wants it.

        Only pairs that are held exactly can be taken back, the ``window`` newest ones at least. To
        go back further, keep the cache of then: caches are values, and share their arrays. What
        comes next is as if they had never been there, bit by bit, unless older pairs have left the
        window because of them: those stay in the middle.

        Args:
          lengths: what is to be left of each sequence ``[batch]``, behind the prefix; may be
            traced. A sequence that is not longer stays as it is.

        Returns:
          The cache. Attention of a sequence that cannot go back so far is NaN from then on.

        Raises:
          ValueError: if ``lengths`` are not integers, one a sequence; or are known, and one of them
            cannot be reached.

        >>> import jax, jax.numpy as jnp
        >>> from coreset_jax.nn import CacheConfig, CoresetCache
        >>> keys, values = jax.random.normal(jax.random.key(0), (2, 3, 20, 2, 8))
        >>> cache = CoresetCache.init(CacheConfig(size=196), jax.random.key(1), keys, values)
        >>> cache.append(keys, values).rolled_back(jnp.array([5, 20, 0])).lengths.tolist()
        [5, 20, 0]
        """
        checks.check_back(lengths, self.lengths, steps.shortest(self))
        return steps.rolled_back(self, jnp.asarray(lengths))

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
        return steps.prefill(self, keys, values, lengths, queries)

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
        return steps.append(self, keys, values, lengths, None)

    def attend(
        self,
        queries: Float[Array, "batch length heads head_dim"],
        keys: Float[Array, "batch length kv_heads head_dim"] | None = None,
        values: Float[Array, "batch length kv_heads value_dim"] | None = None,
        lengths: Int[Array, " batch"] | None = None,
        sink_logits: Float[Array, " heads"] | None = None,
    ) -> Float[Array, "batch length heads value_dim"]:
        """Attention over the cache, and causally over pairs that are about to be appended.

        Args:
          queries: queries, positions applied ``[batch, length, heads, head_dim]``; head ``h``
            reads key-value head ``h // (heads // kv_heads)``.
          keys: the keys that come with the queries, one each, or ``None``. Query ``i`` reads the
            cache and the first ``i + 1`` of these.
          values: their values.
          lengths: number of valid ones among them ``[batch]``; outputs behind that mean nothing.
          sink_logits: learned logits of the denominator, one a query head ``[heads]``, see
            :func:`coreset_jax.attention`; ``None`` for none.

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
        checks.check_sink_logits(sink_logits, queries)
        if sink_logits is not None:
            sink_logits = jnp.broadcast_to(
                jnp.asarray(sink_logits)[None, None, :, None],
                (queries.shape[0], 1, queries.shape[2], 1),
            )
        return steps.attend(self, queries, keys, values, lengths, sink_logits)

    def read_and_extend(
        self,
        queries: Float[Array, "batch length heads head_dim"],
        keys: Float[Array, "batch length kv_heads head_dim"],
        values: Float[Array, "batch length kv_heads value_dim"],
        lengths: Int[Array, " batch"] | None = None,
        sink_logits: Float[Array, " heads"] | None = None,
    ) -> tuple[Float[Array, "batch length heads value_dim"], "CoresetCache"]:
        """What an attention layer does with new tokens: they attend, and join the cache.

        More than one token for a sequence of which the cache holds nothing are a prompt, and
        compressed at once.

        Args:
          queries: as for :meth:`attend`.
          keys: as for :meth:`attend`.
          values: as for :meth:`attend`.
          lengths: as for :meth:`attend`.
          sink_logits: as for :meth:`attend`.

        Returns:
          The outputs, and the cache behind these tokens.

        Raises:
          ValueError: as for :meth:`attend`, and if more tokens come at once than ``max_length``.
        """
        outputs = self.attend(queries, keys, values, lengths, sink_logits)
        self._check_prompt(keys)
        if keys.shape[1] == 1:
            return outputs, steps.append(self, keys, values, lengths, None)
        return outputs, steps.extend(self, queries, keys, values, lengths)

    def _check_prompt(self, keys: Array) -> None:
        limit = self.config.max_length
        if limit is not None and keys.shape[1] > limit:
            raise ValueError(
                f"the prompt must not be longer than max_length {limit}; got keys {keys.shape}."
            )
