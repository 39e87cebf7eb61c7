"""Export: names, provenance, numbers, types and opsets, dynamic shapes, nested inputs, files."""

from __future__ import annotations

import copy
import math
import operator
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from converted_graphs import GraphBuilder, residual_net
from golden import check_golden
from onnx import numpy_helper
from torch import Tensor, fx, nn

import fxq
from fxq.backends import onnx_capture, onnx_files
from fxq.backends.onnx_compare import compare_nodes
from fxq.backends.onnx_export import export_onnx
from fxq.backends.onnx_names import MODULE_PATH, NODE, SOURCE, properties
from fxq.backends.onnxrt import Session
from fxq.errors import ExportError
from fxq.graph import State, set_state
from fxq.target import Target

DYNAMIC = pytest.mark.parametrize("dynamic_shapes", ["batch", None])


def export(gm: fx.GraphModule, args: tuple[Any, ...], path: Path, **options: Any) -> onnx.ModelProto:
    assert export_onnx(gm, args, options.pop("kwargs", None), path, **options) == path
    return onnx.load(path)


def text(model: onnx.ModelProto) -> str:
    """The graph in lines: node name, operator, inputs, outputs, origin."""
    shapes = {v.name: v for v in [*model.graph.input, *model.graph.output, *model.graph.value_info]}

    def show(name: str) -> str:
        kind = shapes[name].type.tensor_type
        dims = ",".join(d.dim_param or str(d.dim_value) for d in kind.shape.dim)
        return f"{name}:{onnx.TensorProto.DataType.Name(kind.elem_type).lower()}[{dims}]"

    lines = [f"opset {model.opset_import[0].version}", *(f"input {show(v.name)}" for v in model.graph.input)]
    for node in model.graph.node:
        known = properties(node)
        lines.append(f"{node.name} = {node.op_type}({', '.join(node.input)}) -> {show(node.output[0])}")
        lines.append(f"    {known[NODE]} | {known.get(MODULE_PATH, '')} | {known[SOURCE]}")
    return "\n".join([*lines, *(f"output {show(v.name)}" for v in model.graph.output)])


@DYNAMIC
def test_residual_net_is_exported_node_for_node(tmp_path: Path, dynamic_shapes: Any) -> None:
    gm, args = residual_net()
    model = export(gm, args, tmp_path / "m.onnx", dynamic_shapes=dynamic_shapes)
    check_golden(f"onnx_export/residual_{dynamic_shapes or 'static'}", text(model))


@DYNAMIC
def test_every_node_has_a_name_of_its_own_and_an_origin(tmp_path: Path, dynamic_shapes: Any) -> None:
    gm, args = residual_net()
    model = export(gm, args, tmp_path / "m.onnx", dynamic_shapes=dynamic_shapes)
    names = [node.name for node in model.graph.node]
    assert not [name for name, count in Counter(names).items() if count > 1]
    assert {"layer1.0.conv1", "layer1.0.conv2", "fc", "act", "layer1_0_add"} <= set(names)
    # The second call of the module layer1.0.relu cannot have the module's name, which is taken.
    assert {"layer1.0.relu", "layer1_0_relu_1"} <= set(names)
    known = {node.name: node for node in gm.graph.nodes}
    for node in model.graph.node:
        held = properties(node)
        where = known[held[NODE]].meta["origin"]
        assert (held.get(MODULE_PATH, ""), held[SOURCE]) == (where.module_path, where.source)


@DYNAMIC
def test_of_several_nodes_the_last_has_the_plain_name(tmp_path: Path, dynamic_shapes: Any) -> None:
    b = GraphBuilder()
    x = b.input("x")
    gelu = b.call(F.gelu, x, name="blocks_0_act", module="blocks.0.act", approximate="tanh")
    # Taken, so the suffixes of the node before have to go around it.
    taken = b.call(torch.relu, gelu, name="blocks.0.act_1", module=None)
    silu = b.call(F.silu, taken, name="silu")
    gm = b.build(silu)
    model = export(gm, (torch.randn(2, 4),), tmp_path / "m.onnx", dynamic_shapes=dynamic_shapes)
    groups: dict[str, list[str]] = {}
    for node in model.graph.node:
        groups.setdefault(properties(node)[NODE], []).append(node.name)
    first = groups["blocks_0_act"]
    assert len(first) > 2
    assert first[-1] == "blocks.0.act"
    assert all(name.startswith("blocks.0.act_") for name in first[:-1])
    assert groups["silu"] == ["silu_1", "silu"]
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    # The value of a group is called after the FX node; what lies inside it tells so too.
    outputs = [name for node in model.graph.node for name in node.output]
    assert "blocks_0_act" in outputs
    assert all(name == "output" or name.split(".")[0].startswith(("blocks_0_act", "silu")) for name in outputs)


