"""What all budgets share: the compressor inside runs over all heads, at several sizes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax._src.core.compressor import Wrapper
from coreset_jax._src.core.coreset import Coreset, padded
from coreset_jax._src.core.driver import Cache
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax.budgets.split import check_axes, grid, resolve_axes, split


class Budget(Wrapper):
    """A wrapper that divides one budget among the heads, and so needs all of them."""

    @property
    def coreset_scale(self) -> ArrayLike | None:
        """The softmax scale that coresets are read with: that by which pairs were compressed."""
        inner = self.compressor.coreset_scale
        return self.scale if inner is None else inner

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Raises ``ValueError``: something around it asks for one head by itself."""
        raise ValueError(
            f"{type(self).__name__} divides a budget among heads and cannot compress one by "
            "itself: put it outermost, around the compressor that now stands around it."
        )

    def sizes(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        """The sizes at which heads are compressed; for subclasses to define.

        Args:
          shape: that of keys ``[..., n, d]``.
          size: mean budget.

        Raises:
          ValueError: if keys have no such axes.
        """
        raise NotImplementedError

    def check_call(self, keys: Any, size: int, queries: Any) -> None:
        """Raises ``ValueError`` unless the compressor can be called at every size."""
        super().check_call(keys, size, queries)
        for each in sorted(set(self.sizes(keys.shape, size))):
            self.compressor.check_call(keys, each, queries)

    def at_size(self, cache: Cache, size: int) -> tuple[Coreset, Info]:
        """What the compressor inside makes of all heads, as if it were called by itself."""
        inner = self.compressor
        queries = cache.queries if inner.reads_queries else None
        scores = cache.scores if inner.reads_scores else None
        return inner.on_heads(cache._replace(queries=queries, scores=scores), size)

    def static_bounded(self, name: str, *, least: float = 0.0, most: float = float("inf")) -> None:
        """Makes a static option a Python float; raises ``ValueError`` if it is out of bounds."""
        self.static_float(name)
        value = getattr(self, name)
        if value < least:
            raise ValueError(f"{name} must be at least {least:g}, got {value:g}.")
        if value > most:
            raise ValueError(f"{name} must be at most {most:g}, got {value:g}.")


class Shared(Budget):
    """A budget that is shared along axes: each head gets one of a few sizes, by its own need."""

    max_multiple: float = 2.0
    num_sizes: int = 2
    axes: int | tuple[int, ...] = -1

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_bounded("max_multiple", least=1.0)
        self.static_count("num_sizes")
        object.__setattr__(self, "axes", check_axes("axes", self.axes))

    def axes_of(self, leading: tuple[int, ...]) -> tuple[int, ...]:
        """The axes along which budgets are shared, counted from the front."""
        return resolve_axes("axes", check_axes("axes", self.axes), leading)

    def sizes(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        """The few sizes of which every head gets one, ascending."""
        self.axes_of(shape[:-2])
        if size >= shape[-2]:
            return (size,)
        return grid(size, shape[-2], self.floor, self.max_multiple, self.num_sizes)

    @property
    def floor(self) -> float:
        """Smallest budget of a head, as a share of the mean; for subclasses to define."""
        raise NotImplementedError

    def shares(self, cache: Cache, size: int, smallest: Coreset) -> Float[Array, "*heads"]:
        """How much each head should have, to a common factor; for subclasses to define.

        Args:
          cache: all heads.
          size: mean budget.
          smallest: their coresets of the smallest size.
        """
        raise NotImplementedError

    def on_heads(self, cache: Cache, size: int) -> tuple[Coreset, Info]:
        """Compresses all heads at every size, and takes for each head what it may have."""
        sizes = self.sizes(cache.keys.shape, size)
        found = [self.at_size(cache, each) for each in sizes]
        if len(sizes) == 1:
            return found[0]
        shares = self.shares(cache, size, found[0][0])
        axes = self.axes_of(cache.keys.shape[:-2])
        return select(split(shares, cache.counts, axes, sizes=sizes, size=size), found)


def alike(found: Sequence[tuple[Coreset, Info]], slots: int) -> list[tuple[Coreset, Info]]:
    """Coresets of as many slots each, and zeros for what others of them have information on.

    A head that is kept whole has no fits, say: that is zero of them.
    """
    known = {
        name: each.dtype
        for _, info in found
        for name, each in info._asdict().items()
        if each is not None
    }

    def filled(coreset: Coreset, info: Info) -> Info:
        zeros = jnp.zeros_like(coreset.log_weights[..., 0])
        missing = [name for name in known if getattr(info, name) is None]
        return info._replace(**{name: zeros.astype(known[name]) for name in missing})

    return [(padded(coreset, slots), filled(coreset, info)) for coreset, info in found]


def select(
    levels: Int[Array, "*heads"], found: Sequence[tuple[Coreset, Info]]
) -> tuple[Coreset, Info]:
    """Of some coresets of all heads the one that each head has chosen.

    Args:
      levels: number of the coreset, ``[...]``.
      found: the coresets; their slots ascend, and the result has those of the last.
    """

    def take(*several: Array) -> Array:
        chosen = several[0]
        for number, each in enumerate(several[1:], 1):
            here = levels.reshape(*levels.shape, *(1,) * (each.ndim - levels.ndim)) == number
            chosen = jnp.where(here, each, chosen)
        return chosen

    chosen: tuple[Coreset, Info] = jax.tree.map(take, *alike(found, found[-1][0].keys.shape[-2]))
    return chosen
