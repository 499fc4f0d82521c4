"""What of a cache is fixed at compile time."""

import dataclasses
from typing import Any

from coreset_jax._src import checks
from coreset_jax._src.balance.walks import greedy_pairs
from coreset_jax._src.core.compressor import Compressor
from coreset_jax._src.stream.halvings import check_compressor, stream_scale
from coreset_jax._src.stream.sketch import Settings

# Options that attention modules take for their caches; the others follow from the module.
MODULE_OPTIONS = ("size", "sinks", "window", "block_size", "query_norm", "soft_cap", "compressor")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What of a cache is fixed at compile time; attention modules take the same options.

    Attributes:
      size: pairs that each head holds, of all kinds.
      sinks: first pairs of a sequence, kept exactly.
      window: newest pairs that are exact at any time.
      block_size: pairs that leave the window together, even; so many more than ``window`` may be
        exact. A decoding step does real work once in so many steps.
      query_norm: largest norm of a query; ``None`` means ``sqrt(head_dim)``.
      scale: the softmax scale, at which the cache is compressed and read; ``None`` means that of
        ``compressor``, and ``1/sqrt(head_dim)`` where that has none. Two that differ are refused.
      soft_cap: a bound that scores approach, see :func:`coreset_jax.attention`; ``None`` for none.
        Fits to sample queries know of it, and all else compresses for scores without a cap.
      compressor: compresses prompts, sample queries given, and halves blocks of what leaves the
        window, where there are none and of what it returns only the choice of pairs and their
        weights count. Options that are arrays are one number or one a key-value head. ``None``
        means :class:`coreset_jax.fitted`, for prompts, and for the middle together with all that
        joins it later, however it arrives.
      max_length: most tokens of one call; ``None`` for no limit.

    ``size == sinks + window + block_size`` leaves no room for a middle: older pairs are dropped.

    Raises:
      ValueError: on options that contradict each other, and on a compressor that is signed or
        needs sample queries.
    """

    size: int
    sinks: int = 4
    window: int = 128
    block_size: int = 64
    query_norm: float | None = None
    scale: float | None = None
    soft_cap: float | None = None
    compressor: Compressor | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        """Raises ``ValueError`` on options that contradict each other."""
        checks.check_size(self.size)
        checks.check_count("sinks", self.sinks, 0)
        checks.check_count("window", self.window, 0)
        checks.check_count("block_size", self.block_size, 2)
        for name in ("query_norm", "scale", "soft_cap"):
            number = checks.static_float(name, getattr(self, name))
            object.__setattr__(self, name, number)
        if self.block_size % 2:
            raise ValueError(f"block_size must be even, got {self.block_size}.")
        check_compressor(self.compressor)
        stream_scale(self.scale, self.compressor)
        if self.max_length is not None:
            checks.check_count("max_length", self.max_length)
        exact = f"sinks {self.sinks} + window {self.window} + block_size {self.block_size}"
        if self.middle < 0:
            raise ValueError(f"size must be at least {exact}; got size {self.size}.")
        if 0 < self.middle < self.block_size:
            raise ValueError(
                f"size must be {exact} (no middle), or larger by at least block_size; "
                f"got size {self.size}."
            )

    def replace(self, **changes: Any) -> "CacheConfig":
        """The configuration with some options changed."""
        return dataclasses.replace(self, **changes)

    @property
    def num_recent(self) -> int:
        """Slots for recent pairs."""
        return self.window + self.block_size

    @property
    def middle(self) -> int:
        """Slots of the compressed middle."""
        return self.size - self.sinks - self.num_recent

    def settings(self, width: int) -> Settings:
        """The settings of the middle for heads of a width."""
        walk: dict[str, Any] = {"walk": greedy_pairs, "max_swaps": self.block_size, "ridge": 1e-4}
        scale = stream_scale(self.scale, self.compressor)
        names = ("block_size", "query_norm", "compressor")
        options = {name: getattr(self, name) for name in names}
        return Settings.at_width(width, scale=scale, **options, **walk)