def test_hardswish_keeps_its_name_whatever_it_becomes(tmp_path: Path) -> None:
    b = GraphBuilder()
    x = b.input("x")
    one = b.call(F.hardswish, x, name="features_0_2", module="features.0.2")
    gm = b.build(b.call(F.hardswish, one, name="features_1_2", module="features.1.2"))
    model = export(gm, (torch.randn(2, 4),), tmp_path / "m.onnx")
    ends = [n.name for n in model.graph.node if not properties(n)[NODE].endswith("quantizer")]
    assert ends[-1] == "features.1.2"
    assert "features.0.2" in ends


@DYNAMIC
def test_node_by_node_the_numbers_are_pytorchs(tmp_path: Path, dynamic_shapes: Any) -> None:
    gm, args = residual_net()
    export(gm, args, tmp_path / "m.onnx", dynamic_shapes=dynamic_shapes)
    rows = {row.node: row for row in compare_nodes(tmp_path / "m.onnx", gm, args)}
    assert set(rows) == {n.name for n in gm.graph.nodes if n.op == "call_function"}
    integers = [row for row in rows.values() if not row.dtype.is_floating_point]
    assert len(integers) == 4
    assert all(row.share <= 0.001 and row.largest <= 1 for row in integers)
    assert all(row.sqnr > 110 for row in rows.values())


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_a_dynamic_batch_takes_any_size(tmp_path: Path, batch: int) -> None:
    gm, args = residual_net()
    model = export(gm, args, tmp_path / "m.onnx")
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    x = torch.randn(batch, 3, 8, 8)
    (got,) = Session(tmp_path / "m.onnx", optimize=False).run(x)
    torch.testing.assert_close(got, gm(x), rtol=1e-5, atol=1e-6)


def test_an_example_of_batch_one_gives_a_dynamic_batch(tmp_path: Path) -> None:
    gm, args = residual_net()
    export(gm, (args[0][:1],), tmp_path / "m.onnx")
    (got,) = Session(tmp_path / "m.onnx", optimize=False).run(args[0])
    torch.testing.assert_close(got, gm(args[0]), rtol=1e-5, atol=1e-6)


def test_static_shapes_are_the_examples(tmp_path: Path) -> None:
    gm, args = residual_net()
    model = export(gm, args, tmp_path / "m.onnx", dynamic_shapes=None)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [4, 3, 8, 8]
    assert [d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == [4, 10]


def test_nothing_about_the_graph_changes(tmp_path: Path) -> None:
    gm, args = residual_net()
    code, weights = gm.code, copy.deepcopy(gm.state_dict())
    metas = [dict(node.meta) for node in gm.graph.nodes]
    gm.train()
    export(gm, args, tmp_path / "m.onnx")
    assert gm.training
    assert gm.code == code
    assert [dict(node.meta) for node in gm.graph.nodes] == metas
    assert gm.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in gm.state_dict().items())


