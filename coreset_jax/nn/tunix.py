"""Gives the attention layers of other people's NNX models a compressed cache.

For models built like those of ``google-tunix`` (Qwen 3, Llama 3, Gemma 3): a layer calls
``attention(inputs, positions, layer_cache, mask)`` and hands on the cache that comes back. That
cache is a pytree of the layer's own, so a :class:`~coreset_jax.nn.CoresetCache` travels in it:
the model keeps no state, and loops, samplers and beam searches written for it go on working.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src import checks
from coreset_jax._src.attention import attention as softmax_attention
from coreset_jax.nn.cache import CoresetCache
from coreset_jax.nn.config import CacheConfig
from coreset_jax.nn.grouped import by_head
from coreset_jax.nn.tunix_parts import (
    Parts,
    is_local,
    parts_of,
    project,
    read_mask,
    rotary,
    scale_of,
)

LayerCache = dict[str, Any]


def wrap(attention: nnx.Module, **options: Any) -> Any:
    """The same attention, with a cache of fixed size.

    The result is of a subclass of the attention's own class and has the same parts under the same
    names: no parameter is copied or renamed. It differs only where it is called with a cache:

    - ``cache`` holds an ``'end_index'`` ``[batch]``, the tokens that came before, and under
      ``'coreset'`` the :class:`~coreset_jax.nn.CoresetCache`. Make one with
      ``wrapped.init_cache(batch_size)`` or, for all layers, :func:`init_cache`. Without
      ``'coreset'`` nothing has been read yet; ``'k'`` and ``'v'`` are ignored and not handed on.
    - ``attn_mask`` is ``None`` for causal attention without padding, or boolean
      ``[batch, tokens, slots]``. Of ``slots == tokens``, they are the tokens of this call. Of more,
      they are those of the whole sequence, of which this call's start at ``end_index``, as in
      the models' own caches. A token that may not see itself is padding, on any side: it takes no
      place in the cache. Apart from that the mask must be causal: one that hides a token or
      shows a later one is refused, by NaN outputs where it is traced.
    - Without a cache (``None``), the attention is what it was.

    Args:
      attention: attention with projections, an output projection and perhaps norms named as in
        tunix, defined in a module with the function ``apply_rope``.
      **options: of :class:`coreset_jax.nn.CacheConfig`, all but ``scale``, which is that of the
        attention; ``size`` must be given.

    Returns:
      The attention with a compressed cache. Its outputs have the shape and dtype of the inputs.

    Raises:
      ValueError: if the attention is wrapped already, is a sliding-window layer, lacks a part, or
        has one that the wrapper would leave out, and on options that contradict each other.

    Example::

        for layer in model.layers:
            layer.attn = wrap(layer.attn, size=1024)
        cache = init_cache(model, batch_size=1)
        logits, cache = model(tokens, positions, cache, None)
    """
    if isinstance(attention, _CoresetAttention):
        raise ValueError("attention is wrapped already.")
    if is_local(attention):
        raise ValueError(
            "attention must be global; a sliding-window layer finds its window by the slots of "
            "its own cache, which is short already."
        )
    parts = parts_of(attention)
    config = CacheConfig(scale=scale_of(attention), **options)
    wrapped = _subclass(type(attention))(attention, config, parts)
    _check_likeness(attention, wrapped)
    return wrapped


def wrap_model(model: Any, layers: Iterable[int] | None = None, **options: Any) -> None:
    """Wraps the attention of a model's layers, in place.

    ``model.init_cache(batch_size, cache_size, dtype)`` then makes caches as :func:`init_cache`
    does; tunix's ``Sampler`` calls it.

    Args:
      model: a model whose ``layers`` have an attention ``attn``.
      layers: numbers of the layers to wrap; ``None`` means all but the sliding-window layers.
      **options: of :func:`wrap`.

    Raises:
      ValueError: as :func:`wrap`, if the model has no such layers, or a number is out of range.
        The model is then left as it was.
    """
    attentions = _attentions(model)
    if layers is None:
        numbers = [i for i, attention in enumerate(attentions) if not is_local(attention)]
    else:
        numbers = list(layers)
        if any(number not in range(len(attentions)) for number in numbers):
            raise ValueError(f"layers must lie in 0..{len(attentions) - 1}, got {numbers}.")
    if not numbers:
        raise ValueError("the model has no layer to wrap; sliding-window layers stay as they are.")
    wrapped = {number: wrap(attentions[number], **options) for number in numbers}
    for number, attention in wrapped.items():
        model.layers[number].attn = attention
    model.init_cache = _ModelCache(tuple(map(_LayerShape.of, _attentions(model))))


def init_cache(
    model: Any,
    batch_size: int,
    cache_size: int = 1,
    dtype: Any = None,
    rng: Array | None = None,
) -> dict[str, LayerCache]:
    """Empty caches of all layers of a model, ``{'layer_0': ..., 'layer_1': ...}``.

    Args:
      model: a model of which some layers have been wrapped.
      batch_size: sequences.
      cache_size: slots of the layers that have not been wrapped, the longest sequence to be read.
        Wrapped layers have the slots that they were given.
      dtype: of keys and values; ``None`` for the one that each layer computes in.
      rng: a JAX random key for compressors that want one; ``jax.random.key(0)`` if ``None``.

    Returns:
      A cache for the model's call. Wrapped layers hold a ``'coreset'``, the rest ``'k'`` and
      ``'v'`` ``[batch_size, cache_size, kv_heads, head_dim]``; all arrays start with the batch.

    Raises:
      ValueError: if no layer has been wrapped, or a size is below one.
    """
    shapes = tuple(map(_LayerShape.of, _attentions(model)))
    if all(shape.config is None for shape in shapes):
        raise ValueError("no layer of the model has been wrapped.")
    return _ModelCache(shapes)(batch_size, cache_size, dtype, rng)


@dataclasses.dataclass(frozen=True)
class _LayerShape:
    """What the cache of a layer looks like."""

    config: CacheConfig | None
    kv_heads: int
    head_dim: int
    dtype: Any

    @classmethod
    def of(cls, attention: Any) -> "_LayerShape":
        """The shape of an attention's cache, wrapped or not."""
        projection = getattr(attention, parts_of(attention).projections[-1])
        dtype = getattr(projection, "dtype", None) or projection.w.dtype
        config = attention.coreset_config if isinstance(attention, _CoresetAttention) else None
        return cls(config, attention.num_kv_heads, attention.head_dim, jnp.dtype(dtype))

    def empty(self, batch_size: int, slots: int, dtype: Any, rng: Array | None) -> LayerCache:
        """An empty cache."""
        rng = jax.random.key(0) if rng is None else rng
        count = 1 if self.config is not None else slots
        shape = (batch_size, count, self.kv_heads, self.head_dim)
        keys, values = (jnp.zeros(shape, dtype or self.dtype) for _ in range(2))
        end_index = jnp.zeros(batch_size, jnp.int32)
        if self.config is None:
            return {"k": keys, "v": values, "end_index": end_index}
        held = CoresetCache.init(self.config, rng, keys, values)
        # Loops that donate their cache need every array in a buffer of its own.
        return {"coreset": jax.tree.map(jnp.copy, held), "end_index": end_index}


