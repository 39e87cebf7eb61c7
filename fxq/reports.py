"""What a graph does in low precision, where, by which rule, and what stays float and why."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import StringIO
from typing import Any, Final

from torch import fx

from . import html
from .calibration_report import RANDOM_DATA
from .graph import Note, state
from .placement import EdgeRow, OpRow, operations
from .tables import plain_console
from .totals import Totals, count

__all__ = ["EdgeRow", "OpRow", "Report", "Totals", "report", "stage_of", "warnings_of"]

_WIDTH: Final = 120
_NARROWEST: Final = 80
_COLUMNS: Final = ("node", "operation", "precision", "input", "weight", "output", "rules")
_HEADINGS: Final = {
    "opaque": "kept whole",
    "declined": "left as it is",
    "advice": "advice",
}


@dataclass(frozen=True)
class Report:
    """What :func:`fxq.report` returns; print it.

    Attributes:
        rows: Operations in graph order.
        totals: The rows in numbers.
        notes: What users should hear: declined rewrites, advice, parts kept whole.
        stage: ``traced``, ``prepared``, ``calibrated`` or ``quantized``.
        target: Name of the target.
        warnings: What makes the numbers unfit for use, such as calibration on random data.
    """

    rows: tuple[OpRow, ...]
    totals: Totals
    notes: tuple[Note, ...]
    stage: str
    target: str
    warnings: tuple[str, ...] = ()

    @property
    def weighted(self) -> tuple[OpRow, ...]:
        """The convolutions, matrix products, and modules kept whole that hide some."""
        return tuple(row for row in self.rows if row.weighted)

    @property
    def skips(self) -> tuple[OpRow, ...]:
        """The residual additions, quantized or not."""
        return tuple(row for row in self.rows if row.residual)

    def summary(self) -> str:
        """One line."""
        t = self.totals
        skips = f" and {t.skips_quantized} of {t.residuals} residual skips" if t.residuals else ""
        weighted = f"{t.weighted_quantized} of {t.weighted} weighted operations"
        return f"{self.stage} for {self.target}: {weighted}{skips} quantized"

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def text(self, width: int | None = None) -> str:
        """The report for people.

        Args:
            width: Columns; None (default) takes the terminal's, or 120 where there is none.
        """
        columns = width or max(_NARROWEST, shutil.get_terminal_size((_WIDTH, 0)).columns)
        out = StringIO()
        console = plain_console(out, columns)
        for line in _wrapped("", self.summary(), columns):
            console.print(line, soft_wrap=True)
        for warning in self.warnings:
            console.print(f"WARNING: {warning}", soft_wrap=True)
        if self.rows:
            console.print(_table(self.rows))
        for line in (*_totals_lines(self.totals), *_note_lines(self.notes, columns)):
            console.print(line, soft_wrap=True)
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

    def __str__(self) -> str:
        return self.text()

    def summary_html(self) -> Iterator[html.Html]:
        """The totals as blocks of a notebook's output."""
        t = self.totals
        yield from (html.element("p", html.element("strong", warning)) for warning in self.warnings)
        words = f"{t.weighted_quantized} of {t.weighted} weighted operations quantized"
        yield html.share(t.weighted_quantized, t.weighted, words)
        if t.residuals:
            words = f"{t.skips_quantized} of {t.residuals} residual skips quantized"
            yield html.share(t.skips_quantized, t.residuals, words)
        yield html.element("p", " · ".join(" ".join(line.split()) for line in list(_totals_lines(t))[-2:]))

    def notes_html(self) -> Iterator[html.Html]:
        """The notes, those of one kind together, to be shown when asked for."""
        for kind in dict.fromkeys([*_HEADINGS, *(note.kind for note in self.notes)]):
            found = [(note.rule, note.node, note.module_path, note.text) for note in self.notes if note.kind == kind]
            if found:
                made = html.table(("rule", "node", "module", ""), found)
                yield html.details(f"{_HEADINGS.get(kind, kind)} ({len(found)})", made)

    def _repr_html_(self) -> str:
        cells = [_cells(row) for row in self.rows]
        used = [i for i in range(len(_COLUMNS)) if i < 3 or any(row[i] for row in cells)]
        rows = [[row[i] for i in used] for row in cells]
        operations = html.folded_table([_COLUMNS[i] for i in used], rows, "operations")
        return html.card(f"{self.stage} for {self.target}", [*self.summary_html(), operations, *self.notes_html()])


