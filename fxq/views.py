"""Writing through a view, out of place: what the memory behind a view holds once the view is changed.

:func:`put_back` undoes one step from a tensor to its view (a reshape, a transposition, a slice, a part of a split). It
gives new nodes and changes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx, nn

from .editor import Editor
from .graph import ALIASES, TENSOR, Aliases, attribute, tensor_info
from .indexing import parse_index, put_items, refuse

__all__ = ["aliases", "put_back"]

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
        return put_items(editor, view, base, parse_index(view, view.args[1], len(info.shape)), value)
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