def test_the_second_file_equals_the_first(tmp_path: Path) -> None:
    gm, args = residual_net()
    export(gm, args, tmp_path / "a.onnx")
    export(gm, args, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_export_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gm, args = residual_net()
    export(gm, args, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")


# Types, axes and opsets


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


# Dynamic shapes


def two_inputs() -> fx.GraphModule:
    b = GraphBuilder()
    x, y = b.input("x"), b.input("y")
    total = b.call(operator.add, b.call(torch.relu, x, name="relu"), y, name="add")
    return b.build(b.call(torch.mean, total, name="mean", dim=-1))


def dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_all_inputs_share_the_batch_and_scalars_have_none(tmp_path: Path) -> None:
    b = GraphBuilder()
    total = b.call(operator.mul, b.input("x"), b.input("factor"), name="mul")
    gm = b.build(b.call(operator.add, total, b.input("y"), name="add"))
    args = (torch.randn(2, 3), torch.tensor(2.0), torch.randn(2, 3))
    model = export(gm, args, tmp_path / "m.onnx")
    assert [dims(v) for v in model.graph.input] == [["batch", 3], [], ["batch", 3]]


def test_dimensions_by_name_and_range(tmp_path: Path) -> None:
    shapes = {"x": {0: "n", 1: (2, 64)}, "y": {0: "n", -1: (2, 64)}}
    gm = two_inputs()
    with pytest.raises(ExportError, match="cannot be exported with dynamic") as caught:
        # Two ranges are two dimensions, which the addition needs to be one.
        export(gm, (torch.randn(4, 6), torch.randn(4, 6)), tmp_path / "m.onnx", dynamic_shapes=shapes)
    assert caught.value.node == "add"
    shapes = {"x": {0: "n", 1: "width"}, "y": {0: "n", -1: "width"}}
    args = (torch.randn(4, 6), torch.randn(4, 6))
    model = export(gm, args, tmp_path / "m.onnx", dynamic_shapes=shapes)
    assert [dims(v) for v in model.graph.input] == [["n", "width"], ["n", "width"]]
    x, y = torch.randn(3, 9), torch.randn(3, 9)
    (got,) = Session(tmp_path / "m.onnx").run(x, y)
    torch.testing.assert_close(got, gm(x, y))


def test_a_range_alone(tmp_path: Path) -> None:
    gm, args = residual_net()
    model = export(gm, args, tmp_path / "m.onnx", dynamic_shapes={"x": {2: (4, 32), 3: (4, 32)}})
    assert dims(model.graph.input[0]) == [4, 3, "x_dim2", "x_dim3"]
    x = torch.randn(4, 3, 12, 16)
    (got,) = Session(tmp_path / "m.onnx", optimize=False).run(x)
    torch.testing.assert_close(got, gm(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ("rows", "is not understood"),
        ({"z": {0: "n"}}, r"names \['z'\], which are no inputs"),
        ({"x": {2: "n"}}, "has no dimension 2"),
        ({"x": {"0": "n"}}, "has no dimension '0'"),
        ({"x": {0: "two words"}}, "is no dimension"),
        ({"x": {0: 3}}, "is no dimension"),
        ({"x": {0: (8, 16)}}, "has size 4 along 'x_dim0', outside"),
        ({"x": {0: "n"}, "y": {1: "n"}}, "'n' is 4 in input 'x' and 6 in 'y'"),
    ],
)
def test_wrong_dynamic_shapes_are_refused(tmp_path: Path, shapes: Any, message: str) -> None:
    args = (torch.randn(4, 6), torch.randn(4, 6))
    with pytest.raises(ExportError, match=message):
        export(two_inputs(), args, tmp_path / "m.onnx", dynamic_shapes=shapes)


def test_inputs_of_unequal_first_dimension_have_no_common_batch(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'batch' is 4 in input 'x' and 1 in 'y'"):
        export(two_inputs(), (torch.randn(4, 6), torch.randn(1, 6)), tmp_path / "m.onnx")


def test_a_fixed_batch_is_refused_at_its_node_and_never_exported_silently(tmp_path: Path) -> None:
    b = GraphBuilder()
    x = b.call(torch.relu, b.input("x"), name="body_relu")
    flat = b.call(torch.reshape, x, (4, -1), name="head_reshape")
    gm = b.build(b.call(torch.neg, flat, name="neg"))
    with pytest.raises(ExportError, match="cannot be exported with dynamic batch") as caught:
        export(gm, (torch.randn(4, 3, 2),), tmp_path / "m.onnx")
    assert (caught.value.node, caught.value.module_path) == ("head_reshape", "head")
    assert caught.value.source == "model.py:2: line 2"
    assert "dynamic_shapes=None" in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())
    model = export(gm, (torch.randn(4, 3, 2),), tmp_path / "m.onnx", dynamic_shapes=None)
    assert dims(model.graph.output[0]) == [4, 6]


# Inputs and outputs


class Nested(nn.Module):
    def forward(self, features: dict[str, Any], scale: Any, mask: Any = None) -> dict[str, Any]:
        low, (high, more) = features["low"], features["rest"]
        total = torch.relu(low) + high * scale + more
        return {"sum": total, "parts": [low * 2, high]}


def test_nested_inputs_and_outputs_are_named_by_their_path(tmp_path: Path) -> None:
    features = {"low": fx.PH, "rest": (fx.PH, fx.PH)}
    gm = fx.symbolic_trace(Nested(), concrete_args={"features": features})
    low, high, more, scale = (torch.randn(2, 3) for _ in range(4))
    args = ({"low": low, "rest": (high, more)}, scale, None)
    model = export(gm, args, tmp_path / "m.onnx")
    names = [v.name for v in model.graph.input]
    assert len(names) == 4
    results = Session(tmp_path / "m.onnx").run(low, high, more, scale)
    expected = gm(*args)
    torch.testing.assert_close(results, [expected["sum"], *expected["parts"]])


def test_a_container_that_the_graph_takes_apart_itself(tmp_path: Path) -> None:
    gm = fx.symbolic_trace(Nested(), concrete_args={"mask": None})
    low, high, more, scale = (torch.randn(2, 3) for _ in range(4))
    kwargs = {"scale": scale, "features": {"low": low, "rest": (high, more)}}
    model = export(gm, (), tmp_path / "m.onnx", kwargs=kwargs)
    assert [v.name for v in model.graph.input] == [
        "features_low",
        "features_rest_0",
        "features_rest_1",
        "scale",
    ]
    assert [v.name for v in model.graph.output] == ["sum", "parts_0", "parts_1"]
    got = Session(tmp_path / "m.onnx").run(
        {"scale": scale, "features_low": low, "features_rest_0": high, "features_rest_1": more}
    )
    torch.testing.assert_close(got["sum"], torch.relu(low) + high * scale + more)
    torch.testing.assert_close(got["parts_1"], high)


def test_several_outputs_repeated_ones_and_inputs_among_them(tmp_path: Path) -> None:
    b = GraphBuilder()
    x = b.input("input")  # fx calls this node input_1, the user calls it input
    y = b.call(torch.relu, x, name="relu")
    gm = b.build((y, x, 3, y, None))
    args = (torch.randn(2, 3),)
    model = export(gm, args, tmp_path / "m.onnx")
    assert [v.name for v in model.graph.input] == ["input"]
    assert [v.name for v in model.graph.output] == ["output_0", "output_1", "output_3"]
    got = Session(tmp_path / "m.onnx").run(*args)
    torch.testing.assert_close(got, [gm(*args)[0], args[0], gm(*args)[0]])
    assert all(NODE in properties(node) for node in model.graph.node)


def test_an_operation_with_several_results(tmp_path: Path) -> None:
    b = GraphBuilder()
    parts = b.call(torch.chunk, b.input("x"), 2, name="halves", dim=1)
    left, right = (b.call(operator.getitem, parts, i, name=f"half_{i}") for i in range(2))
    gm = b.build(b.call(operator.mul, left, b.call(torch.sigmoid, right, name="gate"), name="glu"))
    args = (torch.randn(2, 6),)
    model = export(gm, args, tmp_path / "m.onnx")
    assert {"halves__0", "halves__1"} <= {name for node in model.graph.node for name in node.output}
    rows = compare_nodes(tmp_path / "m.onnx", gm, args)
    assert [row.node for row in rows] == ["halves", "halves", "gate", "glu"]


def test_batch_normalization_is_one_tensor_though_onnx_could_give_three(tmp_path: Path) -> None:
    b = GraphBuilder()
    mean, variance = b.tensor("norm.mean", torch.randn(3)), b.tensor("norm.variance", torch.rand(3) + 0.5)
    norm = b.call(F.batch_norm, b.input("x"), mean, variance, name="norm", module="norm")
    gm = b.build(b.call(torch.relu, norm, name="relu"))
    args = (torch.randn(2, 3, 4),)
    model = export(gm, args, tmp_path / "m.onnx")
    assert [(n.name, n.op_type, n.output[0]) for n in model.graph.node] == [
        ("norm", "BatchNormalization", "norm"),
        ("relu", "Relu", "output"),
    ]
    assert [row.node for row in compare_nodes(tmp_path / "m.onnx", gm, args)] == ["norm", "relu"]


def test_names_by_wish(tmp_path: Path) -> None:
    gm, args = residual_net()
    model = export(gm, args, tmp_path / "m.onnx", input_names=["images"], output_names=["logits"])
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    assert model.graph.node[-1].name == "fc"


def test_a_wish_may_be_the_name_of_another_tensor(tmp_path: Path) -> None:
    gm, args = residual_net()
    export(gm, args, tmp_path / "m.onnx", input_names=["stem"], output_names=["act"])
    (got,) = Session(tmp_path / "m.onnx", optimize=False).run(*args)
    torch.testing.assert_close(got, gm(*args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_names": ["a", "b"]}, "for 1 inputs"),
        ({"output_names": []}, "for 1 outputs"),
        ({"input_names": [""]}, "not distinct names"),
        ({"input_names": ["a"], "output_names": ["a"]}, "both an input and an output"),
    ],
)
def test_wrong_names_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    gm, args = residual_net()
    with pytest.raises(ExportError, match=message):
        export(gm, args, tmp_path / "m.onnx", **options)


def test_examples_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    gm, args = residual_net()
    with pytest.raises(ExportError, match="do not fit the graph"):
        export(gm, (*args, *args), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"torch\.export stopped") as caught:
        export(gm, (torch.randn(4, 5, 8, 8),), tmp_path / "m.onnx")
    assert caught.value.node == "stem"


def test_a_graph_without_tensor_outputs_is_refused(tmp_path: Path) -> None:
    b = GraphBuilder()
    b.input("x")
    with pytest.raises(ExportError, match="no output tensor"):
        export(b.build(3), (torch.randn(2),), tmp_path / "m.onnx")


def test_only_graph_modules_are_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot export a Linear"):
        export_onnx(nn.Linear(2, 2), (torch.randn(2, 2),), None, tmp_path / "m.onnx")  # type: ignore[arg-type]


# What else a graph may hold


def test_a_module_kept_whole_lends_its_name_to_all_its_nodes(tmp_path: Path) -> None:
    b = GraphBuilder()
    b.root.add_module("mixer", nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)))
    gm = b.build(b.graph.call_module("mixer", (b.qdq(b.input("x"), 0.05),)))
    x = torch.randn(2, 4)
    model = export(gm, (x,), tmp_path / "m.onnx")
    held = [node.name for node in model.graph.node if properties(node)[NODE] == "mixer"]
    assert len(held) > 2
    assert held[-1] == "mixer"
    (got,) = Session(tmp_path / "m.onnx").run(x)
    torch.testing.assert_close(got, gm(x), rtol=1e-5, atol=1e-6)


