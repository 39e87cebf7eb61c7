"""``fxq.diff``: what changed between two graphs, as text and as a picture.

Nodes are the same if their names are: passes keep them (a fused node has the name of the last that it replaces). The
picture is of the later graph, with what is gone drawn where it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, Final

import torch
from torch import fx

from ..errors import FxqError
from ..graph import constant
from ..html import SCRIPT, STYLE, Html, details, element, sheet
from ..instruments import format_diff
from ..printer import format_graph, format_node
from .depiction import depict
from .sketch import Item, Sketch
from .viewer import View

__all__ = ["Change", "Diff", "diff"]

_KINDS: Final = ("added", "removed", "rewired", "changed")


@dataclass(frozen=True)
class Change:
    """What happened to one node.

    Attributes:
        kind: ``added``, ``removed``, ``rewired`` (it reads something else, and is the same otherwise) or ``changed``.
        node: Its name.
        before: Its line in the earlier graph, "" if it is not there.
        after: Its line in the later one.
    """

    kind: str
    node: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Diff:
    """What changed between two graphs. Empty, and so false, if nothing; prints as text, shows itself in a notebook.

    Attributes:
        changes: The nodes that differ, in the later graph's order, what is gone where it was.
        text: Lines marked ``-`` and ``+`` with one line around them, as :func:`fxq.format_graph` prints the graphs.
    """

    changes: tuple[Change, ...]
    text: str
    _sketch: Sketch = field(repr=False, compare=False)

    def __bool__(self) -> bool:
        return bool(self.changes)

    def summary(self) -> str:
        """One line: how many nodes of each kind of change."""
        counts = Counter(change.kind for change in self.changes)
        return ", ".join(f"{counts[kind]} {kind}" for kind in _KINDS if counts[kind]) or "nothing changed"

    def of(self, kind: str) -> tuple[str, ...]:
        """The names of the nodes with one kind of change."""
        return tuple(change.node for change in self.changes if change.kind == kind)

    def view(self, *, depth: int | None = None) -> View:
        """The picture.

        Args:
            depth: How many levels of modules are open; None opens those in which something changed, as far as that
                can be taken in.
        """
        changed = {item.key for item in self._sketch.items if item.change}
        return View(self._sketch, depth=depth, wanted=changed)

    def __str__(self) -> str:
        same = [c.node for c in self.changes if c.before == c.after]
        values = f"other values: {', '.join(same)}" if same else ""
        return "\n".join(part for part in (self.summary(), values, self.text) if part)

    def fragment(self) -> Html:
        """Summary, picture and text, without style sheet and script."""
        head = element("p", element("strong", self.summary()))
        return element(
            "div", [head, self.view().fragment(), details("as text", element("pre", str(self)))], class_="fxq"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Mapping[str, str]:
        shown = element("div", [sheet(STYLE), self.fragment(), sheet(SCRIPT)])
        return {"text/html": shown, "image/svg+xml": self.view().to_svg(), "text/plain": str(self)}


def diff(before: fx.GraphModule, after: fx.GraphModule) -> Diff:
    """What a pass, or a whole pipeline, changed.

    Args:
        before: A graph.
        after: What became of it.

    Returns:
        Changes by node; print it, leave it at the end of a cell, or take its ``view()``.

    Raises:
        FxqError: One of them is no GraphModule.
    """
    for given in (before, after):
        if not isinstance(given, fx.GraphModule):
            raise FxqError(f"cannot compare a {type(given).__name__}", hint="give two GraphModules")
    changes = {change.node: change for change in _changes(before, after)}
    text = format_diff(format_graph(before), format_graph(after))
    sketch = _merge(depict(before), depict(after), changes, _parameters(before, after))
    order = {item.key: place for place, item in enumerate(sketch.items)}
    found = sorted(changes.values(), key=lambda c: order.get(c.node, len(order)))
    return Diff(tuple(found), text, sketch)


def _changes(before: fx.GraphModule, after: fx.GraphModule) -> Iterator[Change]:
    old = {node.name: node for node in before.graph.nodes}
    new = {node.name: node for node in after.graph.nodes}
    for name in {**new, **old}:
        if name not in old:
            yield Change("added", name, after=format_node(after, new[name]))
        elif name not in new:
            yield Change("removed", name, before=format_node(before, old[name]))
        else:
            lines = format_node(before, old[name]), format_node(after, new[name])
            if lines[0] != lines[1]:
                yield Change("rewired" if _only_rewired(old[name], new[name], lines) else "changed", name, *lines)
            elif not _same_values(old[name], new[name]):
                yield Change("changed", name, *lines)


def _only_rewired(old: fx.Node, new: fx.Node, lines: tuple[str, str]) -> bool:
    """Whether a node's line is the same but for what it reads."""
    words = [line.replace(f"%{node.name} ", "") for line, node in zip(lines, (old, new), strict=True)]
    for index, node in enumerate((old, new)):
        for read in sorted((n.name for n in node.all_input_nodes), key=len, reverse=True):
            words[index] = words[index].replace(f"%{read}", "%")
    return words[0] == words[1]


