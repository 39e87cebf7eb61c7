"""How each box of a picture is arranged: once, with everything inside it closed.

Sizes of marks are estimated from their texts, so that no typeface has to be asked and the same graph always gives the
same plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .layered import Line, Segment, arrange
from .sketch import Box, Item

__all__ = [
    "Cell",
    "Plan",
    "Strand",
    "Wire",
    "item_size",
    "opened_by_default",
    "opened_to",
    "plan",
    "text_width",
]

_HEIGHTS: Final = {"quantizer": 18.0, "unsolved": 18.0, "io": 34.0, "plain": 30.0}
_NODE: Final = 36.0
_BOX: Final = 46.0
_NARROW: Final = "fijltI.,:;'|![]()/ "
_WIDE: Final = "mwMW@%…\u00d7"


@dataclass(frozen=True)
class Cell:
    """Something in a box's arrangement.

    Attributes:
        kind: ``item``, ``box``, ``in``, ``out`` (where a tensor passes the wall) or ``bend``.
        key: Of the item or box, or the tensor; "" for a bend.
        row: Its row.
        x: Its centre; the trunk's is near 0.
        width: Pixels, closed.
        height: Likewise.
        old: For a wall: it belongs to an edge that is no more.
    """

    kind: str
    key: str
    row: int
    x: float
    width: float
    height: float
    old: bool = False


@dataclass(frozen=True)
class Wire:
    """A piece of a tensor's line between two cells of neighbouring rows.

    Attributes:
        tensor: Key of the item that gives it.
        above: Index of the upper cell.
        below: Index of the lower cell.
        start: Where it leaves the upper cell, from that cell's centre.
        end: Where it meets the lower one.
        old: It is an edge that is no more.
    """

    tensor: str
    above: int
    below: int
    start: float
    end: float
    old: bool = False


@dataclass(frozen=True)
class Strand:
    """Cells in one column that straight lines join.

    Attributes:
        side: 1 to the right of the trunk, -1 to the left.
        cells: For each its index, and that of the next cell of its row towards the trunk, -1 if there is none.
    """

    side: int
    cells: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """A box's arrangement, with everything inside closed.

    Attributes:
        key: The box.
        cells: What it holds.
        wires: What joins them.
        strands: The cells beside the trunk, from it outwards, those together that are to stay in line.
        gaps: Pixels below each row.
        title: Width of its title.
    """

    key: str
    cells: tuple[Cell, ...]
    wires: tuple[Wire, ...]
    strands: tuple[Strand, ...]
    gaps: tuple[float, ...]
    title: float

    def to_data(self, numbers: Mapping[str, int]) -> dict[str, Any]:
        """The plan for the browser, with items by number."""
        return {
            "cells": [[c.kind, numbers.get(c.key, -1), c.row, c.x, c.width, c.height, int(c.old)] for c in self.cells],
            "wires": [[numbers[w.tensor], w.above, w.below, w.start, w.end, int(w.old)] for w in self.wires],
            "strands": [[strand.side, strand.cells] for strand in self.strands],
            "gaps": self.gaps,
            "title": self.title,
        }


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """About how wide a text is in a sans-serif typeface, in pixels."""
    units = sum(0.31 if c in _NARROW else 0.9 if c in _WIDE else 0.69 if c.isupper() else 0.56 for c in text)
    return units * size * (1.06 if bold else 1.0)


def item_size(item: Item) -> tuple[float, float]:
    """Width and height of an item's mark."""
    small = item.style in ("quantizer", "unsolved")
    label, sub = text_width(item.label, 10 if small else 12, bold=True), text_width(item.sub, 10)
    tag = 0.0 if item.style in ("float", "plain", "io") or small else 30.0
    return max(label + tag, sub, 22.0) + (14 if small else 22), _HEIGHTS.get(item.style, _NODE)


def box_size(box: Box) -> tuple[float, float]:
    """Width and height of a closed box."""
    items = sum(1 for _ in box.items)
    return max(text_width(box.title, 12, bold=True) + 22, text_width(f"{box.type} · {items} nodes", 10), 90) + 24, _BOX


def plan(box: Box) -> dict[str, Plan]:
    """The plans of a box and of all boxes inside, by key."""
    return {one.key: _plan(one) for one in box.boxes}


def _plan(box: Box) -> Plan:
    ins = [("in", way.tensor, 8.0, 0.0, way.old) for way in box.ways_in]
    outs = [("out", way.tensor, 8.0, 0.0, way.old) for way in box.ways_out]
    inner = [_closed(child) for child in box.children]
    base = [*ins, *inner, *outs]
    where = {(kind, key, old): index for index, (kind, key, _, _, old) in enumerate(base)}
    child = {key: index for index, (kind, key, *_) in enumerate(base) if kind in ("item", "box")}
    lines = []
    for route in box.routes:
        source = where["in", route.tensor, route.old] if route.source is None else child[route.source]
        targets = [where["out", route.tensor, route.old] if t is None else child[t] for t in route.targets]
        lines.append(Line(source, tuple(targets)))
    found = arrange(
        [width for _, _, width, _, _ in base],
        lines,
        first=range(len(ins)),
        last=range(len(ins) + len(inner), len(base)),
    )
    zero = found.x[0] if base else 0.0
    cells = [
        Cell(kind, key, found.rows[i], round(found.x[i] - zero, 1), round(width, 1), height, old)
        for i, (kind, key, width, height, old) in enumerate(base)
    ]
    cells += [
        Cell("bend", "", found.rows[i], round(found.x[i] - zero, 1), 8.0, 0.0)
        for i in range(len(base), len(found.rows))
    ]
    wires = _wires(box, cells, found.segments)
    title = round(text_width(_title(box), 11, bold=True) + 34, 1)
    return Plan(box.key, tuple(cells), wires, _strands(cells, wires), _gaps(cells, wires), title)


