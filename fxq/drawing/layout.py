"""Where everything in a picture lies, for any choice of open boxes.

Each box is arranged once (:mod:`fxq.drawing.plans`). When a box is opened it needs more room: what lies beside it is
pushed aside, what lies below it down, and nothing changes its order. That takes a few sums (:func:`place`), which
``view.js`` does in the same way, so that a click moves no more than it must and a picture on paper is the picture on
the screen.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from .plans import Plan, Wire

__all__ = ["Placed", "Spot", "coordinate", "place"]

HEADER: Final = 22.0
PAD: Final = 12.0
ROW: Final = 46.0
"""In rows higher than this, which hold an open box, the others stand at the top."""


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
