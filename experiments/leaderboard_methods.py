"""The methods of `experiments.leaderboard`, one line each."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import coreset_jax as cj
from coreset_jax import baselines, budgets, refit

FREE, INFORMED, QUANTISED = "query-free", "query-informed", "quantised"
UNEVEN = "uneven budgets"
CATEGORIES = (FREE, INFORMED, QUANTISED, UNEVEN)

# Classes in which a head has as much memory as the same head of every other method.
EVEN = (FREE, INFORMED, QUANTISED)

TRAITS = {"ours", "subset", "draws", "grouped", "whole", "asks"}

# The method that others are divided by.
REFERENCE = "uniform"


class Method(NamedTuple):
    """A line of the table.

    Attributes:
      name: its name in configurations and results.
      label: its name in tables and figures.
      category: its class. A method is compared with those of its own class alone.
      traits: some of these words. `ours`: this library's own, all others are rivals. `subset`: it
        keeps pairs of the cache bit by bit, with weights that nothing was fitted to. `draws`: it
        draws random numbers; without it one seed is all there is. `grouped`: it takes an option
        `groups`, the query heads that share a key-value head. `whole`: it keeps every pair. `asks`:
        it is given queries, and cannot do without; those of the query-informed class always are.
      make: makes the compressor.
      bits: of a number, for quantised caches: their ratio is one of bytes.
    """

    name: str
    label: str
    category: str
    traits: str
    make: Callable[..., cj.Compressor]
    bits: int | None = None

    @property
    def ours(self) -> bool:
        """Whether it is this library's own."""
        return "ours" in self.traits.split()

    @property
    def subset(self) -> bool:
        """Whether it keeps pairs as they are, and refits nothing."""
        return "subset" in self.traits.split()

    @property
    def draws(self) -> bool:
        """Whether seeds make a difference."""
        return "draws" in self.traits.split()

    @property
    def whole(self) -> bool:
        """Whether it keeps every pair."""
        return "whole" in self.traits.split()

    @property
    def asks(self) -> bool:
        """Whether it is given queries."""
        return self.category == INFORMED or "asks" in self.traits.split()

    @property
    def title(self) -> str:
        """The label, and whose it is."""
        return f"{self.label} (ours)" if self.ours else self.label

    def compressor(self, groups: int) -> cj.Compressor:
        """The compressor for a model with so many query heads a key-value head."""
        return self.make(groups=groups) if "grouped" in self.traits.split() else self.make()


def _corrected() -> cj.Compressor:
    return baselines.balance_kv(corrected=True)


def _balanced_ends() -> cj.Compressor:
    # What prompts of this length can afford: the exact field takes n^2 products.
    between = cj.balanced(block_size=1024, max_swaps=512, landmarks=None)
    return cj.with_ends(between, recent=0.125)


def _nystrom() -> cj.Compressor:
    return refit.nystrom(cj.balanced())


class _Matched(NamedTuple):
    """`cj.fitted` with sample queries, which it can do without and this cannot."""

    fitted: cj.Compressor = cj.fitted()

    def __call__(self, *arguments: Any, queries: Any = None, **options: Any) -> cj.Coreset:
        """Compresses, given queries."""
        if queries is None:
            raise ValueError("queries must be given to be matched.")
        return self.fitted(*arguments, queries=queries, **options)


# Two heads a layer, as the shipped model has, leave little to split: all of them share a budget.
_EVERY_HEAD = (0, -1)


def _pyramid_kv(groups: int) -> cj.Compressor:
    return budgets.pyramid(baselines.snapkv(groups=groups))


def _ada_kv(groups: int) -> cj.Compressor:
    return budgets.adaptive(baselines.snapkv(groups=groups), axes=_EVERY_HEAD)


def _by_energy() -> cj.Compressor:
    return budgets.by_energy(cj.fitted(), axes=_EVERY_HEAD)


def _matched_adaptive() -> cj.Compressor:
    # Between half and double, as by energy: every further size is a program more to compile.
    return budgets.adaptive(cj.fitted(), safeguard=0.5, steps=2, axes=_EVERY_HEAD)


