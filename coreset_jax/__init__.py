"""Nearly optimal attention coresets: shrink a KV cache and say how wrong the result may be."""

from coreset_jax import baselines, budgets, guarantees, problem, refit, streaming, walks
from coreset_jax._version import __version__
from coreset_jax.attention import attention
from coreset_jax.certified import Certified, OutOfReachError, compress
from coreset_jax.compression import balanced
from coreset_jax.coreset import Compressor, Coreset, attend
from coreset_jax.ends import with_ends
from coreset_jax.fitted import fitted
from coreset_jax.pivots import pivoted
from coreset_jax.stretches import stretched

__all__ = [
    "Certified",
    "Compressor",
    "Coreset",
    "OutOfReachError",
    "__version__",
    "attend",
    "attention",
    "balanced",
    "baselines",
    "budgets",
    "compress",
    "fitted",
    "guarantees",
    "pivoted",
    "problem",
    "refit",
    "streaming",
    "stretched",
    "walks",
    "with_ends",
]
