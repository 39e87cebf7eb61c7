"""TensorRT's rules for explicit quantization, checked on an ONNX file of any tool."""

from __future__ import annotations

from collections.abc import Collection
from os import PathLike
from typing import TYPE_CHECKING

from ..errors import FxqError
from ..rules import RULES, Findings, rank, run_checks
from . import onnx_check_kernels, onnx_check_numbers, onnx_check_placement
from .onnx_graph import OnnxGraph

if TYPE_CHECKING:
    import onnx

__all__ = ["lint_onnx"]

ROOMS = (onnx_check_numbers, onnx_check_placement, onnx_check_kernels)
"""The rooms whose checks register when they are imported."""


def lint_onnx(
    model: str | PathLike[str] | bytes | onnx.ModelProto, *, rules: Collection[str] | None = None
) -> Findings:
    """Check the rules of :data:`fxq.rules.RULES` that an ONNX graph can show.

    The graph is read as TensorRT would: through operations that only move values (R19), through Concat, and
    with weights as integers or as a constant behind a Q. Graphs inside If and Loop are not checked. Nothing
    is run, and weights are not read from disk.

    Args:
        model: A file, a serialized model or a ModelProto, from any tool. It is not changed.
        rules: Ids of the rules to check; None (default) takes all.

    Returns:
        The findings in the order of the graph's nodes; empty if there are none.

    Raises:
        FxqError: There is no such file, it holds no ONNX model, or a rule is not in the table.
    """
    if unknown := set(rules or ()) - RULES.keys():
        raise FxqError(f"no rule {', '.join(sorted(unknown))}", hint=f"the rules are {', '.join(RULES)}")
    graph = OnnxGraph(model)
    order = {node.name: node.index for node in graph.nodes}
    found = run_checks("onnx", graph, rules=rules)
    return Findings(tuple(sorted(found, key=lambda f: (order.get(f.node or "", -1), rank(f.rule)))))
