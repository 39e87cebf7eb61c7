"""A graph as stable text, for goldens, diffs and people.

One node a line: name, op kind, inputs, other arguments, dtype and shape, quantizer or annotation. A call
that is not in its kind's canonical form looks like what it is: a method (``%x.relu()``) or another function
(``functional.relu(%x)``). Nothing in it depends on memory addresses, hashes or versions of torch. Scales
and zero points of a converted graph are printed where they are used, and their buffers have no lines of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, fx

from .graph import TENSOR, TensorInfo, attribute, constant, edge_annotations
from .ops import kind, kind_name
from .qdq import DEQUANTIZE, QUANTIZE
from .quantizer import Quantizer

__all__ = ["format_graph", "format_node", "format_numbers"]

_QDQ: Final = {QUANTIZE: "quantize", DEQUANTIZE: "dequantize"}


def format_graph(gm: fx.GraphModule, only: Callable[[fx.Node], bool] | None = None) -> str:
    """The graph as text.

    Args:
        gm: Any GraphModule; what fxq noted on its nodes is printed where it is there.
        only: Which nodes to print; all by default.

    Returns:
        One line per node, ending without a newline.
    """
    shown = (node for node in gm.graph.nodes if not _is_parameter(node))
    return "\n".join(format_node(gm, node) for node in shown if only is None or only(node))


def format_numbers(values: Tensor) -> str:
    """A scale or zero point as text: one number, or how many there are and between which two they lie."""
    flat = values.detach().flatten()
    if values.dim() == 0:
        return _number(flat[0])
    low, high = _number(flat.min()), _number(flat.max())
    return f"{flat.numel()} times {low}" if low == high else f"{flat.numel()} in [{low}, {high}]"


def _number(value: Tensor) -> str:
    return f"{value.item():.4g}" if value.dtype.is_floating_point else str(int(value.item()))


def _is_parameter(node: fx.Node) -> bool:
    """Whether `node` only brings a scale or zero point to quantize and dequantize operations."""
    readers = [user for user in node.users if user.target in _QDQ]
    return (
        node.op == "get_attr"
        and bool(readers)
        and all(user in readers and node is not user.args[0] for user in node.users)
    )


def format_node(gm: fx.GraphModule, node: fx.Node) -> str:
    """The line that :func:`format_graph` prints for one node of `gm`."""
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    text = f"%{node.name} = {_call(node)}"
    shape = _info(node.meta.get(TENSOR))
    return "  ".join(part for part in (text + (f" : {shape}" if shape else ""), *_quantization(gm, node)) if part)


def _call(node: fx.Node) -> str:
    if node.target in _QDQ:
        return f"{_QDQ[node.target]}({', '.join(_qdq_arguments(node))})"
    arguments = [_value(a) for a in node.args] + [f"{k}={_value(v)}" for k, v in node.kwargs.items()]
    if node.op == "get_attr":
        arguments = [str(node.target)]
    elif node.op == "placeholder":
        arguments = []
    if node.op == "call_method":
        return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
    return f"{_name(node)}({', '.join(arguments)})"


def _name(node: fx.Node) -> str:
    """The op kind's name; a function that is not the kind's own says where it is from."""
    if node.op != "call_function" or kind(node) is not None:
        return kind_name(node)
    target: Any = node.target
    home = "Tensor" if hasattr(target, "__objclass__") else getattr(target, "__module__", None) or "torch"
    return f"{home.rpartition('.')[2].strip('_')}.{getattr(target, '__name__', target)}"


def _qdq_arguments(node: fx.Node) -> Iterable[str]:
    source, scale, zero_point, axis, *dtype = node.args
    yield _value(source)
    yield from (str(d) for d in dtype)
    for name, held in (("scale", scale), ("zero_point", zero_point)):
        values = constant(held)
        yield f"{name}={_value(held) if values is None else format_numbers(values)}"
    if axis is not None:
        yield f"axis={axis}"


def _quantization(gm: fx.GraphModule, node: fx.Node) -> Iterable[str]:
    if node.op == "call_module":
        module = attribute(gm, str(node.target))
        if isinstance(module, Quantizer):
            scale = f" scale={format_numbers(module.scale)}" if module.solved else ""
            tie = f" tie={module.tie}" if module.tie else ""
            yield f"[{module.spec}{scale}{tie}]"
    for edge, annotation in edge_annotations(node).items():
        what = str(annotation.spec) if annotation.spec else "float"
        tie = f" tie={annotation.tie}" if annotation.tie else ""
        yield f"{{{edge}: {what} {annotation.rule}{tie}}}"


def _info(info: Any) -> str:
    if isinstance(info, TensorInfo):
        return f"{str(info.dtype).removeprefix('torch.')}[{','.join(map(str, info.shape))}]"
    if isinstance(info, tuple):
        return f"({', '.join(_info(i) or '-' for i in info)})"
    return ""


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_value, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        parts = [value.start, value.stop] + ([value.step] if value.step is not None else [])
        return ":".join("" if p is None else _value(p) for p in parts)
    if isinstance(value, torch.dtype | torch.memory_format | torch.device | torch.layout):
        return str(value).removeprefix("torch.")
    return repr(value)
