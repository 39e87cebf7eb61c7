"""Checks of numbers and formats: one mistake, one finding."""

from __future__ import annotations

import numpy as np
import onnx
from lint_net import INT4, Make, Net, RoomOfChecks, Wanted, fp8_convolution
from onnx import TensorProto, helper

from fxq.backends import onnx_check_numbers


def first_conv(scale: object = 0.05, opset: int = 18, **options: object) -> onnx.ModelProto:
    """A convolution whose input pair gets these parameters."""
    net = Net()
    return net.model(net.conv(net.qdq("x", scale, **options), "conv"), opset=opset)


def computed_scale() -> onnx.ModelProto:
    net = Net()
    peak = net.op("ReduceMax", ["x"], "peak", keepdims=0)
    scale = net.op("Mul", [peak, net.constant("step", np.float32(1 / 127))], "scale")
    zero = net.constant("zero", np.int8(0))
    integers = net.op("QuantizeLinear", ["x", scale, zero], "x_q")
    return net.model(net.conv(net.op("DequantizeLinear", [integers, scale, zero], "x_dq"), "conv"))


def no_zero_point() -> onnx.ModelProto:
    net = Net()
    scale = net.constant("scale", np.float32(0.05))
    integers = net.op("QuantizeLinear", ["x", scale], "x_q")
    return net.model(net.conv(net.op("DequantizeLinear", [integers, scale], "x_dq"), "conv"))


def uint8_weight() -> onnx.ModelProto:
    net = Net()
    data = net.constant("w", net.random.integers(0, 255, (32, 32, 3, 3)).astype(np.uint8))
    weight = net.dq(data, "w_dq", np.full(32, 0.003), dtype=np.uint8, axis=0)
    return net.model(net.conv(net.qdq("x"), "conv", weight=weight))


def short_scale() -> onnx.ModelProto:
    net = Net()
    data = net.float_weight("conv", (32, 32, 3, 3))
    weight = net.qdq(data, np.full(16, 0.003), axis=0)
    return net.model(net.conv(net.qdq("x"), "conv", weight=weight))


def lonely_zero_point() -> onnx.ModelProto:
    net = Net()
    parameters = [
        net.constant("scale", np.full(32, 0.003, np.float32)),
        net.constant("zero", np.zeros(1, np.int8)),
    ]
    data = net.constant("w", net.random.integers(-127, 128, (32, 32, 3, 3)).astype(np.int8))
    weight = net.op("DequantizeLinear", [data, *parameters], "w_dq", axis=0)
    return net.model(net.conv(net.qdq("x"), "conv", weight=weight))