@dataclasses.dataclass(frozen=True)
class _ModelCache:
    """Makes the caches of a model; static, so that it may be an attribute of an NNX module."""

    layers: tuple[_LayerShape, ...]

    def __call__(
        self, batch_size: int, cache_size: int = 1, dtype: Any = None, rng: Array | None = None
    ) -> dict[str, LayerCache]:
        """Empty caches, see :func:`init_cache`."""
        checks.check_count("batch_size", batch_size)
        checks.check_count("cache_size", cache_size)
        rng = jax.random.key(0) if rng is None else rng
        return {
            f"layer_{i}": layer.empty(batch_size, cache_size, dtype, jax.random.fold_in(rng, i))
            for i, layer in enumerate(self.layers)
        }


class _CoresetAttention(nnx.Module):
    """What a wrapped attention does; :func:`_subclass` puts it before the attention's class."""

    def __init__(self, attention: Any, config: CacheConfig, parts: Parts) -> None:
        # A new module has the bookkeeping of NNX already; the rest is the attention's.
        for name, value in vars(attention).items():
            if name not in vars(self):
                setattr(self, name, value)
        self.coreset_config = config
        self.coreset_parts = parts
        self.coreset_rotate = rotary(attention)

    def init_cache(
        self, batch_size: int, dtype: Any = None, rng: Array | None = None
    ) -> LayerCache:
        """An empty cache of this layer; arguments as for :func:`init_cache`."""
        checks.check_count("batch_size", batch_size)
        return _LayerShape.of(self).empty(batch_size, 1, dtype, rng)

    def __call__(
        self,
        inputs: Float[Array, "batch tokens features"],
        positions: Int[Array, "batch tokens"],
        cache: Mapping[str, Any] | None,
        attn_mask: Bool[Array, "batch tokens slots"] | None,
        segment_ids: Array | None = None,
    ) -> tuple[LayerCache | None, Float[Array, "batch tokens features"]]:
        """Attention to what the cache holds and, causally, to the inputs; see :func:`wrap`."""
        if cache is None:
            plain: Any = super()
            options = {} if segment_ids is None else {"segment_ids": segment_ids}
            return plain.__call__(inputs, positions, None, attn_mask, **options)
        if segment_ids is not None:
            raise ValueError("segment_ids must be None with a cache; use attn_mask for padding.")
        if not isinstance(cache, Mapping) or "end_index" not in cache:
            raise ValueError("cache must be a layer's cache, as init_cache makes it.")
        queries, keys, values = project(self, inputs, positions)
        held = cache.get("coreset")
        if held is None:
            held = CoresetCache.init(self.coreset_config, jax.random.key(0), keys, values)
        end_index = cache["end_index"]
        real, supported = read_mask(attn_mask, inputs.shape[:2], end_index, held.lengths)
        outputs, held = _attend(held, queries, keys, values, real)
        outputs = jnp.where(supported[:, None, None, None], outputs, jnp.nan)
        new_cache = {"coreset": held, "end_index": end_index + inputs.shape[1]}
        return new_cache, getattr(self, self.coreset_parts.output)(outputs)


