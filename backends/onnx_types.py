"""fxq's two operators in ONNX: which opset their types need, their translation, and zero points of the right
type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from ..errors import ExportError
from ..graph import constant, edge_annotations, error_at
from ..qdq import DEQUANTIZE, QUANTIZE
from .onnx_names import carried_name

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

__all__ = ["needed_opset", "translations", "type_zero_points"]

LOWEST: Final = 18
"""The opset in which torch's exporter writes its operators; it cannot be trusted to convert down."""
HIGHEST: Final = 25
"""The last opset that TensorRT 11 parses and that the exporter converts up to."""

_TYPES: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "float",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "double",
    torch.float8_e4m3fn: "float8e4m3fn",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.int16: "int16",
    torch.uint16: "uint16",
    torch.int32: "int32",
}
_NAMES: Final[Mapping[str, str]] = {"float8_e4m3fn": "float8e4m3fn"}
_FOUR_BITS: Final = frozenset({"int4", "uint4"})
"""torch holds these in bytes; ONNX has a type for them, two to a byte."""


def needed_opset(gm: fx.GraphModule, asked: int | None, *, at_least: int = LOWEST, because: str = "") -> int:
    """The opset to export with (R15).

    Args:
        gm: The graph; what counts are the types that its quantize and dequantize nodes take and give.
        asked: What the user wants; None for the lowest that will do, 18 or more.
        at_least: What else the file needs.
        because: What needs that.

    Raises:
        ExportError: `asked` is too low for the graph or beyond what the exporter knows, or no opset has the
            types.
    """
    needed, at = max(LOWEST, at_least), None
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in (QUANTIZE, DEQUANTIZE):
            version = _version_for(node)
            needed, at = (version, node) if version > needed else (needed, at)
    if asked is None:
        return needed
    if asked > HIGHEST:
        raise ExportError(f"opset {asked} is not known here", hint=f"use {needed} to {HIGHEST}, or None for {needed}")
    if asked < needed and at is not None:
        what = f"opset {asked} is too low: the types of {at.name} need {needed} (R15)"
        raise error_at(ExportError, what, at, hint=f"use opset={needed} or None")
    if asked < at_least > LOWEST:
        what = f"opset {asked} is too low: {because} needs {at_least} (R15)"
        raise ExportError(what, hint=f"use opset={at_least} or None")
    if asked < needed:
        raise ExportError(
            f"opset {asked} is too low: the exporter writes opset {LOWEST} and newer (R15)",
            hint=f"use opset={LOWEST} or None",
        )
    return asked


def _version_for(node: fx.Node) -> int:
    quantizes = node.target is QUANTIZE
    scale = constant(_argument(node, 1, "scale"))
    if scale is None:
        message = f"the scale of {node.name} is computed by the graph; TensorRT takes constants only (R11)"
        raise error_at(ExportError, message, node, hint="store the scale as a buffer")
    if quantizes:
        name = str(_argument(node, 4, "dtype"))
        stored: str | None = _NAMES.get(name, name)
    else:
        weight = constant(_argument(node, 0, "q"))
        stored = None if weight is None else _four_bits(node) or _TYPES.get(weight.dtype, str(weight.dtype))
    version = _first_version(quantizes, _TYPES.get(scale.dtype, str(scale.dtype)), stored)
    if version is None:
        op = "QuantizeLinear" if quantizes else "DequantizeLinear"
        message = f"ONNX's {op} does not take {stored} with a scale of {scale.dtype}, as {node.name} has it"
        raise error_at(ExportError, message, node, hint="quantize it to int8 with a float32 scale")
    return version


def _four_bits(node: fx.Node) -> str | None:
    """The 4-bit type of the weight that `node` dequantizes, by the annotation of an operation that reads it."""
    for user in node.users:
        for edge, annotation in edge_annotations(user).items():
            reads = isinstance(edge, int) and edge < len(user.args) and user.args[edge] is node
            if reads and annotation.spec is not None and annotation.spec.qdtype.name in _FOUR_BITS:
                return annotation.spec.qdtype.name
    return None


