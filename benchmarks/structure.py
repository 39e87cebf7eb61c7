"""What a Q/DQ ONNX file quantizes, and what it does at residual additions, as JSON.

python structure.py model.onnx
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
COMMUTING = (
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Identity",
    "MaxPool",
    "Slice",
    "Cast",
)
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


class Graph:
    """Reading helpers over an ONNX graph."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.nodes: list[NodeProto] = list(graph.node)
        self.producer = {output: node for node in self.nodes for output in node.output}
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.fixed = set(self.constants)  # every tensor that depends on no input
        for node in self.nodes:
            if all(name in self.fixed for name in node.input if name):
                self.fixed.update(node.output)

    def value(self, name: str) -> np.ndarray | None:
        """The constant value of `name`, or None."""
        if name in self.constants:
            return numpy_helper.to_array(self.constants[name])
        node = self.producer.get(name)
        if node is not None and node.op_type in ("Cast", "Identity", "Squeeze"):
            return self.value(node.input[0])
        return None

    def dequantizer(self, name: str, through: tuple[str, ...] = ()) -> NodeProto | None:
        """The DequantizeLinear that makes `name`, looking back through the op types in `through`."""
        node = self.producer.get(name)
        while node is not None and node.op_type in through:
            node = self.producer.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def scale(self, node: NodeProto) -> float | None:
        """The (first) scale of a Q or DQ node, or None where it is no constant."""
        value = self.value(node.input[1])
        return None if value is None else float(np.asarray(value).reshape(-1)[0])

    def source(self, dequantizer: NodeProto) -> str:
        """The float tensor that a Q/DQ pair carries."""
        node = self.producer.get(dequantizer.input[0])
        while node is not None and node.op_type in (*COMMUTING, "Clip"):
            node = self.producer.get(node.input[0])
        if node is not None and node.op_type == "QuantizeLinear":
            return node.input[0]
        return dequantizer.input[0]


def zero_points(graph: Graph) -> dict[str, Any]:
    """Their types, how many are not 0, and how many biases come as dequantized int32."""
    kinds: Counter[str] = Counter()
    nonzero = biases = 0
    for node in graph.nodes:
        if node.op_type not in QUANTIZERS:
            continue
        name = node.input[2] if len(node.input) > 2 else ""
        value = graph.value(name) if name else None
        kind = "none" if value is None else str(value.dtype)
        caster = graph.producer.get(name)
        if caster is not None and caster.op_type == "Cast":
            kind = TensorProto.DataType.Name(caster.attribute[0].i).lower()
        kinds[kind] += 1
        nonzero += value is not None and bool(np.any(value))
        biases += node.op_type == "DequantizeLinear" and node.input[0] in graph.constants and kind == "int32"
    return {"zero_point_dtypes": dict(kinds), "nonzero_zero_points": nonzero, "int32_bias_dq": biases}


def weighted(graph: Graph) -> dict[str, Any]:
    """Convolutions and matrix products, those with both inputs dequantized, and what the others lack."""
    nodes, missing = [node for node in graph.nodes if node.op_type in WEIGHTED], []
    for node in nodes:
        activation = graph.dequantizer(node.input[0], COMMUTING)
        weight = graph.dequantizer(node.input[1], COMMUTING)
        if activation is None or weight is None:
            lacks = [word for word, dq in (("activation", activation), ("weight", weight)) if dq is None]
            missing.append(f"{node.name or node.output[0]}: {' and '.join(lacks)}")
    return {
        "weighted": len(nodes),
        "weighted_quantized": len(nodes) - len(missing),
        "weighted_missing": missing,
    }


def residuals(graph: Graph) -> dict[str, Any]:
    """Additions of two activations by how many inputs are quantized, and whose scale identity skips have."""
    entering: dict[str, set[float]] = {}  # float tensor -> the scales with which it enters a weighted node
    for node in graph.nodes:
        if node.op_type in WEIGHTED:
            dq = graph.dequantizer(node.input[0], COMMUTING)
            scale = None if dq is None else graph.scale(dq)
            if dq is not None and scale is not None:
                entering.setdefault(graph.source(dq), set()).add(scale)
    quantized, shared, own = Counter({0: 0, 1: 0, 2: 0}), 0, 0
    for node in graph.nodes:
        if node.op_type != "Add" or any(name in graph.fixed for name in node.input):
            continue
        dequantizers = [dq for name in node.input if (dq := graph.dequantizer(name)) is not None]
        quantized[len(dequantizers)] += 1
        for dq in dequantizers:
            scales, scale = entering.get(graph.source(dq), set()), graph.scale(dq)
            if scales and scale is not None:
                same = any(np.isclose(scale, other, rtol=1e-6) for other in scales)
                shared, own = shared + same, own + (not same)
    return {
        "adds": quantized.total(),
        "adds_both_quantized": quantized[2],
        "adds_one_quantized": quantized[1],
        "adds_none_quantized": quantized[0],
        "skip_scale_shared_with_convolution": shared,
        "skip_scale_own": own,
    }


def report(path: Path) -> dict[str, Any]:
    """Everything this module knows about the file."""
    model = onnx.load(path)
    graph = Graph(model)
    ops = Counter(node.op_type for node in graph.nodes)
    return {
        "opset": max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        "bytes": path.stat().st_size,
        "quantize": ops["QuantizeLinear"],
        "dequantize": ops["DequantizeLinear"],
        "batch_norms": ops["BatchNormalization"],
        **zero_points(graph),
        **weighted(graph),
        **residuals(graph),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("onnx", type=Path)
    print(json.dumps(report(parser.parse_args().onnx), indent=1))


if __name__ == "__main__":
    main()
