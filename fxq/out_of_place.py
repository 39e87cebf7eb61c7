"""What an in-place call computes, as a call that changes nothing."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Final

import torch
from torch import fx

from .editor import Editor
from .graph import TENSOR, TensorInfo, attribute, tensor_info
from .indexing import fit, refuse, set_item
from .ops import inplace_target
from .views import aliases

__all__ = ["inplace_argument", "make_pure", "out_of_place", "written_argument"]

_RESTRIDES: Final = frozenset(("resize_", "resize_as_", "as_strided_", "set_"))


def written_argument(node: fx.Node) -> fx.Node:
    """The tensor that an in-place call changes: its first argument.

    Raises:
        TraceError: It is something else that the call changes.
    """
    if node.kwargs.get("out") is not None:
        raise refuse(node, "writes its result into another tensor (out=)")
    written = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if not isinstance(written, fx.Node):
        raise refuse(node, "changes a tensor that is not its first argument")
    return written


def out_of_place(editor: Editor, node: fx.Node, written: fx.Node) -> fx.Node:
    """What `node` computes, without the write.

    Args:
        editor: Makes the nodes, at its current insertion point, which is behind `node`.
        node: The in-place call; it is rewritten, or left for others to stand for.
        written: The tensor that it changes.

    Raises:
        TraceError: Nothing computes it out of place.
    """
    special = _special(editor, node, written)
    if special is not None:
        return special
    if _gives_what_it_writes(node, written):
        function: Any = node.target
        return editor.call(_on_a_copy(function), node.args, node.kwargs, like=node, info=tensor_info(written))
    if not make_pure(editor, node):
        raise refuse(node, "changes its input in a way that cannot be rewritten")
    info, computed = tensor_info(written), _computed(node)
    if info is None or (computed is not None and computed.dtype is info.dtype):
        return node
    if computed is not None:
        node.meta[TENSOR] = computed
    return editor.call(torch.Tensor.to, (node, info.dtype), like=node, info=info)


def _special(editor: Editor, node: fx.Node, written: fx.Node) -> fx.Node | None:
    """Writes that no function of the same name computes out of place."""
    info = tensor_info(written)
    if node.target is operator.setitem:
        return set_item(editor, node, written, node.args[1], node.args[2])
    name = str(getattr(node.target, "__name__", node.target))
    if name == "copy_" and isinstance(node.args[1], fx.Node):
        return fit(editor, node, node.args[1], written)
    if name == "zero_":
        return editor.call(torch.zeros_like, (written,), like=node, info=info)
    if name == "fill_":
        value = node.args[1] if len(node.args) > 1 else node.kwargs["value"]
        full = torch.fill if isinstance(value, fx.Node) else torch.full_like
        return editor.call(full, (written, value), like=node, info=info)
    return None


def _gives_what_it_writes(node: fx.Node, written: fx.Node) -> bool:
    """Whether `node` calls a function that torch.fx.wrap kept whole and that gives back the tensor that it changes, or
    nothing that is read.
    """
    if not node.meta.get("is_wrapped") or not node.args or node.args[0] is not written:
        return False
    return not node.users or aliases(node).storages == aliases(written).storages


@cache
def _on_a_copy(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """`function` on a copy of its first argument, and that copy afterwards."""

    @wraps(function)
    def call(written: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copied = written.clone()
        function(copied, *args, **kwargs)
        return copied

    call.__name__ = f"{function.__name__}_on_a_copy"
    return call


def inplace_argument(node: fx.Node) -> int | str | None:
    """Where ``inplace=True`` is given: the argument's index or name."""
    if node.kwargs.get("inplace") is True:
        return "inplace"
    if node.op != "call_function" or True not in node.args[1:]:
        return None
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin; none of them takes inplace
        return None
    at = names.index("inplace") if "inplace" in names else len(node.args)
    return at if at < len(node.args) and node.args[at] is True else None


def make_pure(editor: Editor, node: fx.Node) -> bool:
    """Write the call in its out-of-place spelling, if it has one."""
    pure, argument = inplace_target(node), inplace_argument(node)
    if node.target in _RESTRIDES:
        return False
    if callable(pure):
        editor.retarget(node, pure, node.args, node.kwargs)
    elif isinstance(pure, str) and hasattr(torch.Tensor, pure):
        editor.retarget_method(node, pure)
    elif isinstance(argument, int):
        editor.set_arg(node, argument, value=False)
    elif argument is not None:
        editor.set_kwarg(node, argument, value=False)
    elif node.op == "call_module":
        module = attribute(editor.gm, str(node.target))
        if not hasattr(module, "inplace") or list(module.children()):
            return False
        if module.inplace:  # for all its calls: each of them is found to write
            editor.set_option(str(node.target), "inplace", value=False)
    else:
        return False
    return True


def _computed(node: fx.Node) -> TensorInfo | None:
    """Shape and dtype of what a call gives out of place; None if that cannot be told without data."""
    if node.op == "call_module":
        return tensor_info(node)
    infos = [tensor_info(n) for n in node.all_input_nodes]
    if None in infos:
        return None

    def blank(n: fx.Node) -> torch.Tensor:
        info = tensor_info(n)
        assert info is not None
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    args, kwargs = fx.map_arg((node.args, node.kwargs), blank)
    try:
        if callable(node.target):
            result = node.target(*args, **kwargs)
        else:
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    except (RuntimeError, TypeError):
        return None
    return TensorInfo(tuple(result.shape), result.dtype) if isinstance(result, torch.Tensor) else None