def test_a_weight_that_two_layers_share_is_stored_once(tmp_path: Path) -> None:
    b = GraphBuilder()
    x = b.qdq(b.input("x"), 0.05)
    weight = b.weight("shared", torch.randn(4, 4))
    one = b.call(F.linear, x, weight, name="one")
    gm = b.build(b.call(F.linear, b.qdq(one, 0.05), weight, name="two"))
    model = export(gm, (torch.randn(2, 4),), tmp_path / "m.onnx")
    assert sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2 for t in model.graph.initializer) == 1


def test_an_operation_without_translation_is_named(tmp_path: Path) -> None:
    b = GraphBuilder()
    x = b.call(torch.relu, b.input("x"), name="relu")
    strange = b.call(torch.special.bessel_j0, x, name="head_bessel")
    gm = b.build(b.call(torch.relu, strange, name="relu_1"))
    with pytest.raises(ExportError, match="cannot translate the graph") as caught:
        export(gm, (torch.randn(2, 4),), tmp_path / "m.onnx")
    assert (caught.value.node, caught.value.module_path) == ("head_bessel", "head")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1, (1, 1), (None, None), (2, 1)])
def test_pooling_a_permuted_tensor_needs_no_gather(tmp_path: Path, size: Any) -> None:
    b = GraphBuilder()
    x = b.call(torch.permute, b.input("x"), (0, 3, 1, 2), name="permute")
    gm = b.build(b.call(F.adaptive_avg_pool2d, x, name="pool", output_size=size))
    args = (torch.randn(2, 4, 4, 3),)
    model = export(gm, args, tmp_path / "m.onnx")
    assert not {"Range", "Gather", "Shape"} & {node.op_type for node in model.graph.node}
    (got,) = Session(tmp_path / "m.onnx").run(*args)
    torch.testing.assert_close(got, gm(*args))


