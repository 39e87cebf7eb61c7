"""Which types an ONNX operator takes and gives, by ONNX's own schemas."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from .onnx_nodes import STANDARD

if TYPE_CHECKING:
    import onnx

__all__ = ["gives", "is_fixed", "takes"]

_TYPE_ATTRIBUTES: Final = frozenset({"dtype", "output_dtype"})
"""Attributes that name the type of an output, which a schema's type variables do not show."""


def takes(node: onnx.NodeProto, index: int, type_name: str, opset: int) -> bool:
    """Whether a node may read input `index` in a type.

    Args:
        node: A node; of an operator that ONNX does not define nothing is known, and float32 is all it may have.
        index: Which input.
        type_name: ONNX's name of the type in lower case (``float16``).
        opset: The model's opset.
    """
    schema = _schema(node, opset)
    return type_name == "float" if schema is None else type_name in _allowed(schema, schema.inputs, index)


def gives(node: onnx.NodeProto, index: int, type_name: str, opset: int) -> bool:
    """Whether a node may write output `index` in a type; arguments as for :func:`takes`."""
    schema = _schema(node, opset)
    if schema is None or any(a.name in _TYPE_ATTRIBUTES for a in node.attribute):
        return type_name == "float"
    return type_name in _allowed(schema, schema.outputs, index)


def is_fixed(node: onnx.NodeProto, index: int, opset: int) -> bool:
    """Whether input `index` is float32 whatever the types of the others are, as the scales of Resize are."""
    schema = _schema(node, opset)
    return schema is not None and _formal(schema.inputs, index).type_str.startswith("tensor(")


def _schema(node: onnx.NodeProto, opset: int) -> Any | None:
    return _find(node.op_type, opset) if node.domain in STANDARD else None


@cache
def _find(op_type: str, opset: int) -> Any | None:
    import onnx

    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _formal(formals: Sequence[Any], index: int) -> Any:
    """The parameter that an argument is for; the last one takes all the rest where it is variadic."""
    return formals[min(index, len(formals) - 1)]


def _allowed(schema: Any, formals: Sequence[Any], index: int) -> set[str]:
    wanted = _formal(formals, index).type_str
    for constraint in schema.type_constraints:
        if constraint.type_param_str == wanted:
            return {name.removeprefix("tensor(").removesuffix(")") for name in constraint.allowed_type_strs}
    return {wanted.removeprefix("tensor(").removesuffix(")")}
