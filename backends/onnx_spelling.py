"""Operators that TensorRT does not take in a 16-bit type, although ONNX does: written as others, or kept in float32.

Seen with the parser and the builder of TensorRT-RTX 1.7 in bfloat16; all of these go through in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from .onnx_names import free_name

if TYPE_CHECKING:
    import onnx

__all__ = ["REFUSED", "spell_out"]

REFUSED: Final[Mapping[str, Mapping[str, str]]] = {
    "bfloat16": {
        "ConvTranspose": "TensorRT's builder knows no transposed convolution in bfloat16",
        "LpPool": "TensorRT's parser takes LpPool in float32 and float16 alone",
    }
}
"""ONNX's name of a type to operator to why it stays float32."""

_GATES: Final[Mapping[str, Mapping[str, tuple[tuple[str, Mapping[str, Any]], ...]]]] = {
    "bfloat16": {
        "HardSwish": (("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),),
        "Mish": (("Softplus", {}), ("Tanh", {})),
    }
}
"""Likewise to the operators that make a gate of the input, which the input is then multiplied by."""


def spell_out(model: onnx.ModelProto, type_name: str) -> int:
    """Write products with a gate out where TensorRT does not know them in a type: HardSwish and Mish.

    ONNX defines both so, hence float32 gives the same numbers. The product keeps the node's name and output; all new
    nodes have its metadata.

    Args:
        model: Changed in place.
        type_name: ONNX's name of the compute dtype in lower case, such as ``bfloat16``.

    Returns:
        How many nodes were written out.
    """
    import onnx

    gates = _GATES.get(type_name, {})
    names = {node.name for node in model.graph.node} | {name for node in model.graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    done = 0
    for node in model.graph.node:
        if node.op_type not in gates or node.domain not in ("", "ai.onnx"):
            nodes.append(node)
            continue
        done += 1
        value = node.input[0]
        made = []
        for operator, attributes in gates[node.op_type]:
            called = free_name(f"{node.name or node.output[0]}_{operator.lower()}", names)
            names.add(called)
            made.append(onnx.helper.make_node(operator, [value], [called], called, **attributes))
            value = called
        made.append(onnx.helper.make_node("Mul", [node.input[0], value], [node.output[0]], node.name))
        for new in made:
            new.metadata_props.extend(node.metadata_props)
        nodes += made
    if done:
        kept = [type(node).FromString(node.SerializeToString()) for node in nodes]  # cleared below
        del model.graph.node[:]
        model.graph.node.extend(kept)
    return done
