"""Writing through a view, out of place: what the memory behind a view holds once the view is changed.

:func:`put_back` undoes one step from a tensor to its view (a reshape, a transposition, a slice, a part of a
split); :func:`set_item` is ``base[index] = value``. Both give new nodes and change nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx, nn

from .editor import Editor
from .errors import FxqError, TraceError
from .graph import ALIASES, TENSOR, Aliases, TensorInfo, attribute, error_at, tensor_info

__all__ = ["aliases", "fit", "put_back", "refuse", "set_item"]

_SAME_ORDER: Final = frozenset(
    [
        *(
            "view",
            "reshape",
            "flatten",
            "unsqueeze",
            "squeeze",
            "unflatten",
            "view_as",
            "reshape_as",
            "ravel",
        ),
        *("Flatten", "Unflatten", "atleast_1d", "atleast_2d", "atleast_3d"),
    ]
)
_SPLITS: Final = frozenset(("chunk", "split", "tensor_split", "split_with_sizes"))


def aliases(node: fx.Node) -> Aliases:
    """What the example run showed of the node's memory; nothing if there was none."""
    found = node.meta.get(ALIASES)
    return found if isinstance(found, Aliases) else Aliases()


def refuse(node: fx.Node, why: str) -> FxqError:
    """The error for a write that cannot be rewritten."""
    return error_at(TraceError, f"{node.name} {why}", node, "write that line without changing a tensor in place")


