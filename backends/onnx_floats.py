"""A model's float32 tensors: who makes them, who reads them, and which nodes have a type of their own to choose."""

from __future__ import annotations

import enum
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from .onnx_nodes import names_read
from .onnx_numbers import ComputeDtype
from .onnx_signatures import gives, is_fixed, takes
from .onnx_values import inferred_types

if TYPE_CHECKING:
    import onnx

__all__ = ["FLOAT", "FloatGraph", "Role", "inner_graphs"]

FLOAT: Final = 1
"""ONNX's number of float32."""
_UNKNOWN_ELEMENTS: Final = 1024


def inner_graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs inside a node, as If and Loop have."""
    return [g for a in node.attribute for g in (*a.graphs, *((a.g,) if a.HasField("g") else ()))]


class Role(enum.Enum):
    """What a node has to do with float32 tensors.

    Attributes:
        NONE: Nothing.
        COMPUTE: It computes in one type, its own to choose.
        QUANTIZE: It is a QuantizeLinear: it reads any type that its scale has, for nothing.
        SOURCE: It makes a float tensor of others, in any type, for nothing: DequantizeLinear, a cast from integers.
        READER: It reads one float tensor of any type and gives none: Shape, ArgMax, a cast to integers.
    """

    NONE = enum.auto()
    COMPUTE = enum.auto()
    QUANTIZE = enum.auto()
    SOURCE = enum.auto()
    READER = enum.auto()


class FloatGraph:
    """A model's main graph, indexed by its float32 tensors.

    Args:
        model: Not changed.
        compute: The type that is to replace float32 where it can.

    Attributes:
        nodes: In graph order.
        producer: Tensor name to index of the node that makes it.
        readers: Tensor name to (index of node, index of input).
        constants: Initializers by name.
        inputs: Names of the graph's float32 inputs.
        outputs: Names of its float32 outputs.
        captured: Tensors that graphs inside nodes (If, Loop) read.
        roles: For each node.
    """

    def __init__(self, model: onnx.ModelProto, compute: ComputeDtype) -> None:
        self.compute = compute
        self.opset = next(entry.version for entry in model.opset_import if entry.domain == "")
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.readers: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.captured: set[str] = set()
        for i, node in enumerate(self.nodes):
            for j, name in enumerate(node.input):
                self.readers[name].append((i, j))
            self.captured |= {name for graph in inner_graphs(node) for name in names_read(graph)}
        self._types = inferred_types(model)
        self.inputs = [v.name for v in model.graph.input if self.is_float(v.name)]
        self.outputs = [v.name for v in model.graph.output if self.is_float(v.name)]
        self.roles = [self._role(node) for node in self.nodes]

    def is_float(self, name: str) -> bool:
        """Whether a tensor is float32 and no constant."""
        return name not in self.constants and self._types.get(name, (0, None))[0] == FLOAT

    def elements(self, name: str) -> int:
        """How many elements a tensor has, with dynamic dimensions counted as 1."""
        shape = self._types.get(name, (0, None))[1]
        return _UNKNOWN_ELEMENTS if shape is None else max(math.prod(dim or 1 for dim in shape), 1)

    def float_inputs(self, index: int) -> list[tuple[int, str]]:
        """A node's float32 inputs that may have another type, constants included, with their places."""
        node = self.nodes[index]
        return [
            (j, name)
            for j, name in enumerate(node.input)
            if name and self._types.get(name, (0, None))[0] == FLOAT and not is_fixed(node, j, self.opset)
        ]

    def float_outputs(self, index: int) -> list[str]:
        """A node's float32 outputs."""
        return [name for name in self.nodes[index].output if name and self.is_float(name)]

    def can_compute(self, index: int) -> bool:
        """Whether ONNX lets a node read and write the compute dtype in place of float32."""
        node, wanted = self.nodes[index], self.compute.onnx_name
        return all(takes(node, j, wanted, self.opset) for j, _ in self.float_inputs(index)) and all(
            gives(node, j, wanted, self.opset) for j, name in enumerate(node.output) if name and self.is_float(name)
        )

    def _role(self, node: onnx.NodeProto) -> Role:
        if node.op_type == "QuantizeLinear":
            return Role.QUANTIZE
        reads = [n for n in node.input if n and self._types.get(n, (0, None))[0] == FLOAT]
        writes = [n for n in node.output if n and self.is_float(n)]
        if node.op_type == "DequantizeLinear" or (node.op_type in ("Cast", "ConstantOfShape") and not reads):
            return Role.SOURCE if writes else Role.NONE
        if len(reads) == 1 and not writes and takes(node, 0, self.compute.onnx_name, self.opset):
            return Role.READER
        return Role.COMPUTE if reads or writes else Role.NONE