@functools.cache
def _subclass(original: type) -> Any:
    """The class of an attention, with the cache of this module."""
    documentation = {"__doc__": f"{original.__name__} with a compressed cache."}
    return type(f"Coreset{original.__name__}", (_CoresetAttention, original), documentation)


def _attentions(model: Any) -> list[Any]:
    attentions = [getattr(layer, "attn", None) for layer in getattr(model, "layers", ())]
    if not attentions or None in attentions:
        raise ValueError(
            f"model must have layers, each with an attention attn; got {type(model).__name__}."
        )
    return attentions


def _attend(
    held: CoresetCache, queries: Array, keys: Array, values: Array, real: Array | None
) -> tuple[Array, CoresetCache]:
    """Outputs in the dtype of the queries, and the cache behind the real ones of these tokens."""
    dtype = queries.dtype
    keys, values = (array.astype(held.recent.keys.dtype) for array in (keys, values))
    if real is None:
        outputs, held = held.read_and_extend(queries, keys, values)
        return outputs.astype(dtype), held
    # The cache wants padding at the end.
    order = jnp.argsort(~real, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)

    def ordered(array: Array, order: Array) -> Array:
        return jnp.take_along_axis(array, order[:, :, None, None], axis=1)

    if real.shape[1] > 1:
        queries, keys, values = (ordered(array, order) for array in (queries, keys, values))
    lengths = jnp.sum(real, axis=1, dtype=jnp.int32)
    outputs, held = held.read_and_extend(queries, keys, values, lengths)
    return ordered(outputs, back).astype(dtype), held


def _check_likeness(attention: Any, wrapped: Any) -> None:
    """Raises ``ValueError`` unless both compute the same keys, values and outputs of tokens.

    The parts are known by their names only; what is done with them may differ between versions.
    """
    leaves = jax.tree.leaves(nnx.state(attention))
    if not all(isinstance(leaf, jax.Array) and not checks.is_traced(leaf) for leaf in leaves):
        return
    shape, count, positions = _LayerShape.of(wrapped), 3, jnp.array([[0, 7, 1000]])
    output = getattr(attention, wrapped.coreset_parts.output)
    inputs = jax.random.normal(jax.random.key(0), (1, count, output.shape[-1])).astype(shape.dtype)
    queries, keys, values = project(wrapped, inputs, positions)
    cache = dataclasses.replace(shape, config=None).empty(1, count, values.dtype, None)
    # One at a time: whole prompts may take a kernel that is not for this platform.
    for i in range(count):
        visible = (jnp.arange(count) <= i)[None, None]
        cache, expected = attention(inputs[:, i : i + 1], positions[:, i : i + 1], cache, visible)
    group = queries.shape[2] // keys.shape[2]
    rows = [by_head(jnp.repeat(array, group, axis=2)) for array in (keys, values)]
    found = softmax_attention(by_head(queries[:, -1:]), *rows, scale=wrapped.coreset_config.scale)
    found = output(by_head(found).astype(queries.dtype))
    # On accelerators, float32 products may be rounded to bfloat16.
    tolerance = max(0.05, 16 * float(jnp.finfo(shape.dtype).eps))
    for one, other in ((keys, cache["k"]), (values, cache["v"]), (found, expected)):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        if float(jnp.max(jnp.abs(one - other))) > tolerance * float(jnp.max(jnp.abs(other))):
            raise ValueError(
                f"attention {type(attention).__name__} does more than the wrapper knows of."
            )
