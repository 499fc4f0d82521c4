"""Caches and attention modules that decode over a coreset; import ``nnx`` or ``linen`` by name."""

from coreset_jax.nn import exporting as exporting
from coreset_jax.nn.cache import CoresetCache
from coreset_jax.nn.config import CacheConfig
from coreset_jax.nn.prefix import LayerPrefix, of_layer

__all__ = ["CacheConfig", "CoresetCache", "LayerPrefix", "of_layer"]
