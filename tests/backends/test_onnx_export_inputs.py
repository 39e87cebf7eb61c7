"""Export's dynamic shapes, nested inputs and outputs, and their names."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from converted_graphs import GraphBuilder, export, residual_net
from torch import Tensor, fx, nn

import fxq
from fxq.backends.onnx_compare import compare_nodes
from fxq.backends.onnx_export import export_onnx
from fxq.backends.onnx_names import NODE, properties
from fxq.backends.onnxrt import Session
from fxq.errors import ExportError


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
    with pytest.raises(ExportError, match="'batch' is 4 in input 'x' and 1 in 'y'") as caught:
        export(two_inputs(), (torch.randn(4, 6), torch.randn(1, 6)), tmp_path / "m.onnx")
    assert "dynamic_shapes={'x': {0: 'batch'}}" in str(caught.value.hint)


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


def test_an_input_called_output_keeps_its_name(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, output: Tensor) -> Tensor:
            return output + 1

    path = fxq.export(fxq.trace(Net(), torch.randn(2, 3)), tmp_path / "m.onnx")
    session = Session(path)
    assert (session.input_names, session.output_names) == (("output",), ("output_1",))
