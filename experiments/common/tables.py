"""The aligned table that every experiment and benchmark prints."""

import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import rich.box
import rich.console
import rich.measure
import rich.table

from experiments.common import results

Row = Sequence[str] | None
"""The cells of a row as text; `None` draws a line between groups of rows."""


def stamp(seeds: int | Iterable[int]) -> str:
    """One line that names the seed or seeds and the versions, to print under a table."""
    named = str(seeds) if isinstance(seeds, int) else ", ".join(map(str, seeds))
    known = results.versions().items()
    return ", ".join([f"seed {named}", *(f"{name} {text}" for name, text in known)])


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    *,
    left: Sequence[str] = (),
    caption: str | None = None,
) -> None:
    """Prints one aligned table, never folded, whatever the width of the terminal.

    Args:
      title: what the table shows, with units.
      columns: headers.
      rows: the rows, see `Row`.
      left: the columns to align left (names); the others, figures, align right.
      caption: a line below the table.
    """
    # Title and caption stay out of the table, which would fold them to its own width.
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in columns:
        justify: Any = "left" if column in left else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    wide = rich.console.Console(width=10_000)
    width = rich.measure.Measurement.get(wide, wide.options, table).maximum
    console = rich.console.Console(file=sys.stdout, width=width, highlight=False, markup=False)
    console.print(title, style="bold", soft_wrap=True)
    console.print(table)
    if caption is not None:
        console.print(caption, soft_wrap=True)
    console.print()


def multiple(share: float, unit: str) -> str:
    """A share of a unit as text, as `3n/4`."""
    fraction = Fraction(share).limit_denominator(64)
    numerator = "" if fraction.numerator == 1 else str(fraction.numerator)
    return f"{numerator}{unit}" + ("" if fraction.denominator == 1 else f"/{fraction.denominator}")
