"""Attention for Flax Linen models that decodes over a compressed cache."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from jaxtyping import Array, Float, Int

from coreset_jax._src.core.compressor import Compressor
from coreset_jax.nn import checks
from coreset_jax.nn.cache import CoresetCache
from coreset_jax.nn.config import MODULE_OPTIONS, CacheConfig
from coreset_jax.nn.placing import projected_sharding
from coreset_jax.nn.rotary import Rotating, rotate_behind
from coreset_jax.nn.scores import Capping, attend_with_sinks, check_takes_bias


class CoresetAttention(linen.Module):
    r"""``linen.MultiHeadDotProductAttention`` whose decoding cache does not grow.

    Parameters have the names and shapes of ``linen.MultiHeadDotProductAttention``: weights load
    across. Without ``decode`` it is that module (with fewer key-value heads and rotary positions
    if asked for). With ``decode`` the collection ``'cache'`` holds a
    :class:`~coreset_jax.nn.CoresetCache`. As ever in Linen, ``init`` creates it, for the batch of
    its inputs, and leaves it empty; ``apply`` with a mutable ``'cache'`` reads any number of
    tokens at a time, a prompt or a single one: each attends to the cache and to those before it
    in the call, and then joins the cache.

    A call with more than one token on an empty cache is a prompt and is compressed at once.
    Nothing is dropped out with ``decode``, and ``attention_fn`` is not called.

    Attributes:
      num_heads: query heads.
      dtype: dtype of the computation; ``None`` infers it from inputs and parameters.
      param_dtype: dtype of the parameters.
      qkv_features: features of all query heads together; ``None`` means those of the inputs.
      out_features: features of the outputs; ``None`` means those of the inputs.
      broadcast_dropout: whether batch and heads share what is dropped out.
      dropout_rate: share of the attention weights that is dropped out.
      deterministic: whether nothing is.
      precision: of the matrix products.
      kernel_init: initializer of kernels.
      out_kernel_init: the same of the output projection; ``None`` means ``kernel_init``.
      bias_init: initializer of biases.
      out_bias_init: the same of the output projection; ``None`` means ``bias_init``.
      use_bias: whether projections have biases.
      attention_fn: ``linen.dot_product_attention`` or a function of the same arguments.
      decode: whether to keep a cache.
      normalize_qk: whether queries and keys pass a layer norm each.
      num_kv_heads: key-value heads; ``None`` means ``num_heads``.
      rope_base: base of rotary positions; ``None`` for none.
      size, sinks, window, block_size, query_norm, soft_cap, compressor: the options of
        :class:`coreset_jax.nn.CacheConfig`; ``size`` must be given.
      max_length: longest prompt; ``None`` means the length of the inputs of ``init``. A prompt
        that is longer is refused.
      use_sink_logits: whether each query head has a learned logit in its denominator, the
        parameter ``sink_logits``; see :func:`coreset_jax.attention`.

    Raises:
      ValueError: on options that contradict each other, and when called as described there.

    >>> import jax, jax.numpy as jnp
    >>> from coreset_jax.nn.linen import CoresetAttention
    >>> module = CoresetAttention(
    ...     num_heads=4, num_kv_heads=2, size=96, window=16, block_size=16, decode=True
    ... )
    >>> variables = module.init(jax.random.key(0), jnp.ones((1, 4096, 32)))
    >>> prompt = jnp.ones((1, 1000, 32))
    >>> outputs, changed = module.apply(variables, prompt, mutable=["cache"])
    >>> outputs.shape, int(changed["cache"]["coreset"].lengths[0])
    ((1, 1000, 32), 1000)
    >>> outputs, changed = module.apply({**variables, **changed}, prompt[:, :1], mutable=["cache"])
    >>> outputs.shape, int(changed["cache"]["coreset"].lengths[0])
    ((1, 1, 32), 1001)
    """

    num_heads: int
    dtype: Any = None
    param_dtype: Any = jnp.float32
    qkv_features: int | None = None
    out_features: int | None = None
    broadcast_dropout: bool = True
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    precision: Any = None
    kernel_init: Callable[..., Array] = linen.linear.default_kernel_init
    out_kernel_init: Callable[..., Array] | None = None
    bias_init: Callable[..., Array] = linen.initializers.zeros_init()
    out_bias_init: Callable[..., Array] | None = None
    use_bias: bool = True
    attention_fn: Callable[..., Array] = linen.dot_product_attention
    decode: bool = False
    normalize_qk: bool = False
    num_kv_heads: int | None = None
    rope_base: float | None = None
    size: int = dataclasses.field(kw_only=True)
    sinks: int = CacheConfig.sinks
    window: int = CacheConfig.window
    block_size: int = CacheConfig.block_size
    query_norm: float | None = None
    compressor: Compressor | None = None
    max_length: int | None = None
    soft_cap: float | None = None
    use_sink_logits: bool = False

    @linen.compact
    def __call__(
        self,
        inputs_q: Float[Array, "*batch length features"],
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        lengths: Int[Array, " batch"] | None = None,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
        sow_weights: bool = False,
    ) -> Float[Array, "*batch length out_features"]:
        """Attention of the inputs; with ``decode``, to what the cache holds and to themselves.

        Args:
          inputs_q: inputs ``[batch, length, features]``.
          inputs_k: what keys are made of, ``None`` for ``inputs_q``; ``None`` with ``decode``.
          inputs_v: what values are made of, ``None`` for ``inputs_k``; ``None`` with ``decode``.
          lengths: with ``decode``, the number of valid inputs of each sequence ``[batch]``;
            ``None`` means all.
          mask: without ``decode``, boolean ``[batch, heads, length, length]``.
          deterministic: overrides the field.
          dropout_rng: a JAX random key; ``None`` takes one of the stream ``'dropout'``.
          sow_weights: without ``decode``, whether to sow the attention weights.

        Returns:
          Outputs ``[batch, length, out_features]``.

        Raises:
          ValueError: with ``decode``, if ``init`` was not called before, if the inputs do not fit
            the cache, or on a ``mask``; without it, on ``lengths``, or if there is an ``inputs_v``
            and no ``inputs_k``.
        """
        if self.decode:
            checks.check_decoding(inputs_q, inputs_k, inputs_v, mask)
        elif lengths is not None:
            raise ValueError("lengths go with decode; without it, use a mask.")
        if inputs_k is None and inputs_v is not None:
            raise ValueError("inputs_k must not be None where inputs_v is given.")
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        query, key, value = self._project(inputs_q, inputs_k, inputs_v)
        sink_logits = None
        if self.use_sink_logits:
            zeros, shape = linen.initializers.zeros_init(), (self.num_heads,)
            sink_logits = self.param("sink_logits", zeros, shape, self.param_dtype)
        if self.decode:
            heads = self._read(query, key, value, lengths, sink_logits)
        else:
            options = {"mask": mask, "deterministic": deterministic, "dropout_rng": dropout_rng}
            heads = self._attend(query, key, value, sink_logits, sow_weights, options)
        sharding = projected_sharding(heads)
        product = functools.partial(jax.lax.dot_general, out_sharding=sharding)
        return self._dense(
            self.out_features or inputs_q.shape[-1],
            dot_general=None if sharding is None else product,
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            name="out",
        )(heads)

    @property
    def _dense(self) -> Callable[..., Any]:
        """A dense layer with the options of this module."""
        names = ("dtype", "param_dtype", "kernel_init", "bias_init", "use_bias", "precision")
        options = {name: getattr(self, name) for name in names}
        return functools.partial(linen.DenseGeneral, **options)

    def _project(
        self, inputs_q: Array, inputs_k: Array, inputs_v: Array
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values ``[..., length, heads, head_dim]``."""
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        features = self.qkv_features or inputs_q.shape[-1]
        if features % self.num_heads:
            raise ValueError(
                f"qkv_features must be a multiple of num_heads {self.num_heads}, got {features}."
            )
        if kv_heads < 1 or self.num_heads % kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads {self.num_heads}, got {kv_heads}."
            )
        head_dim = features // self.num_heads
        checks.check_rope(self.rope_base, head_dim)
        query = self._dense((self.num_heads, head_dim), name="query")(inputs_q)
        key = self._dense((kv_heads, head_dim), name="key")(inputs_k)
        value = self._dense((kv_heads, head_dim), name="value")(inputs_v)
        if self.normalize_qk:
            norm = functools.partial(
                linen.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
            )
            query, key = norm(name="query_ln")(query), norm(name="key_ln")(key)
        return query, key, value

    def _attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        sink_logits: Array | None,
        sow_weights: bool,
        options: dict[str, Any],
    ) -> Array:
        """What the plain module does."""
        still = True
        if self.dropout_rate > 0:
            still = linen.merge_param("deterministic", self.deterministic, options["deterministic"])
            if not still and options["dropout_rng"] is None:
                options["dropout_rng"] = self.make_rng("dropout")
        attention_fn = self.attention_fn
        if self.soft_cap is not None:
            attention_fn = Capping(attention_fn, self.soft_cap)
        if self.rope_base is not None:
            attention_fn = Rotating(attention_fn, self.rope_base)
        names = ("dropout_rate", "broadcast_dropout", "dtype", "precision")
        options |= {name: getattr(self, name) for name in names} | {"deterministic": still}
        known = inspect.signature(attention_fn).parameters
        options = {name: option for name, option in options.items() if name in known}
        if sow_weights:
            options["module"] = self
        # Linen's attention knows no groups.
        group = self.num_heads // key.shape[-2]
        key, value = (
            array if group == 1 else jnp.repeat(array, group, axis=-2) for array in (key, value)
        )
        if sink_logits is None:
            return attention_fn(query, key, value, **options)
        check_takes_bias(attention_fn)
        return attend_with_sinks(attention_fn, sink_logits, query, key, value, **options)

    def _read(
        self,
        query: Array,
        key: Array,
        value: Array,
        lengths: Array | None,
        sink_logits: Array | None,
    ) -> Array:
        """Reads the cache and extends it; ``init`` makes an empty one."""
        if not self.has_variable("cache", "coreset") and not self.is_initializing():
            raise ValueError(
                "the cache is not initialized; call init with decode=True first, and hand its "
                "collection 'cache' to apply."
            )
        variable = self.variable("cache", "coreset", self._empty, key, value)
        cache = variable.value
        query, key = rotate_behind(cache.next_positions, query, key, self.rope_base)
        if self.is_initializing():
            return cache.attend(query, key, value, lengths, sink_logits)
        heads, variable.value = cache.read_and_extend(query, key, value, lengths, sink_logits)
        return heads

    def _empty(self, key: Array, value: Array) -> CoresetCache:
        checks.check_module_scale(self.compressor, key.shape[-1])
        longest = key.shape[1] if self.max_length is None else self.max_length
        options = {name: getattr(self, name) for name in MODULE_OPTIONS}
        config = CacheConfig(max_length=longest, **options)
        rng = self.make_rng("cache") if self.has_rng("cache") else jax.random.key(0)
        return CoresetCache.init(config, rng, key, value)
