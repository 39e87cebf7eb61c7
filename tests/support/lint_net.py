"""Small ONNX graphs for the linter's tests, right or wrong in any way that a tool can get them wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fxq.backends.onnx_fix import fix_model
from fxq.backends.onnx_lint import lint_onnx
from fxq.checks import checks
from fxq.findings import Findings
from fxq.rules import RULES

Make = Callable[[], onnx.ModelProto]
Wanted = tuple[str, str, str | None]
"""Rule, severity and node of a finding."""

IMAGE = (2, 32, 16, 16)
FP8 = ml_dtypes.float8_e4m3fn
INT4 = ml_dtypes.int4


class Net:
    """Collects nodes; each method adds an operation and returns its output, which the node is named after.

    Args:
        inputs: Shapes by name.
    """

    def __init__(self, **inputs: Sequence[int | str]) -> None:
        self.inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (inputs or {"x": IMAGE}).items()
        ]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.random = np.random.default_rng(0)

    def op(self, op_type: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node; with several outputs the others are called ``<name>.1``, ``<name>.2``."""
        names = [name, *(f"{name}.{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=name, **attributes))
        return name

    def constant(self, name: str, value: Any) -> str:
        array = np.asarray(value)
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def _parameters(self, name: str, scale: Any, zero: Any, dtype: Any, scale_dtype: Any) -> list[str]:
        scales = np.asarray(scale, scale_dtype)
        zeros = np.full(scales.shape, zero).astype(dtype)
        return [self.constant(f"{name}_scale", scales), self.constant(f"{name}_zero", zeros)]

    def q(
        self, tensor: str, name: str, scale: Any = 0.05, *, zero: Any = 0, dtype: Any = np.int8,
        scale_dtype: Any = np.float32, **attributes: Any,
    ) -> str:  # fmt: skip
        parameters = self._parameters(name, scale, zero, dtype, scale_dtype)
        return self.op("QuantizeLinear", [tensor, *parameters], name, **attributes)

    def dq(
        self, tensor: str, name: str, scale: Any = 0.05, *, zero: Any = 0, dtype: Any = np.int8,
        scale_dtype: Any = np.float32, **attributes: Any,
    ) -> str:  # fmt: skip
        parameters = self._parameters(name, scale, zero, dtype, scale_dtype)
        return self.op("DequantizeLinear", [tensor, *parameters], name, **attributes)

    def qdq(self, tensor: str, scale: Any = 0.05, *, name: str = "", **options: Any) -> str:
        """A pair with one scale; the nodes are called ``<tensor>_q`` and ``<tensor>_dq``, or after `name`."""
        name = name or tensor
        return self.dq(self.q(tensor, f"{name}_q", scale, **options), f"{name}_dq", scale, **options)

    def weight(self, name: str, shape: Sequence[int], axis: int | None = 0, **options: Any) -> str:
        """A float constant behind Q and DQ, with a scale along `axis`, or one if it is None."""
        data = self.constant(f"{name}_w", self.random.normal(0, 0.1, shape).astype(np.float32))
        scale = np.float32(0.003) if axis is None else np.full(shape[axis], 0.003, np.float32)
        return self.qdq(data, scale, axis=0 if axis is None else axis, **options)

    def float_weight(self, name: str, shape: Sequence[int]) -> str:
        return self.constant(f"{name}_w", self.random.normal(0, 0.1, shape).astype(np.float32))

    def conv(
        self, tensor: str, name: str, channels: tuple[int, int] = (32, 32), *, kernel: Sequence[int] = (3, 3),
        weight: str | None = None, op: str = "Conv", group: int = 1, **attributes: Any,
    ) -> str:  # fmt: skip
        """A convolution of the same size with bias and, by default, an INT8 weight; `channels` in and out."""
        into, out = channels
        transposed = op == "ConvTranspose"
        shape = (into, out // group, *kernel) if transposed else (out, into // group, *kernel)
        if weight is None:
            weight = self.weight(name, shape, axis=1 if transposed else 0)
        bias = self.constant(f"{name}_b", self.random.normal(size=out).astype(np.float32))
        pads = [k // 2 for k in kernel] * 2
        if "kernel_shape" not in attributes:
            attributes["kernel_shape"] = list(kernel)
        return self.op(op, [tensor, weight, bias], name, pads=pads, group=group, **attributes)

    def linear(self, tensor: str, name: str, size: tuple[int, int] = (64, 64)) -> str:
        """A Gemm as PyTorch exports Linear: the weight is [out, in] and transposed."""
        return self.op("Gemm", [tensor, self.weight(name, (size[1], size[0]))], name, transB=1)

    def model(self, *outputs: str, opset: int = 18) -> onnx.ModelProto:
        """The model; the shapes of its outputs are inferred."""
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, values, list(self.initializers.values()))
        domains = {node.domain for node in self.nodes} - {""}
        imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in sorted(domains))]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        inferred = onnx.shape_inference.infer_shapes(model).graph.output
        del model.graph.output[:]
        model.graph.output.extend(inferred)
        return model


def residual(
    skip: str | None = "shared", *, conv: bool = False, downsample: bool = False, swapped: bool = False
) -> onnx.ModelProto:
    """Two convolutions and a skip around them, followed by Relu and another convolution.

    Args:
        skip: ``shared`` reads the block input's quantizer (with `downsample`: gives its convolution's output
            one), ``own`` gives it a quantizer with another scale, None leaves it float.
        conv: Quantize the convolution's edge.
        downsample: Put a 1x1 convolution on the skip.
        swapped: Give the addition its inputs the other way round.
    """
    net = Net()
    stem = net.op("Relu", ["x"], "stem")
    block = net.qdq(stem)
    inner = net.op("Relu", [net.conv(block, "conv1")], "relu1")
    branch = net.conv(net.qdq(inner), "conv2")
    if conv:
        branch = net.qdq(branch)
    other = net.conv(block, "down", kernel=(1, 1)) if downsample else stem
    if skip is not None:
        shared = skip == "shared" and not downsample
        other = block if shared else net.qdq(other, 0.07, name="skip")
    add = net.op("Add", [other, branch] if swapped else [branch, other], "add")
    tail = net.conv(net.qdq(net.op("Relu", [add], "relu2")), "conv3")
    return net.model(tail)


def fp8_convolution(
    into: int, out: int, kernel: tuple[int, int] = (3, 3), group: int = 1, opset: int = 19
) -> onnx.ModelProto:
    net = Net(x=(2, into, 16, 16))
    weight = net.qdq(net.float_weight("conv", (out, into // group, *kernel)), np.full(out, 0.003), dtype=FP8, axis=0)
    source = net.qdq("x", dtype=FP8)
    return net.model(net.conv(source, "conv", (into, out), kernel=kernel, group=group, weight=weight), opset=opset)


def clipped_or_moved(op: str | None, *, activation: bool = False) -> onnx.ModelProto:
    """A convolution whose integers, of the weight or of the activation, go through one operation to their DQ."""
    net = Net()
    if activation:
        data = net.q("x", "x_q")
    else:
        data = net.constant("w", net.random.integers(-127, 128, (32, 32, 3, 3)).astype(np.int8))
    bounds = [net.constant("low", np.int8(-127)), net.constant("high", np.int8(127))]
    if op is not None:
        inputs, options = ([data, *bounds], {}) if op == "Clip" else ([data], {"perm": [0, 1, 3, 2]})
        data = net.op(op, inputs, "between", **options)
    if activation:
        return net.model(net.conv(net.dq(data, "x_dq"), "conv"))
    return net.model(net.conv(net.qdq("x"), "conv", weight=net.dq(data, "w_dq", np.full(32, 0.003), axis=0)))


def brief(findings: Findings) -> list[Wanted]:
    """Findings without their texts."""
    return [(f.rule, f.severity, f.node) for f in findings]


class RoomOfChecks:
    """What the tests of every room of checks hold; a subclass names the room and its graphs.

    Attributes:
        room: The module whose checks these are.
        broken: Graphs with one mistake each, and what is found.
        right: Graphs without a finding.
    """

    room: ClassVar[ModuleType]
    broken: ClassVar[Mapping[str, tuple[Make, list[Wanted]]]]
    right: ClassVar[Mapping[str, Make]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name, graphs in (("mistake", self.broken), ("graph", self.right)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, graphs)

    def test_one_mistake_is_one_finding(self, mistake: str) -> None:
        make, wanted = self.broken[mistake]
        assert brief(lint_onnx(make())) == wanted

    def test_nothing_is_found_on_a_right_graph(self, graph: str) -> None:
        findings = lint_onnx(self.right[graph]())
        assert not findings, str(findings)

    @pytest.mark.parametrize("rounding", [False, True])
    def test_what_is_called_fixable_is_fixed_and_nothing_else(self, mistake: str, rounding: bool) -> None:
        model = self.broken[mistake][0]()
        allowed = {"exact", "rounding"} if rounding else {"exact"}
        before = lint_onnx(model)
        changes = fix_model(model, rounding=rounding)
        assert bool(changes) == any(finding.fixable in allowed for finding in before)
        assert all(RULES[finding.rule].fixable for finding in before if finding.fixable)
        left = lint_onnx(model)
        assert not [finding for finding in left if finding.fixable in allowed]
        assert [f for f in before if not f.fixable] == [f for f in left if not f.fixable]
        assert fix_model(model, rounding=rounding) == ()

    def test_each_rule_of_the_room_has_a_broken_graph(self) -> None:
        mine = [c for c in checks("onnx") if c.run.__module__ == self.room.__name__]
        broken = {rule for _, wanted in self.broken.values() for rule, _, _ in wanted}
        assert broken == {rule for c in mine for rule in c.rules}
