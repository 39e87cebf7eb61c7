"""Fixes keep the numbers, mend what they say, leave the rest alone, and find nothing to do the second time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from lint_net import FP8, INT4, Make, Net, brief, clipped_or_moved, residual
from onnx import helper
from onnx_running import outputs

from fxq.backends.onnx_fix import Fixed, fix_model, fix_onnx
from fxq.backends.onnx_lint import lint_onnx
from fxq.errors import ExportError, FxqError
from fxq.rules import RULES

Changes = list[tuple[str, str]]


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    return twin


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def doubled(same: bool = True, *, readers: bool = True) -> onnx.ModelProto:
    net = Net()
    first = net.conv(net.qdq("x"), "conv1")
    second = net.qdq("x", 0.05 if same else 0.06, name="again")
    return net.model(first, *([net.conv(second, "conv2")] if readers else []))


def requantized(scale: float, *, dtype: type = np.float32) -> onnx.ModelProto:
    net = Net()
    once = net.qdq("x", scale, scale_dtype=dtype)
    twice = net.qdq(once, scale, name="again", scale_dtype=dtype)
    return net.model(net.conv(twice, "conv"))


def unread() -> onnx.ModelProto:
    net = Net()
    pair = net.qdq("x")
    net.op("Identity", [net.qdq("x", 0.06, name="dead")], "idle")
    return net.model(net.conv(pair, "conv"))


def biased(dtype: type, *, through_q: bool = False) -> onnx.ModelProto:
    """A convolution whose bias comes out of a DQ, and its weight too."""
    net = Net()
    if through_q:
        bias = net.qdq(net.constant("b", net.random.normal(size=32).astype(np.float32)), 0.01)
    else:
        integers = net.random.integers(-100, 100, 32) * (10**5 if dtype is np.int32 else 1)
        bias = net.dq(net.constant("b", integers.astype(dtype)), "b_dq", np.full(32, 1.1e-7), dtype=dtype, axis=0)
    return net.model(net.op("Conv", [net.qdq("x"), net.weight("conv", (32, 32, 3, 3)), bias], "conv", pads=[1] * 4))


def unsigned(zero: int, *, moved: bool = False) -> onnx.ModelProto:
    net = Net()
    integers = net.q("x", "x_q", zero=zero, dtype=np.uint8)
    if moved:
        integers = net.op("MaxPool", [integers], "pool", kernel_shape=[2, 2], strides=[2, 2])
    return net.model(net.conv(net.dq(integers, "x_dq", zero=zero, dtype=np.uint8), "conv"))


def shifted_weight(
    zero: int, low: int, high: int, dtype: type = np.uint8, *, per_channel: bool = True
) -> onnx.ModelProto:
    net = Net()
    data = net.constant("w", net.random.integers(low, high, (32, 32, 3, 3)).astype(dtype))
    zeros = np.full(32, zero) + (np.arange(32) % 3 if per_channel else 0)
    scale = net.constant("w_scale", np.full(32, 0.003, np.float32))
    zero_point = net.constant("w_zero", zeros.astype(dtype))
    weight = net.op("DequantizeLinear", [data, scale, zero_point], "w_dq", axis=0)
    return net.model(net.conv(net.qdq("x"), "conv", weight=weight))


def relu(behind: float | None, *, op: str = "Relu", skip: bool = False) -> onnx.ModelProto:
    """Q/DQ between a convolution and an activation, and perhaps behind it."""
    net = Net()
    pair = net.qdq(net.conv(net.qdq("x"), "conv1"))
    constants = [net.constant("low", np.float32(0)), net.constant("high", np.float32(1.003))] if op == "Clip" else []
    active = net.op(op, [pair, *constants], "active")
    read = active if behind is None else net.qdq(active, behind)
    tail = net.conv(read, "conv2")
    return net.model(net.op("Add", [tail, pair], "sum") if skip else tail)


def computed_zero(kind: str) -> onnx.ModelProto:
    """Zero points that a graph computes from constants, so that reading the file does not tell them."""
    net = Net()
    zero = onnx.numpy_helper.from_array(
        np.array([99 if kind == "weight" else 9], np.uint8 if kind == "weight" else np.int8)
    )
    shape = net.constant("shape", np.array([32] if kind == "weight" else [], np.int64))
    parameters = ["x_q_scale", net.op("ConstantOfShape", [shape], "zero", value=zero)]
    pair = net.qdq("x")
    if kind == "weight":
        data = net.constant("w", net.random.integers(60, 120, (32, 32, 3, 3)).astype(np.uint8))
        scale = net.constant("w_scale", np.full(32, 0.003, np.float32))
        weight = net.op("DequantizeLinear", [data, scale, "zero"], "w_dq", axis=0)
        return net.model(net.conv(pair, "conv", weight=weight))
    source = {"second": "x", "behind": pair, "relu": net.conv(pair, "conv1")}[kind]
    integers = net.op("QuantizeLinear", [source, *parameters], "other_q")
    other = net.op("DequantizeLinear", [integers, *parameters], "other_dq")
    read = net.op("Relu", [other], "active") if kind == "relu" else other
    return net.model(net.conv(read, "conv2"), *([] if kind == "relu" else [net.conv(pair, "conv3")]))


def doubled_with(attribute: str) -> onnx.ModelProto:
    """Two quantizers of one tensor with one scale that differ in how they compute."""
    net = Net()
    dtype = FP8 if attribute == "saturate" else np.int8
    options: dict[str, int] = {"saturate": 0} if attribute == "saturate" else {"precision": onnx.TensorProto.FLOAT16}
    pairs = [
        net.dq(net.q("x", f"{n}_q", 0.001, dtype=dtype, **o), n, 0.001, dtype=dtype)
        for n, o in (("a", {}), ("b", options))
    ]
    return net.model(*(net.conv(pair, f"conv_{pair}") for pair in pairs), opset=19 if attribute == "saturate" else 23)


def integers_in_front_of_relu() -> onnx.ModelProto:
    net = Net()
    pair = net.qdq(net.op("Cast", ["x"], "whole", to=onnx.TensorProto.INT32))
    return net.model(net.conv(net.op("Relu", [pair], "active"), "conv"), opset=13)


def wide_requantized() -> onnx.ModelProto:
    """INT16 through float16, which does not have all of its integers."""
    net = Net()
    half = net.op("Cast", ["x"], "half", to=onnx.TensorProto.FLOAT16)
    once = net.qdq(half, 0.001, dtype=np.int16, scale_dtype=np.float16)
    twice = net.qdq(once, 0.001, name="again", dtype=np.int16, scale_dtype=np.float16)
    return net.model(net.conv(net.op("Cast", [twice], "y", to=onnx.TensorProto.FLOAT), "conv"), opset=21)


EXACT: dict[str, tuple[Make, Changes]] = {
    "two quantizers": (doubled, [("R29", "again_q")]),
    "requantized": (lambda: requantized(0.05), [("R31", "again_q")]),
    "unread": (unread, [("R31", "dead_dq")]),
    "int32 bias": (lambda: biased(np.int32), [("R17", "b_dq")]),
    "INT8 bias": (lambda: biased(np.int8), [("R17", "b_dq")]),
    "bias behind Q/DQ": (lambda: biased(np.int8, through_q=True), [("R17", "b_dq")]),
    "uint8 around 128": (lambda: unsigned(128), [("R9", "x_q")]),
    "uint8 weight": (lambda: shifted_weight(128, 3, 250), [("R9", "w_dq")]),
    "uint8 weight around 0": (lambda: shifted_weight(0, 0, 128, per_channel=False), [("R10", "w_dq")]),
    "INT8 weight with zero points": (lambda: shifted_weight(5, -100, 120, np.int8), [("R9", "w_dq")]),
    "clipped weight": (lambda: clipped_or_moved("Clip"), [("R14", "between")]),
    "transposed weight": (lambda: clipped_or_moved("Transpose"), [("R14", "between")]),
    "in front of Relu": (lambda: relu(None), [("R21", "conv1_dq")]),
    "around Relu": (lambda: relu(0.05), [("R21", "conv1_dq"), ("R31", "active_q")]),
}

DECLINED: dict[str, Make] = {
    "two scales": lambda: doubled(same=False),
    "uint8 around 0": lambda: unsigned(0),
    "uint8 moved": lambda: unsigned(128, moved=True),
    "too wide for int8": lambda: shifted_weight(5, 3, 250),
    "another scale behind Relu": lambda: relu(0.06),
    "Clip": lambda: relu(None, op="Clip"),
    "read by an addition too": lambda: relu(None, skip=True),
    "float skip": lambda: residual(None),
    "second quantizer with a computed zero point": lambda: computed_zero("second"),
    "computed zero point behind a pair": lambda: computed_zero("behind"),
    "computed zero point in front of Relu": lambda: computed_zero("relu"),
    "weight with computed zero points": lambda: computed_zero("weight"),
    "saturating and not": lambda: doubled_with("saturate"),
    "two precisions": lambda: doubled_with("precision"),
    "INT16 in float16": wide_requantized,
    "INT32 in front of Relu": integers_in_front_of_relu,
}


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_fix_mends_its_finding_and_no_number_changes(name: str) -> None:
    make, wanted = EXACT[name]
    model = make()
    fixed = copied(model)
    changes = fix_model(fixed)
    assert [(change.rule, change.node) for change in changes] == wanted
    assert all(change.exact for change in changes)
    assert not lint_onnx(fixed), str(lint_onnx(fixed))
    onnx.checker.check_model(fixed, full_check=True)
    for before, after in zip(outputs(model), outputs(fixed), strict=True):
        np.testing.assert_array_equal(before, after)
    assert fix_model(copied(fixed), rounding=True) == ()


@pytest.mark.parametrize("name", DECLINED)
def test_what_would_change_a_number_is_left(name: str) -> None:
    model = DECLINED[name]()
    fixed = copied(model)
    assert fix_model(fixed) == ()
    assert fixed == model
    assert lint_onnx(model)
    assert all(finding.fixable != "exact" for finding in lint_onnx(model))


@pytest.mark.parametrize(("scale", "dtype", "mended"), [(1e-41, np.float32, False), (0.05, np.float16, True)])
def test_requantization_is_taken_away_where_every_integer_survives_it(scale: float, dtype: type, mended: bool) -> None:
    net = Net()
    half = net.op("Cast", ["x"], "half", to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    once = net.qdq(half, scale, scale_dtype=dtype)
    twice = net.qdq(once, scale, name="again", scale_dtype=dtype)
    model = net.model(net.op("Cast", [net.op("Relu", [twice], "relu")], "y", to=1), opset=19)
    assert ("R31", "again_q") in [(c.rule, c.node) for c in fix_model(model)] or not mended
    assert ("again_q" not in {node.name for node in model.graph.node}) == mended


def test_the_table_names_the_rules_that_are_fixed() -> None:
    rules = {finding.rule for make, _ in EXACT.values() for finding in lint_onnx(make()) if finding.fixable}
    assert rules | {"R23", "R38"} == {rule.id for rule in RULES.values() if rule.fixable}


class TestRounding:
    """Fixes after which outputs differ slightly."""

    @pytest.mark.parametrize(
        ("make", "changes"),
        [
            (lambda: residual(conv=True), [("R23", "add")]),
            (lambda: residual(None), [("R23", "add")]),
            (lambda: residual(None, conv=True), [("R23", "add")]),
            (lambda: residual(None, swapped=True), [("R23", "add")]),
            (lambda: relu(0.06), [("R21", "conv1_dq")]),
            (lambda: relu(None, op="Clip"), [("R21", "conv1_dq")]),
        ],
    )
    def test_edges_and_pairs(self, make: Make, changes: Changes) -> None:
        model = make()
        before = outputs(model, spread=1.0)
        done = fix_model(model, rounding=True)
        assert [(change.rule, change.node) for change in done] == changes
        assert not any(change.exact for change in done)
        assert not lint_onnx(model).of(changes[0][0])
        (got,), (wanted,) = outputs(model, spread=1.0), before
        assert np.abs(got - wanted).mean() < 0.1 * np.abs(wanted).mean()

    def test_the_skip_reads_the_quantizer_of_its_tensor(self) -> None:
        model = residual(None, conv=True)
        fix_model(model, rounding=True)
        (add,) = [node for node in model.graph.node if node.name == "add"]
        assert list(add.input) == ["conv2", "stem_dq"]
        assert "conv2_q" not in {node.name for node in model.graph.node}

    def test_a_skip_without_any_quantizer_takes_data(self) -> None:
        model = residual(None, downsample=True)
        assert brief(lint_onnx(model)) == [("R23", "warning", "add")]
        assert fix_model(model, rounding=True) == ()

    def test_a_pair_in_front_of_an_output(self) -> None:
        net = Net()
        model = net.model(net.qdq(net.conv(net.qdq("x"), "conv")))
        (finding,) = lint_onnx(model)
        assert (finding.rule, finding.fixable) == ("R31", "rounding")
        fix_model(model, rounding=True)
        assert [output.name for output in model.graph.output] == ["conv_dq"]
        assert operators(model)[-1] == "Conv"
        onnx.checker.check_model(model, full_check=True)
        assert not lint_onnx(model)

    def test_a_pair_between_input_and_output_stays(self) -> None:
        net = Net()
        model = net.model(net.qdq("x"))
        assert lint_onnx(model).of("R31")[0].fixable == ""
        assert fix_model(model, rounding=True) == ()


class TestWhatElseIsThere:
    """Graphs inside nodes, metadata, and what was useless before."""

    def test_a_tensor_that_a_branch_reads_is_not_rerouted(self) -> None:
        net = Net()
        first = net.conv(net.qdq("x"), "conv1")
        again = net.qdq("x", name="again")
        branches = {}
        for name in ("then_branch", "else_branch"):
            node = helper.make_node("Identity", ["again_q"], [f"{name}_y"], name=name)
            output = helper.make_tensor_value_info(f"{name}_y", onnx.TensorProto.INT8, (2, 32, 16, 16))
            branches[name] = helper.make_graph([node], name, [], [output])
        chosen = net.op("If", [net.constant("wish", np.array([True])[0])], "if", **branches)
        model = net.model(first, net.conv(again, "conv2"), net.op("Cast", [chosen], "y", to=1))
        assert brief(lint_onnx(model)) == [("R29", "advice", "again_q")]
        assert fix_model(model) == ()

    def test_a_new_tensor_has_no_name_of_a_branch(self) -> None:
        net = Net()
        active = net.op("Relu", [net.qdq(net.conv(net.qdq("x"), "conv1"))], "active")
        branches = {}
        for name in ("then_branch", "else_branch"):
            nodes = [
                helper.make_node("Relu", ["x"], ["active_float"], name=f"{name}_a"),
                helper.make_node("Identity", ["active_float"], [f"{name}_y"], name=f"{name}_b"),
            ]
            output = helper.make_tensor_value_info(f"{name}_y", onnx.TensorProto.FLOAT, (2, 32, 16, 16))
            branches[name] = helper.make_graph(nodes, name, [], [output])
        chosen = net.op("If", [net.constant("wish", np.bool_(1))], "if", **branches)
        model = net.model(net.conv(active, "conv2"), chosen)
        before = outputs(model)
        assert [change.rule for change in fix_model(model)] == ["R21"]
        onnx.checker.check_model(model, full_check=True)
        for wanted, got in zip(before, outputs(model), strict=True):
            np.testing.assert_array_equal(wanted, got)

    def test_stored_tensors_are_inputs_too_in_old_files(self) -> None:
        model = unsigned(128)
        model.ir_version = 3
        for tensor in model.graph.initializer:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        assert [change.rule for change in fix_model(model)] == ["R9"]
        onnx.checker.check_model(model, full_check=True)
        assert {tensor.name for tensor in model.graph.initializer} == {i.name for i in model.graph.input} - {"x"}

    def test_a_long_chain_is_mended_to_its_end(self) -> None:
        net = Net()
        tensor = net.qdq("x")
        for index in range(70):
            tensor = net.op("Relu", [tensor], f"relu{index}")
        model = net.model(net.conv(tensor, "conv"))
        assert len(fix_model(model)) == 70
        assert not lint_onnx(model)

    def test_everything_else_stays_as_it_was(self) -> None:
        model = doubled()
        model.metadata_props.add(key="author", value="somebody")
        model.graph.node[0].metadata_props.add(key="note", value="first")
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "useless"))
        model.graph.value_info.append(helper.make_tensor_value_info("again_dq", 1, (2, 32, 16, 16)))
        model.graph.value_info.append(helper.make_tensor_value_info("conv1_dummy", 1, None))
        before = {node.name: node.SerializeToString() for node in model.graph.node}
        fix_model(model)
        assert model.metadata_props[0].value == "somebody"
        assert "useless" in {tensor.name for tensor in model.graph.initializer}
        assert "again_dq" not in {value.name for value in model.graph.value_info}
        changed = [node.name for node in model.graph.node if before[node.name] != node.SerializeToString()]
        assert changed == ["conv2"]
        assert set(before) - {node.name for node in model.graph.node} == {"again_q", "again_dq"}
        assert not {"again_scale", "again_zero"} & {tensor.name for tensor in model.graph.initializer}

    def test_four_bit_weights_are_left_alone(self) -> None:
        net = Net(x=(2, 4, 64))
        data = net.constant("w", net.random.integers(-7, 8, (64, 64)).astype(INT4))
        weight = net.dq(data, "w_dq", np.full((1, 64), 0.01), dtype=INT4, axis=0, block_size=64)
        model = net.model(net.op("MatMul", ["x", weight], "product"), opset=21)
        assert fix_model(copied(model), rounding=True) == ()


class TestFiles:
    """Where the result goes, and when it does not."""

    @staticmethod
    def written(folder: Path, make: Callable[[], onnx.ModelProto] = doubled) -> Path:
        onnx.save(make(), folder / "net.onnx")
        return folder / "net.onnx"

    def test_beside_the_file_by_default(self, tmp_path: Path) -> None:
        path = self.written(tmp_path)
        before = path.read_bytes()
        fixed = fix_onnx(path)
        assert fixed.path == tmp_path / "net.fixed.onnx"
        assert path.read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["net.fixed.onnx", "net.onnx"]
        assert not lint_onnx(fixed.path)
        assert str(fixed) == "fixed: R29 again_q: let its readers share x_q\n\nleft: no findings"

    def test_a_second_run_changes_nothing(self, tmp_path: Path) -> None:
        first = fix_onnx(self.written(tmp_path), tmp_path / "once.onnx", rounding=True)
        assert isinstance(first, Fixed)
        second = fix_onnx(tmp_path / "once.onnx", tmp_path / "twice.onnx", rounding=True)
        assert second.changes == ()
        assert (tmp_path / "twice.onnx").read_bytes() == (tmp_path / "once.onnx").read_bytes()
        assert str(second) == "nothing to fix\n\nleft: no findings"

    def test_in_place_only_if_asked_and_needed(self, tmp_path: Path) -> None:
        path = self.written(tmp_path)
        with pytest.raises(FxqError, match=r"is the file that is to be fixed[\s\S]*--in-place"):
            fix_onnx(path, path)
        with pytest.raises(FxqError, match="two places"):
            fix_onnx(path, tmp_path / "other.onnx", in_place=True)
        assert fix_onnx(path, in_place=True).path == path
        stamp = path.stat().st_mtime_ns
        assert fix_onnx(path, in_place=True).path is None
        assert path.stat().st_mtime_ns == stamp

    def test_weights_beside_the_file_come_along(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "out").mkdir()
        path = tmp_path / "in" / "net.onnx"
        for make in (doubled, lambda: doubled(same=False)):
            onnx.save(make(), path, save_as_external_data=True, location="net.data", size_threshold=0)
            fixed = fix_onnx(path, tmp_path / "out" / "net.onnx")
            assert [p.name for p in (tmp_path / "out").iterdir()] == ["net.onnx"]
            result = onnx.load(tmp_path / "out" / "net.onnx")
            for before, after in zip(outputs(make()), outputs(result), strict=True):
                np.testing.assert_array_equal(before, after)
            assert fixed.left == lint_onnx(result)
        (tmp_path / "in" / "net.data").unlink()
        with pytest.raises(FxqError, match=r"cannot read the weights beside net\.onnx"):
            fix_onnx(path)

    def test_weights_beside_that_a_branch_reads_come_along(self, tmp_path: Path) -> None:
        net = Net()
        branches = {}
        for name in ("then_branch", "else_branch"):
            held = onnx.numpy_helper.from_array(np.full((2, 32, 16, 16), 3, np.float32), f"{name}_w")
            output = helper.make_tensor_value_info(f"{name}_y", onnx.TensorProto.FLOAT, (2, 32, 16, 16))
            node = helper.make_node("Identity", [held.name], [output.name], name=name)
            branches[name] = helper.make_graph([node], name, [], [output], [held])
        chosen = net.op("If", [net.constant("wish", np.bool_(1))], "if", **branches)
        model = net.model(chosen)
        path = tmp_path / "net.onnx"
        (tmp_path / "out").mkdir()
        onnx.save(copied(model), path, save_as_external_data=True, location="net.data", size_threshold=9000)
        assert fix_onnx(path, tmp_path / "out" / "net.onnx").changes == ()
        for before, after in zip(outputs(model), outputs(onnx.load(tmp_path / "out" / "net.onnx")), strict=True):
            np.testing.assert_array_equal(before, after)

    def test_another_tools_weight_file_is_not_removed(self, tmp_path: Path) -> None:
        path = tmp_path / "net.onnx"
        onnx.save(doubled(), path, save_as_external_data=True, location="net.onnx.data", size_threshold=0)
        assert fix_onnx(path, in_place=True).changes
        assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]

    def test_nothing_is_written_where_the_checker_refuses(self, tmp_path: Path) -> None:
        model = doubled()
        model.graph.node[-1].attribute.append(helper.make_attribute("no_such_attribute", 1))
        onnx.save(model, tmp_path / "net.onnx")
        with pytest.raises(ExportError, match=r"nothing is written, ONNX's checker refuses[\s\S]*net\.onnx"):
            fix_onnx(tmp_path / "net.onnx")
        assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]

    def test_functions_of_the_file_are_inlined(self, tmp_path: Path) -> None:
        model = doubled()
        function = helper.make_function(
            "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"], name="sum")], model.opset_import
        )
        model.functions.append(function)
        model.opset_import.append(helper.make_opsetid("local", 1))
        model.graph.node.append(helper.make_node("Twice", ["conv1"], ["y"], domain="local", name="twice"))
        model.graph.output.append(helper.make_tensor_value_info("y", 1, (2, 32, 16, 16)))
        onnx.save(model, tmp_path / "net.onnx")
        fixed = fix_onnx(tmp_path / "net.onnx")
        assert len(fixed.changes) == 1
        assert fixed.path is not None
        result = onnx.load(fixed.path)
        assert not result.functions
        for before, after in zip(outputs(model), outputs(result), strict=True):
            np.testing.assert_array_equal(before, after)

    def test_plain_data(self, tmp_path: Path) -> None:
        data = fix_onnx(self.written(tmp_path, lambda: residual(None))).to_dict()
        assert data["path"] == str(tmp_path / "net.fixed.onnx")
        assert data["changes"] == []
        assert data["left"]["findings"][0]["fixable"] == "rounding"
