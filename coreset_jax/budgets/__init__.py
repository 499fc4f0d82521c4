"""One budget for many heads, split unevenly: wrappers over any compressor.

With these, ``size`` is the mean budget of a head. What comes back has slots for the largest one,
and heads that keep fewer pairs leave slots empty. No more than ``heads * size`` pairs are kept.

- :class:`pyramid` gives early layers more than late ones;
- :class:`adaptive` asks sample queries, and gives more to heads with more of the largest scores;
- :class:`by_energy` asks nobody, and gives more to heads that are hard to compress.

They look at all heads at once: no wrapper that works on one head at a time can stand around them.
"""

from coreset_jax.budgets.adaptive import adaptive
from coreset_jax.budgets.energy import by_energy
from coreset_jax.budgets.pyramid import pyramid

__all__ = ["adaptive", "by_energy", "pyramid"]
