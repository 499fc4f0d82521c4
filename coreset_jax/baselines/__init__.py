"""Other methods of shrinking a cache, behind the protocol of :class:`coreset_jax.Compressor`.

Each is written from its paper and held by the tests to its formulas and, where there are any, to
figures of its authors' own code.
"""

from coreset_jax._src.core.coreset import SignedCoreset
from coreset_jax.baselines.attention_matching import attention_matching
from coreset_jax.baselines.balance_kv import balance_kv
from coreset_jax.baselines.compactor import compactor
from coreset_jax.baselines.expected_attention import expected_attention
from coreset_jax.baselines.h2o import h2o
from coreset_jax.baselines.kernel_halving import kernel_halving
from coreset_jax.baselines.keydiff import keydiff
from coreset_jax.baselines.kmeans import kmeans
from coreset_jax.baselines.kvzip import kvzip
from coreset_jax.baselines.quantized import quantized, quantized_bytes
from coreset_jax.baselines.snapkv import snapkv
from coreset_jax.baselines.streaming_llm import streaming_llm
from coreset_jax.baselines.top_attention import top_attention
from coreset_jax.baselines.uniform import uniform
from coreset_jax.baselines.wildcat import wildcat

__all__ = [
    "SignedCoreset",
    "attention_matching",
    "balance_kv",
    "compactor",
    "expected_attention",
    "h2o",
    "kernel_halving",
    "keydiff",
    "kmeans",
    "kvzip",
    "quantized",
    "quantized_bytes",
    "snapkv",
    "streaming_llm",
    "top_attention",
    "uniform",
    "wildcat",
]
