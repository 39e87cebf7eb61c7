"""The linter's door: what it takes, what it leaves as it was, and how findings come out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from lint_net import IMAGE, Make, Net, brief, residual
from onnx import TensorProto, helper

import fxq
from fxq.backends.onnx_lint import lint_onnx
from fxq.checks import checks
from fxq.errors import FxqError
from fxq.rules import RULES


def read_in_a_branch() -> onnx.ModelProto:
    """A DQ that only the graphs inside an If read."""
    net = Net()
    pair = net.qdq("x")
    weight = net.weight("conv", (32, 32, 3, 3))
    wish = net.constant("wish", np.array(True))  # noqa: FBT003
    branches = {}
    for name in ("then_branch", "else_branch"):
        node = helper.make_node("Conv", [pair, weight], [f"{name}_y"], name=name, pads=[1] * 4)
        output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, IMAGE)
        branches[name] = helper.make_graph([node], name, [], [output])
    return net.model(net.op("If", [wish], "if", **branches))


def local_function() -> onnx.ModelProto:
    """The network of :func:`first_conv`, with the pair inside a function of the model's own."""
    net = Net()
    net.op("Pair", ["x"], "pair", domain="local")
    model = net.model(net.conv("pair", "conv"))
    inner = Net()
    inner.qdq("a")
    parameters = [helper.make_node("Constant", [], [name], value=tensor) for name, tensor in inner.initializers.items()]
    function = helper.make_function(
        "local", "Pair", ["a"], ["a_dq"], [*parameters, *inner.nodes], [helper.make_opsetid("", 18)]
    )
    model.functions.append(function)
    return model


RIGHT: dict[str, Make] = {
    "float": lambda: Net().model("x"),
    "read in a branch": read_in_a_branch,
    "local function": local_function,
}


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_found_on_a_right_graph(name: str) -> None:
    findings = lint_onnx(RIGHT[name]())
    assert not findings, str(findings)


def test_the_table_says_which_rules_are_checked() -> None:
    checked = {rule for check in checks("onnx") for rule in check.rules}
    assert checked == {rule.id for rule in RULES.values() if rule.check is not None}


class TestInput:
    """What the linter takes, and what it leaves as it was."""

    def test_file_bytes_and_model_give_the_same(self, tmp_path: Path) -> None:
        model = residual(None)
        before = model.SerializeToString()
        path = tmp_path / "net.onnx"
        path.write_bytes(before)
        assert lint_onnx(model) == lint_onnx(path) == lint_onnx(str(path)) == lint_onnx(before)
        assert len(lint_onnx(model)) == 1
        assert model.SerializeToString() == before
        assert path.read_bytes() == before

    def test_weights_beside_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "net.onnx"
        onnx.save(residual("own"), path, save_as_external_data=True, location="net.data", size_threshold=0)
        assert brief(lint_onnx(path)) == [("R24", "warning", "skip_q")]
        (tmp_path / "net.data").unlink()
        with pytest.raises(FxqError, match=r"cannot read the values of '\w+' from the file beside the model"):
            lint_onnx(path)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FxqError, match=r"cannot read .*gone\.onnx: No such file"):
            lint_onnx(tmp_path / "gone.onnx")

    @pytest.mark.parametrize("content", [b"", b"no model at all, just text \xff\xff"])
    def test_what_is_no_model(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "net.onnx"
        path.write_bytes(content)
        for source in (path, content):
            with pytest.raises(FxqError, match="no ONNX model in"):
                lint_onnx(source)

    def test_a_model_of_pytorchs(self) -> None:
        with pytest.raises(FxqError, match="a Linear is no ONNX model") as caught:
            fxq.lint(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
        assert "fxq.export" in str(caught.value.hint)

    def test_only_some_rules(self) -> None:
        assert not lint_onnx(residual(None), rules=["R24"])
        assert brief(lint_onnx(residual(None), rules={"R23", "R24"})) == [("R23", "warning", "add")]
        with pytest.raises(FxqError, match=r"no rule R99[\s\S]*R23"):
            lint_onnx(residual(), rules=["R99"])

    def test_findings_say_where_the_node_came_from(self) -> None:
        model = residual(conv=True)
        (add,) = [node for node in model.graph.node if node.name == "add"]
        add.metadata_props.add(key="fxq.module_path", value="layer1.0")
        add.metadata_props.add(key="fxq.source", value="resnet.py:93")
        (finding,) = lint_onnx(model)
        assert (finding.module_path, finding.source) == ("layer1.0", "resnet.py:93")
        assert "layer1.0 at resnet.py:93" in str(lint_onnx(model))

    def test_nodes_without_names_of_their_own(self) -> None:
        model = residual(conv=True)
        for node in model.graph.node:
            node.name = "same"
        assert [f.node for f in lint_onnx(model)] == ["Add:add"]

    def test_findings_are_in_the_graphs_order(self) -> None:
        net = Net()
        first = net.conv(net.qdq("x", zero=3), "conv1", weight=net.float_weight("conv1", (32, 32, 3, 3)))
        relu = net.op("Relu", [net.qdq(first)], "relu")
        weight = net.weight("conv2", (32, 32, 3, 3), 1)
        net.conv(net.qdq(relu, np.inf), "conv2", weight=weight)
        findings = lint_onnx(net.model("conv2", opset=26))
        assert brief(findings) == [
            ("R8", "warning", None),
            ("R9", "error", "x_q"),
            ("R20", "warning", "conv1"),
            ("R21", "warning", "conv1_dq"),
            ("R9", "error", "relu_q"),
            ("R16", "error", "conv2"),
        ]
        assert findings == lint_onnx(net.model("conv2", opset=26))

    def test_a_graph_that_shape_inference_refuses(self) -> None:
        model = residual(None)
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
        assert brief(lint_onnx(model)) == [("R23", "warning", "add")]
