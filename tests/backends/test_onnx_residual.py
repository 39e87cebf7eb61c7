"""Residual additions: which edge is the convolution's, and what is found on the edges."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lint_net import Make, Net, brief, residual
from onnx import helper

from fxq.backends.onnx_lint import lint_onnx


def pre_activation() -> onnx.ModelProto:
    """BatchNormalization and Relu before each convolution; the raw sum is the skip, with its own pair."""
    net = Net()
    norm = [net.constant(f"norm{i}", np.ones(32, np.float32)) for i in range(4)]
    stem = net.conv(net.qdq("x"), "stem")
    active = net.op("Relu", [net.op("BatchNormalization", [stem, *norm], "bn1")], "relu1")
    inner = net.op("Relu", [net.op("BatchNormalization", [net.conv(net.qdq(active), "conv1"), *norm], "bn2")], "relu2")
    total = net.op("Add", [net.conv(net.qdq(inner), "conv2"), net.qdq("skip")], "add")
    net.nodes.insert(0, helper.make_node("Identity", ["x"], ["skip"], name="skip"))
    return net.model(net.conv(net.qdq(net.op("Relu", [total], "relu3")), "conv3"))


def squeeze_excite() -> onnx.ModelProto:
    """An addition that broadcasts, behind a convolution, is not fused: it may stay float."""
    net = Net()
    source = net.qdq(net.op("Relu", ["x"], "relu"))
    image = net.conv(source, "conv1")
    pooled = net.op("GlobalMaxPool", [source], "pool")
    gate = net.conv(
        net.qdq(net.op("Relu", [net.conv(pooled, "conv2", kernel=(1, 1))], "relu2")), "conv3", kernel=(1, 1)
    )
    return net.model(net.op("Add", [image, gate], "add"))


def silu_residual() -> onnx.ModelProto:
    """A SiLU between convolution and addition: nothing is sure to fuse, so nothing is asked for."""
    net = Net()
    block = net.op("Relu", ["x"], "relu")
    branch = net.conv(net.qdq(block), "conv")
    active = net.op("Mul", [branch, net.op("Sigmoid", [branch], "gate")], "silu")
    return net.model(net.op("Add", [active, block], "add"))


def convnext() -> onnx.ModelProto:
    """The fork is a convolution, and the branch ends in a product: none can take the addition along."""
    net = Net()
    stem = net.conv(net.qdq("x"), "stem")
    turned = net.op("Transpose", [net.conv(net.qdq(stem), "depthwise", group=32)], "turned", perm=[0, 2, 3, 1])
    wide = net.op("MatMul", [net.qdq(turned), net.weight("wide", (32, 64), 1)], "wide")
    slim = net.op("MatMul", [net.qdq(net.op("Gelu", [wide], "gelu")), net.weight("slim", (64, 32), 1)], "slim")
    back = net.op("Transpose", [slim], "back", perm=[0, 3, 1, 2])
    return net.model(net.op("Add", [stem, back], "add"), opset=20)


RIGHT: dict[str, Make] = {
    "identity skip": residual,
    "identity skip, swapped": lambda: residual(swapped=True),
    "downsample": lambda: residual(downsample=True),
    "pre-activation": pre_activation,
    "squeeze and excite": squeeze_excite,
    "SiLU before the addition": silu_residual,
    "ConvNeXt": convnext,
}


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_found_on_a_right_graph(name: str) -> None:
    findings = lint_onnx(RIGHT[name]())
    assert not findings, str(findings)


class TestResidual:
    """Every way to quantize the edges of a residual addition."""

    @pytest.mark.parametrize("swapped", [False, True])
    @pytest.mark.parametrize("downsample", [False, True])
    @pytest.mark.parametrize(
        ("skip", "conv", "rule"),
        [("shared", False, None), ("shared", True, "R23"), (None, False, "R23"), (None, True, "R23 or R25")],
    )
    def test_edges(self, skip: str | None, conv: bool, rule: str | None, downsample: bool, swapped: bool) -> None:
        findings = lint_onnx(residual(skip, conv=conv, downsample=downsample, swapped=swapped))
        if rule == "R23 or R25":
            rule = "R25" if downsample else "R23"
        assert [(f.rule, f.node) for f in findings] == ([(rule, "add")] if rule else [])

    def test_messages_name_the_convolution_and_the_skip(self) -> None:
        (both,) = lint_onnx(residual(conv=True))
        assert both.message == "both inputs are quantized; 'conv2_dq' from conv2 should stay float"
        (neither,) = lint_onnx(residual(None))
        assert neither.message == "no input is quantized; the skip 'stem' should be"
        (longer,) = lint_onnx(residual(None, conv=True, downsample=True))
        assert "the skip is down's" in longer.message

    def test_a_float_block_needs_no_quantized_skip(self) -> None:
        net = Net()
        weights = [net.float_weight(f"conv{i}", (32, 32, 3, 3)) for i in range(2)]
        inner = net.op("Relu", [net.conv("x", "conv1", weight=weights[0])], "relu1")
        assert not lint_onnx(net.model(net.op("Add", [net.conv(inner, "conv2", weight=weights[1]), "x"], "add")))

    def test_a_skip_whose_pool_is_moved_twice_is_float(self) -> None:
        """The pool's result has a quantizer, and the addition reads it in front of that."""
        net = Net()
        relu = net.op("Relu", ["x"], "relu")
        pooled = net.op("MaxPool", [net.qdq(relu)], "pool", kernel_shape=[3, 3], pads=[1] * 4)
        branch = net.conv(net.qdq(pooled), "conv")
        findings = lint_onnx(net.model(net.op("Add", [branch, pooled], "add")))
        assert brief(findings) == [("R23", "warning", "add")]

    def test_equally_long_ways_decide_nothing(self) -> None:
        net = Net()
        source = net.qdq(net.op("Relu", ["x"], "relu"))
        left, right = net.conv(source, "left"), net.conv(source, "right")
        assert not lint_onnx(net.model(net.op("Add", [net.qdq(left), right], "add")))

    @given(data=st.data(), blocks=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=4))
    def test_one_wrong_block_among_right_ones(self, data: st.DataObject, blocks: list[tuple[bool, bool]]) -> None:
        """Blocks are (downsample, swapped); one of them gets one mistake."""
        wrong = data.draw(st.integers(0, len(blocks) - 1))
        mistake = data.draw(st.sampled_from(["none", "no skip", "both edges"]))
        net = Net()
        tensor = net.op("Relu", ["x"], "stem")
        for i, (downsample, swapped) in enumerate(blocks):
            source = net.qdq(tensor)
            inner = net.op("Relu", [net.conv(source, f"conv{i}.1")], f"relu{i}.1")
            branch = net.conv(net.qdq(inner), f"conv{i}.2")
            skip = net.qdq(net.conv(source, f"down{i}", kernel=(1, 1))) if downsample else source
            if i == wrong and mistake == "both edges":
                branch = net.qdq(branch)
            if i == wrong and mistake == "no skip":
                skip = f"down{i}" if downsample else tensor
            tensor = net.op("Add", [skip, branch] if swapped else [branch, skip], f"add{i}")
            tensor = net.op("Relu", [tensor], f"relu{i}.2")
        found = [(f.rule, f.node) for f in lint_onnx(net.model(net.conv(net.qdq(tensor), "tail"))) if f.rule != "R31"]
        assert found == ([] if mistake == "none" else [("R23", f"add{wrong}")])
