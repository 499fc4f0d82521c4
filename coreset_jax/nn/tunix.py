"""Gives the attention layers of other people's NNX models a compressed cache.

For models built like those of ``google-tunix`` (Qwen 2 and 3, Llama 3, Gemma 1 to 4): a layer calls
``attention(inputs, positions, layer_cache, mask)`` and hands on the cache that comes back. That
cache is a pytree of the layer's own, so a :class:`~coreset_jax.nn.CoresetCache` travels in it:
the model keeps no state, and loops, samplers and beam searches written for it go on working.
"""

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src import checks
from coreset_jax.nn.cache import CoresetCache
from coreset_jax.nn.config import CacheConfig
from coreset_jax.nn.tunix_caches import (
    LayerCache,
    LayerShape,
    ModelCache,
    attentions_of,
    origins_of,
)
from coreset_jax.nn.tunix_likeness import check_likeness
from coreset_jax.nn.tunix_parts import (
    Parts,
    is_local,
    parts_of,
    project,
    read_mask,
    rotary,
    scale_of,
    soft_cap_of,
)
from coreset_jax.prefixes import Prefix


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

    Arguments are those of the attention. Where they hold sines and cosines in place of positions
    (Qwen 2), so does the call. Where they hold the cache of another layer (Gemma 4), that layer
    must be wrapped as well, and its coreset is read.

    Args:
      attention: attention with projections, an output projection and perhaps norms, biases and a
        soft cap named as in tunix, defined in a module with the function that rotates.
      **options: of :class:`coreset_jax.nn.CacheConfig`, all but ``scale`` and ``soft_cap``, which
        are those of the attention; ``size`` must be given.

    Returns:
      The attention with a compressed cache. Its outputs have the shape and dtype of the inputs.

    Raises:
      ValueError: if the attention is wrapped already, is a sliding-window layer or latent, lacks
        a part or has one that the wrapper would leave out, or if it computes something else than
        the wrapper, at scores of any size; and on options that contradict each other.

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
    scale, soft_cap = scale_of(attention), soft_cap_of(attention)
    config = CacheConfig(scale=scale, soft_cap=soft_cap, **options)
    wrapped = _subclass(type(attention))(attention, config, parts)
    check_likeness(attention, wrapped)
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
      ValueError: as :func:`wrap`, if the model has no such layers, a number is out of range, or
        of layers that share a cache only some are named. The model is then left as it was.
    """
    attentions = attentions_of(model)
    if layers is None:
        numbers = [i for i, attention in enumerate(attentions) if not is_local(attention)]
    else:
        numbers = list(layers)
        if any(number not in range(len(attentions)) for number in numbers):
            raise ValueError(f"layers must lie in 0..{len(attentions) - 1}, got {numbers}.")
    if not numbers:
        raise ValueError("the model has no layer to wrap; sliding-window layers stay as they are.")
    for number, origin in enumerate(origins_of(model)):
        if (number in numbers) != (origin in numbers):
            raise ValueError(
                f"layers must hold both or neither of {origin} and {number}, which reads the "
                f"cache of {origin}; got {numbers}."
            )
    wrapped = {number: wrap(attentions[number], **options) for number in numbers}
    for number, attention in wrapped.items():
        model.layers[number].attn = attention
    model.init_cache = ModelCache.of(model)


def init_cache(
    model: Any,
    batch_size: int,
    cache_size: int = 1,
    dtype: Any = None,
    rng: Array | None = None,
    prefix: Prefix | Sequence[Prefix] | None = None,
) -> dict[str, LayerCache]:
    """Empty caches of all layers of a model, ``{'layer_0': ..., 'layer_1': ...}``.

    Args:
      model: a model of which some layers have been wrapped.
      batch_size: sequences.
      cache_size: slots of the layers that have not been wrapped, the longest sequence to be read.
        Wrapped layers have the slots that they were given.
      dtype: of keys and values; ``None`` for the one that each layer computes in.
      rng: a JAX random key for compressors that want one; ``jax.random.key(0)`` if ``None``.
      prefix: the document that all sequences begin with, or one for each of them. Positions that
        the model is called with are counted from behind it.

    Returns:
      A cache for the model's call. Wrapped layers hold a ``'coreset'``, the rest ``'k'`` and
      ``'v'`` ``[batch_size, cache_size, kv_heads, head_dim]``; all arrays start with the batch.

    Raises:
      ValueError: if no layer has been wrapped, or a size is below one; with a prefix, if it does
        not fit the model, or if not all layers have been wrapped.
    """
    if not any(isinstance(each, _CoresetAttention) for each in attentions_of(model)):
        raise ValueError("no layer of the model has been wrapped.")
    return ModelCache.of(model)(batch_size, cache_size, dtype, rng, prefix)


def open_prefix(model: Any, prefix: Prefix | Sequence[Prefix] | None) -> None:
    """Lets all caches that ``model.init_cache`` makes begin behind a document, in place.

    That is what tunix's ``Sampler`` calls: what it generates is then about the document. A sampler
    holds the model as it was when it was made: make one for each document, behind this.

    Args:
      model: a model all of whose layers have been wrapped.
      prefix: as for :func:`init_cache`; ``None`` for caches that begin with nothing.

    Raises:
      ValueError: if the prefix does not fit the model, or some layers have not been wrapped.
    """
    documents = [prefix] if prefix is None or isinstance(prefix, Prefix) else prefix
    init_cache(model, len(documents), prefix=prefix)
    model.init_cache = functools.partial(ModelCache.of(model), prefix=prefix)


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
        return LayerShape.of(self).empty(batch_size, 1, dtype, rng)

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
        _check_segments(segment_ids)
        return self._read(project(self, inputs, _behind(cache, positions)), cache, attn_mask)

    def _read(
        self,
        projected: tuple[Array, Array, Array],
        cache: Mapping[str, Any],
        attn_mask: Array | None,
    ) -> tuple[LayerCache, Array]:
        """The cache behind some tokens, and their outputs."""
        if not isinstance(cache, Mapping) or "end_index" not in cache:
            raise ValueError("cache must be a layer's cache, as init_cache makes it.")
        queries, keys, values = projected
        held = cache.get("coreset")
        if held is None:
            held = CoresetCache.init(self.coreset_config, jax.random.key(0), keys, values)
        end_index = cache["end_index"]
        real, supported = read_mask(attn_mask, queries.shape[:2], end_index, held.lengths)
        outputs, held = _attend(held, queries, keys, values, real)
        outputs = jnp.where(supported[:, None, None, None], outputs, jnp.nan)
        new_cache = {"coreset": held, "end_index": end_index + queries.shape[1]}
        return new_cache, getattr(self, self.coreset_parts.output)(outputs)


class _AngleAttention(_CoresetAttention):
    """The same for attentions that are told sines and cosines, as in Qwen 2."""

    def __call__(  # type: ignore[override]
        self,
        inputs: Float[Array, "batch tokens features"],
        cache: Mapping[str, Any] | None,
        attn_mask: Bool[Array, "batch tokens slots"] | None,
        sin: Float[Array, "batch tokens half"],
        cos: Float[Array, "batch tokens half"],
        segment_ids: Array | None = None,
    ) -> tuple[LayerCache | None, Float[Array, "batch tokens features"]]:
        """Attention to what the cache holds and, causally, to the inputs; see :func:`wrap`."""
        if cache is None:
            plain: Any = super(_CoresetAttention, self)
            return plain.__call__(inputs, None, attn_mask, sin, cos, segment_ids)
        _check_segments(segment_ids)
        if "coreset" in cache and cache["coreset"].prefix is not None:
            raise ValueError(
                "cache must have no prefix: the attention is told sines and cosines, which know "
                "nothing of it."
            )
        return self._read(project(self, inputs, sin, cos), cache, attn_mask)


class _SharedAttention(_CoresetAttention):
    """The same for attentions that may read the cache of another layer, as in Gemma 4."""

    def __call__(  # type: ignore[override]
        self,
        inputs: Float[Array, "batch tokens features"],
        segment_pos: Int[Array, "batch tokens"],
        cache: Mapping[str, Any] | None,
        attn_mask: Bool[Array, "batch tokens slots"] | None,
        kv_shared_cache: Mapping[str, Any] | None = None,
    ) -> tuple[LayerCache | None, Float[Array, "batch tokens features"], tuple[Array, Array]]:
        """Attention to what the cache holds and, causally, to the inputs; see :func:`wrap`.

        With the coreset of another layer in ``kv_shared_cache``, which holds this call's token
        already, attention to that alone. Keys and values of this call are returned as well.
        """
        shared = None if kv_shared_cache is None else kv_shared_cache.get("coreset")
        if cache is None and shared is None:
            plain: Any = super(_CoresetAttention, self)
            return plain.__call__(inputs, segment_pos, None, attn_mask, kv_shared_cache)
        inputs = inputs.astype(LayerShape.of(self).dtype)
        queries, keys, values = project(self, inputs, _behind(cache, segment_pos))
        if shared is None:
            new_cache, outputs = self._read((queries, keys, values), cache or {}, attn_mask)
            return new_cache, outputs, (keys, values)
        if queries.shape[1] != 1:
            raise ValueError(
                "kv_shared_cache may hold a coreset for one token at a time only; "
                f"got inputs {inputs.shape}."
            )
        outputs = shared.attend(queries).astype(queries.dtype)
        return None, getattr(self, self.coreset_parts.output)(outputs), (keys, values)


@functools.cache
def _subclass(original: type) -> Any:
    """The class of an attention, with the cache of this module."""
    documentation = {"__doc__": f"{original.__name__} with a compressed cache."}
    called = _CoresetAttention
    for name, special in (("sin", _AngleAttention), ("kv_shared_cache", _SharedAttention)):
        if name in inspect.signature(original.__call__).parameters:
            called = special
    return type(f"Coreset{original.__name__}", (called, original), documentation)


def _behind(cache: Any, positions: Array) -> Array:
    """Positions behind the document that a layer's cache begins with."""
    held = cache.get("coreset") if isinstance(cache, Mapping) else None
    if held is None or held.prefix is None:
        return positions
    return positions + held.prefix.lengths[:, None]


def _check_segments(segment_ids: Array | None) -> None:
    if segment_ids is not None:
        raise ValueError("segment_ids must be None with a cache; use attn_mask for padding.")


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
