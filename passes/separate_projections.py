"""Separate projections: queries, keys and values that one layer makes become a layer each."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import fx, nn

from ..editor import Editor
from ..graph import TENSOR, TensorInfo, attribute, constant, state, tensor_info
from ..ops import kind_name
from ..passbase import Numeric, Pass
from .expand_attention import Builder

__all__ = ["SeparateProjections"]

_COUNTS: Final = (2, 3)
_BETWEEN: Final = frozenset(
    (
        *("mul", "div", "normalize", "layer_norm", "contiguous", "clone"),
        *("reshape", "flatten", "unflatten", "permute", "transpose", "unsqueeze", "squeeze"),
    )
)
"""What may stand between a part and the product of an attention that reads it."""


@dataclass(frozen=True)
class SeparateProjections(Pass):
    """Write the packed layer in front of an attention as a layer for queries, one for keys and one for values.

    Problem: ``qkv(x).reshape(B, N, 3, heads, d).permute(2, 0, 3, 1, 4)`` is taken apart by TensorRT's builder itself,
    on a weight that it has dequantized, so the layer runs in floating point. Three layers that read one tensor run as
    one INT8 kernel.

    Rewrite: a layer whose result goes, through a reshape and at most one permutation, to nothing but its equal parts
    (``qkv[0]``, ``unbind``, ``chunk``, ``split``) becomes a layer for each part, on the rows of the weight that make
    it. The weights are parameters of their own then (``qkv.weight_0``); module paths stay.

    Declines: where the target's data do not ask for it (``separates``); where a part goes elsewhere than into a matrix
    product, or the weight is computed.
    """

    name: ClassVar[str] = "separate-projections"
    requires: ClassVar[tuple[str, ...]] = ("canonical",)
    numeric: ClassVar[Numeric] = "rounding"

    def call(self, editor: Editor) -> None:
        kinds = state(editor.gm).target.separates
        for node in list(editor.graph.nodes):
            if kind_name(node) in kinds and not node._erased:
                found = _packed(node)
                if found is not None and all(_attends(part) for part in found.parts):
                    _separate(editor, found)


@dataclass(frozen=True)
class _Packed:
    """A packed layer.

    Attributes:
        layer: The linear layer.
        count: How many parts it makes.
        split: The reshape behind it; None where the parts are cut from its result.
        order: The dimensions that are left of the split result, in the order in which a part has them.
        parts: The nodes that give a part.
        which: For each, the index of its part.
    """

    layer: fx.Node
    count: int
    split: fx.Node | None
    order: tuple[int, ...]
    parts: tuple[fx.Node, ...]
    which: tuple[int, ...]


def _packed(layer: fx.Node) -> _Packed | None:
    info = tensor_info(layer)
    stored = [constant(a) for a in layer.args[1:] if a is not None]
    if info is None or len(layer.users) != 1 or any(tensor is None for tensor in stored):
        return None
    (reader,) = layer.users
    axis = len(info.shape) - 1
    if kind_name(reader) in ("chunk", "split"):
        return _cut(layer, reader, axis)
    split = tensor_info(reader)
    if kind_name(reader) not in ("reshape", "unflatten") or split is None or len(split.shape) <= axis + 1:
        return None
    fits = split.shape[:axis] == info.shape[:axis] and math.prod(split.shape[axis:]) == info.shape[axis]
    count = split.shape[axis]
    if not fits or count not in _COUNTS or _sizes(reader, axis) is None or not reader.users:
        return None
    rank, mover = len(split.shape), next(iter(reader.users))
    order = _order(mover, rank) if len(reader.users) == 1 else None
    source = mover if order is not None else reader
    places = order or tuple(range(rank))
    left = tuple(d - (d > axis) for d in places if d != axis)
    return _taken(layer, source, places.index(axis), reader, left, count)


def _sizes(split: fx.Node, axis: int) -> list[Any] | None:
    """The sizes that split a part, which is the split's own but for the number of parts."""
    key = "shape" if kind_name(split) == "reshape" else "sizes"
    sizes = list(split.kwargs[key])  # type: ignore[arg-type]
    if key == "sizes":
        return sizes[1:] if isinstance(sizes[0], int) and sizes[0] > 0 else None
    return [*sizes[:axis], *sizes[axis + 1 :]] if isinstance(sizes[axis], int) and sizes[axis] > 0 else None


def _order(mover: fx.Node, rank: int) -> tuple[int, ...] | None:
    """The dimensions of what a permutation reads, in the order in which it gives them."""
    if kind_name(mover) == "permute":
        dims = mover.kwargs["dims"]
        return tuple(int(d) % rank for d in dims)  # type: ignore[union-attr,arg-type]
    if kind_name(mover) == "transpose":
        first, second = (int(mover.kwargs[name]) % rank for name in ("dim0", "dim1"))  # type: ignore[arg-type]
        order = list(range(rank))
        order[first], order[second] = second, first
        return tuple(order)
    return None