def put_back(editor: Editor, view: fx.Node, source: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    """The tensor `base` with `value` in the place that `view` shows of it, at the current insertion point.

    Args:
        editor: Makes the nodes.
        view: The node that took the view.
        source: What it was taken from: a tensor, or a tuple of parts, in which case `base` is what was split.
        base: What holds that tensor's values now.
        value: What the view holds now.

    Raises:
        TraceError: The view is none that can be undone.
    """
    if tensor_info(source) is None:
        return _put_part(editor, view, source, base, value)
    info, mine = tensor_info(source), tensor_info(view)
    if mine is not None and info is not None and mine.dtype is not info.dtype:
        raise refuse(view, "is a view of another dtype whose memory is changed later")
    if aliases(view).storages == aliases(source).storages:
        return value
    if view.target is operator.getitem and info is not None:
        return _put_items(editor, view, base, _parse(view, view.args[1], len(info.shape)), value)
    call = _called(view)
    if call in _SAME_ORDER:
        return editor.call(torch.Tensor.reshape_as, (value, base), like=view, info=info)
    if call in _INVERSES:
        target, args, kwargs = _INVERSES[call](view, value)
    elif call in _SCATTERS:
        target, args, kwargs = _SCATTERS[call](view, base, value)
    else:
        raise refuse(view, f"is a view through {call} whose memory is changed later")
    return editor.call(target, args, kwargs, like=view, info=info)


Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def _called(view: fx.Node) -> str:
    """The name of what a view calls: a function's, a method's, a torch.nn module's type, an attribute's."""
    if view.op == "call_module" and view.graph.owning_module is not None:
        module = attribute(view.graph.owning_module, str(view.target))
        return type(module).__name__ if type(module) in (nn.Flatten, nn.Unflatten) else str(view.target)
    if view.target is getattr:
        return f".{view.args[1]}"
    return str(getattr(view.target, "__name__", view.target))


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _swap(view: fx.Node, value: fx.Node) -> Call:
    target = view.target if callable(view.target) else getattr(torch, str(view.target))
    return target, (value, *view.args[1:]), dict(view.kwargs)


def _attribute_swap(view: fx.Node, value: fx.Node) -> Call:
    return getattr, (value, view.args[1]), {}


def _permute(view: fx.Node, value: fx.Node) -> Call:
    dims = _argument(view, 1, "dims")
    order: list[Any] = list(dims if isinstance(dims, tuple | list) else view.args[1:])
    inverse = sorted(range(len(order)), key=lambda i: order[i] % len(order))
    return torch.permute, (value, tuple(inverse)), {}


def _movedim(view: fx.Node, value: fx.Node) -> Call:
    return torch.movedim, (value, _argument(view, 2, "destination"), _argument(view, 1, "source")), {}


def _select(view: fx.Node, base: fx.Node, value: fx.Node) -> Call:
    return torch.select_scatter, (base, value, _argument(view, 1, "dim"), _argument(view, 2, "index")), {}


def _narrow(view: fx.Node, base: fx.Node, value: fx.Node) -> Call:
    dim, start, length = (_argument(view, i, n) for i, n in ((1, "dim"), (2, "start"), (3, "length")))
    if not isinstance(start, int) or not isinstance(length, int):
        raise refuse(view, "narrows by a computed size and is changed in place")
    stop = start + length
    return torch.slice_scatter, (base, value, dim, start, stop if stop or start >= 0 else None), {}


def _diagonal(view: fx.Node, base: fx.Node, value: fx.Node) -> Call:
    where = (_argument(view, 1, "offset", 0), _argument(view, 2, "dim1", 0), _argument(view, 3, "dim2", 1))
    return torch.diagonal_scatter, (base, value, *where), {}


_INVERSES: Final[dict[str, Callable[[fx.Node, fx.Node], Call]]] = {
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t"), _swap),
    **dict.fromkeys((".T", ".mT"), _attribute_swap),
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    "permute": _permute,
}
_SCATTERS: Final[dict[str, Callable[[fx.Node, fx.Node, fx.Node], Call]]] = {
    "select": _select,
    "narrow": _narrow,
    "diagonal": _diagonal,
}


def _put_part(editor: Editor, view: fx.Node, parts: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    """`base` with one of its parts, as chunk, split or unbind gave them, replaced."""
    call, index = _called(parts), view.args[1]
    infos = parts.meta[TENSOR]
    if not isinstance(index, int) or (call not in _SPLITS and call != "unbind"):
        raise refuse(view, f"is a part of {call} whose memory is changed later")
    index %= len(infos)
    dim = _argument(parts, 1 if call == "unbind" else 2, "dim", 0)
    if call == "unbind":
        return editor.call(torch.select_scatter, (base, value, dim, index), like=view, info=tensor_info(base))
    sizes = [info.shape[dim] for info in infos]
    start = sum(sizes[:index])
    return editor.call(
        torch.slice_scatter,
        (base, value, dim, start, start + sizes[index]),
        like=view,
        info=tensor_info(base),
    )


@dataclass
class _Index:
    """An index taken apart.

    Attributes:
        basic: The index with tensors replaced by full slices.
        items: Dimension of the indexed tensor, and int or slice; without full slices.
        new: Dimensions of the result that ``None`` made.
        tensors: Dimension of what `basic` gives, and the index tensor there.
    """

    basic: list[Any] = field(default_factory=list)
    items: list[tuple[int, Any]] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    tensors: list[tuple[int, fx.Node]] = field(default_factory=list)


def _parse(node: fx.Node, index: Any, rank: int) -> _Index:
    given = list(index) if isinstance(index, tuple) else [index]
    taken = sum(0 if item is None or item is Ellipsis else _width(item) for item in given)
    parsed, dim, out = _Index(), 0, 0
    for item in given:
        if item is None:
            parsed.new.append(out)
            parsed.basic.append(None)
            out += 1
            continue
        width = rank - taken if item is Ellipsis else _width(item)
        if isinstance(item, int) and not isinstance(item, bool):
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
        index: Ints, slices, None, Ellipsis, masks and index tensors, as PyTorch takes them.
        value: A node or a number.

    Raises:
        TraceError: The index is none of these.
    """
    info = tensor_info(base)
    if info is None:
        raise refuse(node, "sets items of something that is no tensor")
    parsed = _parse(node, index, len(info.shape))
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
    return _put_items(editor, node, base, parsed, new) if part is not base else new


def _numbers(node: fx.Node, items: list[Any]) -> tuple[Any, ...]:
    for item in items:
        if isinstance(item, slice) and any(isinstance(b, fx.Node) for b in (item.start, item.stop, item.step)):
            raise refuse(node, "sets items from or to a computed position")
    return tuple(items)


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


def _index_put(editor: Editor, node: fx.Node, part: fx.Node, parsed: _Index, value: Any) -> fx.Node:
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


def _put_items(editor: Editor, like: fx.Node, base: fx.Node, parsed: _Index, value: fx.Node) -> fx.Node:
    """`base` with `value` at a basic index."""
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
        inner = editor.call(operator.getitem, (base, index), like=like, info=_indexed(base, dim, item))
        left = 1 if isinstance(item, int) else 0
        value = _scatter(editor, like, inner, [(d - left, i) for d, i in rest], value)
    info = tensor_info(base)
    if isinstance(item, int):
        return editor.call(torch.select_scatter, (base, value, dim, item), like=like, info=info)
    where = (dim, item.start, item.stop, item.step or 1)
    return editor.call(torch.slice_scatter, (base, value, *where), like=like, info=info)


def _indexed(base: fx.Node, dim: int, item: Any) -> TensorInfo | None:
    info = tensor_info(base)
    if info is None:
        return None
    index = (*[slice(None)] * dim, item)
    return TensorInfo(tuple(torch.empty(info.shape, device="meta")[index].shape), info.dtype)
