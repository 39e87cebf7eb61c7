"""A graph as stable text, for goldens, diffs and people.

One node a line: name, op kind, inputs, other arguments, dtype and shape, quantizer or annotation. Nothing in it depends
on memory addresses, hashes or versions of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from .graph import TENSOR, TensorInfo, annotations, attribute
from .ops import kind_name
from .quantizer import Quantizer

__all__ = ["format_graph"]


def format_graph(gm: fx.GraphModule, only: Callable[[fx.Node], bool] | None = None) -> str:
    """The graph as text.

    Args:
        gm: Any GraphModule; what fxq noted on its nodes is printed where it is there.
        only: Which nodes to print; all by default.

    Returns:
        One line per node, ending without a newline.
    """
    return "\n".join(_line(gm, node) for node in gm.graph.nodes if only is None or only(node))


def _line(gm: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    arguments = [_value(a) for a in node.args] + [f"{k}={_value(v)}" for k, v in node.kwargs.items()]
    if node.op == "get_attr":
        arguments = [str(node.target)]
    elif node.op == "placeholder":
        arguments = []
    text = f"%{node.name} = {kind_name(node)}({', '.join(arguments)})"
    shape = _info(node.meta.get(TENSOR))
    return "  ".join(
        part for part in (text + (f" : {shape}" if shape else ""), *_quantization(gm, node)) if part
    )


def _quantization(gm: fx.GraphModule, node: fx.Node) -> Iterable[str]:
    if node.op == "call_module":
        module = attribute(gm, str(node.target))
        if isinstance(module, Quantizer):
            yield f"[{module.spec}{_scale(module)}]"
    for edge, annotation in annotations(node).items():
        what = str(annotation.spec) if annotation.spec else "float"
        tie = f" tie={annotation.tie}" if annotation.tie else ""
        yield f"{{{edge}: {what} {annotation.rule}{tie}}}"


def _scale(module: Quantizer) -> str:
    if not module.solved:
        return ""
    scale = module.scale.detach().flatten()
    return f" scale={scale[0].item():.4g}" + (f"…[{scale.numel()}]" if scale.numel() > 1 else "")


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
    if isinstance(value, torch.dtype | torch.memory_format | torch.device):
        return str(value).removeprefix("torch.")
    return repr(value)