@cache
def _first_version(quantizes: bool, scale: str, stored: str | None) -> int | None:
    """The lowest opset, 18 or more, whose QuantizeLinear or DequantizeLinear has these types."""
    import onnx

    op = "QuantizeLinear" if quantizes else "DequantizeLinear"
    for version in range(LOWEST, min(HIGHEST, onnx.defs.onnx_opset_version()) + 1):
        schema = onnx.defs.get_schema(op, version, "")
        allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        integer = schema.outputs[0] if quantizes else schema.inputs[0]
        integers, scales = allowed[integer.type_str], _allowed(schema.inputs[1].type_str, allowed)
        if f"tensor({scale})" in scales and (stored is None or f"tensor({stored})" in integers):
            return version
    return None


def _allowed(type_str: str, allowed: Mapping[str, set[str]]) -> set[str]:
    return allowed.get(type_str, {type_str})


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch's exporter needs to know about fxq's operators; zero points get their types afterwards."""
    from onnxscript import opset18 as op

    def quantize(x: Any, scale: Any, zero_point: Any, axis: int | None = None, dtype: str = "int8") -> Any:
        del dtype  # the exporter passes every argument of the operator by name; type_zero_points writes this one
        attributes = {} if axis is None else {"axis": axis}
        return op.QuantizeLinear(x, scale, zero_point, **attributes)

    def dequantize(q: Any, scale: Any, zero_point: Any, axis: int | None = None) -> Any:
        attributes = {} if axis is None else {"axis": axis}
        return op.DequantizeLinear(q, scale, zero_point, **attributes)

    return {QUANTIZE: quantize, DEQUANTIZE: dequantize}


def type_zero_points(model: ir.Model, program: torch.export.ExportedProgram, gm: fx.GraphModule) -> None:
    """Give zero points the quantized type (fxq holds them as int32), and tensors of 4 bits theirs.

    Zero points that are all 0 become one constant for each type and length. A per-tensor scale becomes a
    scalar.

    Args:
        model: As the exporter made it from `program`; changed in place.
        program: Its nodes know the types by name.
        gm: The graph that was exported; its annotations know which weights have 4 bits.
    """
    steps = {node.name: node for node in program.graph.nodes}
    narrow = {
        node.name: kind
        for node in gm.graph.find_nodes(op="call_function", target=DEQUANTIZE)
        if constant(_argument(node, 0, "q")) is not None and (kind := _four_bits(node)) is not None
    }
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            step = steps[str(node.outputs[0].name)]
            _pack(model, node, narrow.get(str(carried_name(step))))
            _type_node(model, node, step)


def _pack(model: ir.Model, node: ir.Node, kind: str | None) -> None:
    """Store the weight that a node dequantizes in its 4-bit type."""
    if kind is None:
        return
    numbers = _numbers(node.inputs[0])
    packed = numbers.astype(_onnx_type(kind).numpy())
    node.replace_input_with(0, _constant(model, f"{_name(node, 0)}_{kind}", packed))


def _type_node(model: ir.Model, node: ir.Node, step: fx.Node) -> None:
    quantized = node.outputs[0] if step.target is QUANTIZE else node.inputs[0]
    assert quantized is not None
    if step.target is QUANTIZE:
        quantized.dtype = _onnx_type(str(_argument(step, 4, "dtype")))
    assert quantized.dtype is not None
    scale, zero_point = _numbers(node.inputs[1]), _numbers(node.inputs[2])
    if _argument(step, 3, "axis") is None:
        node.attributes.pop("axis", None)
        if scale.ndim:
            node.replace_input_with(1, _constant(model, f"{_name(node, 1)}_scalar", scale.reshape(())))
        zero_point = zero_point.reshape(())
    kind = quantized.dtype.name.lower()
    if zero_point.any():
        name = f"{_name(node, 2)}_{kind}"
    else:
        name = f"zero_points_{kind}_{zero_point.size}" if zero_point.ndim else f"zero_point_{kind}"
    node.replace_input_with(2, _constant(model, name, zero_point.astype(quantized.dtype.numpy())))


def _numbers(value: ir.Value | None) -> np.ndarray[Any, Any]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _name(node: ir.Node, index: int) -> str:
    value = node.inputs[index]
    assert value is not None
    return str(value.name)


def _constant(model: ir.Model, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    import onnx_ir as ir

    known = model.graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.tensor(array, name=name)
    shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _onnx_type(name: str) -> ir.DataType:
    import onnx_ir as ir

    return ir.DataType[_NAMES.get(name, name).upper()]


def _argument(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs[name]