def _same_values(old: fx.Node, new: fx.Node) -> bool:
    a, b = constant(old), constant(new)
    if a is None or b is None or a is b:
        return (a is None) == (b is None)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach().cpu(), b.detach().cpu())


def _parameters(before: fx.GraphModule, after: fx.GraphModule) -> dict[str, set[str]]:
    """For each node, the nodes that are part of its mark: parameters, and what leads from them to it."""
    found: dict[str, set[str]] = {}
    for gm in (before, after):
        of: dict[fx.Node, set[str]] = {}
        for node in gm.graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr" or (inputs and all(n in of for n in inputs)):
                of[node] = {node.name}.union(*(of[n] for n in inputs))
            else:
                found.setdefault(node.name, set()).update(*(of[n] for n in inputs if n in of))
    return found


def _merge(before: Sketch, after: Sketch, changes: Mapping[str, Change], parts: Mapping[str, set[str]]) -> Sketch:
    """The later picture with the changes marked, and what is gone of the earlier one."""
    old = {item.key: item for item in before.items}
    new = {item.key: item for item in after.items}
    order = [item.key for item in after.items]
    previous: str | None = None
    for key in old:
        if key not in new:
            order.insert(order.index(previous) + 1 if previous in order else 0, key)
        previous = key
    place = {key: index for index, key in enumerate(order)}
    merged = []
    for key in order:
        was, now = old.get(key), new.get(key)
        item = now or was
        assert item is not None
        gone = [k for k in was.inputs if now is None or k not in now.inputs] if was else []
        merged.append(
            replace(
                item,
                inputs=now.inputs if now else (),
                old_inputs=tuple(k for k in gone if place.get(k, len(order)) < place[key]),
                change=_change(was, now, changes, parts),
                facts=(*_facts(key, changes, parts), *item.facts),
                weighted=item.weighted if now else 0,
                low=item.low if now else 0,
            )
        )
    return Sketch(after.title, tuple(merged), {**before.types, **after.types})


def _change(was: Item | None, now: Item | None, changes: Mapping[str, Change], parts: Mapping[str, set[str]]) -> str:
    if was is None:
        return "added"
    if now is None:
        return "removed"
    own = changes.get(now.key)
    if own is not None and own.kind == "changed":
        return "changed"
    if was.inputs != now.inputs:
        return "rewired"
    if own is not None or any(part in changes for part in parts.get(now.key, ())):
        return "changed"
    return ""


def _facts(key: str, changes: Mapping[str, Change], parts: Mapping[str, set[str]]) -> Iterator[tuple[str, str]]:
    for name in (key, *sorted(parts.get(key, ()))):
        change = changes.get(name)
        if change is None:
            continue
        if change.before == change.after:
            yield change.kind, f"{name}: other values"
        for label, line in ((f"{change.kind}, before", change.before), (f"{change.kind}, after", change.after)):
            if line and change.before != change.after:
                yield label, line


def steps_html(parts: list[tuple[str, Html]]) -> Html:
    """Pictures one after another, which the script puts behind a slider.

    Args:
        parts: Title and picture of each.
    """
    blocks = [
        Html(f"<details{' open' if not i else ''}><summary>{escape(t)}</summary>{p}</details>")
        for i, (t, p) in enumerate(parts)
    ]
    return element("div", blocks, class_="fxq fxq-steps")
