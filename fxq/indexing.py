"""Assigning to an index, out of place: :func:`set_item` is ``base[index] = value``, as new nodes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .editor import Editor
from .errors import FxqError, TraceError
from .graph import TensorInfo, error_at, origin, tensor_info

__all__ = ["Index", "fit", "parse_index", "put_items", "refuse", "set_item"]


def refuse(node: fx.Node, why: str) -> FxqError:
    """The error for a write that cannot be rewritten; a function that was traced through may stay whole instead."""
    hint, function = "write that line without changing a tensor in place", origin(node).function
    if function:
        hint += f", or keep {function} whole with leaf_modules=[{function!r}]"
    return error_at(TraceError, f"{node.name} {why}", node, hint)


@dataclass
class Index:
    """An index taken apart.

    Attributes:
        basic: The index with tensors replaced by full slices.
        items: Dimension of the indexed tensor, and int or slice, maybe computed; without full slices.
        new: Dimensions of the result that ``None`` made.
        tensors: Dimension of what `basic` gives, and the index tensor there.
    """

    basic: list[Any] = field(default_factory=list)
    items: list[tuple[int, Any]] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    tensors: list[tuple[int, fx.Node]] = field(default_factory=list)


def parse_index(node: fx.Node, index: Any, rank: int) -> Index:
    """Take an index apart.

    Args:
        node: The node that indexes, for errors.
        index: As ``tensor[index]`` takes it.
        rank: The tensor's number of dimensions.

    Raises:
        TraceError: It holds something else than ints, slices, None, Ellipsis, masks and index tensors.
    """
    given = list(index) if isinstance(index, tuple) else [index]
    taken = sum(0 if item is None or item is Ellipsis else _width(item) for item in given)
    parsed, dim, out = Index(), 0, 0
    for item in given:
        if item is None:
            parsed.new.append(out)
            parsed.basic.append(None)
            out += 1
            continue
        width = rank - taken if item is Ellipsis else _width(item)
        computed = isinstance(item, fx.Node) and tensor_info(item) is None
        if computed or (isinstance(item, int) and not isinstance(item, bool)):
            parsed.basic.append(item)
            parsed.items.append((dim, item))
            out -= 1
        elif isinstance(item, slice):
            parsed.basic.append(item)
            parsed.items += [(dim, item)] if item != slice(None) else []
        elif isinstance(item, fx.Node) and tensor_info(item) is not None:
            parsed.basic += [slice(None)] * width
            parsed.tensors.append((out, item))
        elif item is Ellipsis:
            parsed.basic += [slice(None)] * width
        else:
            raise refuse(node, f"indexes with {item!r} and is changed in place")
        dim += width
        out += width
    return parsed


def _width(item: Any) -> int:
    """How many dimensions an index item takes: a mask one for each of its own."""
    info = tensor_info(item) if isinstance(item, fx.Node) else None
    return len(info.shape) if info is not None and info.dtype is torch.bool else 1


def set_item(editor: Editor, node: fx.Node, base: fx.Node, index: Any, value: Any) -> fx.Node:
    """``base[index] = value`` out of place, at the current insertion point.

    Args:
        editor: Makes the nodes.
        node: The assignment, for origins and errors.
        base: The tensor.
        index: Ints and slices, which may be computed from sizes, None, Ellipsis, masks and index tensors, as PyTorch
            takes them.
        value: A node or a number.

    Raises:
        TraceError: The index is none of these.
    """
    info = tensor_info(base)
    if info is None:
        raise refuse(node, "sets items of something that is no tensor")
    parsed = parse_index(node, index, len(info.shape))
    part = base
    if parsed.items or parsed.new:
        shape = tuple(torch.empty(info.shape, device="meta")[_numbers(node, parsed.basic)].shape)
        inner = TensorInfo(shape, info.dtype)
        part = editor.call(operator.getitem, (base, tuple(parsed.basic)), like=node, info=inner)
    if parsed.tensors:
        new = _index_put(editor, node, part, parsed, value)
    elif isinstance(value, fx.Node):
        new = fit(editor, node, value, part)
    else:
        new = editor.call(torch.full_like, (part, value), like=node, info=tensor_info(part))
    return put_items(editor, node, base, parsed, new) if part is not base else new


def _numbers(node: fx.Node, items: Sequence[Any]) -> tuple[Any, ...]:
    """A basic index with the numbers that computed positions are in the example.

    Raises:
        TraceError: A position depends on a tensor's values.
    """
    known: dict[fx.Node, Any] = {}

    def number(n: fx.Node) -> Any:
        if n not in known:
            info = tensor_info(n)
            if info is not None:
                known[n] = torch.empty(info.shape, dtype=info.dtype, device="meta")
            else:
                args, kwargs = fx.map_arg((n.args, n.kwargs), number)
                call = n.target if callable(n.target) else getattr(torch.Tensor, str(n.target))
                known[n] = call(*args, **kwargs)
        return known[n]

    try:
        found: tuple[Any, ...] = tuple(fx.map_arg(list(items), number))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise refuse(node, "sets items at a position that depends on values") from error
    bounds = [b for item in found for b in ((item.start, item.stop, item.step) if isinstance(item, slice) else (item,))]
    if any(isinstance(bound, torch.Tensor) for bound in bounds):
        raise refuse(node, "sets items at a position that depends on values")
    return found


def fit(editor: Editor, node: fx.Node, value: fx.Node, part: fx.Node) -> fx.Node:
    """`value` in the shape and dtype of `part`, as an assignment broadcasts and casts it."""
    info, mine = tensor_info(part), tensor_info(value)
    if info is None or mine is None:
        return editor.call(torch.Tensor.expand_as, (value, part), like=node, info=info)
    shape = mine.shape
    while len(shape) > len(info.shape):  # leading dimensions of length 1 are dropped
        shape = shape[1:]
        value = editor.call(torch.squeeze, (value, 0), like=node, info=TensorInfo(shape, mine.dtype))
    if shape != info.shape or 1 in shape:
        inner = TensorInfo(info.shape, mine.dtype)
        value = editor.call(torch.Tensor.expand_as, (value, part), like=node, info=inner)
    if mine.dtype is not info.dtype:
        value = editor.call(torch.Tensor.to, (value, info.dtype), like=node, info=info)
    return value


def _index_put(editor: Editor, node: fx.Node, part: fx.Node, parsed: Index, value: Any) -> fx.Node:
    """`part` with `value` where masks or index tensors point."""
    info = tensor_info(part)
    assert info is not None
    at, first = parsed.tensors[0]
    mask, given = tensor_info(first), tensor_info(value) if isinstance(value, fx.Node) else None
    number = not isinstance(value, fx.Node) or (given is not None and given.shape == ())
    if len(parsed.tensors) == 1 and mask is not None and mask.dtype is torch.bool and number:
        missing = len(info.shape) - at - len(mask.shape)
        if missing:
            wide = TensorInfo((*mask.shape, *[1] * missing), torch.bool)
            first = editor.call(operator.getitem, (first, (..., *[None] * missing)), like=node, info=wide)
        return editor.call(torch.masked_fill, (part, first, value), like=node, info=info)
    if not isinstance(value, fx.Node):
        single = TensorInfo((), info.dtype)
        value = editor.call(torch.Tensor.new_full, (part, (), value), like=node, info=single)
    indices: list[Any] = []
    reached = 0
    for position, tensor in parsed.tensors:
        indices += [*[None] * (position - reached), tensor]
        reached = position + _width(tensor)
    return editor.call(torch.ops.aten.index_put.default, (part, indices, value), like=node, info=info)


def put_items(editor: Editor, like: fx.Node, base: fx.Node, parsed: Index, value: fx.Node) -> fx.Node:
    """`base` with `value` at a basic index, at the current insertion point.

    Args:
        editor: Makes the nodes.
        like: Where their origin comes from.
        base: The tensor.
        parsed: The index; its tensors do not count.
        value: What ``base[parsed.basic]`` is to be.
    """
    info = tensor_info(value)
    for dim in reversed(parsed.new):
        if info is not None:
            info = TensorInfo(info.shape[:dim] + info.shape[dim + 1 :], info.dtype)
        value = editor.call(torch.squeeze, (value, dim), like=like, info=info)
    if not parsed.items:
        return value
    return _scatter(editor, like, base, parsed.items, value)


def _scatter(editor: Editor, like: fx.Node, base: fx.Node, items: list[tuple[int, Any]], value: fx.Node) -> fx.Node:
    """`base` with `value` at `items`, one dimension at a time: into the slice of the first item go the
    others.
    """
    (dim, item), rest = items[0], items[1:]
    if rest:
        index = (*[slice(None)] * dim, item)
        inner = editor.call(operator.getitem, (base, index), like=like, info=_indexed(like, base, dim, item))
        left = 0 if isinstance(item, slice) else 1
        value = _scatter(editor, like, inner, [(d - left, i) for d, i in rest], value)
    info = tensor_info(base)
    if not isinstance(item, slice):
        return editor.call(torch.select_scatter, (base, value, dim, item), like=like, info=info)
    where = (dim, item.start, item.stop, item.step or 1)
    return editor.call(torch.slice_scatter, (base, value, *where), like=like, info=info)


def _indexed(node: fx.Node, base: fx.Node, dim: int, item: Any) -> TensorInfo | None:
    info = tensor_info(base)
    if info is None:
        return None
    index = _numbers(node, (*[slice(None)] * dim, item))
    return TensorInfo(tuple(torch.empty(info.shape, device="meta")[index].shape), info.dtype)
