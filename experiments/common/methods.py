"""The methods that the experiments compare, one entry each."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import coreset_jax as cj
from coreset_jax import baselines, budgets, refit
from experiments.common.figures import Look

# The words are in the settings of finished cells: spelled otherwise they would name other cells.
FREE, INFORMED, QUANTIZED = "query-free", "query-informed", "quantized"
UNEVEN = "uneven budgets"
CATEGORIES = (FREE, INFORMED, QUANTIZED, UNEVEN)

# What decoding has beside them: caches that no compressor makes.
PLAIN = "plain caches"

# Classes in which a head has as much memory as the same head of every other method.
EVEN = (FREE, INFORMED, QUANTIZED)

TRAITS = {"ours", "subset", "draws", "grouped", "whole", "asks"}

# The method that others are divided by.
REFERENCE = "uniform"


class Method(NamedTuple):
    """An entry of the table.

    Attributes:
      name: its name in configurations and results.
      label: its name in tables and figures.
      category: its class. The leaderboard compares a method with those of its own class alone.
      traits: some of these words. `ours`: this library's own, all others are rivals. `subset`: it
        keeps pairs of the cache bit by bit, with weights that nothing was fitted to. `draws`: it
        draws random numbers; without it one seed is all there is. `grouped`: it takes an option
        `groups`, the query heads that share a key-value head. `whole`: it keeps every pair. `asks`:
        it is given queries, and cannot do without; those of the query-informed class always are.
      make: makes the compressor; `None` for a plain cache.
      look: how its line is drawn in figures with few methods.
      bits: of a number, for quantized caches: their ratio is one of bytes.
    """

    name: str
    label: str
    category: str
    traits: str = ""
    make: Callable[..., cj.Compressor] | None = None
    look: Look | None = None
    bits: int | None = None

    def has(self, trait: str) -> bool:
        """Whether this is one of its traits."""
        return trait in self.traits.split()

    @property
    def ours(self) -> bool:
        """Whether it is this library's own."""
        return self.has("ours")

    @property
    def asks(self) -> bool:
        """Whether it is given queries."""
        return self.category == INFORMED or self.has("asks")

    @property
    def title(self) -> str:
        """The label, and whose it is."""
        return f"{self.label} (ours)" if self.ours else self.label

    def compressor(self, groups: int = 1) -> cj.Compressor:
        """The compressor for a model with so many query heads a key-value head.

        Raises:
          ValueError: the method is a plain cache.
        """
        if self.make is None:
            raise ValueError(f"{self.name} is a plain cache: no compressor makes it")
        return self.make(groups=groups) if self.has("grouped") else self.make()


def _corrected() -> cj.Compressor:
    return baselines.balance_kv(corrected=True)


def _balanced_ends() -> cj.Compressor:
    # What prompts of this length can afford: the exact field takes n^2 products.
    between = cj.balanced(block_size=1024, max_swaps=512, landmarks=None)
    return cj.keep_ends(between, recent_fraction=0.125)


def _nystrom() -> cj.Compressor:
    return refit.nystrom(cj.balanced())


class _matched(cj.Wrapper):  # noqa: N801
    """`cj.fitted` with sample queries, which it can do without and this cannot."""

    @property
    def needs_queries(self) -> bool:  # type: ignore[override]
        return True

    def compress_head(self, head: cj.Head, size: int) -> tuple[cj.Coreset, cj.Info]:
        return self.compressor.on_head(head, size)


def _matched_fitted() -> cj.Compressor:
    return _matched(cj.fitted())


# Two heads a layer, as the shipped model has, leave little to split: all of them share a budget.
_EVERY_HEAD = (0, -1)

# Newest pairs that are kept beside KVzip's own: a continuation reads them most.
_RECENT = 64

# Of the shipped model.
_ROPE_BASE = 1e5


def _pyramid_kv(groups: int) -> cj.Compressor:
    return budgets.pyramid(baselines.snapkv(groups=groups))


def _ada_kv(groups: int) -> cj.Compressor:
    return budgets.adaptive(baselines.snapkv(groups=groups), axes=_EVERY_HEAD)


def _kvzip(axes: tuple[int, ...] = ()) -> cj.Compressor:
    return baselines.kvzip(num_recent=_RECENT, axes=axes)


def _kvzip_every_head() -> cj.Compressor:
    return _kvzip(_EVERY_HEAD)


def _attended_every_head() -> cj.Compressor:
    return cj.attended(axes=_EVERY_HEAD)


def _by_energy() -> cj.Compressor:
    return budgets.by_energy(cj.fitted(), axes=_EVERY_HEAD)


def _matched_adaptive() -> cj.Compressor:
    # Between half and double, as by energy: every further size is a program more to compile.
    return budgets.adaptive(cj.fitted(), safeguard=0.5, num_sizes=2, axes=_EVERY_HEAD)


def _log_weights() -> cj.Compressor:
    return refit.weights(cj.balanced())


def _nystrom_8() -> cj.Compressor:
    return baselines.quantized(_nystrom(), bits=8)


def _fitted_8() -> cj.Compressor:
    return baselines.quantized(cj.fitted(), bits=8)


