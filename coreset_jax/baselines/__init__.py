"""Other methods of shrinking a cache, behind the protocol of :class:`coreset_jax.Compressor`.

Each is written from its paper and held by the tests to figures of its authors' own code.
"""

from coreset_jax.baselines.balance_kv import balance_kv
from coreset_jax.baselines.uniform import uniform

__all__ = ["balance_kv", "uniform"]
