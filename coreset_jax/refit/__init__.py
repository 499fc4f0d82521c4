r"""Refits: other weights, values or keys in place of those that a compressor kept.

They wrap any compressor and are compressors themselves:

    compressor = refit.relocation(cj.pivoted())
    coreset = compressor(rng, keys, values, size=1024)

They keep every weight positive, so that a refitted coreset is read, streamed and decoded like any
other. But for those that match attention, they need no queries.
"""

from coreset_jax.refit.matching import attention_matching, matching
from coreset_jax.refit.projection import log_weights, nystrom
from coreset_jax.refit.relocate import relocation

__all__ = ["attention_matching", "log_weights", "matching", "nystrom", "relocation"]
