"""Advice on kernels: one reason, one finding."""

from __future__ import annotations

import numpy as np
import onnx
from lint_net import IMAGE, Make, Net, RoomOfChecks, Wanted, fp8_convolution

from fxq.backends import onnx_check_kernels


def small_convolution(into: int, out: int, kernel: tuple[int, int] = (3, 3), group: int = 1) -> onnx.ModelProto:
    """Not a first layer."""
    net = Net(x=(2, into, 16, 16))
    relu = net.op("Relu", ["x"], "relu")
    return net.model(net.conv(net.qdq(relu), "conv", (into, out), kernel=kernel, group=group))


def dynamic_weight() -> onnx.ModelProto:
    net = Net(x=IMAGE, w=(32, 32, 3, 3))
    return net.model(net.conv(net.qdq("x"), "conv", weight=net.qdq("w")))


def linear(rows: int | str = 32, size: tuple[int, int] = (64, 64)) -> onnx.ModelProto:
    net = Net(x=(rows, size[0]))
    return net.model(net.linear(net.qdq("x"), "fc", size))


def attention(length: int = 128, head: int = 64) -> onnx.ModelProto:
    net = Net(q=(2, 4, length, head), k=(2, 4, head, length), v=(2, 4, length, head))
    scores = net.op("MatMul", [net.qdq("q"), net.qdq("k")], "bmm1")
    scaled = net.op("Mul", [scores, net.constant("factor", np.float32(0.125))], "scaled")
    weights = net.op("Softmax", [scaled], "softmax", axis=-1)
    return net.model(net.op("MatMul", [net.qdq(weights), net.qdq("v")], "bmm2"))


def transposed_convolution(axis: int | None) -> onnx.ModelProto:
    net = Net()
    weight = net.weight("up", (32, 32, 3, 3), axis)
    return net.model(net.conv(net.qdq("x"), "up", op="ConvTranspose", weight=weight))


BROKEN: dict[str, tuple[Make, list[Wanted]]] = {
    "4 channels": (lambda: small_convolution(4, 4), [("R35", "advice", "conv")]),
    "8 to 8 channels": (lambda: small_convolution(8, 8), [("R35", "advice", "conv")]),
    "8 to 32 channels, 1x3": (lambda: small_convolution(8, 32, (1, 3)), [("R35", "advice", "conv")]),
    "depthwise 1x1": (lambda: small_convolution(32, 32, (1, 1), 32), [("R35", "advice", "conv")]),
    "depthwise, 12 channels": (lambda: small_convolution(12, 12, group=12), [("R35", "advice", "conv")]),
    "dynamic weight": (dynamic_weight, [("R35", "advice", "conv")]),
    "FP8, 16 channels": (lambda: fp8_convolution(16, 32), [("R36", "advice", "conv")]),
    "FP8, 7x7": (lambda: fp8_convolution(32, 32, (7, 7)), [("R36", "advice", "conv")]),
    "FP8, grouped": (lambda: fp8_convolution(64, 64, group=2), [("R36", "advice", "conv")]),
    "one row": (lambda: linear(1), [("R37", "advice", "fc")]),
    "ten classes": (lambda: linear(size=(64, 10)), [("R37", "advice", "fc")]),
    "K of 8": (lambda: linear(size=(8, 64)), [("R37", "advice", "fc")]),
    "long attention": (lambda: attention(length=1024), [("R40", "advice", "bmm1")]),
    "heads of 80": (lambda: attention(head=80), [("R40", "advice", "bmm1")]),
    "transposed convolution": (lambda: transposed_convolution(1), [("R43", "advice", "up")]),
}

RIGHT: dict[str, Make] = {
    "FP8 convolution": lambda: fp8_convolution(32, 32),
    "ConvTranspose with one scale": lambda: transposed_convolution(None),
    "attention": attention,
    "8 to 32 channels": lambda: small_convolution(8, 32),
    "depthwise 3x3": lambda: small_convolution(32, 32, group=32),
    "dynamic batch": lambda: linear("batch"),
}


class TestRoom(RoomOfChecks):
    """Each mistake and each right graph by itself."""

    room, broken, right = onnx_check_kernels, BROKEN, RIGHT
