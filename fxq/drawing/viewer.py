"""``fxq.view``: a graph as a picture, on paper and to click on.

The picture is laid out and drawn in Python (:mod:`fxq.drawing.layout`, :mod:`fxq.drawing.svg`), so that the SVG and
what the browser shows are the same. In a notebook a script takes the still picture and makes it interactive; it needs
nothing from anywhere. Where no script runs, the still picture stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, Final

from torch import fx

from ..backends.files import write_whole
from ..errors import FxqError
from ..html import SCRIPT, STYLE, Html, element, image, json_script, sheet
from .depiction import depict
from .layout import place
from .plans import opened_by_default, opened_to, plan
from .sketch import Box, Sketch, nest
from .svg import Drawing, draw, legend

__all__ = ["View", "page", "view"]

_LIMIT: Final = 48
_HINT: Final = (
    "Click a node for its shape, scale, rule and source line.\n"
    "Click a module to open it, its title to close it.\n"
    "Drag to move, Ctrl and wheel to zoom, Esc to let go."
)


class View:
    """A picture of a graph. At the end of a notebook cell it shows itself.

    Args:
        sketch: What to show.
        depth: How many levels of modules are open; None opens as many as can be taken in at a glance.
        wanted: Keys of items; with them, None opens only modules that hold some.
    """

    def __init__(self, sketch: Sketch, *, depth: int | None = None, wanted: Collection[str] | None = None) -> None:
        box = nest(sketch)
        items = {item.key: item for item in sketch.items}
        numbers = {key: number for number, key in enumerate([*items, *(inner.key for inner in box.boxes)])}
        self.sketch = sketch
        self._depth = depth
        self._drawing = Drawing(box, plan(box), items, numbers)
        self._opened = opened_by_default(box, _LIMIT, wanted) if depth is None else opened_to(box, depth)

    def to_svg(self) -> str:
        """The picture as SVG, modules open and closed as at first; hovering shows what the panel says."""
        return draw(self._drawing, place(self._drawing.plans, self._opened), hidden=False)

    def to_html(self, path: str | Path | None = None) -> str:
        """The interactive picture as one HTML page that needs no other file and no network.

        Args:
            path: Where to write it, whole or not at all; None (default) writes nothing.

        Returns:
            The page.
        """
        return page(self.sketch.title, [self.fragment(), sheet(SCRIPT)], path)

    def fragment(self) -> Html:
        """The picture as an element with its data, to which a script that follows gives life."""
        still = draw(self._drawing, place(self._drawing.plans, self._opened), hidden=True)
        items = self.sketch.items
        signs = legend({item.style for item in items}, {item.change for item in items})
        bar = element("div", [element("span", [Html(sign), word]) for sign, word in signs], class_="fxq-bar")
        stage = element("div", image(still, f"graph of {self.sketch.title}"), class_="fxq-stage")
        panel = element("div", "", class_="fxq-panel")
        return element("div", [bar, stage, panel, json_script(self._data())], class_="fxq fxq-view")

    def _data(self) -> dict[str, Any]:
        """What the script needs: plans, and what the panel says of each item and box."""
        drawing, numbers = self._drawing, self._drawing.numbers
        words: dict[str, int] = {}

        def word(text: str) -> int:
            return words.setdefault(text, len(words))

        def entry(title: str, facts: tuple[tuple[str, str], ...], related: tuple[str, ...], box: str) -> dict[str, Any]:
            known = [numbers[key] for key in related if key in numbers]
            return {
                "title": word(title),
                "facts": [(word(label), word(text)) for label, text in facts],
                "related": known,
                "box": numbers[box],
            }

        holders = _holders(drawing.box)
        entries = []
        for key, item in drawing.items.items():
            made = entry(f"{item.label}  {item.key}", item.facts, item.related, holders[key])
            entries.append(made | {"follow": int(item.style not in ("quantizer", "unsolved"))})
        for box in drawing.box.boxes:
            title = ".".join(box.path) or box.title
            entries.append(entry(title, tuple(_box_facts(box)), (), holders.get(box.key, "")))
        plans: dict[str, Any] = {str(numbers[key]): one.to_data(numbers) for key, one in drawing.plans.items()}
        return {
            "items": entries,
            "plans": plans | {"root": numbers[""]},
            "opened": sorted(numbers[key] for key in self._opened),
            "words": list(words),
            "hint": _HINT,
        }

    def with_facts(self, facts: Mapping[str, Sequence[tuple[str, str]]]) -> View:
        """The same picture, whose panel says more.

        Args:
            facts: Node name to labels and texts, which come before what the panel says anyway.
        """
        items = [replace(item, facts=(*facts.get(item.key, ()), *item.facts)) for item in self.sketch.items]
        return View(replace(self.sketch, items=tuple(items)), depth=self._depth)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Mapping[str, str]:
        shown = element("div", [sheet(STYLE), self.fragment(), sheet(SCRIPT)])
        return {"text/html": shown, "image/svg+xml": self.to_svg(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        boxes = sum(1 for _ in self._drawing.box.boxes) - 1
        return f"<View of {self.sketch.title}: {len(self.sketch.items)} nodes in {boxes} modules>"


def view(gm: fx.GraphModule, *, depth: int | None = None) -> View:
    """A picture of a graph: what is in low precision, through which quantizers, by which rule, from which line.

    Modules are boxes that open and close. Quantizers, or quantize with dequantize, are marks on the lines; lines of
    quantized tensors are thick. Weights are part of the operation that reads them.

    Args:
        gm: A traced, prepared or converted graph. Of a GraphModule that is not from fxq the picture shows less.
        depth: How many levels of modules are open at first; None (default) opens as many as can be taken in.

    Returns:
        The picture: leave it at the end of a cell, or call its ``to_svg()`` or ``to_html("graph.html")``.

    Raises:
        FxqError: `gm` is no GraphModule, or `depth` no number of levels.
    """
    if not isinstance(gm, fx.GraphModule):
        raise FxqError(f"cannot draw a {type(gm).__name__}", hint="give a GraphModule: fxq.trace(model, inputs)")
    if depth is not None and depth < 0:
        raise FxqError(f"depth is {depth}", hint="give 0 or more levels, or None")
    return View(depict(gm), depth=depth)


def page(title: str, content: list[Html], path: str | Path | None) -> str:
    """A whole HTML page.

    Args:
        title: Its title.
        content: Its body.
        path: Where to write it; None writes nothing.
    """
    body = "\n".join(content)
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"{sheet(STYLE)}</head>\n<body>\n{body}\n</body></html>\n"
    )
    if path is not None:
        write_whole(Path(path), text.encode())
    return text


def _holders(box: Box) -> dict[str, str]:
    """For each item and box, the key of the box that holds it."""
    return {child.key: outer.key for outer in box.boxes for child in outer.children}


def _box_facts(box: Box) -> list[tuple[str, str]]:
    items = list(box.items)
    kinds = Counter(item.label.split()[0] for item in items if item.style not in ("quantizer", "unsolved"))
    facts = [("module", ".".join(box.path))] if box.path else []
    facts += [("type", box.type)] if box.type else []
    weighted, low = sum(i.weighted for i in items), sum(i.low for i in items)
    if weighted:
        facts.append(("quantized", f"{low} of {weighted} weighted operations"))
    quantizers = sum(1 for item in items if item.style in ("quantizer", "unsolved"))
    if quantizers:
        facts.append(("quantizers of activations", str(quantizers)))
    facts.append(("holds", ", ".join(f"{n} {kind}" if n > 1 else kind for kind, n in sorted(kinds.items()))))
    changes = Counter(item.change for item in items if item.change)
    if changes:
        facts.append(("changes", ", ".join(f"{n} {kind}" for kind, n in sorted(changes.items()))))
    return facts
