"""Checks of where Q/DQ sit: one mistake, one finding."""

from __future__ import annotations

import numpy as np
import onnx
from lint_net import FP8, Make, Net, RoomOfChecks, Wanted, residual
from onnx import TensorProto

from fxq.backends import onnx_check_placement


def weight_only() -> onnx.ModelProto:
    net = Net()
    return net.model(net.conv("x", "conv"))


def activation_only() -> onnx.ModelProto:
    net = Net()
    return net.model(net.conv(net.qdq("x"), "conv", weight=net.float_weight("conv", (32, 32, 3, 3))))


def one_sided_product() -> onnx.ModelProto:
    net = Net(a=(4, 32, 64), b=(4, 64, 32))
    return net.model(net.op("MatMul", [net.qdq("a"), "b"], "product"))


def behind_cast() -> onnx.ModelProto:
    net = Net()
    half = net.op("Cast", [net.qdq("x")], "half", to=TensorProto.FLOAT16)
    return net.model(net.conv(net.op("Cast", [half], "full", to=TensorProto.FLOAT), "conv"))


def moved_twice() -> onnx.ModelProto:
    """The pool's result is quantized for one convolution and read as it is by another."""
    net = Net()
    pooled = net.op("MaxPool", [net.qdq("x")], "pool", kernel_shape=[2, 2], strides=[2, 2])
    return net.model(net.conv(net.qdq(pooled), "conv1"), net.conv(pooled, "conv2"))


def mixed_types() -> onnx.ModelProto:
    net = Net()
    weight = net.qdq(net.float_weight("conv", (32, 32, 3, 3)), np.full(32, 0.003), dtype=FP8, axis=0)
    return net.model(net.conv(net.qdq("x"), "conv", weight=weight), opset=19)


def before_activation(op: str = "Relu") -> onnx.ModelProto:
    net = Net()
    active = net.op(op, [net.qdq(net.conv(net.qdq("x"), "conv1"))], "act")
    return net.model(net.conv(net.qdq(active), "conv2"))


def before_relu_behind_bias() -> onnx.ModelProto:
    net = Net(x=(32, 64))
    product = net.op("MatMul", [net.qdq("x"), net.weight("product", (64, 64), 1)], "product")
    biased = net.op("Add", [product, net.constant("bias", np.ones(64, np.float32))], "biased")
    active = net.op("Relu", [net.qdq(biased)], "act")
    return net.model(net.linear(net.qdq(active), "fc"))


def two_quantizers(scale: float) -> onnx.ModelProto:
    net = Net()
    relu = net.op("Relu", ["x"], "relu")
    first = net.conv(net.qdq(relu), "conv1")
    return net.model(first, net.conv(net.qdq(relu, scale, name="again"), "conv2"))


def average(op: str = "AveragePool", *, behind: bool = False) -> onnx.ModelProto:
    net = Net()
    if op == "AveragePool":
        pooled = net.op(op, [net.qdq("x")], "pool", kernel_shape=[2, 2], strides=[2, 2])
    elif op == "ReduceMean":
        pooled = net.op(op, [net.qdq("x"), net.constant("axes", np.array([-1, -2]))], "pool")
    elif op == "Resize":
        scales = net.constant("scales", np.array([1, 1, 2, 2], np.float32))
        pooled = net.op(op, [net.qdq("x"), "", scales], "pool", mode="linear")
    else:
        pooled = net.op(op, [net.qdq("x")], "pool")
    return net.model(net.conv(net.qdq(pooled, 0.04), "conv") if behind else pooled)


def concat(*scales: float, behind: float | None = None, pool: bool = False) -> onnx.ModelProto:
    """Two branches with these scales (0 leaves one float), joined and read by a convolution."""
    net = Net()
    source = net.qdq("x")
    parts = []
    for i, scale in enumerate(scales):
        relu = net.op("Relu", [net.conv(source, f"conv{i}")], f"relu{i}")
        parts.append(net.qdq(relu, scale) if scale else relu)
    if pool:
        parts[1] = net.op("MaxPool", [parts[1]], "pool", kernel_shape=[3, 3], pads=[1] * 4)
    joined = net.op("Concat", parts, "joined", axis=1)
    read = joined if behind is None else net.qdq(joined, behind)
    return net.model(net.conv(read, "tail", (64, 32)))


def requantized(scale: float) -> onnx.ModelProto:
    net = Net()
    return net.model(net.conv(net.qdq(net.qdq("x"), scale), "conv"))


def around_pool(scale: float) -> onnx.ModelProto:
    net = Net()
    pooled = net.op("MaxPool", [net.qdq("x")], "pool", kernel_shape=[2, 2], strides=[2, 2])
    return net.model(net.conv(net.qdq(pooled, scale), "conv"))


def dead_dq() -> onnx.ModelProto:
    net = Net()
    integers = net.q("x", "x_q")
    net.dq(integers, "dead")
    return net.model(net.conv(net.dq(integers, "x_dq"), "conv"))


def dead_q() -> onnx.ModelProto:
    net = Net()
    relu = net.op("Relu", ["x"], "relu")
    net.q(relu, "dead")
    return net.model(net.conv(relu, "conv", weight=net.float_weight("conv", (32, 32, 3, 3))))


def quantized_logits() -> onnx.ModelProto:
    net = Net()
    return net.model(net.qdq(net.conv(net.qdq("x"), "conv")))