def int4_product(block: int = 128, opset: int = 21) -> onnx.ModelProto:
    """A weight-only INT4 MatMul."""
    net = Net(x=(32, 256))
    data = net.constant("w", np.zeros((256, 64), INT4))
    weight = net.dq(data, "w_dq", np.full((256 // block, 64), 0.02), dtype=INT4, axis=0, block_size=block)
    return net.model(net.op("MatMul", ["x", weight], "product"), opset=opset)


def int4_activation() -> onnx.ModelProto:
    net = Net(x=(32, 64))
    weight = net.qdq(net.float_weight("product", (64, 64)), np.full(64, 0.02), dtype=INT4, axis=1)
    return net.model(net.op("MatMul", [net.qdq("x", dtype=INT4), weight], "product"), opset=21)


def int4_convolution() -> onnx.ModelProto:
    net = Net()
    weight = net.qdq(net.float_weight("conv", (32, 32, 3, 3)), np.full(32, 0.02), dtype=INT4, axis=0)
    return net.model(net.conv("x", "conv", weight=weight), opset=21)


def conv_axis(axis: int, op: str = "Conv") -> onnx.ModelProto:
    net = Net()
    return net.model(net.conv(net.qdq("x"), "conv", weight=net.weight("conv", (32, 32, 3, 3), axis), op=op))


def product_axis(axis: int, op: str = "MatMul", *, transposed: bool = False, **attributes: int) -> onnx.ModelProto:
    net = Net(x=(32, 64))
    weight = net.weight("product", (48, 64) if transposed or attributes else (64, 48), axis)
    if transposed:
        weight = net.op("Transpose", [weight], "turned", perm=[1, 0])
    return net.model(net.op(op, [net.qdq("x"), weight], "product", **attributes))


def quantized_bias(dtype: type) -> onnx.ModelProto:
    net = Net()
    data = net.constant("b", np.zeros(32, dtype))
    bias = net.dq(data, "b_dq", np.full(32, 1e-4), dtype=dtype, axis=0)
    weight = net.weight("conv", (32, 32, 3, 3))
    return net.model(net.op("Conv", [net.qdq("x"), weight, bias], "conv", pads=[1] * 4))


def per_tensor_weight() -> onnx.ModelProto:
    net = Net()
    return net.model(net.conv(net.qdq("x"), "conv", weight=net.weight("conv", (32, 32, 3, 3), None)))


def spelled_by_exporters() -> onnx.ModelProto:
    """Parameters that are computed; a cast and a clamp between Q and DQ; no node names."""
    net = Net()
    value = helper.make_tensor("v", TensorProto.FLOAT, [], [0.1])
    scale = net.op(
        "Mul", [net.op("Constant", [], "tenth", value=value), net.constant("half", np.float32(0.5))], "scale"
    )
    zero = net.op("Cast", [net.constant("zero64", np.array([0]))], "zero8", to=TensorProto.INT8)
    shape = net.constant("shape", np.array([], np.int64))
    zero = net.op("Reshape", [zero, shape], "zero")
    integers = net.op("Cast", [net.op("QuantizeLinear", ["x", scale, zero], "x_q")], "cast", to=TensorProto.INT8)
    bounds = [net.constant(n, np.int8(v)) for n, v in (("low", -127), ("high", 127))]
    clipped = net.op("Clip", [integers, *bounds], "clip")
    model = net.model(net.conv(net.op("DequantizeLinear", [clipped, scale, zero], "x_dq"), "conv"))
    for node in model.graph.node:
        node.name = ""
    return model


def negative_axis() -> onnx.ModelProto:
    net = Net(x=(32, 64))
    data = net.float_weight("product", (64, 48))
    weight = net.qdq(data, np.full(48, 0.003), axis=-1)
    return net.model(net.op("MatMul", [net.qdq("x"), weight], "product"))


BROKEN: dict[str, tuple[Make, list[Wanted]]] = {
    "old opset": (lambda: Net().model("x", opset=8), [("R8", "error", None)]),
    "zero point": (lambda: first_conv(zero=3), [("R9", "error", "x_q")]),
    "negative scale": (lambda: first_conv(-0.05), [("R9", "error", "x_q")]),
    "zero scale": (lambda: first_conv(0.0), [("R9", "error", "x_q")]),
    "NaN scale": (lambda: first_conv(np.nan), [("R9", "error", "x_q")]),
    "infinite scale": (lambda: first_conv(np.inf), [("R9", "error", "x_q")]),
    "subnormal scale": (lambda: first_conv(1e-40), [("R9", "warning", "x_q")]),
    "subnormal half scale": (
        lambda: first_conv(3e-5, scale_dtype=np.float16, opset=19),
        [("R9", "warning", "x_q")],
    ),
    "uint8 activation": (lambda: first_conv(dtype=np.uint8), [("R10", "error", "x_q")]),
    "int16 activation": (
        lambda: first_conv(dtype=np.int16, opset=21),
        [("R10", "error", "x_q")],
    ),
    "uint8 weight": (uint8_weight, [("R10", "error", "w_dq")]),
    "no zero point": (no_zero_point, [("R10", "error", "x_q")]),
    "computed scale": (computed_scale, [("R11", "error", "x_q")]),
    "scales that do not fit": (short_scale, [("R11", "error", "conv_w_q")]),
    "zero points that do not fit": (lonely_zero_point, [("R11", "error", "w_dq")]),
    "INT4 in blocks of 32": (lambda: int4_product(32), [("R12", "warning", "w_dq")]),
    "INT4 activation": (int4_activation, [("R12", "warning", "x_q")]),
    "INT4 convolution": (int4_convolution, [("R13", "warning", "conv")]),
    "per channel in opset 12": (lambda: first_conv(opset=12), [("R15", "error", "conv_w_q")]),
    "half scales in opset 18": (lambda: first_conv(scale_dtype=np.float16), [("R15", "error", "x_q")]),
    "FP8 in opset 18": (lambda: fp8_convolution(32, 32, opset=18), [("R15", "error", "conv_w_q")]),
    "INT4 in opset 20": (
        lambda: int4_product(opset=20),
        [("R15", "error", "w_dq"), ("R15", "error", "w_dq")],
    ),
    "Conv along axis 1": (lambda: conv_axis(1), [("R16", "error", "conv")]),
    "MatMul along axis 0": (lambda: product_axis(0), [("R16", "error", "product")]),
    "Gemm transB along axis 1": (lambda: product_axis(1, "Gemm", transB=1), [("R16", "error", "product")]),
    "Gemm along axis 0": (lambda: product_axis(0, "Gemm"), [("R16", "error", "product")]),
    "transposed MatMul along axis 1": (
        lambda: product_axis(1, transposed=True),
        [("R16", "error", "product")],
    ),
    "int32 bias": (lambda: quantized_bias(np.int32), [("R17", "error", "b_dq")]),
    "INT8 bias": (lambda: quantized_bias(np.int8), [("R17", "warning", "b_dq")]),
    "activation per channel": (
        lambda: first_conv(np.full(32, 0.05), axis=1),
        [("R32", "warning", "conv")],
    ),
    "weight per tensor": (per_tensor_weight, [("R32", "advice", "conv")]),
}

RIGHT: dict[str, Make] = {
    "first convolution": first_conv,
    "INT4 weights only": int4_product,
    "MatMul along axis 1": lambda: product_axis(1),
    "transposed MatMul along axis 0": lambda: product_axis(0, transposed=True),
    "Gemm along axis 1": lambda: product_axis(1, "Gemm", transB=0),
    "negative axis": negative_axis,
    "spelled by exporters": spelled_by_exporters,
}


class TestRoom(RoomOfChecks):
    """Each mistake and each right graph by itself."""

    room, broken, right = onnx_check_numbers, BROKEN, RIGHT
