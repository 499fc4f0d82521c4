"""The subset of the paper: repeated halving of the whole cache by a balancing walk."""

from typing import Any

from jax.typing import ArrayLike

from coreset_jax._src.balance import walks
from coreset_jax._src.balance.repeated_halving import HalvingOptions, halve_repeatedly
from coreset_jax._src.core.compressor import Compressor, leaf
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info


class balanced(Compressor):  # noqa: N801
    r"""Repeated halving of the whole cache by a balancing walk; the compressor of the paper.

    .. math::
       \sup_{\|q\|\le\rho} \|\mathrm{Attn}(q) - \mathrm{Attn}'(q)\|
         = O\!\left(\sqrt d\, e^{\rho + o(\rho)} / m\right)

    in the unit problem of :func:`coreset_jax.geometry.standardize`. That bound is the theorem's,
    for a subgaussian walk in the kernel of radius ``rho``; the defaults are those that measured
    best, and are not proved (``docs/balancing.md``). Blocks of pairs are balanced in
    order, each against the field of everything before it, in its own level and in the levels
    before. Time is linear in ``n``, and memory above the inputs
    a few numbers a pair and a few ``block_size x block_size`` matrices a head.

    Args:
      rho: the radius of unit queries, a scalar or ``[...]``.
      query_norm: largest norm of a raw query instead, a scalar or ``[...]``. If neither is given,
        the call's sample ``queries`` decide, and without them ``sqrt(d)``.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.
      walk: a function of :mod:`coreset_jax.walks`, or any of the same signature. It is part of
        the compiled program's identity: pass a module-level function, not a fresh lambda.
      kernel_radius: the geometry of the balance, a scalar or ``[...]``; ``None`` means
        :func:`coreset_jax._src.geometry.kernel_geometry.default_kernel_radius`.
      block_size: pairs in a block, even.
      landmarks: landmark keys that represent the field; ``None`` means the exact field, which
        takes :math:`n^2` products and a float32 copy of the cache.
      max_swaps: swaps that may refine a block after its walk; 0 leaves the walk's signs alone.
      passes: passes over the blocks of the last level, each further one a refinement by swaps.
      ridge: regularization of the landmarks' Gram matrix, relative to its diagonal.

    Called with ``(rng, keys [..., n, d], values [..., n, dv], *, size, lengths=None,
    queries=None)`` it returns a :class:`~coreset_jax.Coreset`; see :class:`coreset_jax.Compressor`.
    Weights of a head sum to its length.

    Raises:
      ValueError: on bad options.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Theorems 3 to 5.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 512, 16))
    >>> compressor = cj.balanced(query_norm=4.0)
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64)
    >>> coreset.keys.shape
    (4, 64, 16)
    >>> print(jnp.exp(coreset.log_weights).sum(axis=-1).round(3))
    [512. 512. 512. 512.]
    """

    rho: ArrayLike | None = leaf(default=None)
    query_norm: ArrayLike | None = leaf(default=None)
    scale: ArrayLike | None = leaf(default=None)
    kernel_radius: Any = leaf(default=None)
    walk: walks.Walk = walks.greedy_pairs
    block_size: int = 512
    landmarks: int | None = 512
    max_swaps: int = 256
    passes: int = 2
    ridge: float = 1e-4

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_float("ridge")
        self.static_count("block_size", 2)
        self.static_count("max_swaps", 0)
        self.static_count("passes")
        if self.landmarks is not None:
            self.static_count("landmarks")
        if self.block_size % 2:
            raise ValueError(f"block_size must be even, got {self.block_size}.")
        if not callable(self.walk):
            raise ValueError(f"walk must be a function of coreset_jax.walks, got {self.walk!r}.")

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Halves the head until ``size`` pairs are left."""
        options = HalvingOptions(
            self.walk, self.block_size, self.landmarks, self.max_swaps, self.passes, self.ridge
        )
        return halve_repeatedly(head, size, self.kernel_radius, options)

    def workspace(self, count: int, size: int, width: int) -> int:
        """A block's Gram matrix, its kernel with the landmarks, and their solver."""
        block, landmarks = min(self.block_size, count), min(self.landmarks or 4096, count)
        return 2 * block * block + landmarks * (block + landmarks + width) + 8 * count
