"""The caches of google-tunix models of which some layers are wrapped."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from coreset_jax._src import checks
from coreset_jax.nn.cache import CoresetCache
from coreset_jax.nn.config import CacheConfig
from coreset_jax.nn.prefix import LayerPrefix, of_layer
from coreset_jax.nn.tunix_parts import is_local, parts_of
from coreset_jax.prefixes import Prefix

LayerCache = dict[str, Any]


def attentions_of(model: Any) -> list[Any]:
    """The attentions of a model's layers; raises ``ValueError`` if it has none."""
    attentions = [getattr(layer, "attn", None) for layer in getattr(model, "layers", ())]
    if not attentions or None in attentions:
        raise ValueError(
            f"model must have layers, each with an attention attn; got {type(model).__name__}."
        )
    return attentions


def origins_of(model: Any) -> list[int]:
    """For each layer of a model the number of the one whose cache it reads, mostly its own."""
    own = range(len(model.layers))
    return list(getattr(model, "kv_cache_sharing_patterns", own))


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What the cache of a layer looks like.

    Attributes:
      config: the options of a wrapped layer, ``None`` of others.
      kv_heads: key-value heads.
      head_dim: width of keys and values.
      dtype: of keys and values.
      most_slots: the most slots of a layer that is not wrapped, ``None`` for any number.
    """

    config: CacheConfig | None
    kv_heads: int
    head_dim: int
    dtype: Any
    most_slots: int | None = None

    @classmethod
    def of(cls, attention: Any) -> "LayerShape":
        """The shape of an attention's cache, wrapped or not."""
        projection = getattr(attention, parts_of(attention).projections[-1])
        dtype = getattr(projection, "dtype", None) or projection.w.dtype
        config, most = getattr(attention, "coreset_config", None), None
        options = getattr(attention, "config", None)
        # The windows of Gemma 4 are rings: a place is found by its remainder.
        if is_local(attention) and getattr(options, "use_sliding_window_kv_cache", False):
            most = getattr(options, "sliding_window_size", None)
        return cls(config, attention.num_kv_heads, attention.head_dim, jnp.dtype(dtype), most)

    def empty(
        self,
        batch_size: int,
        slots: int,
        dtype: Any,
        rng: Array | None,
        prefix: LayerPrefix | None = None,
    ) -> LayerCache:
        """An empty cache, of a wrapped layer perhaps behind a document."""
        rng = jax.random.key(0) if rng is None else rng
        slots = slots if self.most_slots is None else min(slots, self.most_slots)
        count = 1 if self.config is not None else slots
        shape = (batch_size, count, self.kv_heads, self.head_dim)
        keys, values = (jnp.zeros(shape, dtype or self.dtype) for _ in range(2))
        end_index = jnp.zeros(batch_size, jnp.int32)
        if self.config is None:
            return {"k": keys, "v": values, "end_index": end_index}
        held = CoresetCache.init(self.config, rng, keys, values, prefix)
        # Loops that donate their cache need every array in a buffer of its own.
        return {"coreset": jax.tree.map(jnp.copy, held), "end_index": end_index}


@dataclasses.dataclass(frozen=True)
class ModelCache:
    """Makes the caches of a model; static, so that it may be an attribute of an NNX module."""

    layers: tuple[LayerShape | None, ...]

    @classmethod
    def of(cls, model: Any) -> "ModelCache":
        """The caches of a model's layers, ``None`` of those that read another layer's."""
        attentions, shared = attentions_of(model), origins_of(model)
        return cls(
            tuple(
                LayerShape.of(attention) if shared[i] == i else None
                for i, attention in enumerate(attentions)
            )
        )

    def __call__(
        self,
        batch_size: int,
        cache_size: int = 1,
        dtype: Any = None,
        rng: Array | None = None,
        prefix: Prefix | Sequence[Prefix] | None = None,
    ) -> dict[str, LayerCache]:
        """Empty caches, see :func:`coreset_jax.nn.tunix.init_cache`."""
        if prefix is not None and any(each is None or each.config is None for each in self.layers):
            raise ValueError("prefix needs a model all of whose layers have been wrapped.")
        documents = [] if prefix is None else [prefix] if isinstance(prefix, Prefix) else prefix
        if any(len(each.layers) != len(self.layers) for each in documents):
            counts = [len(each.layers) for each in documents]
            raise ValueError(f"prefix must have {len(self.layers)} layers, got {counts}.")
        checks.check_count("batch_size", batch_size)
        checks.check_count("cache_size", cache_size)
        rng = jax.random.key(0) if rng is None else rng
        return {
            f"layer_{i}": layer.empty(
                batch_size,
                cache_size,
                dtype,
                jax.random.fold_in(rng, i),
                None if prefix is None else of_layer(prefix, i),
            )
            for i, layer in enumerate(self.layers)
            if layer is not None
        }