def report(gm: fx.GraphModule) -> Report:
    """What is quantized in `gm`, where, by which rule, and what is not and why.

    Args:
        gm: A traced, prepared or converted graph.
    """
    held = state(gm)
    rows = tuple(operations(gm))
    return Report(rows, count(gm, rows), held.notes, stage_of(gm), held.target.name, warnings_of(gm))


def stage_of(gm: fx.GraphModule) -> str:
    """How far the graph has come: ``traced``, ``prepared``, ``calibrated`` or ``quantized``."""
    held = state(gm)
    if "quantized" in held.properties:
        return "quantized"
    if "observed" in held.properties:
        return "calibrated" if "calibration" in held.provenance else "prepared"
    return "traced"


def warnings_of(gm: fx.GraphModule) -> tuple[str, ...]:
    """What makes the graph's numbers unfit for use."""
    return (RANDOM_DATA,) if state(gm).provenance.get("calibration", {}).get("performance_only") else ()


def _table(rows: Iterable[OpRow]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    cells = [_cells(row) for row in rows]
    used = [i for i in range(len(_COLUMNS)) if i < 3 or any(row[i] for row in cells)]
    for i in used:
        table.add_column(_COLUMNS[i], overflow="fold", no_wrap=_COLUMNS[i] not in ("node", "input", "output"))
    for row in cells:
        table.add_row(*(row[i] for i in used))
    return table


def _cells(row: OpRow) -> tuple[str, ...]:
    texts = [
        "\n".join(_edge_text(e) for e in row.edges if e.quantized and e.role in roles)
        for roles in (("input", "skip"), ("weight",), ("output",))
    ]
    return row.node, row.kind, row.precision, *texts, " ".join(dict.fromkeys(e.rule for e in row.edges))


def _edge_text(edge: EdgeRow) -> str:
    if edge.role == "weight":
        scales = f"{edge.channels} scale{'s' if edge.channels > 1 else ''}"
        return scales if edge.scale is None else f"{scales} ≤ {edge.scale:.3g}"
    name = f"skip {edge.tensor}" if edge.role == "skip" else edge.tensor
    scale = "" if edge.scale is None else f" {edge.scale:.4g}"
    return f"{name}{scale}{' (shared)' if edge.role == 'skip' and edge.readers > 1 else ''}"


def _totals_lines(totals: Totals) -> Iterator[str]:
    t = totals
    yield f"weighted operations  {t.weighted_quantized} of {t.weighted} quantized"
    if t.residuals:
        projected = t.skips_quantized - t.identity_skips_quantized
        kinds = f" ({t.identity_skips_quantized} identity, {projected} projected)" if t.skips_quantized else ""
        yield f"residual additions   {t.skips_quantized} of {t.residuals} skips quantized{kinds}"
    yield (
        f"quantizers           {t.activation_quantizers + t.weight_quantizers}: "
        f"{t.activation_quantizers} of activations, {t.weight_quantizers} of weights"
    )
    yield f"parameters           {_size(t.float_bytes)} in float, {_size(t.bytes)} converted"


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _note_lines(notes: Iterable[Note], width: int) -> Iterator[str]:
    """The notes by kind, and within a kind by rule and by what comes before the colon of their text."""
    grouped: dict[str, dict[tuple[str, str], list[tuple[Note, str]]]] = {kind: {} for kind in _HEADINGS}
    for note in notes:
        head, _, rest = note.text.partition(": ")
        key = (note.rule, head if rest else "")
        grouped.setdefault(note.kind, {}).setdefault(key, []).append((note, rest or head))
    for kind, groups in grouped.items():
        if groups:
            yield ""
            yield f"{_HEADINGS.get(kind, kind)} ({sum(map(len, groups.values()))})"
        for (rule, head), found in groups.items():
            if head:
                yield from _wrapped(f"  {rule}  ", head, width)
            for places, text in _merged(found):
                yield from _wrapped("    - " if head else f"  {rule}  ", f"{places}: {text}", width)


def _merged(found: Iterable[tuple[Note, str]]) -> Iterator[tuple[str, str]]:
    """Nodes and text; nodes of which the same is to be said come together."""
    by_text: dict[str, list[Note]] = {}
    for note, text in found:
        by_text.setdefault(text, []).append(note)
    for text, notes in by_text.items():
        place = notes[0].module_path
        only = f" ({place})" if len(notes) == 1 and place not in ("", notes[0].node) else ""
        yield ", ".join(note.node for note in notes) + only, text


def _wrapped(start: str, text: str, width: int) -> list[str]:
    indent = " " * len(start)
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=indent, break_long_words=False)
