"""The parts of an ONNX graph as the linter reads them: nodes, readers, quantizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ..findings import Finding, Severity
from .onnx_names import MODULE_PATH, NODE, SOURCE, properties

if TYPE_CHECKING:
    import onnx

__all__ = ["STANDARD", "Array", "Node", "Quant", "Reader", "graphs_inside", "names_read", "nodes_of_graph"]

STANDARD: Final = ("", "ai.onnx")
"""Names of ONNX's own operator set."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Node:
    """An ONNX node.

    Attributes:
        index: Its place in the file.
        name: Its name; ``Op:output`` if the file gives it none, or one that another node has too.
        op: Operator, without its domain.
        domain: Operator set; "" for ONNX's own.
        inputs: Names of tensors; "" for an optional one that is left out.
        outputs: Names of tensors.
        attributes: Attributes by name, as Python values.
        module_path: The user's module, where the file says so.
        source: The user's ``file:line``, where the file says so.
        fx_node: The node of fxq's graph that it was exported from, where the file says so.
    """

    index: int
    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    module_path: str | None = None
    source: str | None = None
    fx_node: str | None = None

    def input(self, index: int) -> str:
        """The input at `index`; "" if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def finding(self, rule: str, severity: Severity, message: str, *, fix: str = "") -> Finding:
        """A breach of a rule at this node."""
        return Finding(rule, severity, self.name, message, fix=fix, module_path=self.module_path, source=self.source)


@dataclass(frozen=True)
class Reader:
    """A place where a tensor is read.

    Attributes:
        node: The node; None for a graph output.
        index: Which of its inputs; -1 if a graph inside the node (If, Loop) reads it.
    """

    node: Node | None
    index: int = 0


@dataclass(frozen=True, eq=False)
class Quant:
    """A QuantizeLinear or DequantizeLinear node.

    Attributes:
        node: The node.
        quantizes: True for Q, False for DQ.
        dtype: The quantized type by ONNX's name in lower case (``int8``, ``float8e4m3fn``); "" if unknown.
        scale: The scale's values in its shape; None if it is not constant or cannot be computed here.
        zero_point: The zero point's values likewise; None also if there is none, see :attr:`zeros`.
        axis: The axis that several scales run along; None for one scale.
        block: Block size along the axis; 0 without blocks.
    """

    node: Node
    quantizes: bool
    dtype: str
    scale: Array | None
    zero_point: Array | None
    axis: int | None
    block: int

    @property
    def tensor(self) -> str:
        """What it reads."""
        return self.node.inputs[0]

    @property
    def output(self) -> str:
        """What it makes."""
        return self.node.outputs[0]

    @property
    def zeros(self) -> Array | None:
        """The zero points in a row, a single 0 if there are none; None if they are not known."""
        if not self.node.input(2):
            return np.zeros(1)
        return None if self.zero_point is None else self.zero_point.ravel()

    @property
    def saturates(self) -> bool:
        """Whether what is too large becomes the largest number; otherwise FP8 makes NaN or infinity of it."""
        return bool(self.node.attributes.get("saturate", 1)) or not self.dtype.startswith("float8")

    def same(self, other: Quant) -> bool:
        """Whether both have one type, one axis, and equal scales and zero points; two Q also saturate alike."""
        if (self.dtype, self.axis, self.block) != (other.dtype, other.axis, other.block):
            return False
        if self.quantizes and other.quantizes and self.saturates != other.saturates:
            return False
        if self.scale is None or other.scale is None:
            return self.node.input(1) == other.node.input(1)
        if not np.array_equal(self.scale.ravel(), other.scale.ravel(), equal_nan=True):
            return False
        mine, theirs = self.zeros, other.zeros
        if mine is None or theirs is None:
            return self.node.input(2) == other.node.input(2)
        return bool(np.all(mine == theirs)) if 1 in (mine.size, theirs.size) else np.array_equal(mine, theirs)

    @property
    def scale_text(self) -> str:
        """The scale for messages: a number, or how many there are."""
        if self.scale is None:
            return "a scale that is not constant"
        return f"scale {self.scale.item():.6g}" if self.scale.size == 1 else f"{self.scale.size} scales"


def nodes_of_graph(graph: onnx.GraphProto) -> tuple[Node, ...]:
    """The graph's nodes in the file's order, with names that are unique."""
    from onnx import helper

    names = Counter(proto.name for proto in graph.node)
    nodes = []
    for index, proto in enumerate(graph.node):
        props = properties(proto)
        output = next((name for name in proto.output if name), str(index))
        node = Node(
            index=index,
            name=proto.name if proto.name and names[proto.name] == 1 else f"{proto.op_type}:{output}",
            op=proto.op_type,
            domain="" if proto.domain in STANDARD else proto.domain,
            inputs=tuple(proto.input),
            outputs=tuple(proto.output),
            attributes=MappingProxyType({a.name: helper.get_attribute_value(a) for a in proto.attribute}),
            module_path=props.get(MODULE_PATH) or None,
            source=props.get(SOURCE) or None,
            fx_node=props.get(NODE) or None,
        )
        nodes.append(node)
    return tuple(nodes)


def graphs_inside(node: Node) -> list[onnx.GraphProto]:
    """The graphs inside a node, as If and Loop have."""
    return [graph for value in node.attributes.values() for graph in _graphs(value)]


def _graphs(value: Any) -> list[onnx.GraphProto]:
    """The graphs in an attribute's value."""
    from onnx import GraphProto

    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, GraphProto)]


def names_read(graph: onnx.GraphProto) -> set[str]:
    """The tensors that a graph inside a node takes from around it."""
    from onnx import helper

    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    attributes = (a for node in graph.node for a in node.attribute)
    inner = (g for a in attributes for g in _graphs(helper.get_attribute_value(a)))
    read = read.union(*(names_read(g) for g in inner))
    made = {name for node in graph.node for name in node.output}
    return read - made - {i.name for i in graph.input} - {t.name for t in graph.initializer}
