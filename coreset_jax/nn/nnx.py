"""Attention for Flax NNX models that decodes over a compressed cache."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from coreset_jax.nn import checks
from coreset_jax.nn.cache import CoresetCache
from coreset_jax.nn.config import MODULE_OPTIONS, CacheConfig
from coreset_jax.nn.placing import projected_sharding
from coreset_jax.nn.prefix import LayerPrefix
from coreset_jax.nn.rotary import Rotating, rotate_behind
from coreset_jax.nn.scores import Capping, attend_with_sinks, check_takes_bias


class SinkAttention(nnx.Module):
    """An ``attention_fn`` of ``nnx.MultiHeadAttention`` with learned sink logits.

    Args:
      attention_fn: a function of query, key and value and of a bias.
      num_heads: query heads.
      param_dtype: dtype of the logits, which are zero at first.

    Attributes:
      sink_logits: the logits ``[num_heads]``, see :func:`coreset_jax.attention`.

    Raises:
      ValueError: if the function takes no bias.
    """

    def __init__(
        self, attention_fn: Callable[..., Array], num_heads: int, param_dtype: Any = jnp.float32
    ) -> None:
        check_takes_bias(attention_fn)
        self.attention_fn = attention_fn
        self.sink_logits = nnx.Param(jnp.zeros(num_heads, param_dtype))

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        """What ``attention_fn`` returns with the logits in its denominators."""
        logits = self.sink_logits.get_value()
        return attend_with_sinks(self.attention_fn, logits, query, key, value, **options)


class CoresetAttention(nnx.MultiHeadAttention):
    r"""``nnx.MultiHeadAttention`` whose decoding cache does not grow with the sequence.

    Parameters have the names and shapes of ``nnx.MultiHeadAttention``: weights load across.
    Without ``decode`` it is that module (with rotary positions if asked for). With ``decode`` the
    module reads any number of tokens at a time, a prompt or a single one: each attends to the
    cache and to those before it in the call, and then joins the cache.

    A call with more than one token on an empty cache is a prompt and is compressed at once.
    Nothing is dropped out with ``decode``, and ``attention_fn`` is not called.

    Args:
      num_heads: query heads.
      in_features: width of the inputs.
      *arguments: further arguments of ``nnx.MultiHeadAttention``.
      rope_base: base of rotary positions; ``None`` for none.
      use_sink_logits: whether each query head has a learned logit in its denominator, which is
        ``attention_fn.sink_logits`` of the module; see :func:`coreset_jax.attention`.
      rngs: an nnx random stream.
      **options: ``size``, which must be given, and ``sinks``, ``window``, ``block_size``,
        ``query_norm``, ``soft_cap`` and ``compressor`` of :class:`coreset_jax.nn.CacheConfig`;
        and further options of ``nnx.MultiHeadAttention``.

    Raises:
      ValueError: on options that contradict each other, and when called as described there.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from coreset_jax.nn.nnx import CoresetAttention
    >>> module = CoresetAttention(
    ...     4, 32, num_kv_heads=2, size=96, window=16, block_size=16, rope_base=1e4,
    ...     rngs=nnx.Rngs(0),
    ... )
    >>> module.init_cache((1, 4096, 32))
    >>> module(jnp.ones((1, 1000, 32)), decode=True).shape
    (1, 1000, 32)
    >>> module(jnp.ones((1, 1, 32)), decode=True).shape
    (1, 1, 32)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *arguments: Any,
        rope_base: float | None = None,
        use_sink_logits: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        held = {name: options.pop(name) for name in MODULE_OPTIONS if name in options}
        self.cache_config = CacheConfig(**held)
        super().__init__(num_heads, in_features, *arguments, rngs=rngs, **options)
        checks.check_rope(rope_base, self.head_dim)
        checks.check_module_scale(self.cache_config.compressor, self.head_dim)
        if self.cache_config.soft_cap is not None:
            self.attention_fn = Capping(self.attention_fn, self.cache_config.soft_cap)
        if rope_base is not None:
            self.attention_fn = Rotating(self.attention_fn, rope_base)
        if use_sink_logits:
            attention_fn = SinkAttention(self.attention_fn, num_heads, self.param_dtype)
            self.attention_fn = nnx.data(attention_fn)
        self.rope_base = rope_base
        self.cache: nnx.Cache[CoresetCache] | None = nnx.data(None)

    def init_cache(
        self,
        input_shape: Sequence[int],
        dtype: Any = jnp.float32,
        rng: Array | None = None,
        prefix: LayerPrefix | None = None,
    ) -> None:
        """Makes an empty cache.

        Args:
          input_shape: ``(batch, longest prompt, in_features)``. A prompt that is longer is
            refused; the cache itself has ``size`` slots a head.
          dtype: of the keys and values that the module computes.
          rng: a JAX random key for compressors that want one; ``jax.random.key(0)`` if ``None``.
          prefix: the documents that sequences begin with (:func:`coreset_jax.nn.of_layer`). The
            tokens of later calls follow them.

        Raises:
          ValueError: if ``input_shape`` or the prefix do not fit the module.
        """
        if len(input_shape) != 3 or input_shape[-1] != self.in_features:
            raise ValueError(
                f"input_shape must be (batch, length, {self.in_features}), got {input_shape}."
            )
        batch, length, _ = input_shape
        config = self.cache_config.replace(max_length=length)
        like = jnp.zeros((batch, 1, self.num_kv_heads, self.head_dim), dtype)
        rng = jax.random.key(0) if rng is None else rng
        self.cache = nnx.Cache(CoresetCache.init(config, rng, like, like, prefix))

    def __call__(
        self,
        inputs_q: Float[Array, "batch length in_features"],
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        lengths: Int[Array, " batch"] | None = None,
        decode: bool | None = None,
        **options: Any,
    ) -> Float[Array, "batch length out_features"]:
        """Attention of the inputs to what the cache holds and, causally, to themselves.

        Args:
          inputs_q: inputs ``[batch, length, in_features]``.
          inputs_k: ``None`` with ``decode``: attention is of the inputs to themselves.
          inputs_v: the same.
          lengths: with ``decode``, the number of valid inputs of each sequence ``[batch]``;
            ``None`` means all.
          decode: whether to read and write the cache; ``None`` for the constructor's, and where
            that has none, ``False``.
          **options: of ``nnx.MultiHeadAttention``; with ``decode``, ``out_sharding``,
            ``qkv_sharding`` and those that do not matter there.

        Returns:
          Outputs ``[batch, length, out_features]``.

        Raises:
          ValueError: with ``decode``, if :meth:`init_cache` was not called before, if the inputs
            do not fit the cache, or on a ``mask``; without it, on ``lengths``.
        """
        decode = self.decode if decode is None else decode
        if not decode:
            if lengths is not None:
                raise ValueError("lengths go with decode; without it, use a mask.")
            return super().__call__(inputs_q, inputs_k, inputs_v, decode=False, **options)
        checks.check_decoding(inputs_q, inputs_k, inputs_v, options.get("mask"))
        if self.cache is None:
            raise ValueError("the cache is not initialized; call init_cache first.")
        if inputs_q.shape[-1] != self.in_features:
            raise ValueError(
                f"inputs_q must be [batch, length, {self.in_features}], got {inputs_q.shape}."
            )
        sharding = options.get("qkv_sharding")
        query, key, value = (
            projection(inputs_q, out_sharding=sharding)
            for projection in (self.query, self.key, self.value)
        )
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        cache = self.cache.get_value()
        query, key = rotate_behind(cache.next_positions, query, key, self.rope_base)
        sink_logits = None
        if isinstance(self.attention_fn, SinkAttention):
            sink_logits = self.attention_fn.sink_logits.get_value()
        heads, cache = cache.read_and_extend(query, key, value, lengths, sink_logits)
        self.cache.set_value(cache)
        sharding = options.get("out_sharding")
        return self.out(heads, out_sharding=sharding or projected_sharding(heads))
