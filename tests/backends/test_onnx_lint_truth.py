"""What the linter says of a graph is what TensorRT's builder makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from lint_net import IMAGE, Make, Net, residual

from fxq.backends.onnx_graph import MOVING
from fxq.backends.onnx_lint import lint_onnx
from fxq.backends.trt_build import build
from fxq.backends.trt_kernels import LayerInfo
from fxq.errors import BuildError

pytestmark = pytest.mark.usefixtures("trt")


def kernel_of(model: onnx.ModelProto, node: str, folder: Path) -> LayerInfo:
    """The weighted kernel that an ONNX node became."""
    engine = build(model.SerializeToString(), folder / "net.engine")
    found = [kernel for kernel in engine.weighted_kernels if node in kernel.onnx_nodes]
    assert len(found) == 1, engine.summary()
    return found[0]


# Operator: constant inputs, attributes, and the channels that it leaves of 32.
STEPS: dict[str, tuple[dict[str, list[int]], dict[str, Any], int]] = {
    "Cast": ({}, {"to": onnx.TensorProto.FLOAT16}, 32),
    "DepthToSpace": ({}, {"blocksize": 2}, 8),
    "Dropout": ({}, {}, 32),
    "Expand": ({"shape": [2, 32, 16, 16]}, {}, 32),
    "Gather": ({"indices": list(range(16))}, {"axis": 1}, 16),
    "GlobalMaxPool": ({}, {}, 32),
    "Identity": ({}, {}, 32),
    "MaxPool": ({}, {"kernel_shape": [2, 2], "strides": [2, 2]}, 32),
    "Pad": ({"pads": [0, 0, 1, 1, 0, 0, 1, 1]}, {}, 32),
    "ReduceMax": ({"axes": [2, 3]}, {}, 32),
    "Relu": ({}, {}, 32),
    "Reshape": ({"shape": [2, 32, 8, 32]}, {}, 32),
    "Slice": ({"starts": [0], "ends": [16], "axes": [1]}, {}, 16),
    "SpaceToDepth": ({}, {"blocksize": 2}, 128),
    "Split": ({}, {"axis": 1, "num_outputs": 2}, 16),
    "Tile": ({"repeats": [1, 2, 1, 1]}, {}, 64),
    "Transpose": ({}, {"perm": [0, 1, 3, 2]}, 32),
}
# The same for a matrix product with 64 columns: the input's shape, and constant inputs.
RANKS: dict[str, tuple[tuple[int, ...], dict[str, list[int]]]] = {
    "Flatten": ((32, 8, 8), {}),
    "Squeeze": ((32, 1, 64), {"axes": [1]}),
    "Unsqueeze": ((32, 64), {"axes": [0]}),
}


def behind(op: str) -> onnx.ModelProto:
    """A DQ, one operation, a quantized convolution or matrix product called conv."""
    shape, constants = RANKS.get(op, (IMAGE, {}))
    net = Net(x=shape)
    source = net.qdq(net.op("Relu", ["x"], "relu"))
    if op in RANKS:
        moved = net.op(op, [source, *(net.constant(k, np.array(v)) for k, v in constants.items())], "moved")
        return net.model(net.op("MatMul", [moved, net.weight("conv", (64, 64), 1)], "conv"))
    if op == "Expand":
        source = net.op("ReduceMax", [source, net.constant("axis", np.array([2]))], "peak")
    constants, attributes, channels = STEPS[op]
    inputs = [source, *(net.constant(k, np.array(v)) for k, v in constants.items())]
    moved = net.op(op, inputs, "moved", outputs=2 if op == "Split" else 1, **attributes)
    if op == "Cast":
        moved = net.op("Cast", [moved], "back", to=onnx.TensorProto.FLOAT)
    return net.model(net.conv(moved, "conv", (channels, 32)))


def behind_resize() -> onnx.ModelProto:
    """As :func:`behind`, for a Resize that repeats values, which ought to commute and does not."""
    net = Net()
    scales = net.constant("scales", np.array([1, 1, 2, 2], np.float32))
    mode = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return net.model(net.conv(net.op("Resize", [net.qdq("x"), "", scales], "moved", **mode), "conv"))


@pytest.mark.parametrize("op", sorted(MOVING))
def test_kernels_behind_operations_that_move_values_read_int8(op: str, tmp_path: Path) -> None:
    model = behind(op)
    assert not lint_onnx(model, rules=["R20"])
    assert kernel_of(model, "conv", tmp_path).reads_int8


@pytest.mark.parametrize("op", ["Cast", "Relu", "Resize"])
def test_kernels_behind_other_operations_do_not(op: str, tmp_path: Path) -> None:
    model = behind_resize() if op == "Resize" else behind(op)
    assert [f.node for f in lint_onnx(model, rules=["R20"])] == ["conv"]
    assert not kernel_of(model, "conv", tmp_path).reads_int8


def conv_with(weight: Callable[[Net], str], *, quantized: bool = True) -> onnx.ModelProto:
    net = Net()
    return net.model(net.conv(net.qdq("x") if quantized else "x", "conv", weight=weight(net)))


def float_weight(net: Net) -> str:
    return net.float_weight("conv", (32, 32, 3, 3))


def axis_1(net: Net) -> str:
    return net.weight("conv", (32, 32, 3, 3), 1)


def per_channel_activation() -> onnx.ModelProto:
    net = Net()
    return net.model(net.conv(net.qdq("x", np.full(32, 0.05), axis=1), "conv"))


def moved_twice() -> onnx.ModelProto:
    net = Net()
    pooled = net.op("MaxPool", [net.qdq("x")], "pool", kernel_shape=[2, 2], strides=[2, 2])
    return net.model(net.conv(net.qdq(pooled), "first"), net.conv(pooled, "conv"))


def concat(*scales: float) -> onnx.ModelProto:
    net = Net()
    source = net.qdq("x")
    parts = [net.qdq(net.conv(source, f"branch{i}"), scale) for i, scale in enumerate(scales)]
    return net.model(net.conv(net.op("Concat", parts, "joined", axis=1), "conv", (64, 32)))


FLOAT: dict[str, tuple[Make, str]] = {
    "weight only": (
        lambda: conv_with(lambda net: net.weight("conv", (32, 32, 3, 3)), quantized=False),
        "R20",
    ),
    "activation only": (lambda: conv_with(float_weight), "R20"),
    "moved twice": (moved_twice, "R20"),
    "wrong axis": (lambda: conv_with(axis_1), "R16"),
    "activation per channel": (per_channel_activation, "R32"),
    "concat of unequal scales": (lambda: concat(0.05, 0.06), "R27"),
}


@pytest.mark.parametrize("name", FLOAT)
def test_a_kernel_that_is_said_to_leave_int8_does(name: str, tmp_path: Path) -> None:
    make, rule = FLOAT[name]
    assert lint_onnx(make()).of(rule)
    assert not kernel_of(make(), "conv", tmp_path).reads_int8


def test_a_concat_of_equal_scales_stays_in_int8(tmp_path: Path) -> None:
    assert not lint_onnx(concat(0.05, 0.05), rules=["R27"])
    assert kernel_of(concat(0.05, 0.05), "conv", tmp_path).reads_int8


def refused_bias() -> onnx.ModelProto:
    net = Net()
    bias = net.dq(net.constant("b", np.zeros(32, np.int32)), "b_dq", np.full(32, 1e-4), dtype=np.int32, axis=0)
    weight = net.weight("conv", (32, 32, 3, 3))
    return net.model(net.op("Conv", [net.qdq("x"), weight, bias], "conv", pads=[1] * 4))


def integers(op: str) -> onnx.ModelProto:
    net = Net()
    weight = net.constant("w", np.ones((32, 32, 1, 1), np.int8))
    sums = net.op(op, [net.q("x", "x_q"), weight], "conv")
    return net.model(net.op("Cast", [sums], "y", to=onnx.TensorProto.FLOAT))


def input_pair(scale: float = 0.05, **options: int) -> onnx.ModelProto:
    net = Net()
    return net.model(net.conv(net.qdq("x", scale, **options), "conv"))


def stored_between(op: str) -> onnx.ModelProto:
    """A stored INT8 weight that goes through an operation to its DQ."""
    net = Net()
    weight = net.constant("w", np.ones((32, 32, 3, 3), np.int8))
    bounds = [net.constant("low", np.int8(-127)), net.constant("high", np.int8(127))] if op == "Clip" else []
    between = net.op(op, [weight, *bounds], "between")
    return net.model(net.conv(net.qdq("x"), "conv", weight=net.dq(between, "w_dq", np.full(32, 0.003), axis=0)))


REFUSED: dict[str, tuple[Make, str]] = {
    "clipped constant": (lambda: stored_between("Clip"), "R14"),
    "passed on constant": (lambda: stored_between("Identity"), "R14"),
    "zero point": (lambda: input_pair(zero=3), "R9"),
    "negative scale": (lambda: input_pair(-0.05), "R9"),
    "int32 bias": (refused_bias, "R17"),
    "ConvInteger": (lambda: integers("ConvInteger"), "R14"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_said_to_be_refused_is(name: str, tmp_path: Path) -> None:
    make, rule = REFUSED[name]
    assert lint_onnx(make()).errors.of(rule)
    with pytest.raises(BuildError):
        build(make().SerializeToString(), tmp_path / "net.engine")


@pytest.mark.parametrize(("skip", "dtypes"), [("shared", ["float32", "int8"]), (None, ["float32", "float32"])])
def test_the_skip_is_read_as_the_linter_says(skip: str | None, dtypes: list[str], tmp_path: Path) -> None:
    """The other operand of the addition is the convolution's sum, which this builder stores in float."""
    model = residual(skip)
    engine = build(model.SerializeToString(), tmp_path / "net.engine")
    (kernel,) = [kernel for kernel in engine.kernels or () if "add" in kernel.onnx_nodes]
    assert sorted(tensor.dtype for tensor in kernel.inputs) == dtypes
    assert bool(lint_onnx(model)) == (skip is None)