def _closed(child: Box | Item) -> tuple[str, str, float, float, bool]:
    if isinstance(child, Item):
        return ("item", child.key, *item_size(child), False)
    return ("box", child.key, *box_size(child), False)


def _title(box: Box) -> str:
    return f"{box.title}  {box.type}" if box.type else box.title


def _wires(box: Box, cells: Sequence[Cell], segments: Sequence[Segment]) -> tuple[Wire, ...]:
    starts = _spread(cells, segments, above=True)
    ends = _spread(cells, segments, above=False)
    return tuple(
        Wire(
            box.routes[s.line].tensor, s.above, s.below, starts[s.above, s.line], ends[s.below, s.line],
            box.routes[s.line].old,
        )
        for s in segments
    )  # fmt: skip


def _spread(cells: Sequence[Cell], segments: Sequence[Segment], *, above: bool) -> dict[tuple[int, int], float]:
    """Where lines meet a cell's edge, from its centre: side by side, in the order of where they come from.

    A line that comes straight down meets the middle.
    """
    meeting: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for s in segments:
        here, there = (s.above, s.below) if above else (s.below, s.above)
        meeting[here][s.line].append(cells[there].x)
    found = {}
    for here, lines in meeting.items():
        middle = cells[here].x
        far = sorted((sum(xs) / len(xs) if middle not in xs else middle, line) for line, xs in lines.items())
        step = min(14.0, cells[here].width / (len(far) + 1))
        straight = next((i for i, (x, _) in enumerate(far) if x == middle), (len(far) - 1) / 2)
        for index, (_, line) in enumerate(far):
            offset = (index - straight) * step
            edge = cells[here].width / 2 - 4
            found[here, line] = round(max(-edge, min(edge, offset)), 1)
    return found


def _strands(cells: Sequence[Cell], wires: Sequence[Wire]) -> tuple[Strand, ...]:
    first = list(range(len(cells)))
    for wire in sorted(wires, key=lambda w: cells[w.above].row):
        if cells[wire.above].x == cells[wire.below].x:
            first[wire.below] = first[wire.above]
    rows: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(cells)), key=lambda i: abs(cells[i].x)):
        rows[cells[index].row].append(index)
    strands: dict[tuple[float, int], list[tuple[int, int]]] = defaultdict(list)
    for row in rows.values():
        last = {1: -1, -1: -1}
        for index in row:
            x = cells[index].x
            if x == 0:
                last = {1: index, -1: index}
                continue
            side = 1 if x > 0 else -1
            strands[abs(x), first[index] * side].append((index, last[side]))
            last[side] = index
    return tuple(
        Strand(1 if cells[members[0][0]].x > 0 else -1, tuple(sorted(members)))
        for _, members in sorted(strands.items())
    )


def _gaps(cells: Sequence[Cell], wires: Sequence[Wire]) -> tuple[float, ...]:
    """Room below each row: more where lines go sideways, and the more the farther they go."""
    gaps = [14.0] * (max((c.row for c in cells), default=0) + 1)
    for wire in wires:
        a, b = cells[wire.above], cells[wire.below]
        aside = abs(a.x + wire.start - b.x - wire.end)
        gaps[a.row] = max(gaps[a.row], min(44.0, 14.0 + aside * 0.14))
    return tuple(float(round(gap)) for gap in gaps)


def opened_by_default(box: Box, limit: int, wanted: Collection[str] | None = None) -> frozenset[str]:
    """Which boxes are open at first: level by level, and all inside one box or none, as long as no more than `limit`
    marks are to be seen.

    Args:
        box: The whole.
        limit: How many marks can be taken in.
        wanted: Keys of items; with them, only boxes that hold some are opened.
    """
    opened: list[str] = []
    seen, level = len(box.children), [box]
    while level:
        below = []
        for outer in level:
            inner = [child for child in outer.children if isinstance(child, Box) and _holds(child, wanted)]
            more = sum(len(child.children) - 1 for child in inner)
            if seen + more <= limit:
                seen += more
                opened += [child.key for child in inner]
                below += inner
        level = below
    return frozenset(opened)


def _holds(box: Box, wanted: Collection[str] | None) -> bool:
    return wanted is None or any(item.key in wanted for item in box.items)


def opened_to(box: Box, depth: int) -> frozenset[str]:
    """The boxes that are open if `depth` levels of them are."""
    inner = [child for child in box.children if isinstance(child, Box)] if depth > 0 else []
    return frozenset(child.key for child in inner).union(*(opened_to(child, depth - 1) for child in inner))