def test_a_device_in_the_graph_becomes_the_cpu(tmp_path: Path) -> None:
    b = GraphBuilder()
    x = b.input("x")
    ones = b.call(torch.ones, 3, name="ones", device=torch.device("meta"))
    gm = b.build(b.call(operator.add, x, ones, name="add"))
    export(gm, (torch.zeros(2, 3),), tmp_path / "m.onnx")
    (got,) = Session(tmp_path / "m.onnx").run(torch.zeros(2, 3))
    torch.testing.assert_close(got, torch.ones(2, 3))


def test_provenance_goes_into_the_file(tmp_path: Path) -> None:
    gm, args = residual_net()
    facts = {"torch": "2.x", "calibration": {"batches": 0, "performance_only": True}}
    set_state(gm, State(target=Target.load("tensorrt"), provenance=facts))
    model = export(gm, args, tmp_path / "m.onnx")
    held = {p.key: p.value for p in model.metadata_props}
    assert held == {
        "fxq.torch": "2.x",
        "fxq.calibration": '{"batches": 0, "performance_only": true}',
        "fxq.compute_dtype": "fp32",
    }
    assert model.producer_name == "fxq"


def test_nothing_of_the_exporting_machine_is_in_the_file(tmp_path: Path) -> None:
    gm, args = residual_net()
    export(gm, args, tmp_path / "m.onnx")
    data = (tmp_path / "m.onnx").read_bytes()
    assert b"pkg.torch" not in data
    assert b"site-packages" not in data


