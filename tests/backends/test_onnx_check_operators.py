"""Operators on integers, on small graphs with one mistake each."""

from __future__ import annotations

import numpy as np
import onnx
from lint_net import Make, Net, RoomOfChecks, Wanted, clipped_or_moved
from onnx import TensorProto

from fxq.backends import onnx_check_operators


def integer_op() -> onnx.ModelProto:
    net = Net()
    integers = net.q("x", "x_q")
    weight = net.constant("w", np.ones((32, 32, 1, 1), np.int8))
    sums = net.op("ConvInteger", [integers, weight], "conv")
    return net.model(net.op("Cast", [sums], "y", to=TensorProto.FLOAT))


def contrib_op() -> onnx.ModelProto:
    net = Net()
    parameters = [net.constant("scale", np.float32(0.05)), net.constant("zero", np.int8(0))]
    integers = net.q("x", "x_q")
    total = net.op(
        "QLinearAdd",
        [integers, *parameters, integers, *parameters, *parameters],
        "sum",
        domain="com.microsoft",
    )
    return net.model(net.conv(net.dq(total, "sum_dq"), "conv"))


BROKEN: dict[str, tuple[Make, list[Wanted]]] = {
    "ConvInteger": (integer_op, [("R14", "error", "conv")]),
    "QLinearAdd": (contrib_op, [("R14", "error", "sum")]),
    "clipped weight": (lambda: clipped_or_moved("Clip"), [("R14", "error", "between")]),
    "transposed weight": (lambda: clipped_or_moved("Transpose"), [("R14", "error", "between")]),
}

RIGHT: dict[str, Make] = {
    "stored weight": lambda: clipped_or_moved(None),
    "clipped activation": lambda: clipped_or_moved("Clip", activation=True),
    "transposed activation": lambda: clipped_or_moved("Transpose", activation=True),
}


class TestRoom(RoomOfChecks):
    """Each mistake and each right graph by itself."""

    room, broken, right = onnx_check_operators, BROKEN, RIGHT
