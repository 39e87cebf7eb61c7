"""Rows of text as a table that reads well in a terminal, a log and a notebook."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["WIDTH", "plain_console", "plain_number", "readable", "table"]

WIDTH: Final = 118
"""Columns that a printed table takes at most."""


def table(headings: Mapping[str, bool], rows: Iterable[Sequence[str]], *, title: str = "", width: int = WIDTH) -> str:
    """A table as plain text.

    Args:
        headings: Column names; True where the column holds numbers, which are set right and never broken.
        rows: A cell for each column.
        title: A line above the table.
        width: Columns at most; text that does not fit is folded.
    """
    from rich import box
    from rich.table import Table

    found = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for name, number in headings.items():
        found.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        found.add_row(*row)
    text = io.StringIO()
    plain_console(text, width).print(found)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def plain_console(file: TextIO, width: int) -> Console:
    """A rich console that writes plain text of so many columns to `file` and nowhere else.

    Left to itself, rich would show what it prints under Jupyter too, beside the text that is asked for.
    """
    from rich.console import Console

    return Console(
        file=file, width=width, color_system=None, highlight=False, markup=False, emoji=False, force_jupyter=False
    )


def plain_number(value: Any) -> Any:
    """What JSON can hold of a value: infinities and NaN, which it lacks, as text; all else as it is."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def readable(size: float) -> str:
    """Bytes with a decimal unit, as in ``1.08 MB``."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