def _taken(
    layer: fx.Node, source: fx.Node, place: int, split: fx.Node, order: tuple[int, ...], count: int
) -> _Packed | None:
    """A packed layer whose parts are picked along dimension `place` of `source`."""
    users = list(source.users)
    info = tensor_info(source)
    assert info is not None
    if len(users) == 1 and kind_name(users[0]) == "unbind":
        dim: Any = users[0].kwargs["dim"]
        if dim % len(info.shape) != place:
            return None
        source, users, place = users[0], list(users[0].users), 0
    which = [_picked(user, place) for user in users]
    if any(index is None or not -count <= index < count for index in which):
        return None
    return _Packed(layer, count, split, order, tuple(users), tuple(i % count for i in which if i is not None))


def _picked(node: fx.Node, place: int) -> int | None:
    """The index that a getitem picks along one dimension, if it picks nothing else."""
    if node.target is not operator.getitem:
        return None
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    whole = all(item == slice(None) for item in index[:place]) and all(
        i in (slice(None), ...) for i in index[place + 1 :]
    )
    found = index[place] if len(index) > place and whole else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _cut(layer: fx.Node, cutter: fx.Node, axis: int) -> _Packed | None:
    """A packed layer whose result is cut into equal parts along its channels."""
    info = tensor_info(layer)
    assert info is not None
    dim = int(cutter.kwargs.get("dim", 0))  # type: ignore[arg-type]
    parts = cutter.meta.get(TENSOR)
    if not isinstance(parts, tuple) or len(parts) not in _COUNTS or dim % (axis + 1) != axis:
        return None
    count = len(parts)
    equal = all(part is not None and part.shape[axis] * count == info.shape[axis] for part in parts)
    which = [_picked(user, 0) for user in cutter.users]
    if not equal or any(i is None for i in which):
        return None
    return _Packed(layer, count, None, (), tuple(cutter.users), tuple(i % count for i in which if i is not None))


def _attends(part: fx.Node) -> bool:
    """Whether everything that reads a part is a matrix product, or comes to one."""
    work, seen = [part], set()
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            if kind_name(user) in _BETWEEN:
                work.append(user)
            elif kind_name(user) not in ("matmul", "scaled_dot_product_attention"):
                return False
    return True


def _separate(editor: Editor, packed: _Packed) -> None:
    layer = packed.layer
    made: dict[int, fx.Node] = {}
    with editor.before((packed.split or layer).next):
        build = Builder(editor, layer)
        for index in sorted(set(packed.which)):
            stored = [None if a is None else _rows(editor, layer, a, index, packed.count) for a in layer.args[1:]]
            part = build("linear", layer.args[0], *stored, name=str(index))
            if packed.split is not None:
                part = _shaped(build, packed, part, index)
            made[index] = part
    for node, index in zip(packed.parts, packed.which, strict=True):
        editor.replace(node, made[index])
    editor.erase_dead(packed.parts)


def _shaped(build: Builder, packed: _Packed, part: fx.Node, index: int) -> fx.Node:
    """A part with the dimensions that it has in the model."""
    split = packed.split
    assert split is not None
    info, whole = tensor_info(packed.layer), tensor_info(split)
    assert info is not None
    assert whole is not None
    axis = len(info.shape) - 1
    key = "shape" if kind_name(split) == "reshape" else "sizes"
    kwargs = {**split.kwargs, key: tuple(_sizes(split, axis) or ())}
    shape = TensorInfo((*whole.shape[:axis], *whole.shape[axis + 1 :]), whole.dtype)
    target: Any = split.target
    part = build.editor.call(target, (part,), kwargs, like=split, name=f"{split.name}_{index}", info=shape)
    if packed.order == tuple(range(len(packed.order))):
        return part
    return build("permute", part, dims=packed.order, name=f"{index}_permuted")


def _rows(editor: Editor, layer: fx.Node, stored: Any, index: int, count: int) -> fx.Node:
    """The part of a weight or bias that makes one part of the result, a tensor of its own."""
    path = f"{stored.target}_{index}"
    whole = attribute(editor.gm, str(stored.target))
    if not editor.stored(path):
        part = whole.detach().chunk(count, 0)[index].clone()
        own = nn.Parameter(part, requires_grad=whole.requires_grad) if isinstance(whole, nn.Parameter) else part
        editor.set_tensor(path, own)
    found = next(iter(editor.stored(path)), None)
    return found if found is not None and found < layer else editor.get_attr(path, like=stored)
