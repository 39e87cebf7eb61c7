"""What a picture of a graph shows, before anyone knows where: items, and the boxes that hold them.

An :class:`Item` is one mark on the paper. :func:`nest` sorts items into boxes, one for each call of a module, and
routes every tensor through the walls of the boxes between who gives it and who reads it. Nothing here knows fx.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Box", "Item", "Port", "Route", "Sketch", "nest"]

_LARGEST: Final = 90
_PART: Final = 30


@dataclass(frozen=True)
class Item:
    """One mark.

    Attributes:
        key: Name, unique in the picture.
        label: What it is, for example ``max_pool2d``.
        sub: A second line, smaller.
        style: How it looks: ``int8``, ``low``, ``half``, ``float``, ``plain``, ``io``, ``quantizer`` or ``unsolved``.
        path: The modules around it, outermost first.
        inputs: Keys of the items that it reads.
        facts: What the panel says of it: label and text.
        related: Keys of items that light up with it: a tie group, a residual's other end.
        weighted: Convolutions and matrix products in it.
        low: How many of them are quantized.
        change: In a picture of a change: ``added``, ``removed``, ``changed``, ``rewired``, or "".
        old_inputs: In a picture of a change: keys of the items that it reads no more.
    """

    key: str
    label: str
    sub: str = ""
    style: str = "float"
    path: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    related: tuple[str, ...] = ()
    weighted: int = 0
    low: int = 0
    change: str = ""
    old_inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sketch:
    """A picture's content.

    Attributes:
        title: What it is of.
        items: The items; each reads earlier ones only.
        types: Type names of modules by their path.
    """

    title: str
    items: tuple[Item, ...]
    types: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Port:
    """Where a tensor passes the wall of a box."""

    tensor: str
    old: bool = False


@dataclass(frozen=True)
class Route:
    """A tensor's way inside one box.

    Attributes:
        tensor: Key of the item that gives it.
        source: The child that it comes from; None for the box's own wall.
        targets: The children that read it; None for the wall.
        old: It is the way of an edge that is no more.
    """

    tensor: str
    source: str | None
    targets: tuple[str | None, ...]
    old: bool = False


@dataclass
class Box:
    """A module's call, or the whole picture.

    Attributes:
        key: ``""`` for the whole, else a key unlike that of any item.
        title: The module's path below the enclosing box.
        type: Its type's name, as far as it is known.
        path: The module's path.
        children: Boxes and items in order.
        ways_in: Tensors from outside that something inside reads.
        ways_out: Tensors from inside that something outside reads.
        routes: The tensors' ways inside.
    """

    key: str
    title: str
    type: str
    path: tuple[str, ...]
    children: list[Box | Item] = field(default_factory=list)
    ways_in: list[Port] = field(default_factory=list)
    ways_out: list[Port] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)

    @property
    def items(self) -> Iterable[Item]:
        """All items inside, in order."""
        for child in self.children:
            if isinstance(child, Item):
                yield child
            else:
                yield from child.items

    @property
    def boxes(self) -> Iterable[Box]:
        """This box and all inside, outermost first."""
        yield self
        for child in self.children:
            if isinstance(child, Box):
                yield from child.boxes


def nest(sketch: Sketch) -> Box:
    """The items in their boxes.

    A module that is called twice has two boxes. A box with one child gives way to it, and a box with very many
    children gets them in parts, so that each part can be drawn and read.

    Args:
        sketch: What to draw.
    """
    root = Box("", sketch.title, sketch.types.get("", ""), ())
    stack = [root]
    for item in sketch.items:
        shared = 0
        while shared < min(len(stack) - 1, len(item.path)) and stack[shared + 1].path == item.path[: shared + 1]:
            shared += 1
        del stack[shared + 1 :]
        for depth in range(shared, len(item.path)):
            path = item.path[: depth + 1]
            title = ".".join(path[-2:]) if path[-1].isdigit() else path[-1]
            box = Box("", title, sketch.types.get(".".join(path), ""), path)
            stack[-1].children.append(box)
            stack.append(box)
        stack[-1].children.append(item)
    _simplify(root)
    for number, box in enumerate(root.boxes):
        box.key = f"box {number}" if number else ""
    _route(root, sketch.items)
    return root


def _simplify(box: Box) -> None:
    for index, child in enumerate(box.children):
        while isinstance(child, Box) and len(child.children) == 1:
            only = child.children[0]
            if isinstance(only, Box) and not only.title.startswith(f"{child.title}."):
                only.title = f"{child.title}.{only.title}"
            child = only  # noqa: PLW2901  the loop goes on with what takes its place
        box.children[index] = child
        if isinstance(child, Box):
            _simplify(child)
    if len(box.children) > _LARGEST:
        box.children = [_part(box, start) for start in range(0, len(box.children), _PART)]


def _part(box: Box, start: int) -> Box | Item:
    children = box.children[start : start + _PART]
    if len(children) == 1:
        return children[0]
    first, last = (list(c.items)[end] if isinstance(c, Box) else c for c, end in ((children[0], 0), (children[-1], -1)))
    return Box("", f"{first.key} … {last.key}", "", box.path, children)


def _route(root: Box, items: Sequence[Item]) -> None:
    chains: dict[str, list[Box]] = {}

    def visit(box: Box, chain: list[Box]) -> None:
        for child in box.children:
            if isinstance(child, Box):
                visit(child, [*chain, child])
            else:
                chains[child.key] = chain

    visit(root, [root])
    ways: dict[tuple[str, str, bool], tuple[str | None, dict[str | None, None]]] = {}
    for item in items:
        for old, tensors in ((False, item.inputs), (True, item.old_inputs)):
            for tensor in tensors:
                _route_one(tensor, item.key, (chains[tensor], chains[item.key]), ways, old)
    by_key = {box.key: box for box in root.boxes}
    for (key, tensor, old), (source, targets) in ways.items():
        by_key[key].routes.append(Route(tensor, source, tuple(targets), old))
        if source is None:
            by_key[key].ways_in.append(Port(tensor, old))
        if None in targets:
            by_key[key].ways_out.append(Port(tensor, old))


def _route_one(
    tensor: str,
    reader: str,
    chains: tuple[list[Box], list[Box]],
    ways: dict[tuple[str, str, bool], tuple[str | None, dict[str | None, None]]],
    old: bool,
) -> None:
    up, down = chains
    shared = 0
    while shared < min(len(up), len(down)) and up[shared] is down[shared]:
        shared += 1
    source = tensor
    for box in reversed(up[shared:]):
        ways.setdefault((box.key, tensor, old), (source, {}))[1][None] = None
        source = box.key
    inner = [box.key for box in down[shared:]] + [reader]
    ways.setdefault((up[shared - 1].key, tensor, old), (source, {}))[1][inner[0]] = None
    for box, target in zip(down[shared:], inner[1:], strict=True):
        ways.setdefault((box.key, tensor, old), (None, {}))[1][target] = None
