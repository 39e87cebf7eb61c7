"""Strong typing: a float32 Q/DQ model gets the types that its engine is to have (R1, R4).

TensorRT 11 takes the types of an engine from the file, so a float32 file gives a float32 engine wherever
nothing is quantized. Here every float tensor gets the compute dtype, scales of Q/DQ included, but for islands
(:mod:`fxq.backends.onnx_islands`) that have to stay float32. Between two types sits one cast; at a Q or a DQ
there is none, because each may read or write what its scale is: so a quantized network has casts at its float
inputs and outputs at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import ExportError
from .onnx_floats import FLOAT, FloatGraph, Role
from .onnx_islands import required_islands, spread
from .onnx_names import MODULE_PATH, NODE, SOURCE, free_name, properties
from .onnx_numbers import ComputeDtype
from .onnx_spelling import spell_out
from .onnx_values import tensor_values

if TYPE_CHECKING:
    import onnx

__all__ = ["FLOAT32_REASON", "Typing", "type_model"]

FLOAT32_REASON: Final = "fxq.float32"
"""Key of a node's metadata_props: why it computes in float32."""
_SMALLEST_SCALE: Final = 2.0**-17
"""float16 keeps 8 bits of a scale down to here; see :func:`_raise_small_scales`."""
_QDQ: Final = frozenset({"DequantizeLinear", "QuantizeLinear"})


@dataclass(frozen=True)
class Typing:
    """What strong typing did.

    Attributes:
        casts: How many Cast nodes it added.
        islands: ONNX node to why it has to be float32.
        joined: Nodes that are float32 because their neighbours are, which saves casts.
    """

    casts: int
    islands: Mapping[str, str]
    joined: tuple[str, ...]


