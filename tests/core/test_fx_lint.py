"""The linter on FX graphs: nothing on what fxq places, and each breach on a graph that was made to have it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from placing import Lambda, convert, node, of_kind
from torch import Tensor, fx, nn
from torchvision_models import torchvision_model
from toys import basic_net, bottleneck_net, branches, image, lenet, preactivation_net, seeded

import fxq
from fxq.checks import checks
from fxq.errors import FxqError, PassError
from fxq.findings import Findings
from fxq.fx_lint import lint_graph
from fxq.graph import EDGES
from fxq.printer import format_graph
from fxq.qdq import DEQUANTIZE, QUANTIZE
from fxq.quantizer import Quantizer
from fxq.recipe import EdgeSpecs, QSpec, Recipe, Rule
from fxq.rules import RULES
from fxq.verify import is_quantizer, quantizer_of

X = (2, 3, 16, 16)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "basic": (basic_net, X),
    "bottleneck": (bottleneck_net, X),
    "preactivation": (preactivation_net, X),
    "branches": (branches, X),
    "lenet": (lenet, (2, 1, 28, 28)),
}


def calibrated(
    model: nn.Module, *shape: int, recipe: Recipe | None = None, target: str | Path = "tensorrt"
) -> fx.GraphModule:
    gm = fxq.prepare(model, image(*shape), recipe=recipe, target=target)
    fxq.calibrate(gm, [image(*shape)], progress=False)
    return gm


def both(gm: fx.GraphModule) -> Findings:
    """The findings of a calibrated graph, which are those of the converted one."""
    found = fxq.lint(gm)
    assert fxq.lint(convert(gm)) == found
    return found


def brief(found: Findings) -> list[tuple[str, str, str | None]]:
    return [(f.rule, f.severity, f.node) for f in found]


def quantizer(gm: fx.GraphModule, tensor: str) -> Quantizer:
    """The quantizer of a tensor."""
    (found,) = [gm.get_submodule(str(n.target)) for n in gm.graph.nodes if is_quantizer(n) and str(n.args[0]) == tensor]
    assert isinstance(found, Quantizer)
    return found


def module_of(read: object) -> Quantizer:
    """The quantizer that a node calls."""
    assert isinstance(read, fx.Node)
    found = quantizer_of(read)
    assert found is not None
    return found


def unplug(gm: fx.GraphModule, reader: str, index: int) -> fx.GraphModule:
    """A copy in which one edge reads its tensor past the quantizer."""
    gm = copy.deepcopy(gm)
    gm.meta = dict(gm.meta)
    found = node(gm, reader)
    read = found.args[index]
    while is_quantizer(read) or read.target in (QUANTIZE, DEQUANTIZE):  # type: ignore[arg-type,union-attr]
        read = read.args[0]  # type: ignore[union-attr]
    found.update_arg(index, read)
    found.meta[EDGES] = {edge: said for edge, said in found.meta[EDGES].items() if edge != index}
    return gm


def add_quantizer(gm: fx.GraphModule, reader: str, index: int, module: Quantizer) -> fx.GraphModule:
    """A copy in which one edge reads its tensor through a quantizer of its own."""
    gm = copy.deepcopy(gm)
    found = node(gm, reader)
    read = found.args[index]
    assert isinstance(read, fx.Node)
    tensor = read.args[0] if is_quantizer(read) else read
    gm.quantizers.add_module("second", copy.deepcopy(module))
    with gm.graph.inserting_before(found):
        made = gm.graph.call_module("quantizers.second", (tensor,))
    made.meta = dict(tensor.meta)  # type: ignore[union-attr]
    found.update_arg(index, made)
    gm.recompile()
    return gm


def test_the_table_says_of_every_rule_how_it_is_checked() -> None:
    checked = {rule for one in checks("fx") for rule in one.rules}
    assert checked == {"R9", "R10", "R11", "R20", "R23", "R27", "R29"}
    assert all(RULES[rule].check for rule in checked)


@pytest.mark.parametrize("name", NETS)
def test_nothing_is_found_where_fxq_placed(name: str) -> None:
    build, shape = NETS[name]
    gm = calibrated(build(), *shape)
    text = format_graph(gm)
    assert not both(gm), str(fxq.lint(gm))
    assert format_graph(gm) == text


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_nothing_is_found_on_real_networks(name: str) -> None:
    assert not both(calibrated(torchvision_model(name), 2, 3, 64, 64))


@pytest.mark.parametrize("name", ["basic", "preactivation", "branches"])
def test_nothing_is_found_in_training(name: str) -> None:
    build, shape = NETS[name]
    gm = fxq.prepare_qat(build().train(), image(*shape))
    fxq.calibrate(gm, [image(*shape)], progress=False)
    assert not fxq.lint(gm), str(fxq.lint(gm))
    assert not fxq.lint(fxq.convert(gm.eval()))


def test_scales_that_are_not_known_yet() -> None:
    gm = fxq.prepare(basic_net(), image(*X))
    (finding,) = fxq.lint(gm)
    assert (finding.rule, finding.severity, finding.node) == ("R11", "advice", "x")
    assert "fxq.calibrate" in finding.fix


class TestResidual:
    """R23, on the identity block and on the one with a downsample branch."""

    def test_both_inputs(self) -> None:
        plain = calibrated(basic_net(), *X)
        add = of_kind(plain, "add")[0]
        conv = next(i for i, a in enumerate(add.args) if not is_quantizer(a))  # type: ignore[arg-type]
        edited = add_quantizer(plain, add.name, conv, module_of(add.args[1 - conv]))
        (finding,) = both(edited)
        assert (finding.rule, finding.severity, finding.node) == ("R23", "warning", add.name)
        assert "should stay float" in finding.message
        assert finding.module_path == "blocks.0"
        assert finding.source is not None
        assert "toys.py:" in finding.source

    def test_both_inputs_by_recipe(self) -> None:
        gm = calibrated(basic_net(), *X, recipe=Recipe([Rule("op:add", EdgeSpecs(input=QSpec()))]))
        found = [f for f in both(gm) if f.rule == "R23"]
        assert [f.node for f in found] == [n.name for n in of_kind(gm, "add")]

    def test_a_float_skip_by_recipe(self) -> None:
        gm = calibrated(basic_net(), *X, recipe=Recipe([Rule("op:add", None)]))
        found = both(gm)
        assert brief(found) == [("R23", "warning", n.name) for n in of_kind(gm, "add")]
        assert all("no input is quantized" in f.message for f in found)

    def test_the_convolutions_edge_instead_of_the_skip(self) -> None:
        gm = calibrated(basic_net(), *X)
        add = of_kind(gm, "add")[0]
        skip = next(i for i, a in enumerate(add.args) if is_quantizer(a))  # type: ignore[arg-type]
        edited = add_quantizer(unplug(gm, add.name, skip), add.name, 1 - skip, module_of(add.args[skip]))
        (finding,) = both(edited)
        assert (finding.rule, finding.node) == ("R23", add.name)
        assert "instead of the skip" in finding.message

    def test_a_float_block_is_left_alone(self) -> None:
        gm = calibrated(basic_net(), *X, recipe=Recipe([Rule("blocks.0", None)]))
        assert not both(gm), str(both(gm))


@pytest.mark.parametrize("index", [0, 1])
def test_one_float_input(index: int) -> None:
    gm = calibrated(lenet(), 2, 1, 28, 28)
    conv = of_kind(gm, "conv2d")[1]
    edited = unplug(gm, conv.name, index)
    (finding,) = fxq.lint(edited)
    assert (finding.rule, finding.severity, finding.node) == ("R20", "warning", conv.name)
    assert finding.module_path == "conv2"
    assert "is quantized and" in finding.message
    converted = convert(gm)
    assert index or brief(fxq.lint(unplug(converted, conv.name, 0))) == [("R20", "warning", conv.name)]


def concat(m: nn.Module, x: Tensor) -> Tensor:
    """Both inputs are quantized for other readers, and so is the concatenation."""
    left, right = torch.relu(x), torch.sigmoid(x) * 5
    return m.a(left) * m.b(right) + m.c(torch.cat([left, right], 1))


def concat_net() -> nn.Module:
    parts = {"a": nn.Conv2d(8, 8, 1), "b": nn.Conv2d(8, 8, 1), "c": nn.Conv2d(16, 8, 1)}
    return seeded(lambda: Lambda(concat, **parts))


def test_concat_with_different_scales() -> None:
    gm = calibrated(concat_net(), 2, 8, 8, 8)
    (cat,) = of_kind(gm, "cat")
    assert not both(gm), str(both(gm))
    for scale, readers in ((0.5, "relu"), (0.25, "cat")):
        edited = copy.deepcopy(gm)
        one = quantizer(edited, readers)
        one.set_parameters(torch.tensor(scale), one.zero_point)
        found = both(edited)
        assert brief(found) == [("R27", "warning", cat.name)], str(found)
        assert f"{scale}" in found[0].message


def test_a_tie_stands_for_scales_that_are_not_known() -> None:
    gm = fxq.prepare(concat_net(), image(2, 8, 8, 8))
    assert {f.rule for f in fxq.lint(gm)} == {"R11"}
    quantizer(gm, "relu").tie = None
    assert {f.rule for f in fxq.lint(gm)} == {"R11", "R27"}


@pytest.mark.parametrize(("factor", "severity"), [(1.0, "advice"), (2.0, "warning")])
def test_two_quantizers_on_one_tensor(factor: float, severity: str) -> None:
    gm = calibrated(lenet(), 2, 1, 28, 28)
    conv = of_kind(gm, "conv2d")[1]
    own = node(gm, conv.name).args[0]
    tensor = own.args[0]  # type: ignore[union-attr]
    first = quantizer(gm, str(tensor))
    second = copy.deepcopy(first)
    second.set_parameters(first.scale * factor, first.zero_point)
    edited = copy.deepcopy(gm)
    relu = next(n for n in edited.graph.nodes if n.name == str(tensor))
    edited.quantizers.add_module("second", second)
    with edited.graph.inserting_after(node(edited, str(own))):
        made = edited.graph.call_module("quantizers.second", (relu,))
    made.meta = dict(relu.meta)
    (output,) = of_kind(edited, "output")
    output.args = ((output.args[0], made),)
    edited.graph.lint()
    edited.recompile()
    assert brief(fxq.lint(edited)) == [("R29", severity, str(tensor))]
    assert "a second quantizer" in fxq.lint(edited)[0].message


@pytest.mark.parametrize(
    ("scale", "zero_point", "severity", "text"),
    [
        (0.1, 3, "error", "the zero point of x is 3, not 0"),
        (-0.1, 0, "error", "not positive and finite"),
        (float("inf"), 0, "error", "not positive and finite"),
        (1e-39, 0, "warning", "subnormal"),
    ],
)
def test_parameters_that_tensorrt_does_not_take(scale: float, zero_point: int, severity: str, text: str) -> None:
    gm = convert(calibrated(lenet(), 2, 1, 28, 28))
    assert not fxq.lint(gm)
    gm.get_buffer("quantizers.x.scale").fill_(scale)
    gm.get_buffer("quantizers.x.zero_point").fill_(zero_point)
    (finding,) = fxq.lint(gm)
    assert (finding.rule, finding.severity, finding.node) == ("R9", severity, "x")
    assert text in finding.message


@pytest.mark.parametrize(("spec", "rule"), [(QSpec(dtype="int16"), "R10"), (QSpec(symmetric=False), "R9")])
def test_specs_that_tensorrt_does_not_take(spec: QSpec, rule: str, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"  # prepares what tensorrt refuses, as a graph from elsewhere would hold it
    study.write_text("name: study\nextends: tensorrt\nrefuses: []\n")
    recipe = Recipe([Rule("conv2", EdgeSpecs(input=spec))])
    gm = calibrated(lenet(), 2, 1, 28, 28, recipe=recipe, target=study)
    found = both(gm)
    assert (rule, "error") in {(f.rule, f.severity) for f in found}, str(found)
    fresh = fxq.lint(fxq.prepare(lenet(), image(2, 1, 28, 28), recipe=recipe, target=study))
    assert rule in {f.rule for f in fresh}


def test_scales_of_another_length() -> None:
    gm = convert(calibrated(lenet(), 2, 1, 28, 28))
    weight = next(n for n in gm.graph.nodes if n.target is DEQUANTIZE and n.args[3] is not None)
    path = str(weight.args[1].target)
    owner, _, name = path.rpartition(".")
    gm.get_submodule(owner).register_buffer(name, torch.ones(3))
    assert brief(fxq.lint(gm)) == [("R11", "error", str(weight.args[0]))]


def test_what_it_does_not_take() -> None:
    with pytest.raises(FxqError, match="no quantizers yet"):
        lint_graph(fxq.trace(lenet(), image(2, 1, 28, 28)))
    with pytest.raises(PassError, match="does not come from fxq"):
        fxq.lint(fx.symbolic_trace(lenet()))
