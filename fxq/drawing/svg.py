"""The picture as SVG: one drawing for paper and for the browser.

All styles are attributes, for some places that show saved notebooks drop style sheets. What tells precisions apart is
lightness and a word as well as colour (Okabe and Ito's palette, which people of all kinds of sight can tell apart):
INT8 is dark blue, 16-bit floats are amber of a middle lightness, float32 is white. Lines of quantized tensors are
thick, of float tensors thin, of what is no tensor dotted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Final

from .layout import HEADER, Placed, Spot, coordinate
from .plans import Cell, Plan, item_size, text_width
from .sketch import Box, Item

__all__ = ["Drawing", "Look", "draw", "legend"]


@dataclass(frozen=True)
class Look:
    """Colours of a mark and of the lines from it."""

    fill: str
    stroke: str
    ink: str
    line: str
    width: float
    dash: str = ""
    tag: str = ""


LOOKS: Final[Mapping[str, Look]] = {
    "int8": Look("#0072b2", "#00456c", "#ffffff", "#6b7680", 1.2, tag="int8"),
    "low": Look("#007a59", "#004a36", "#ffffff", "#6b7680", 1.2, tag="low"),
    "half": Look("#f2c14e", "#8a6100", "#221800", "#b07d00", 1.8, tag="16 bit"),
    "float": Look("#ffffff", "#59636e", "#1d2329", "#6b7680", 1.2),
    "plain": Look("#f1f3f5", "#aab2ba", "#59636e", "#aab2ba", 1.0, "2 3"),
    "io": Look("#e8ecf0", "#59636e", "#1d2329", "#6b7680", 1.2),
    "quantizer": Look("#d5e9f6", "#0072b2", "#003a5c", "#0072b2", 2.8),
    "unsolved": Look("#ffffff", "#0072b2", "#003a5c", "#0072b2", 2.2, "6 3"),
}
MINUS: Final = "\u2212"
CHANGES: Final[Mapping[str, tuple[str, str, str]]] = {
    "added": ("+", "#00694a", ""),
    "removed": (MINUS, "#a83f00", "4 3"),
    "changed": ("~", "#6d3f8c", ""),
    "rewired": ("\u21b7", "#8a6100", ""),
}
"""Sign, colour and dashes of what a pass did to a node."""
_FONT: Final = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
_MARGIN: Final = 8.0


@dataclass(frozen=True)
class Drawing:
    """A picture's content, and how to draw it.

    Attributes:
        box: The whole, as :func:`fxq.drawing.sketch.nest` gives it.
        plans: How each box is arranged.
        items: The items by key.
        numbers: A number for each item and box, by which script finds it.
    """

    box: Box
    plans: Mapping[str, Plan]
    items: Mapping[str, Item]
    numbers: Mapping[str, int]


def draw(drawing: Drawing, placed: Placed, *, hidden: bool) -> str:
    """The picture.

    Args:
        drawing: What to draw.
        placed: Where.
        hidden: Also draw what closed boxes hold, not to be seen, for script to show; without, marks have tooltips.
    """
    width, height = placed.left + placed.right + 2 * _MARGIN, placed.height + 2 * _MARGIN
    pen = _Pen(drawing, hidden=hidden)
    body = "".join(pen.inside(drawing.box, placed))
    title = escape(drawing.box.title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{coordinate(width)}" height="{coordinate(height)}" '
        f'viewBox="0 0 {coordinate(width)} {coordinate(height)}" font-family="{_FONT}" role="img" aria-label="{title}">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>'
        f'<g transform="translate({coordinate(placed.left + _MARGIN)} {coordinate(_MARGIN)})">{body}</g></svg>'
    )


class _Pen:
    def __init__(self, drawing: Drawing, *, hidden: bool) -> None:
        self.drawing, self.hidden = drawing, hidden
        self.boxes = {box.key: box for box in drawing.box.boxes}

    def inside(self, box: Box, placed: Placed | None) -> Iterator[str]:
        """What an open box holds, lines first; without `placed`, hidden and without coordinates."""
        here = self.drawing.plans[box.key]
        yield '<g fill="none">'
        for index, wire in enumerate(here.wires):
            old = CHANGES["removed"][1:] if wire.old else None
            look = LOOKS[self.drawing.items[wire.tensor].style]
            colour, dash = old or (look.line, look.dash)
            dashes = f' stroke-dasharray="{dash}"' if dash else ""
            path = f' d="{placed.paths[index]}"' if placed else ""
            number = f' data-t="{self.drawing.numbers[wire.tensor]}"' if self.hidden else ""
            yield f'<path{number} stroke="{colour}" stroke-width="{look.width}"{dashes}{path}/>'
        yield "</g>"
        for index, cell in enumerate(here.cells):
            spot = placed.spots[index] if placed else None
            if cell.kind == "item":
                yield from self._item(self.drawing.items[cell.key], spot)
            elif cell.kind == "box":
                yield from self._box(self.boxes[cell.key], cell, spot)

    def _open(self, key: str, kind: str, spot: Spot | None) -> str:
        number = f' class="fxq-{kind}" data-n="{self.drawing.numbers[key]}"' if self.hidden else ""
        where = f' transform="translate({coordinate(spot.x)} {coordinate(spot.y)})"' if spot else ""
        return f"<g{number}{where}>"

    def _item(self, item: Item, spot: Spot | None) -> Iterator[str]:
        width, height = item_size(item)
        look = LOOKS[item.style]
        round_ = height / 2 if item.style in ("quantizer", "unsolved", "io") else 5
        dashes = f' stroke-dasharray="{look.dash}"' if look.dash else ""
        yield self._open(item.key, "item", spot)
        if not self.hidden:
            yield f"<title>{escape(_tip(item))}</title>"
        yield _rect((-width / 2, 0, width, height), round_, look.fill, look.stroke, dashes)
        yield from self._texts(item, width, height, look)
        if item.change:
            yield from _change(item.change, width, height)
        yield "</g>"

    @staticmethod
    def _texts(item: Item, width: float, height: float, look: Look) -> Iterator[str]:
        small = item.style in ("quantizer", "unsolved")
        size, lines = (10 if small else 12), (2 if item.sub else 1)
        base = height / 2 + size * 0.36 - (6.5 if lines == 2 else 0)
        if look.tag and not small:
            yield _text(-width / 2 + 9, base, item.label, size, look.ink, bold=True, anchor="start")
            yield _text(width / 2 - 8, base, look.tag, 9, look.ink, anchor="end")
        else:
            yield _text(0, base, item.label, size, look.ink, bold=True)
        if item.sub and look.tag:
            yield _text(-width / 2 + 9, base + 13, item.sub, 10, look.ink, anchor="start")
        elif item.sub:
            yield _text(0, base + 13, item.sub, 10, look.ink)

    def _box(self, box: Box, cell: Cell, spot: Spot | None) -> Iterator[str]:
        placed = spot.inside if spot else None
        yield self._open(box.key, "box", spot)
        if self.hidden or placed is None:
            shown = ' display="none"' if placed is not None else ""
            yield f'<g class="fxq-shut"{shown}>' if self.hidden else "<g>"
            yield from self._shut(box, cell)
            yield "</g>"
        if self.hidden or placed is not None:
            shown = ' display="none"' if placed is None else ""
            yield f'<g class="fxq-open"{shown}>' if self.hidden else "<g>"
            yield from self._frame(box, placed)
            yield from self.inside(box, placed)
            yield "</g>"
        yield "</g>"

    def _shut(self, box: Box, cell: Cell) -> Iterator[str]:
        width, height = cell.width, cell.height
        items = list(box.items)
        weighted, low = sum(i.weighted for i in items), sum(i.low for i in items)
        marks = sum(i.style not in ("quantizer", "unsolved") for i in items)
        words = " · ".join(part for part in (box.type, f"{marks} node{'s' if marks != 1 else ''}") if part)
        if not self.hidden:
            share = f"\n{low} of {weighted} weighted operations quantized" if weighted else ""
            yield f"<title>{escape('.'.join(box.path))}: {escape(words)}{share}</title>"
        yield _rect((-width / 2 + 3, 3, width, height), 5, "#ccd5dd", "#7d8a96")
        yield _rect((-width / 2, 0, width, height), 5, "#f4f7f9", "#59636e")
        yield _text(0, 17, f"+ {box.title}", 12, "#1d2329", bold=True)
        yield _text(0, 31, words, 10, "#3c454e")
        changes = [i.change for i in items if i.change]
        if changes:
            yield from _change("changed", width, height)
        if weighted:
            full = width - 16
            yield _rect((-full / 2, 36, full, 5), 0, "#ffffff", "#59636e")
            yield _rect((-full / 2, 36, full * low / weighted, 5), 0, "#0072b2", "none") if low else ""

    @staticmethod
    def _frame(box: Box, placed: Placed | None) -> Iterator[str]:
        left, right, height = (placed.left, placed.right, placed.height) if placed else (0.0, 0.0, HEADER)
        width = left + right
        yield _rect((-left, 0, width, height), 6, "#1d2329", "#9aa5af", ' fill-opacity="0.035"')
        yield _rect((-left, 0, width, HEADER), 6, "#dfe6ec", "#9aa5af", ' class="fxq-head"')
        yield f'<g class="fxq-title" transform="translate({coordinate(-left)} 0)">'
        end = text_width(f"{MINUS} {box.title}", 11, bold=True)
        yield _text(9, 15, f"{MINUS} {box.title}", 11, "#1d2329", bold=True, anchor="start")
        if box.type:
            yield _text(18 + end, 15, box.type, 10, "#3c454e", anchor="start")
        yield "</g>"


def _rect(where: tuple[float, float, float, float], round_: float, fill: str, stroke: str, more: str = "") -> str:
    """A rectangle at x, y with width and height."""
    x, y, width, height = map(coordinate, where)
    top = f' y="{y}"' if y != "0" else ""
    corners = f' rx="{coordinate(round_)}"' if round_ else ""
    return f'<rect{more} x="{x}"{top} width="{width}" height="{height}"{corners} fill="{fill}" stroke="{stroke}"/>'


def _text(x: float, y: float, text: str, size: int, ink: str, *, bold: bool = False, anchor: str = "middle") -> str:
    more = (' font-weight="600"' if bold else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    where = f'x="{coordinate(x)}" y="{coordinate(y)}"'
    return f'<text {where} font-size="{size}" fill="{ink}"{more}>{escape(text)}</text>'


def _change(change: str, width: float, height: float) -> Iterator[str]:
    sign, colour, dash = CHANGES[change]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    line = f' stroke-width="2.5"{dashes}'
    yield _rect((-width / 2 - 3, -3, width + 6, height + 6), 8, "none", colour, line)
    yield f'<circle cx="{coordinate(width / 2 + 2)}" cy="-1" r="8" fill="{colour}"/>'
    yield _text(width / 2 + 2, 3.5, sign, 13, "#ffffff", bold=True)


def _tip(item: Item) -> str:
    return "\n".join(f"{label}: {text}" for label, text in item.facts)


def legend(styles: Collection[str], changes: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """What the colours mean: small drawings and words.

    Args:
        styles: The styles that a picture uses.
        changes: The changes that it shows.
    """
    words = {
        "int8": "runs in INT8",
        "low": "runs in another low precision",
        "half": "16-bit float",
        "float": "float32",
        "quantizer": "Q/DQ, and what reads it",
        "unsolved": "observer: no scale yet",
        "plain": "no tensor",
    }
    for style, word in words.items():
        if style in styles:
            look = LOOKS[style]
            dashes = f' stroke-dasharray="{look.dash}"' if look.dash else ""
            round_ = 7 if style in ("quantizer", "unsolved") else 3
            mark = _rect((1, 1, 24, 14), round_, look.fill, look.stroke, dashes)
            yield f'<svg width="26" height="16">{mark}</svg>', word
    for change, (sign, colour, _) in CHANGES.items():
        if change in changes:
            mark = f'<circle cx="9" cy="8" r="7" fill="{colour}"/>{_text(9, 12, sign, 12, "#ffffff")}'
            yield f'<svg width="18" height="16">{mark}</svg>', change
