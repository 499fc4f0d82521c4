"""The methods that are asked, by what they are given of a document."""

from collections.abc import Callable
from typing import NamedTuple

import coreset_jax as cj
from coreset_jax import baselines, refit
from experiments.common.figures import Look
from experiments.model.llama import LlamaConfig
from experiments.questions.documents import SOURCES

EVERY_HEAD = (0, 1)
"""One budget for all heads of all layers `[layers, kv_heads, n, d]`."""

CLASSES = {
    "query-free": ("nothing",),
    "prompt": ("last", "ahead"),
    "reconstruction": ("reconstruction", "both"),
}
"""What methods are compared with: the same of a document, and the same passes of the model."""


# Newest pairs that rivals keep in any case, and the share of the slots that they may take at most.
_RECENT, _RECENT_SHARE = 64, 7


class Setting(NamedTuple):
    """What a method may have to know beside what it is given.

    Attributes:
      groups: query heads a key-value head.
      size: pairs that are to be kept, a head in the mean.
      rope_base: base of the model's rotary positions.
    """

    groups: int
    size: int
    rope_base: float

    @property
    def recent(self) -> int:
        """Newest pairs that rivals keep in any case: 64, or a seventh of few slots."""
        return min(_RECENT, self.size // _RECENT_SHARE)

    @classmethod
    def of(cls, config: LlamaConfig, size: int) -> "Setting":
        """That of a model, for so many pairs."""
        return cls(config.num_query_heads // config.num_kv_heads, size, config.rope_base)


class Entrant(NamedTuple):
    """A method.

    Attributes:
      name: its name in configurations and results.
      label: its name in tables and figures.
      source: what it is given, see `experiments.questions.documents.SOURCES`.
      make: makes the compressor.
      ours: whether it is this library's own.
      look: how its line is drawn; methods without are left out of the figure.
    """

    name: str
    label: str
    source: str
    make: Callable[[Setting], cj.Compressor]
    ours: bool = False
    look: Look | None = None

    @property
    def category(self) -> str:
        """The class that it is compared in."""
        return next(name for name, sources in CLASSES.items() if self.source in sources)

    @property
    def title(self) -> str:
        """The label, and whose it is."""
        return f"{self.label} (ours)" if self.ours else self.label


def _balanced(_: Setting) -> cj.Compressor:
    return cj.keep_ends(refit.weights(cj.balanced()))


def _kvzip(setting: Setting, axes: tuple[int, ...] = ()) -> cj.Compressor:
    return baselines.kvzip(num_recent=setting.recent, axes=axes)


def _attended(_: Setting) -> cj.Compressor:
    return cj.attended(axes=EVERY_HEAD)


_TABLE = (
    Entrant(
        "uniform_ends",
        "uniform, ends kept",
        "nothing",
        lambda _: cj.keep_ends(baselines.uniform()),
        look=Look("#000000", "--", "s"),
    ),
    Entrant(
        "streaming_llm",
        "StreamingLLM",
        "nothing",
        lambda _: baselines.streaming_llm(),
        look=Look("#009E73", "--", "D"),
    ),
    Entrant("keydiff", "KeyDiff", "nothing", lambda _: cj.keep_ends(baselines.keydiff())),
    Entrant(
        "kmeans_ends", "k-means, ends kept", "nothing", lambda _: cj.keep_ends(baselines.kmeans())
    ),
    Entrant(
        "compactor",
        "Compactor, leverage alone",
        "nothing",
        lambda setting: baselines.compactor(
            rope_base=setting.rope_base,
            sinks=min(16, setting.size // 8),
            num_recent=setting.recent,
        ),
    ),
    Entrant("balanced", "balanced, weights refitted", "nothing", _balanced, ours=True),
    Entrant("fitted", "fitted", "nothing", lambda _: cj.fitted(), ours=True),
    Entrant(
        "snapkv",
        "SnapKV",
        "last",
        lambda setting: baselines.snapkv(groups=setting.groups),
        look=Look("#E69F00", "-.", "v"),
    ),
    Entrant(
        "expected_attention",
        "expected attention",
        "last",
        lambda setting: baselines.expected_attention(groups=setting.groups),
    ),
    Entrant(
        "attention_matching_last",
        "attention matching, last queries",
        "last",
        lambda _: cj.keep_ends(baselines.attention_matching()),
    ),
    Entrant("matched", "fitted and matched", "last", lambda _: cj.fitted(), ours=True),
    Entrant(
        "compress",
        "default, budgets a head",
        "ahead",
        lambda _: cj.better_of(cj.attended(), cj.fitted()),
        ours=True,
    ),
    Entrant(
        "attended",
        "attended, one budget",
        "ahead",
        _attended,
        ours=True,
        look=Look("#0072B2", "-", "o"),
    ),
    Entrant(
        "kvzip_heads",
        "KVzip, budgets a head",
        "reconstruction",
        _kvzip,
    ),
    Entrant(
        "kvzip",
        "KVzip, one budget",
        "reconstruction",
        lambda setting: _kvzip(setting, EVERY_HEAD),
        look=Look("#D55E00", ":", "^"),
    ),
    Entrant(
        "attention_matching",
        "attention matching",
        "reconstruction",
        lambda _: cj.keep_ends(baselines.attention_matching()),
    ),
    Entrant(
        "attended_reconstruction",
        "attended, one budget, reconstruction alone",
        "reconstruction",
        _attended,
        ours=True,
    ),
    Entrant(
        "attended_again",
        "attended, one budget, reconstruction",
        "both",
        _attended,
        ours=True,
        look=Look("#CC79A7", "-", "P"),
    ),
)

ENTRANTS = {each.name: each for each in _TABLE}

FULL = "full"
"""The full cache, which no method makes."""

assert {each.source for each in _TABLE} <= set(SOURCES)


def chosen(names: tuple[str, ...] | None) -> tuple[Entrant, ...]:
    """The methods of these names, in the order of the table; all if `None`.

    Raises:
      ValueError: a name is unknown.
    """
    if names is None:
        return _TABLE
    if unknown := sorted(set(names) - set(ENTRANTS)):
        raise ValueError(f"methods must be among {', '.join(ENTRANTS)}; unknown: {unknown}")
    return tuple(each for each in _TABLE if each.name in names)
