"""Export's types: integers along their axes, the opset that they need, 4 bits."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from converted_graphs import GraphBuilder, export, residual_net
from onnx import numpy_helper
from torch import fx, nn

import fxq
from fxq.backends.onnx_compare import compare_nodes
from fxq.backends.onnxrt import Session
from fxq.errors import ExportError


def quantized(dtype: str, scale: torch.Tensor | float = 0.05, **options: Any) -> fx.GraphModule:
    b = GraphBuilder()
    return b.build(b.call(torch.relu, b.qdq(b.input("x"), scale, dtype=dtype, **options), name="relu"))


def test_weights_are_integers_along_the_right_axis(tmp_path: Path) -> None:
    b = GraphBuilder()
    x = b.qdq(b.input("x"), 0.02)
    up = b.call(F.conv_transpose2d, x, b.weight("up.weight", torch.randn(3, 6, 2, 2), 1), name="up", stride=2)
    depthwise = b.conv(b.qdq(up, 0.05), "dw", (6, 6), groups=6)
    model = export(b.build(depthwise), (torch.randn(2, 3, 4, 4),), tmp_path / "m.onnx")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    for path, axis, shape in (("up.weight", 1, (3, 6, 2, 2)), ("dw.weight", 0, (6, 1, 3, 3))):
        node = nodes[path.replace(".", "_") + "_quantizer"]
        integers, scale, zero = (stored[name] for name in node.input)
        assert {a.name: a.i for a in node.attribute} == {"axis": axis}
        assert (integers.name, integers.data_type, tuple(integers.dims)) == (
            path,
            onnx.TensorProto.INT8,
            shape,
        )
        assert (scale.data_type, list(scale.dims)) == (onnx.TensorProto.FLOAT, [6])
        assert zero.data_type == onnx.TensorProto.INT8
        assert not numpy_helper.to_array(zero).any()
    quantizer = nodes["x_quantize"]
    assert not quantizer.attribute
    assert list(stored[quantizer.input[1]].dims) == list(stored[quantizer.input[2]].dims) == []


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (2, 3, 5, 8)])
def test_a_linear_layer_reads_its_integers_without_a_transpose(tmp_path: Path, shape: tuple[int, ...]) -> None:
    b = GraphBuilder()
    gm = b.build(b.linear(b.qdq(b.input("x"), 0.02), "head", (8, 6)))
    x = torch.randn(shape)
    model = export(gm, (x,), tmp_path / "m.onnx")
    assert "Transpose" not in {node.op_type for node in model.graph.node}
    (got,) = Session(tmp_path / "m.onnx", optimize=False).run(x)
    torch.testing.assert_close(got, gm(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "zero_point", "opset", "onnx_dtype"),
    [
        ("int8", 0, 18, "INT8"),
        ("int8", -7, 18, "INT8"),
        ("uint8", 128, 18, "UINT8"),
        ("float8_e4m3fn", 0, 19, "FLOAT8E4M3FN"),
        ("int16", 3, 21, "INT16"),
        ("int4", 0, 21, "INT4"),
        ("uint4", 8, 21, "UINT4"),
    ],
)
def test_the_opset_is_what_the_types_need(
    tmp_path: Path, dtype: str, zero_point: int, opset: int, onnx_dtype: str
) -> None:
    gm = quantized(dtype, 0.05, zero_point=zero_point)
    x = torch.randn(3, 8) * 4
    model = export(gm, (x,), tmp_path / "m.onnx")
    assert model.opset_import[0].version == opset
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    assert kinds["x_quantize"] == onnx.TensorProto.DataType.Value(onnx_dtype)
    zero = next(t for t in model.graph.initializer if t.name == model.graph.node[0].input[2])
    assert zero.data_type == onnx.TensorProto.DataType.Value(onnx_dtype)
    assert float(numpy_helper.to_array(zero).astype("float32")) == zero_point
    (got,) = Session(tmp_path / "m.onnx", optimize=False).run(x)
    torch.testing.assert_close(got, gm(x), rtol=0, atol=0)


def test_fp16_scales_need_opset_19(tmp_path: Path) -> None:
    gm = quantized("int8", torch.tensor(0.05, dtype=torch.float16))
    x = torch.randn(3, 8, dtype=torch.float16)
    assert export(gm, (x,), tmp_path / "m.onnx").opset_import[0].version == 19
    (got,) = Session(tmp_path / "m.onnx", optimize=False).run(x)
    torch.testing.assert_close(got, gm(x), rtol=0, atol=0)


def test_a_higher_opset_is_taken(tmp_path: Path) -> None:
    gm, args = residual_net()
    model = export(gm, args, tmp_path / "m.onnx", opset=21)
    assert model.opset_import[0].version == 21
    rows = compare_nodes(tmp_path / "m.onnx", gm, args)
    assert len(rows) == sum(n.op == "call_function" for n in gm.graph.nodes)
    assert max(row.largest for row in rows if row.dtype == torch.int8) <= 1


@pytest.mark.parametrize(
    ("dtype", "opset", "node"),
    [("int8", 17, None), ("float8_e4m3fn", 18, "x_quantize"), ("int4", 20, "x_quantize")],
)
def test_too_low_an_opset_is_refused(tmp_path: Path, dtype: str, opset: int, node: str | None) -> None:
    with pytest.raises(ExportError, match="R15") as caught:
        export(quantized(dtype), (torch.randn(2, 3),), tmp_path / "m.onnx", opset=opset)
    assert caught.value.node == node
    assert "use opset=" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_opset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset 99 is not known"):
        export(quantized("int8"), (torch.randn(2, 3),), tmp_path / "m.onnx", opset=99)


def test_a_type_that_onnx_does_not_quantize_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not take int32") as caught:
        export(quantized("int32"), (torch.randn(2, 3),), tmp_path / "m.onnx")
    assert caught.value.node == "x_quantize"


def test_a_computed_scale_is_refused(tmp_path: Path) -> None:
    gm = quantized("int8")
    node = next(n for n in gm.graph.nodes if n.name == "x_quantize")
    with gm.graph.inserting_before(node):
        node.update_arg(1, gm.graph.call_function(torch.abs, (node.args[1],)))
    with pytest.raises(ExportError, match="R11") as caught:
        export(gm, (torch.randn(2, 3),), tmp_path / "m.onnx")
    assert caught.value.source == "model.py:1: line 1"


def test_a_scale_of_shape_one_becomes_a_scalar(tmp_path: Path) -> None:
    gm = quantized("int8", torch.tensor([0.05]), zero_point=3)
    x = torch.randn(2, 3)
    model = export(gm, (x,), tmp_path / "m.onnx")
    assert all(list(t.dims) == [] for t in model.graph.initializer)
    (got,) = Session(tmp_path / "m.onnx").run(x)
    torch.testing.assert_close(got, gm(x), rtol=0, atol=0)


def test_equal_scales_and_zero_points_are_stored_once(tmp_path: Path) -> None:
    b = GraphBuilder()
    one, two = b.qdq(b.input("x"), 0.05), b.qdq(b.input("y"), 0.05)
    gm = b.build(b.call(operator.add, one, two, name="add"))
    model = export(gm, (torch.randn(2, 3), torch.randn(2, 3)), tmp_path / "m.onnx")
    assert len(model.graph.initializer) == 2


@pytest.mark.parametrize("compute_dtype", ["fp32", "fp16"])
def test_weights_of_4_bits_take_half_a_byte(tmp_path: Path, compute_dtype: str) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(4, 16)
    recipe = fxq.Recipe([fxq.Rule("*", fxq.EdgeSpecs(weight=fxq.QSpec("int4")))])
    quantized = fxq.quantize(model, [x], recipe=recipe, progress=False)
    path = fxq.export(quantized, tmp_path / "m.onnx", compute_dtype=compute_dtype)
    held = onnx.load(path)
    weights = [t for t in held.graph.initializer if t.data_type == onnx.TensorProto.INT4 and len(t.dims) == 2]
    assert held.opset_import[0].version == 21
    assert [(list(t.dims), len(t.raw_data)) for t in weights] == [([16, 16], 128), ([8, 16], 64)]
    torch.testing.assert_close(
        Session(path).run(x)[0], quantized(x), rtol=0, atol=1e-5 if compute_dtype == "fp32" else 0.01
    )
    with pytest.raises(ExportError, match="opset 20 is too low"):
        fxq.export(quantized, tmp_path / "m.onnx", opset=20)
