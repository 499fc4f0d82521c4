"""Signs from a Gram matrix: the walks of vector balancing, for ``balanced(walk=...)``."""

from coreset_jax._src.balance.walks import (
    Walk,
    gram_schmidt,
    gram_schmidt_rounding,
    greedy_pairs,
    self_balancing,
    swap_refinement,
)

__all__ = [
    "Walk",
    "gram_schmidt",
    "gram_schmidt_rounding",
    "greedy_pairs",
    "self_balancing",
    "swap_refinement",
]
