"""A small Q/DQ ONNX model, made node by node, as an exporter would write it for TensorRT."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class QdqModel:
    """Collects nodes and initializers; each method adds one operation and returns the name of its output.

    Nodes are named after their output and carry the metadata that fxq's exporter writes: module path
    ``net.<name>`` and source line ``net.py:<number of the node>``.
    """

    def __init__(self, batch: int | str = "batch", channels: int = 16, size: int = 16, seed: int = 0) -> None:
        self.input_shape = (batch, channels, size, size)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.random = np.random.default_rng(seed)

    def op(self, op_type: str, inputs: list[str], name: str, domain: str = "", **attributes: object) -> str:
        node = helper.make_node(op_type, inputs, [name], name=name, domain=domain, **attributes)
        for key, value in (("module_path", f"net.{name}"), ("source", f"net.py:{len(self.nodes) + 1}")):
            node.metadata_props.add(key=f"fxq.{key}", value=value)
        self.nodes.append(node)
        return name

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def qdq(self, tensor: str, scale: float = 0.03, zero_point: int = 0) -> str:
        """Quantize and dequantize an activation per tensor."""
        parameters = [
            self.constant(f"{tensor}_scale", np.float32(scale)),
            self.constant(f"{tensor}_zero_point", np.int8(zero_point)),
        ]
        quantized = self.op("QuantizeLinear", [tensor, *parameters], f"{tensor}_q")
        return self.op("DequantizeLinear", [quantized, *parameters], f"{tensor}_dq")

    def weight(self, name: str, shape: tuple[int, ...], *, quantized: bool = True) -> str:
        """A weight with output channels first, as float32 or as int8 with a scale per output channel."""
        if not quantized:
            return self.constant(name, self.random.normal(0, 0.1, shape).astype(np.float32))
        data = self.constant(f"{name}_int8", self.random.integers(-127, 128, shape, dtype=np.int8))
        scale = self.constant(f"{name}_scale", np.full(shape[0], 0.003, np.float32))
        zero_point = self.constant(f"{name}_zero_point", np.zeros(shape[0], np.int8))
        return self.op("DequantizeLinear", [data, scale, zero_point], name, axis=0)

    def conv(self, tensor: str, name: str, channels: tuple[int, int], *, quantized: bool = True) -> str:
        """A 3x3 convolution with bias; ``channels`` are those in and out."""
        weight = self.weight(f"{name}_weight", (channels[1], channels[0], 3, 3), quantized=quantized)
        bias = self.constant(f"{name}_bias", self.random.normal(size=channels[1]).astype(np.float32))
        return self.op("Conv", [tensor, weight, bias], name, pads=[1, 1, 1, 1])

    def model(self, output: str, output_shape: tuple[int | str, ...]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.input_shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, output_shape)],
            list(self.initializers.values()),
        )
        domains = {node.domain for node in self.nodes} - {""}
        opsets = [
            helper.make_opsetid("", 17),
            *(helper.make_opsetid(domain, 1) for domain in sorted(domains)),
        ]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def residual_model(batch: int | str = "batch", *, quantize_skip: bool = True) -> onnx.ModelProto:
    """Stem, a basic residual block with an identity skip, pooling and a classifier: five weighted ops.

    Args:
        batch: The batch size, or a name for a dynamic one.
        quantize_skip: Feed the Add's skip from the quantizer of the block's input (R23, R24), or not.
    """
    net = QdqModel(batch)
    stem = net.op("Relu", [net.conv(net.qdq("x"), "stem", (16, 32))], "stem_relu")
    block_input = net.qdq(stem)
    inner = net.op("Relu", [net.conv(block_input, "conv1", (32, 32))], "conv1_relu")
    branch = net.conv(net.qdq(inner), "conv2", (32, 32))
    add = net.op("Add", [branch, block_input if quantize_skip else stem], "add")
    last = net.conv(net.qdq(net.op("Relu", [add], "block_relu")), "conv3", (32, 32))
    pooled = net.op("Flatten", [net.op("GlobalAveragePool", [last], "pool")], "flat")
    weight = net.weight("fc_weight", (10, 32))
    bias = net.constant("fc_bias", np.zeros(10, np.float32))
    logits = net.op("Gemm", [net.qdq(pooled), weight, bias], "fc", transB=1)
    return net.model(logits, (batch, 10))