def before_softmax() -> onnx.ModelProto:
    net = Net()
    relu = net.op("Relu", [net.conv(net.qdq("x"), "conv")], "relu")
    return net.model(net.op("Softmax", [net.qdq(relu)], "softmax", axis=1))


def moved(op: str) -> onnx.ModelProto:
    """A DQ, an operation that only moves values, a convolution."""
    net = Net()
    source, size = net.qdq("x"), 32
    if op == "Slice":
        parts = [net.constant(n, np.array([v])) for n, v in (("start", 0), ("end", 16), ("axis", 1))]
        source, size = net.op(op, [source, *parts], "moved"), 16
    elif op == "Pad":
        source = net.op(op, [source, net.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))], "moved")
    elif op == "Split":
        source, size = net.op(op, [source], "moved", outputs=2, axis=1, num_outputs=2), 16
    elif op == "MaxPool":
        source = net.op(op, [source], "moved", kernel_shape=[2, 2], strides=[2, 2])
    elif op == "Transpose":
        source = net.op(op, [source], "moved", perm=[0, 1, 3, 2])
    elif op == "Concat":
        source, size = net.op(op, [source, source], "moved", axis=1), 64
    else:
        source = net.op(op, [source], "moved")
    return net.model(net.conv(source, "conv", (size, 32)))


BROKEN: dict[str, tuple[Make, list[Wanted]]] = {
    "requantized behind a pool": (lambda: around_pool(0.06), [("R19", "warning", "pool_q")]),
    "weight only": (weight_only, [("R20", "warning", "conv")]),
    "activation only": (activation_only, [("R20", "warning", "conv")]),
    "one side of a product": (one_sided_product, [("R20", "warning", "product")]),
    "cast between DQ and Conv": (behind_cast, [("R20", "warning", "conv")]),
    "INT8 and FP8": (mixed_types, [("R20", "error", "conv")]),
    "moved values that a Q reads too": (moved_twice, [("R20", "warning", "conv2")]),
    "pair before Relu": (before_activation, [("R21", "warning", "conv1_dq")]),
    "pair before HardSwish": (lambda: before_activation("HardSwish"), [("R21", "warning", "conv1_dq")]),
    "pair between bias and Relu": (before_relu_behind_bias, [("R21", "warning", "biased_dq")]),
    "no skip": (lambda: residual(None), [("R23", "warning", "add")]),
    "both edges": (lambda: residual(conv=True), [("R23", "warning", "add")]),
    "the convolution's edge": (lambda: residual(None, conv=True), [("R23", "warning", "add")]),
    "skip with its own scale": (lambda: residual("own"), [("R24", "warning", "skip_q")]),
    "the longer way": (lambda: residual(None, conv=True, downsample=True), [("R25", "advice", "add")]),
    "average pool": (average, [("R26", "warning", "pool")]),
    "global average pool": (lambda: average("GlobalAveragePool"), [("R26", "warning", "pool")]),
    "mean over the image": (lambda: average("ReduceMean"), [("R26", "warning", "pool")]),
    "resize": (lambda: average("Resize"), [("R26", "warning", "pool")]),
    "concat, inputs differ": (lambda: concat(0.05, 0.06, behind=0.06), [("R27", "warning", "joined")]),
    "concat, output differs": (lambda: concat(0.05, 0.05, behind=0.06), [("R27", "warning", "joined")]),
    "concat without Q behind": (lambda: concat(0.05, 0.06), [("R27", "warning", "joined")]),
    "concat, one input float": (lambda: concat(0.05, 0, behind=0.06), [("R27", "warning", "joined")]),
    "pooled branch differs": (
        lambda: concat(0.05, 0.06, behind=0.05, pool=True),
        [("R28", "warning", "joined")],
    ),
    "two quantizers, one scale": (lambda: two_quantizers(0.05), [("R29", "advice", "again_q")]),
    "two quantizers, two scales": (lambda: two_quantizers(0.06), [("R29", "warning", "again_q")]),
    "double pair, one scale": (lambda: requantized(0.05), [("R31", "advice", "x_dq_q")]),
    "double pair, two scales": (lambda: requantized(0.06), [("R31", "warning", "x_dq_q")]),
    "dead DQ": (dead_dq, [("R31", "advice", "dead")]),
    "dead Q": (dead_q, [("R31", "advice", "dead")]),
    "quantized output": (quantized_logits, [("R31", "warning", "conv_dq")]),
    "pair before Softmax": (before_softmax, [("R38", "warning", "relu_dq")]),
}

RIGHT: dict[str, Make] = {
    "concat with one scale": lambda: concat(0.05, 0.05, behind=0.05),
    "concat without Q behind": lambda: concat(0.05, 0.05),
    "concat with a float input": lambda: concat(0.05, 0, behind=0.05),
    "concat of float": lambda: concat(0, 0, behind=0.05),
    "concat with a pool": lambda: concat(0.05, 0.05, behind=0.05, pool=True),
    "pool between pairs": lambda: around_pool(0.05),
    "average pool between pairs": lambda: average(behind=True),
    **{
        f"{op} between DQ and Conv": lambda op=op: moved(op)
        for op in (
            "Identity",
            "Slice",
            "Pad",
            "Split",
            "MaxPool",
            "Transpose",
            "Concat",
            "Dropout",
            "GlobalMaxPool",
        )
    },
}


class TestRoom(RoomOfChecks):
    """Each mistake and each right graph by itself."""

    room, broken, right = onnx_check_placement, BROKEN, RIGHT