_WILDCAT_4 = functools.partial(baselines.wildcat, bins=4)
_WHOLE_8 = functools.partial(baselines.quantised, bits=8)
_WHOLE_4 = functools.partial(baselines.quantised, bits=4)

METHODS = (
    Method("uniform", "uniform", FREE, "subset draws", baselines.uniform),
    Method("streaming_llm", "StreamingLLM", FREE, "subset", baselines.streaming_llm),
    Method("key_similarity", "KeyDiff", FREE, "subset", baselines.key_similarity),
    Method("kmeans", "k-means", FREE, "draws", baselines.kmeans),
    Method("balance_kv", "BalanceKV, published", FREE, "draws", baselines.balance_kv),
    Method("balance_kv_corrected", "BalanceKV, corrected", FREE, "subset draws", _corrected),
    Method("kernel_halving", "kernel halving", FREE, "subset draws", baselines.kernel_halving),
    Method("wildcat", "WildCat, 1 bin", FREE, "draws", baselines.wildcat),
    Method("wildcat_4", "WildCat, 4 bins", FREE, "draws", _WILDCAT_4),
    Method("balanced", "balanced", FREE, "ours subset draws", cj.balanced),
    Method("balanced_ends", "balanced, ends kept", FREE, "ours subset draws", _balanced_ends),
    Method(
        "log_weights",
        "balanced, weights refitted",
        FREE,
        "ours draws",
        lambda: refit.log_weights(cj.balanced()),
    ),
    Method("nystrom", "balanced and refitted", FREE, "ours draws", _nystrom),
    Method("fitted", "fitted", FREE, "ours draws", cj.fitted),
    Method("h2o", "H2O", INFORMED, "subset", baselines.h2o),
    Method("snapkv", "SnapKV", INFORMED, "subset grouped", baselines.snapkv),
    Method(
        "expected_attention",
        "expected attention",
        INFORMED,
        "subset grouped",
        baselines.expected_attention,
    ),
    Method("top_attention", "top attention", INFORMED, "subset", baselines.top_attention),
    Method("attention_matching", "attention matching", INFORMED, "", baselines.attention_matching),
    Method("matched", "fitted and matched", INFORMED, "ours draws", _Matched),
    Method("quantised_8", "whole cache, 8 bits", QUANTISED, "whole", _WHOLE_8, 8),
    Method("quantised_4", "whole cache, 4 bits", QUANTISED, "whole", _WHOLE_4, 4),
    Method(
        "nystrom_8",
        "balanced and refitted, 8 bits",
        QUANTISED,
        "ours draws",
        lambda: baselines.quantised(_nystrom(), 8),
        8,
    ),
    Method(
        "fitted_8",
        "fitted, 8 bits",
        QUANTISED,
        "ours draws",
        lambda: baselines.quantised(cj.fitted(), 8),
        8,
    ),
    Method("pyramid_kv", "SnapKV in a pyramid", UNEVEN, "subset grouped asks", _pyramid_kv),
    Method("ada_kv", "SnapKV, adaptive", UNEVEN, "subset grouped asks", _ada_kv),
    Method("fitted_by_energy", "fitted, by energy", UNEVEN, "ours draws", _by_energy),
    Method(
        "matched_adaptive",
        "fitted and matched, adaptive",
        UNEVEN,
        "ours draws asks",
        _matched_adaptive,
    ),
)


def chosen(names: tuple[str, ...] | None) -> tuple[Method, ...]:
    """The methods of these names, in the order of the table; all if `None`.

    Raises:
      ValueError: a name is unknown, or the reference is not among them.
    """
    if names is None:
        return METHODS
    unknown = set(names) - {method.name for method in METHODS}
    if unknown or REFERENCE not in names:
        raise ValueError(
            f"methods must be known and include {REFERENCE!r}, got {list(names)}; "
            f"unknown: {sorted(unknown)}"
        )
    return tuple(method for method in METHODS if method.name in names)


def identity(compressor: cj.Compressor) -> str:
    """A compressor with its options as text, the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(compressor))