_WILDCAT_4 = functools.partial(baselines.wildcat, bins=4)
_COMPACTOR = functools.partial(baselines.compactor, rope_base=_ROPE_BASE)
_WHOLE_8 = functools.partial(baselines.quantized, bits=8)
_WHOLE_4 = functools.partial(baselines.quantized, bits=4)

_UNIFORM = Look("#000000", "--", "s")
_PUBLISHED = Look("#D55E00", ":", "^")
_CORRECTED = Look("#E69F00", "-.", "v")
_BALANCED = Look("#0072B2", "-", "o")
_FITTED = Look("#CC79A7", "-", "P")
_EXACT = Look("#888888", "-", "none")
_WINDOW = Look("#009E73", "--", "D")

_TABLE = (
    Method("uniform", "uniform", FREE, "subset draws", baselines.uniform, _UNIFORM),
    Method("streaming_llm", "StreamingLLM", FREE, "subset", baselines.streaming_llm),
    Method("keydiff", "KeyDiff", FREE, "subset", baselines.keydiff),
    Method("compactor", "Compactor, leverage alone", FREE, "subset draws", _COMPACTOR),
    Method("kmeans", "k-means", FREE, "draws", baselines.kmeans),
    Method("balance_kv", "BalanceKV, published", FREE, "draws", baselines.balance_kv, _PUBLISHED),
    Method(
        "balance_kv_corrected", "BalanceKV, corrected", FREE, "subset draws", _corrected, _CORRECTED
    ),
    Method("kernel_halving", "kernel halving", FREE, "subset draws", baselines.kernel_halving),
    Method("wildcat", "WildCat, 1 bin", FREE, "draws", baselines.wildcat),
    Method("wildcat_4", "WildCat, 4 bins", FREE, "draws", _WILDCAT_4),
    Method("balanced", "balanced", FREE, "ours subset draws", cj.balanced, _BALANCED),
    Method("balanced_ends", "balanced, ends kept", FREE, "ours subset draws", _balanced_ends),
    Method("log_weights", "balanced, weights refitted", FREE, "ours draws", _log_weights),
    Method("nystrom", "balanced and refitted", FREE, "ours draws", _nystrom),
    Method("fitted", "fitted", FREE, "ours draws", cj.fitted, _FITTED),
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
    Method("kvzip_heads", "KVzip, budgets a head", INFORMED, "subset", _kvzip),
    Method("attention_matching", "attention matching", INFORMED, "", baselines.attention_matching),
    Method("matched", "fitted and matched", INFORMED, "ours draws", _matched_fitted),
    Method("attended_heads", "attended, budgets a head", INFORMED, "ours draws", cj.attended),
    Method("quantized_8", "whole cache, 8 bits", QUANTIZED, "whole", _WHOLE_8, bits=8),
    Method("quantized_4", "whole cache, 4 bits", QUANTIZED, "whole", _WHOLE_4, bits=4),
    Method(
        "nystrom_8", "balanced and refitted, 8 bits", QUANTIZED, "ours draws", _nystrom_8, bits=8
    ),
    Method("fitted_8", "fitted, 8 bits", QUANTIZED, "ours draws", _fitted_8, bits=8),
    Method("pyramid_kv", "SnapKV in a pyramid", UNEVEN, "subset grouped asks", _pyramid_kv),
    Method("ada_kv", "SnapKV, adaptive", UNEVEN, "subset grouped asks", _ada_kv),
    Method("kvzip", "KVzip, one budget", UNEVEN, "subset asks", _kvzip_every_head),
    Method("fitted_by_energy", "fitted, by energy", UNEVEN, "ours draws", _by_energy),
    Method(
        "matched_adaptive",
        "fitted and matched, adaptive",
        UNEVEN,
        "ours draws asks",
        _matched_adaptive,
    ),
    Method("attended", "attended, one budget", UNEVEN, "ours draws asks", _attended_every_head),
    Method("exact", "full cache", PLAIN, look=_EXACT),
    Method("window", "sinks and window", PLAIN, look=_WINDOW),
)

METHODS = {method.name: method for method in _TABLE}

ENTRANTS = tuple(method for method in _TABLE if method.category in CATEGORIES)
"""The methods of the leaderboard, in its order."""

# In the order of the legends.
_DRAWN = ("fitted", "balanced", "exact", "window", "uniform", "balance_kv", "balance_kv_corrected")

LOOKS = {name: look for name in _DRAWN if (look := METHODS[name].look) is not None}
"""How the methods are drawn in figures with few of them, in the order of the legends."""


def chosen(names: tuple[str, ...] | None) -> tuple[Method, ...]:
    """The methods of these names, in the order of the table; all if `None`.

    Raises:
      ValueError: a name is unknown, or the reference is not among them.
    """
    if names is None:
        return ENTRANTS
    unknown = set(names) - {method.name for method in ENTRANTS}
    if unknown or REFERENCE not in names:
        raise ValueError(
            f"methods must be known and include {REFERENCE!r}, got {list(names)}; "
            f"unknown: {sorted(unknown)}"
        )
    return tuple(method for method in ENTRANTS if method.name in names)


def identity(compressor: cj.Compressor) -> str:
    """A compressor with its options as text, the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(compressor))
