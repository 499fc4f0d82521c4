"""The names that caches have in programs that ``jax.export`` writes to disk."""

import dataclasses
import json

from jax import export

from coreset_jax.nn.cache import CoresetCache
from coreset_jax.nn.config import CacheConfig
from coreset_jax.nn.kv_block import KVBlock
from coreset_jax.nn.prefix import LayerPrefix


def config_to_bytes(config: CacheConfig) -> bytes:
    """The options of a cache as JSON.

    Raises:
      ValueError: if there is a compressor among them, which is code.
    """
    if config.compressor is not None:
        raise ValueError(
            "a cache whose config has a compressor cannot be serialized, since that is code; "
            "export a function of its arrays instead: take and return "
            "jax.tree.leaves(cache), and rebuild the cache by jax.tree.unflatten. "
            f"Got {config.compressor!r}."
        )
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    # NumPy's integers are no JSON.
    return json.dumps(options, default=int).encode()


def config_from_bytes(serialized: bytes | bytearray) -> CacheConfig:
    """The options that :func:`config_to_bytes` wrote; such as are not named have their defaults."""
    return CacheConfig(**json.loads(serialized))


for each in (KVBlock, LayerPrefix):
    export.register_namedtuple_serialization(
        each, serialized_name=f"coreset_jax.nn.{each.__name__}"
    )
export.register_pytree_node_serialization(
    CoresetCache,
    serialized_name="coreset_jax.nn.CoresetCache",
    serialize_auxdata=lambda config: config_to_bytes(*config),
    deserialize_auxdata=lambda serialized: (config_from_bytes(serialized),),
)
