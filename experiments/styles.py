"""How the methods are called and drawn, the same in every experiment."""

from typing import NamedTuple


class Style(NamedTuple):
    """How a method is called and drawn; line and marker tell it apart without color."""

    label: str
    color: str
    line: str
    marker: str


STYLES = {
    "fitted": Style("fitted", "#CC79A7", "-", "P"),
    "balanced": Style("balanced", "#0072B2", "-", "o"),
    "exact": Style("full cache", "#888888", "-", "none"),
    "window": Style("sinks and window", "#009E73", "--", "D"),
    "uniform": Style("uniform", "#000000", "--", "s"),
    "balance_kv": Style("BalanceKV, published", "#D55E00", ":", "^"),
    "balance_kv_corrected": Style("BalanceKV, corrected", "#E69F00", "-.", "v"),
}