def type_model(
    model: onnx.ModelProto,
    kind: ComputeDtype,
    *,
    keep_io_types: bool = True,
    islands: Mapping[str, str] | None = None,
    largest: Mapping[str, float] | None = None,
) -> Typing:
    """Write a 16-bit compute dtype into a float32 model.

    Args:
        model: A cleaned model whose float tensors are float32; changed in place. Types that the user's own casts
            gave are kept.
        kind: The compute dtype.
        keep_io_types: Leave the model's inputs and outputs float32 (default) and cast there. A quantizer that
            reads an input reads it as it is, so this costs a quantized network nothing at its input.
        islands: FX node name to why it is to stay float32.
        largest: Tensor name to the largest magnitude seen there; beyond a quarter of the type's range a tensor
            stays float32.

    Raises:
        ExportError: The model's opset does not have the type.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset < kind.opset:
        raise ExportError(
            f"compute_dtype={kind.name!r} needs opset {kind.opset}, not {opset} (R15)",
            hint=f"use opset={kind.opset} or None",
        )
    if kind.has_less_range:
        _raise_small_scales(model)
    spell_out(model, kind.onnx_name)
    graph = FloatGraph(model, kind)
    required = required_islands(graph, islands or {}, largest or {})
    wide = spread(graph, required, float_io=keep_io_types)
    for i, why in required.items():
        graph.nodes[i].metadata_props.add(key=FLOAT32_REASON, value=why)
    writer = _Writer(model, graph, wide, keep_io_types=keep_io_types)
    writer.write()
    named = {graph.nodes[i].name: why for i, why in sorted(required.items())}
    joined = tuple(graph.nodes[i].name for i in sorted(wide - set(required)))
    return Typing(writer.casts, named, joined)


def _raise_small_scales(model: onnx.ModelProto) -> None:
    """Give weight channels whose scale float16 can hardly hold a larger one, and their integers with it.

    BatchNorm leaves channels with weights of 1e-8 and less. Their scale becomes 2^-17, which moves a weight by at
    most 2^-18: less than half an INT8 step of a channel whose largest weight is 0.001.
    """
    import onnx

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    uses = Counter(name for node in model.graph.node for name in node.input)
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or not {node.input[0], node.input[1]} <= set(constants):
            continue
        weight, scale = (constants[name] for name in node.input[:2])
        values = tensor_values(scale, "")
        if weight.data_type != onnx.TensorProto.INT8 or values is None or (values >= _SMALLEST_SCALE).all():
            continue
        zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
        if (zero_point is not None and onnx.numpy_helper.to_array(zero_point).any()) or uses[weight.name] > 1:
            continue  # rare, and its node stays float32 instead
        raised = np.maximum(values, np.float32(_SMALLEST_SCALE))
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        integers = onnx.numpy_helper.to_array(weight)
        shape = [-1 if d == axis % integers.ndim else 1 for d in range(integers.ndim)] if values.ndim else []
        moved = np.rint(integers * (values / raised).astype(np.float64).reshape(shape)).astype(np.int8)
        weight.CopyFrom(onnx.numpy_helper.from_array(moved, weight.name))
        if uses[scale.name] == 1:
            scale.CopyFrom(onnx.numpy_helper.from_array(raised, scale.name))
        else:
            name = free_name(f"{scale.name}_raised", set(constants))
            constants[name] = onnx.numpy_helper.from_array(raised, name)
            model.graph.initializer.append(constants[name])
            node.input[1] = name


class _Writer:
    """Writes chosen types into a model: first a name for each tensor in each type, then node by node."""

    def __init__(self, model: onnx.ModelProto, graph: FloatGraph, wide: set[int], *, keep_io_types: bool) -> None:
        self.model, self.graph, self.wide = model, graph, wide
        self.narrow = graph.compute.element_type
        self.io = FLOAT if keep_io_types else self.narrow
        self.casts = 0
        self.tensor_names = {*graph.producer, *graph.constants, *(v.name for v in model.graph.input)}
        self.node_names = {node.name for node in graph.nodes}
        self.untyped: dict[int, onnx.NodeProto] = {}
        self.constants: dict[tuple[str, int, bool], onnx.TensorProto] = {}
        self.own: dict[str, int] = {}
        """The type in which a tensor is made."""
        self.names: dict[str, dict[int, str]] = {}
        """Its name in each type in which it is wanted."""

    def write(self) -> None:
        """Change the model."""
        graph = self.model.graph
        for name in (*self.graph.inputs, *self.graph.producer):
            if self.graph.is_float(name):
                self._plan(name)
        nodes = [cast for name in self.graph.inputs for cast in self._others(name, None)]
        for i, node in enumerate(self.graph.nodes):
            made = [name for name in node.output if name in self.own]
            self._retype(i)
            nodes += [node, *(other for name in made for other in self._others(name, i))]
        for value in (*graph.input, *graph.output):
            if value.name in self.own:
                value.type.tensor_type.elem_type = self.io
        # graph.node would copy what is appended while it is cleared.
        kept = [_copied(node) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
        self._replace_constants()

    def _plan(self, name: str) -> None:
        """Choose the type in which a tensor is made, and names for all in which it is wanted."""
        graph, index = self.graph, self.graph.producer.get(name)
        source = index is not None and graph.roles[index] is Role.SOURCE
        if index is None:
            natural = self.io
        elif source:
            natural = 0
        else:
            natural = FLOAT if index in self.wide or graph.roles[index] is not Role.COMPUTE else self.narrow
        kinds = {self._wanted(i, j, natural) for i, j in graph.readers[name]} - {0}
        if name in graph.outputs:
            kinds.add(self.io)
        if name in graph.captured:
            kinds.add(FLOAT)
        if source and not self._scale_fits(index):
            natural = FLOAT
        own = self.own[name] = natural or (FLOAT if kinds == {FLOAT} else self.narrow)
        # What the outside, or a graph inside a node, sees keeps its name.
        first = FLOAT if name in graph.captured else self.io if name in graph.outputs else own
        self.names[name] = {kind: name if kind == first else self._fresh(name, kind) for kind in sorted(kinds | {own})}

    def _wanted(self, index: int, place: int, natural: int) -> int:
        """The type in which a node reads an input that is made as `natural`."""
        graph = self.graph
        if graph.roles[index] is Role.QUANTIZE and not self._scale_fits(index):
            return FLOAT
        if graph.roles[index] is not Role.COMPUTE:
            return natural
        if all(j != place for j, _ in graph.float_inputs(index)):
            return FLOAT  # an input that is float32 by definition
        return FLOAT if index in self.wide else self.narrow

    def _scale_fits(self, index: int | None) -> bool:
        """Whether the compute dtype can hold the scale of a Q or a DQ; other nodes have none."""
        node = None if index is None else self.graph.nodes[index]
        if node is None or node.op_type not in _QDQ or node.input[1] not in self.graph.constants:
            return True
        values = tensor_values(self.graph.constants[node.input[1]], "")
        return values is None or self.graph.compute.holds(values, closely=True)

    def _retype(self, index: int) -> None:
        """Let a node read and write tensors under the names that they have in its types."""
        node, role = self.graph.nodes[index], self.graph.roles[index]
        if role is Role.SOURCE:
            self.untyped[index] = _copied(node)
        kind = None
        for place, name in enumerate(node.input):
            if name in self.own:
                kind = self._wanted(index, place, self.own[name]) or self.own[name]
                node.input[place] = self.names[name][kind]
            elif role in (Role.COMPUTE, Role.READER) and self._is_float_constant(name):
                node.input[place] = self._constant(name, self._wanted(index, place, FLOAT))
        for place, name in enumerate(node.output):
            if name in self.own:
                kind = self.own[name]
                node.output[place] = self.names[name][kind]
        if role in (Role.QUANTIZE, Role.SOURCE):
            self._set_type(node, FLOAT if kind is None else kind)

    def _set_type(self, node: onnx.NodeProto, kind: int) -> None:
        """The type that a Q takes, or that a DQ, a cast or a constant of a shape gives."""
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = kind
            elif node.op_type == "ConstantOfShape" and kind != FLOAT:
                values = tensor_values(attribute.t, "")
                assert values is not None
                attribute.t.CopyFrom(self.graph.compute.tensor(attribute.t.name, values))
        if node.op_type in _QDQ and self._is_float_constant(node.input[1]):
            node.input[1] = self._constant(node.input[1], kind, scale=True)

    def _others(self, name: str, index: int | None) -> list[onnx.NodeProto]:
        """The nodes that make a tensor in the types that it is not made in: copies of what costs nothing, or casts."""
        own = self.own[name]
        found = []
        for kind, called in self.names[name].items():
            if kind == own:
                continue
            free = index is not None and self.graph.roles[index] is Role.SOURCE and self._scale_fits(index)
            found.append(self._copy(index, called, kind) if free else self._cast(name, called, kind, index))
        return found

    def _copy(self, index: int | None, called: str, kind: int) -> onnx.NodeProto:
        assert index is not None
        node: onnx.NodeProto = _copied(self.untyped[index])
        node.name = self._free_node_name(f"{node.name}_{self._type_name(kind)}")
        node.output[0] = called
        self._set_type(node, kind)
        return node

    def _cast(self, name: str, called: str, kind: int, index: int | None) -> onnx.NodeProto:
        import onnx

        self.casts += 1
        title = self._free_node_name(f"{name}_to_{self._type_name(kind)}")
        source = self.names[name][self.own[name]]
        node: onnx.NodeProto = onnx.helper.make_node("Cast", [source], [called], name=title, to=kind)
        near = index if index is not None else next((i for i, _ in self.graph.readers[name]), None)
        known = {} if near is None else properties(self.graph.nodes[near])
        for key in (NODE, MODULE_PATH, SOURCE):
            if key in known:
                node.metadata_props.add(key=key, value=known[key])
        return node

    def _is_float_constant(self, name: str) -> bool:
        return name in self.graph.constants and self.graph.constants[name].data_type == FLOAT

    def _constant(self, name: str, kind: int, *, scale: bool = False) -> str:
        """A constant in a type, each made once.

        A float32 scale has the value that it has in the compute dtype, so that a Q in one type and a DQ in the
        other are one quantization.
        """
        import onnx

        values = tensor_values(self.graph.constants[name], "")
        assert values is not None
        compute = self.graph.compute
        if kind == FLOAT and not (scale and compute.holds(values, closely=True)):
            return name
        key = (name, kind, scale)
        if key not in self.constants:
            called = self._fresh(name, kind)
            exact = kind == FLOAT
            made = onnx.numpy_helper.from_array(compute.rounded(values), called) if exact else None
            self.constants[key] = made or compute.tensor(called, values)
        return self.constants[key].name

    def _replace_constants(self) -> None:
        graph = self.model.graph
        used = {name for node in graph.node for name in node.input} | self.graph.captured
        used |= {value.name for value in graph.output}
        kept = [t for t in graph.initializer if t.name in used]
        made = [t for t in self.constants.values() if t.name in used]
        tensors = [_copied(tensor) for tensor in (*kept, *made)]
        del graph.initializer[:]
        graph.initializer.extend(tensors)
        del graph.value_info[:]

    def _type_name(self, kind: int) -> str:
        return "float32" if kind == FLOAT else self.graph.compute.onnx_name

    def _fresh(self, name: str, kind: int) -> str:
        fresh = free_name(f"{name}_{self._type_name(kind)}", self.tensor_names)
        self.tensor_names.add(fresh)
        return fresh

    def _free_node_name(self, wish: str) -> str:
        name = free_name(wish, self.node_names)
        self.node_names.add(name)
        return name


def _copied(message: Any) -> Any:
    """A copy of a protobuf message that belongs to no other."""
    fresh = type(message)()
    fresh.CopyFrom(message)
    return fresh
