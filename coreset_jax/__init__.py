"""Nearly optimal attention coresets: shrink a KV cache and say how wrong the result may be."""

from coreset_jax import _exporting as _exporting
from coreset_jax import (
    baselines,
    budgets,
    geometry,
    guarantees,
    prefixes,
    queries,
    refit,
    streaming,
    walks,
)
from coreset_jax._src.attention import attention, merge_attention
from coreset_jax._src.core.attend import attend
from coreset_jax._src.core.bias import attention_bias
from coreset_jax._src.core.compressor import Compressor, Wrapper
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.folding import fold_queries, fold_weights
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.core.packed import PackedCoreset, pack, unpack
from coreset_jax._version import __version__
from coreset_jax.attending import attended
from coreset_jax.balancing import balanced
from coreset_jax.choosing import better_of
from coreset_jax.combinators import chunked, keep_ends
from coreset_jax.compression import Certified, OutOfReachError, compress, compress_to_error
from coreset_jax.fitting import fitted, pivoted

__all__ = [
    "Certified",
    "Compressor",
    "Coreset",
    "Head",
    "Info",
    "OutOfReachError",
    "PackedCoreset",
    "Wrapper",
    "__version__",
    "attend",
    "attended",
    "attention",
    "attention_bias",
    "balanced",
    "baselines",
    "better_of",
    "budgets",
    "chunked",
    "compress",
    "compress_to_error",
    "fitted",
    "fold_queries",
    "fold_weights",
    "geometry",
    "guarantees",
    "keep_ends",
    "merge_attention",
    "pack",
    "pivoted",
    "prefixes",
    "queries",
    "refit",
    "streaming",
    "unpack",
    "walks",
]
