"""Reading an ONNX graph: who makes a tensor, who reads it, what is constant, and where Q/DQ sit.

Nothing here changes the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from .onnx_nodes import STANDARD, Array, Node, Quant, Reader, graphs_inside, names_read, nodes_of_graph
from .onnx_values import FOLDS, TensorType, inferred_types, read_model, tensor_values, type_name

if TYPE_CHECKING:
    import onnx

__all__ = ["MOVING", "WEIGHTED", "OnnxGraph"]

WEIGHTED: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operations whose first two inputs are multiplied and summed."""

_REARRANGING: Final = (
    "DepthToSpace",
    "Flatten",
    "Reshape",
    "SpaceToDepth",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
_CHOOSING: Final = ("Gather", "GlobalMaxPool", "MaxPool", "ReduceMax", "Slice", "Split")
_COPYING: Final = ("Dropout", "Expand", "Identity", "Pad", "Tile")
MOVING: Final = frozenset((*_REARRANGING, *_CHOOSING, *_COPYING))
"""Operations that only move or choose values of their first input, so that Q and DQ pass through (R19).

A convolution behind a DQ and one of these runs in INT8. Behind a Cast, a Resize or a Relu it does not.
"""

QUANTIZE: Final = {
    "QuantizeLinear": "",
    "TRT_FP8QuantizeLinear": "float8e4m3fn",
    "TRT_INT4QuantizeLinear": "int4",
}
"""Operators that quantize, and the type that those which know only one give."""
DEQUANTIZE: Final = {name.replace("Quantize", "Dequantize"): dtype for name, dtype in QUANTIZE.items()}

INTEGER_STEPS: Final = frozenset({"Cast", "Clip"})
"""What exporters put between a Q and its DQ: a cast to the type it has, a clamp to a narrower range."""


class OnnxGraph:
    """An ONNX model's main graph, indexed for reading.

    Args:
        model: A file, a serialized model or a ModelProto, which is not changed. Functions that the model
            defines are inlined.

    Attributes:
        metadata: What the file says of itself, by key.
        opset: Version of ONNX's own operator set.
        inputs: Names of the graph's inputs.
        outputs: Names of the graph's outputs.
        nodes: Its nodes, in the file's order.
        producers: The node that makes a tensor, by the tensor's name.
        fixed: Names of the tensors that do not depend on the graph's inputs.

    Raises:
        FxqError: There is no such file, or it holds no ONNX model.
    """

    def __init__(self, model: str | PathLike[str] | bytes | onnx.ModelProto) -> None:
        self._model, self._folder = read_model(model)
        graph = self._model.graph
        self.metadata = {entry.key: entry.value for entry in self._model.metadata_props}
        self._initializers = {t.name: t for t in graph.initializer}
        self.opset = next((o.version for o in self._model.opset_import if o.domain in STANDARD), 1)
        self.inputs = frozenset(i.name for i in graph.input) - self._initializers.keys()
        self.outputs = frozenset(o.name for o in graph.output)
        self.nodes = nodes_of_graph(graph)
        self.producers = {name: node for node in self.nodes for name in node.outputs if name}
        self.fixed = self._find_fixed()
        self._readers = self._index_readers()

    def _find_fixed(self) -> frozenset[str]:
        fixed = set(self._initializers)
        for node in self.nodes:
            read = [name for name in node.inputs if name]
            computed = bool(read) and not graphs_inside(node) and fixed.issuperset(read)
            if computed or node.op == "Constant":
                fixed.update(name for name in node.outputs if name)
        return frozenset(fixed)

    def _index_readers(self) -> dict[str, list[Reader]]:
        readers: dict[str, list[Reader]] = {}
        for node in self.nodes:
            inner = ((-1, name) for graph in graphs_inside(node) for name in names_read(graph))
            for index, name in (*enumerate(node.inputs), *inner):
                readers.setdefault(name, []).append(Reader(node, index))
        for name in sorted(self.outputs):
            readers.setdefault(name, []).append(Reader(None))
        return readers

    def readers(self, name: str) -> list[Reader]:
        """Where a tensor is read, in the file's order; as a graph output last."""
        return self._readers.get(name, [])

    @cached_property
    def _types(self) -> dict[str, TensorType]:
        types = inferred_types(self._model)
        for node in self.nodes:
            if node.op == "Constant" and "value" in node.attributes:
                tensor = node.attributes["value"]
                types[node.outputs[0]] = (tensor.data_type, tuple(tensor.dims))
        return types

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """A tensor's shape, with None for a symbolic dimension; None if it is not known."""
        return self._types.get(name, (0, None))[1]

    def dtype(self, name: str) -> str:
        """A tensor's element type by ONNX's name in lower case; "" if it is not known."""
        return type_name(self._types.get(name, (0, None))[0])

    def array(self, name: str) -> Array | None:
        """A constant's values as float64; None if the tensor is not constant, or hard to compute."""
        value = self._value(name)
        return None if value is None else np.asarray(value, dtype=np.float64)

    def _value(self, name: str) -> npt.NDArray[Any] | None:
        if name in self._initializers:
            return tensor_values(self._initializers[name], self._folder)
        node = self.producers.get(name)
        if node is None or name not in self.fixed:
            return None
        if node.op == "Constant":
            given = next(iter(node.attributes.values()))
            return tensor_values(given, self._folder) if "value" in node.attributes else np.asarray(given)
        inputs = [self._value(i) for i in node.inputs if i]
        values = [value for value in inputs if value is not None]
        fold = FOLDS.get(node.op)
        return fold(*values) if fold and len(values) == len(inputs) else None

    def stored(self, name: str) -> bool:
        """Whether the file holds a tensor's values: an initializer, or a Constant."""
        node = self.producers.get(name)
        return name in self._initializers or (node is not None and node.op == "Constant")

    def stored_value(self, name: str) -> npt.NDArray[Any] | None:
        """The values of a :meth:`stored` tensor in its own type; None if they lie in a file out of reach."""
        return self._value(name) if self.stored(name) else None

    def proto(self, node: Node) -> onnx.NodeProto:
        """A node as the file has it."""
        proto: onnx.NodeProto = self._model.graph.node[node.index]
        return proto

    @cached_property
    def _quants(self) -> dict[int, Quant]:
        return {n.index: self._quant(n) for n in self.nodes if n.op in QUANTIZE or n.op in DEQUANTIZE}

    @property
    def quants(self) -> list[Quant]:
        """Every Q and DQ, in the file's order."""
        return list(self._quants.values())

    def quant(self, node: Node | None) -> Quant | None:
        """The node as a Q or DQ; None if it is none."""
        return self._quants.get(node.index) if node is not None else None

    def _quant(self, node: Node) -> Quant:
        scale = self.array(node.input(1))
        block = int(node.attributes.get("block_size", 0))
        several = scale.size > 1 if scale is not None else bool(self.shape(node.input(1)))
        return Quant(
            node=node,
            quantizes=node.op in QUANTIZE,
            dtype=self._quantized_type(node),
            scale=scale,
            zero_point=self.array(node.input(2)),
            axis=self._axis(node) if several or block else None,
            block=block,
        )

    def _axis(self, node: Node) -> int:
        axis = int(node.attributes.get("axis", 1 if self.opset >= 13 else 0))
        shape = self.shape(node.inputs[0])
        return axis + len(shape) if axis < 0 and shape is not None else axis

    def _quantized_type(self, node: Node) -> str:
        if given := (QUANTIZE | DEQUANTIZE)[node.op]:
            return given
        if node.input(2):
            return self.dtype(node.input(2))
        if node.op in DEQUANTIZE:
            return self.dtype(node.inputs[0])
        return type_name(int(node.attributes.get("output_dtype", 0))) or "uint8"  # ONNX's default

    def moves(self, reader: Reader) -> bool:
        """Whether the values that are read here are only moved, see :data:`MOVING`."""
        node = reader.node
        if node is None or node.op not in MOVING or reader.index != 0:
            return False
        if node.op != "Pad" or node.attributes.get("mode", b"constant") != b"constant":
            return True
        value = self.array(node.input(2)) if node.input(2) else np.float64(node.attributes.get("value", 0.0))
        return value is not None and not np.any(value)

    def origin(self, name: str) -> str:
        """The tensor whose values these are, back through operations that only move them."""
        while (node := self.producers.get(name)) is not None and self.moves(Reader(node)):
            name = node.inputs[0]
        return name

    def dequantizer(self, name: str) -> Quant | None:
        """The DQ that a tensor comes from, directly or through operations that only move values."""
        found = self.quant(self.producers.get(self.origin(name)))
        return found if found is not None and not found.quantizes else None

    def dequantizers(self, name: str) -> list[Quant | None]:
        """The DQ that a weighted operation or an addition reads in INT8.

        As :meth:`dequantizer`, and one for each tensor that Concat brings together. Where a Q reads the moved
        values too, the builder moves them twice, in INT8 for the Q and in float for everybody else.

        Returns:
            The DQ; None for each tensor that arrives in float.
        """
        while (node := self.producers.get(name)) is not None and self.moves(Reader(node)):
            if any(quant.quantizes for quant in self._quants_reading(name)):
                return [None]
            name = node.inputs[0]
        if node is not None and node.op == "Concat":
            return [found for part in node.inputs for found in self.dequantizers(part)]
        return [self.dequantizer(name)]

    def _quants_reading(self, name: str) -> list[Quant]:
        return [quant for r in self.readers(name) if (quant := self.quant(r.node)) is not None]

    def quantized(self, name: str) -> bool:
        """Whether all that reaches a tensor comes out of DQ."""
        return None not in self.dequantizers(name)

    def quantizer(self, dq: Quant) -> Quant | None:
        """The Q that a DQ belongs to, also through operations on the integers; None for stored integers."""
        name = dq.tensor
        while (node := self.producers.get(name)) is not None:
            if (found := self.quant(node)) is not None:
                return found if found.quantizes else None
            if node.op not in INTEGER_STEPS and not self.moves(Reader(node)):
                return None
            name = node.inputs[0]
        return None

    def final_readers(self, name: str) -> Iterator[Reader]:
        """Where a tensor's values are read in the end: behind operations that only move them."""
        for reader in self.readers(name):
            if reader.node is not None and self.moves(reader):
                for output in reader.node.outputs:
                    yield from self.final_readers(output)
            else:
                yield reader
