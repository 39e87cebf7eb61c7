"""Where everything in a picture lies, for any choice of open boxes.

Each box is arranged once (:mod:`fxq.layered`), with all that it holds closed; that is its :class:`Plan`. When a box is
opened it needs more room: what lies beside it is pushed aside, what lies below it down, and nothing changes its order.
That takes a few sums (:func:`place`), which ``view.js`` does in the same way, so that a click moves no more than it
must and a picture on paper is the picture on the screen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .layered import Line, Segment, arrange
from .sketch import Box, Item

__all__ = [
    "Cell",
    "Placed",
    "Plan",
    "Spot",
    "Strand",
    "Wire",
    "coordinate",
    "item_size",
    "opened_by_default",
    "opened_to",
    "place",
    "plan",
    "text_width",
]

HEADER: Final = 22.0
PAD: Final = 12.0
ROW: Final = 46.0
"""In rows higher than this, which hold an open box, the others stand at the top."""
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


@dataclass(frozen=True)
class Spot:
    """Where a cell ended up: its centre from the box's anchor, its top from the box's top, its size."""

    x: float
    y: float
    left: float
    right: float
    height: float
    inside: Placed | None = None


@dataclass(frozen=True)
class Placed:
    """An open box.

    Attributes:
        plan: Its plan.
        left: How far it reaches to the left of its anchor, the place where its first input enters.
        right: How far to the right.
        height: From its top to its bottom.
        spots: Where its cells are.
        paths: For each wire, an SVG path.
        ports: Where tensors pass its wall, from the anchor: by kind (``in`` or ``out``), tensor and oldness.
    """

    plan: Plan
    left: float
    right: float
    height: float
    spots: tuple[Spot, ...]
    paths: tuple[str, ...]
    ports: Mapping[tuple[str, str, bool], float]


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


def place(plans: Mapping[str, Plan], opened: Collection[str], key: str = "") -> Placed:
    """Where everything in box `key` lies.

    Args:
        plans: The plans of all boxes.
        opened: Which boxes inside are open.
        key: The box; the whole picture by default.
    """
    here = plans[key]
    inside = {i: place(plans, opened, c.key) for i, c in enumerate(here.cells) if c.kind == "box" and c.key in opened}
    xs = _pushed(here, inside)
    rows = [0.0] * len(here.gaps)
    for i, cell in enumerate(here.cells):
        rows[cell.row] = max(rows[cell.row], inside[i].height if i in inside else cell.height)
    tops, y = [], HEADER + PAD if key else PAD
    for row, gap in zip(rows, here.gaps, strict=True):
        tops.append(y)
        y += row + gap
    height = y - here.gaps[-1] + (PAD if rows[-1] else 0.0)
    spots = []
    for i, cell in enumerate(here.cells):
        size = inside.get(i)
        own = size.height if size else cell.height
        top = tops[cell.row] + (0.0 if size else max(0.0, (min(rows[cell.row], ROW) - own) / 2))
        left, right = (size.left, size.right) if size else (cell.width / 2, cell.width / 2)
        spots.append(Spot(xs[i], top, left, right, own, size))
    left = max((spot.left - spot.x for spot in spots), default=0.0) + PAD
    right = max(max((spot.right + spot.x for spot in spots), default=0.0) + PAD, here.title - left)
    paths = tuple(_path(here, wire, spots, (tops, rows), height) for wire in here.wires)
    ports = {(c.kind, c.key, c.old): s.x for c, s in zip(here.cells, spots, strict=True) if c.kind in ("in", "out")}
    return Placed(here, left, right, height, tuple(spots), paths, ports)


def _pushed(here: Plan, inside: Mapping[int, Placed]) -> list[float]:
    """Where the cells' centres come to lie when open boxes push away from the trunk what is in their way."""
    wider = {
        i: (max(0.0, size.left - here.cells[i].width / 2), max(0.0, size.right - here.cells[i].width / 2))
        for i, size in inside.items()
    }
    none, shift = (0.0, 0.0), [0.0] * len(here.cells)
    for strand in here.strands:
        outer, inner = (1, 0) if strand.side > 0 else (0, 1)
        moved = max(
            abs(shift[beside] if beside >= 0 else 0.0) + wider.get(beside, none)[outer] + wider.get(cell, none)[inner]
            for cell, beside in strand.cells
        )
        for cell, _ in strand.cells:
            shift[cell] = strand.side * moved
    return [cell.x + moved for cell, moved in zip(here.cells, shift, strict=True)]


def _path(here: Plan, wire: Wire, spots: Sequence[Spot], rows: tuple[list[float], list[float]], height: float) -> str:
    above, below = spots[wire.above], spots[wire.below]
    upper, lower = here.cells[wire.above], here.cells[wire.below]
    tops, heights = rows
    x1, y1 = above.x + wire.start, above.y + above.height
    if above.inside is not None:
        x1 = above.x + above.inside.ports["out", wire.tensor, wire.old]
    elif upper.kind == "in":
        x1, y1 = above.x, HEADER
    elif upper.kind == "bend":
        x1, y1 = above.x, tops[upper.row]
    x2, y2 = below.x + wire.end, below.y
    if below.inside is not None:
        x2 = below.x + below.inside.ports["in", wire.tensor, wire.old]
    elif lower.kind == "out":
        x2, y2 = below.x, height
    elif lower.kind == "bend":
        x2, y2 = below.x, tops[lower.row]
    bottom, top = tops[upper.row] + heights[upper.row], tops[lower.row]
    text = f"M{coordinate(x1)} {coordinate(y1)}"
    if x1 != x2:
        middle = (bottom + top) / 2
        bow = " ".join(map(coordinate, (x1, middle, x2, middle, x2, top)))
        text += f"V{coordinate(bottom)}C{bow}"
    text += f"V{coordinate(y2)}"
    if lower.kind in ("item", "box"):
        text += "m-3.5 -5l3.5 5l3.5 -5"
    return text


def coordinate(value: float) -> str:
    """A coordinate as text: to a tenth of a pixel, halves upwards, as ``view.js`` rounds."""
    whole, rest = divmod(abs(tenths := math.floor(value * 10 + 0.5)), 10)
    return f"{'-' if tenths < 0 else ''}{whole}{f'.{rest}' if rest else ''}"
