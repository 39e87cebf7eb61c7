"""What the linter says of files for ONNX Runtime's integer kernels, and whose rules it goes by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from qdq_onnx import QdqModel, residual_model
from torch import nn
from typer.testing import CliRunner

import fxq
from fxq.backends.onnx_lint import lint_onnx
from fxq.cli import app
from fxq.errors import BuildError, FxqError

Found = list[tuple[str, str, str | None]]


def found(model: onnx.ModelProto) -> Found:
    return [(f.rule, f.severity, f.node) for f in lint_onnx(model, family="ORT")]


def integer_bias(net: QdqModel, name: str, channels: int, scale: float) -> str:
    data = net.constant(f"{name}_int32", np.zeros(channels, np.int32))
    scales = net.constant(f"{name}_scale", np.full(channels, scale, np.float32))
    return net.op("DequantizeLinear", [data, scales], name, axis=0)


def unsigned(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same numbers with activations in uint8."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and not tensor.dims:
            shifted = onnx.numpy_helper.to_array(tensor).astype(np.int16) + 128
            tensor.CopyFrom(onnx.numpy_helper.from_array(shifted.astype(np.uint8), tensor.name))
    return model


def conv(
    *,
    bias: float | None = 0.03 * 0.003,
    into: int = 16,
    out: int = 16,
    data: bool = True,
    weight: bool = True,
    zero_point: int = -128,
    signed: bool = False,
) -> Callable[[], onnx.ModelProto]:
    """x -> Conv -> Relu -> Q/DQ, with what may be wrong about it."""

    def make() -> onnx.ModelProto:
        net = QdqModel(1, into)
        held = net.weight("w", (out, into, 3, 3), quantized=weight)
        biases = net.constant("b", np.zeros(out, np.float32)) if bias is None else integer_bias(net, "b", out, bias)
        made = net.op("Conv", [net.qdq("x") if data else "x", held, biases], "conv", pads=[1, 1, 1, 1])
        model = net.model(net.qdq(net.op("Relu", [made], "relu"), zero_point=zero_point), (1, out, 16, 16))
        return model if signed else unsigned(model)

    return make


def behind(
    op: str, *, result: bool, activation: str = "", cut: bool = False, upper: float = 7.65
) -> Callable[[], onnx.ModelProto]:
    """Two quantized tensors through one operation and perhaps an activation."""

    def make() -> onnx.ModelProto:
        net = QdqModel(1, 16)
        first, second = net.qdq("x"), net.qdq(net.op("Sigmoid", ["x"], "other"))
        inputs = [first, second] if op in {"Add", "Concat"} else [first]
        more = {"Concat": {"axis": 1}, "MaxPool": {"kernel_shape": [1, 1]}, "AveragePool": {"kernel_shape": [1, 1]}}
        made = net.op(op, inputs, "op", **more.get(op, {}))
        made = net.qdq(made) if cut else made
        bounds = [net.constant("low", np.float32(0)), net.constant("high", np.float32(upper))]
        made = (
            net.op(activation, [made, *(bounds if activation == "Clip" else [])], "activation") if activation else made
        )
        shape = (1, 32 if op == "Concat" else 16, *((1, 1) if op == "GlobalAveragePool" else (16, 16)))
        return unsigned(
            net.model(net.qdq(made, zero_point=-128) if result else net.op("Sigmoid", [made], "end"), shape)
        )

    return make


CASES: dict[str, tuple[Callable[[], onnx.ModelProto], Found]] = {
    "all integers": (conv(), []),
    "float weight": (conv(weight=False), [("ORT1", "warning", "conv")]),
    "float input": (conv(data=False), [("ORT1", "warning", "conv")]),
    "float bias": (conv(bias=None), [("ORT6", "advice", "conv")]),
    "bias in other steps": (conv(bias=0.5), [("ORT6", "warning", "conv")]),
    "few channels": (conv(into=3, out=32), [("ORT7", "advice", "conv")]),
    "few inputs, many outputs": (conv(into=3, out=33), []),
    "sum": (behind("Add", result=True), []),
    "sum and activation": (behind("Add", result=True, activation="Relu"), []),
    "sum and a wide clamp": (behind("Add", result=True, activation="Clip"), []),
    "sum and a clamp within the range": (
        behind("Add", result=True, activation="Clip", upper=6),
        [("ORT4", "warning", "op")],
    ),
    "signed activations": (conv(signed=True), []),
    "range that does not compute Relu": (conv(zero_point=0), [("ORT1", "warning", "conv")]),
    "float sum": (behind("Add", result=False), [("ORT4", "warning", "op")]),
    "float sum behind an activation": (behind("Add", result=False, activation="Relu"), [("ORT4", "warning", "op")]),
    "activation cut off": (behind("Add", result=True, activation="Clip", cut=True), [("ORT3", "warning", "op_dq")]),
    **{op: (behind(op, result=True), []) for op in ("Concat", "MaxPool", "AveragePool", "GlobalAveragePool")},
    **{
        f"float {op}": (behind(op, result=False), [("ORT5", "warning", "op")])
        for op in ("Concat", "MaxPool", "AveragePool", "GlobalAveragePool")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_findings(name: str) -> None:
    make, expected = CASES[name]
    assert found(make()) == expected


@pytest.mark.parametrize(
    "name",
    [
        "all integers",
        "float weight",
        "float input",
        "bias in other steps",
        "range that does not compute Relu",
        "signed activations",
        "sum and activation",
        "sum and a clamp within the range",
        "float sum",
        "float MaxPool",
    ],
)
def test_a_warning_is_an_operation_that_onnx_runtime_computes_in_float(name: str, tmp_path: Path) -> None:
    make, expected = CASES[name]
    onnx.save(make(), tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    ran = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    integers = {"QLinearAdd", "QLinearConv", "NhwcMaxPool"} & ran
    assert bool(integers) is not bool(expected)


def test_a_tensorrt_file_by_the_other_rules_and_back() -> None:
    model = residual_model()
    assert {f.rule for f in lint_onnx(model)} <= {rule for rule in fxq.rules.RULES if rule.startswith("R")}
    assert {"ORT1", "ORT6"} <= {rule for rule, _, _ in found(model)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 8)).eval()
    gm = fxq.quantize(model, [torch.rand(4, 16, 8, 8)], target="onnxruntime", progress=False)
    return fxq.export(gm, tmp_path_factory.mktemp("ort") / "m.onnx")


def test_a_file_is_linted_by_its_own_targets_rules(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert {e.key: e.value for e in onnx.load(path).metadata_props}["fxq.rules"] == "ORT"
    assert not fxq.lint(path)
    assert {f.rule for f in fxq.lint(path, target="tensorrt").errors} >= {"R10", "R17"}
    assert not caplog.records
    runner = CliRunner()
    assert runner.invoke(app, ["lint", str(path)]).exit_code == 0
    assert runner.invoke(app, ["lint", str(path), "--target", "tensorrt"]).exit_code == 1


def test_unknown_families_are_refused(path: Path) -> None:
    model = onnx.load(path)
    next(e for e in model.metadata_props if e.key == "fxq.rules").value = "X"
    with pytest.raises(FxqError, match="no rules of family 'X'"):
        lint_onnx(model)
    assert not lint_onnx(model, family="ORT")


def test_no_engine_is_built_of_it(path: Path, tmp_path: Path) -> None:
    """Whether TensorRT is installed or not: it is not what is missing."""
    with pytest.raises(BuildError, match=r"quantized for target onnxruntime, by rules that are not TensorRT's"):
        fxq.build(path, tmp_path / "m.engine")
    for library in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(FxqError, match=r"m\.onnx was quantized for target onnxruntime"):
            fxq.predict(path, library=library)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_has_no_checks_says_so() -> None:
    x = torch.rand(4, 3, 8, 8)
    gm = fxq.prepare(nn.Sequential(nn.Conv2d(3, 64, 3)), x, target="onnxruntime")
    with pytest.raises(FxqError, match="no checks of graphs by the rules ORT"):
        fxq.lint(gm)
    with pytest.raises(FxqError, match="own target"):
        fxq.lint(gm, target="tensorrt")


def test_a_transposed_convolution_is_float_and_no_finding(tmp_path: Path) -> None:
    """No kernel computes it from integers, so that its weight stays float is as it should be (ORT9)."""
    layers = (nn.Conv2d(32, 32, 3), nn.ReLU(), nn.ConvTranspose2d(32, 32, 2, stride=2), nn.ReLU(), nn.Conv2d(32, 32, 3))
    x = torch.rand(2, 32, 8, 8)
    gm = fxq.quantize(nn.Sequential(*layers).eval(), [x], target="onnxruntime", progress=False)
    assert not fxq.lint(fxq.export(gm, tmp_path / "m.onnx"))
    rows = {row.kind: row for row in fxq.report(gm).weighted}
    assert (rows["conv2d"].precision, rows["conv_transpose2d"].precision) == ("uint8/int8", "float")
    assert "2 of 3 weighted operations" in str(fxq.report(gm))
    reasons = [(edge.edge, edge.rule) for edge in fxq.explain(gm, "2")]
    assert reasons == [(0, "ORT9"), (1, "ORT9")]