# Files


def test_a_refused_model_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm, args = residual_net()
    path = tmp_path / "m.onnx"
    export(gm, args, path)
    before = path.read_bytes()
    translate = onnx_capture._translate

    def spoiled(*given: Any) -> Any:
        result = translate(*given)
        gemm = next(n for n in result.model.graph if n.op_type == "Gemm")
        gemm.attributes["transB"] = onnx_ir.AttrInt64("transB", 0)
        return result

    monkeypatch.setattr(onnx_capture, "_translate", spoiled)
    with pytest.raises(ExportError, match="refuses the model") as caught:
        export(gm, args, path)
    assert caught.value.node == "fc"
    assert caught.value.source
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    gm, args = residual_net()
    export(gm, args, tmp_path / "m.onnx")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "m.onnx").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    gm, args = residual_net()
    with pytest.raises(ExportError, match="there is no folder"):
        export(gm, args, tmp_path / "none" / "m.onnx")


def wide_net(seed: int) -> tuple[fx.GraphModule, tuple[torch.Tensor]]:
    torch.manual_seed(seed)
    b = GraphBuilder()
    return b.build(b.linear(b.qdq(b.input("x"), 0.02), "wide", (64, 64))), (torch.randn(2, 64),)


def test_weights_beyond_the_limit_go_into_one_file_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    gm, args = wide_net(0)
    export(gm, args, path)
    assert list(tmp_path.iterdir()) == [path]  # below the limit all is in one file
    monkeypatch.setattr(onnx_files, "_LIMIT", 2000)
    export(gm, args, path)
    files = {file.name for file in tmp_path.iterdir()}
    (data,) = files - {path.name}
    assert data.startswith("m.onnx.")
    assert data.endswith(".data")
    (got,) = Session(path, optimize=False).run(*args)
    torch.testing.assert_close(got, gm(*args), rtol=1e-5, atol=1e-6)
    # Other weights make another data file, and the old one goes.
    other, args = wide_net(1)
    export(other, args, path)
    (replaced,) = {file.name for file in tmp_path.iterdir()} - {path.name}
    assert replaced != data
    (got,) = Session(path, optimize=False).run(*args)
    torch.testing.assert_close(got, other(*args), rtol=1e-5, atol=1e-6)
    monkeypatch.undo()
    export(other, args, path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_beyond_the_limit_leaves_both_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "_LIMIT", 2000)
    path = tmp_path / "m.onnx"
    gm, args = wide_net(0)
    export(gm, args, path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before) == 2

    def refuse(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("no")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match="refuses"):
        export(*wide_net(1), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    # The same weights again: their file is in use, so a failure must not remove it.
    with pytest.raises(ExportError, match="refuses"):
        export(gm, args, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    (got,) = Session(path).run(*args)
    assert math.isfinite(got.sum())


def test_an_input_called_output_keeps_its_name(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, output: Tensor) -> Tensor:
            return output + 1

    path = fxq.export(fxq.trace(Net(), torch.randn(2, 3)), tmp_path / "m.onnx")
    session = Session(path)
    assert (session.input_names, session.output_names) == (("output",), ("output_1",))


@pytest.mark.parametrize("compute_dtype", ["fp32", "fp16", "bf16"])
def test_nothing_is_said_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str], compute_dtype: str) -> None:
    gm = fxq.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 6, 6))
    fxq.export(gm, tmp_path / "m.onnx", compute_dtype=compute_dtype)
    assert capfd.readouterr() == ("", "")


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
