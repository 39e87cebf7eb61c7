"""Annotations: what target and recipe decide, edge by edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from placing import (
    STUDY,
    Lambda,
    Lambda2,
    annotated,
    before,
    check_pass,
    convert,
    decided,
    node,
    notes,
    of_kind,
    prepared,
    reads,
)
from torch import Tensor, nn
from toys import basic_net, image, lenet, seeded

from fxq.calibration import calibrate
from fxq.errors import RecipeError, TargetError
from fxq.graph import edge_annotations
from fxq.ops import kind_name
from fxq.passes.annotate import Annotate, applied, governing
from fxq.quantizer import quantizers
from fxq.recipe import EdgeSpecs, PerChannel, QSpec, Recipe, Rule
from fxq.target import Target
from fxq.target_parts import OpPlacement

DIGITS = (1, 1, 28, 28)
MAX = QSpec(method="max")


def rules(*found: Rule) -> Recipe:
    return Recipe(found)


def low(model: nn.Module, *args: Tensor, recipe: Recipe) -> dict[str, set[str]]:
    """For each operation with quantized edges, the roles of those edges."""
    gm = annotated(model, *args, recipe=recipe)
    return {
        n.name: {str(edge) for edge, a in edge_annotations(n).items() if a.spec is not None}
        for n in gm.graph.nodes
        if any(a.spec is not None for a in edge_annotations(n).values())
    }


ALL = {"conv1": {"0", "1"}, "conv2": {"0", "1"}, "fc1": {"0", "1"}, "fc2": {"0", "1"}, "fc3": {"0", "1"}}


# The target's own placement.


def test_golden_and_second_run() -> None:
    result = check_pass(Annotate(), before("annotate", lenet(), image(*DIGITS)), "passes/annotate_lenet")
    assert result.counts == {"annotated": 10}
    x = image(*DIGITS)
    with torch.no_grad():
        assert torch.equal(result.graph_module(x), before("annotate", lenet(), x)(x))


def test_reasons_and_priorities() -> None:
    gm = annotated(lenet(), image(*DIGITS), recipe=rules(Rule("fc1", None), Rule("fc2", MAX, "because")))
    conv, fc1, fc2 = (edge_annotations(node(gm, n))[0] for n in ("conv1", "fc1", "fc2"))
    assert (conv.rule, conv.priority) == ("R20", -1)
    assert conv.reason == "a convolution runs in INT8 when its input and its weight are quantized"
    assert (fc1.rule, fc1.priority, fc1.reason) == ("recipe", 0, "recipe rule 0, 'fc1'")
    assert (fc2.rule, fc2.priority, fc2.reason) == ("recipe", 1, "because")


def only(layer: nn.Module) -> nn.Module:
    return seeded(lambda: nn.Sequential(layer))


AXES: dict[str, tuple[nn.Module, tuple[int, ...], int | None]] = {
    "conv1d": (only(nn.Conv1d(4, 6, 3)), (2, 4, 8), 0),
    "conv2d": (only(nn.Conv2d(4, 6, 3)), (2, 4, 8, 8), 0),
    "conv3d": (only(nn.Conv3d(4, 6, 3)), (2, 4, 8, 8, 8), 0),
    "grouped": (only(nn.Conv2d(4, 6, 3, groups=2)), (2, 4, 8, 8), 0),
    "depthwise": (only(nn.Conv2d(4, 4, 3, groups=4)), (2, 4, 8, 8), 0),
    "transposed 1d": (only(nn.ConvTranspose1d(4, 6, 3)), (2, 4, 8), 1),
    "transposed 2d": (only(nn.ConvTranspose2d(4, 6, 3)), (2, 4, 8, 8), 1),
    "transposed 3d": (only(nn.ConvTranspose3d(4, 6, 3)), (2, 4, 8, 8, 8), 1),
    "transposed, grouped": (only(nn.ConvTranspose2d(4, 6, 3, groups=2)), (2, 4, 8, 8), None),
    "linear": (only(nn.Linear(8, 6)), (2, 8), 0),
    "linear on three dimensions": (only(nn.Linear(8, 6)), (2, 5, 8), 0),
    "linear with a vector": (Lambda(lambda m, x: F.linear(x, m.w), w=nn.Parameter(image(8))), (2, 8), None),
    "matmul": (Lambda(lambda m, x: x @ m.w, w=nn.Parameter(image(8, 6))), (2, 8), 1),
    "matmul from the left": (Lambda(lambda m, x: m.w @ x, w=nn.Parameter(image(6, 8))), (8, 2), None),
    "batched matmul": (Lambda(lambda m, x: x @ m.w, w=nn.Parameter(image(2, 8, 6))), (2, 3, 8), None),
}


@pytest.mark.parametrize("case", AXES)
def test_weights_are_quantized_per_output_channel(case: str) -> None:
    """The axis is right if scaling each output channel at will leaves each channel's error at half a step."""
    model, shape, axis = AXES[case]
    with torch.no_grad():
        for weight in (p for name, p in model.named_parameters() if not name.endswith("bias")):
            if axis is not None:
                steps = torch.logspace(-3, 3, weight.shape[axis])
                weight.mul_(steps.view(*(-1 if d == axis else 1 for d in range(weight.dim()))))
    gm = prepared(model, image(*shape), recipe=rules(Rule("*", MAX)))
    (quantizer,) = [q for q in quantizers(gm).values() if q.weight]
    assert quantizer.axis == axis
    assert quantizer.spec.axis == axis
    calibrate(gm, [image(*shape)], progress=False)
    (weight,) = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    channels = () if axis is None else (weight.shape[axis],)
    assert tuple(quantizer.scale.shape) == channels
    others = tuple(d for d in range(weight.dim()) if d != axis)
    amax = weight.detach().abs().amax(others if axis is not None else None)
    torch.testing.assert_close(quantizer.scale, amax / 127, rtol=1e-6, atol=0)


def test_matmul_of_two_activations() -> None:
    gm = annotated(Lambda2(lambda _, x, y: torch.matmul(x, y)), image(2, 4, 8), image(2, 8, 4))
    assert decided(gm, "matmul") == {0: "int8 per-tensor mse R20", 1: "int8 per-tensor mse R20"}


def test_what_has_no_weight_stays_float() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = F.layer_norm(F.avg_pool2d(F.gelu(x), 2), (4,))
        return torch.softmax(F.interpolate(y, scale_factor=2.0), 1) * m.scale

    gm = annotated(Lambda(forward, scale=nn.Parameter(torch.ones(1))), image(1, 3, 8, 8))
    assert [n.name for n in gm.graph.nodes if edge_annotations(n)] == []


def test_logits_and_biases_stay_float() -> None:
    gm = prepared(lenet(), image(*DIGITS))
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    assert output.args[0] is node(gm, "fc3")
    assert reads(gm, "fc3") == ["relu_3_quantizer", "fc3_weight_quantizer", "fc3_bias"]


def test_a_computed_weight_declines() -> None:
    model = seeded(lambda: Lambda(lambda m, x: F.conv2d(x, m.conv.weight * 2, m.conv.bias), conv=nn.Conv2d(3, 4, 3)))
    result = check_pass(Annotate(), before("annotate", model, image(1, 3, 8, 8)))
    assert not result.modified
    (note,) = result.notes
    assert (note.node, note.rule, note.kind) == ("conv2d", "R35", "declined")
    assert note.text == "its weight is computed in the graph, so it stays float"


def test_what_reads_stored_tensors_alone_is_computed_once() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = m.two(torch.relu(m.one(m.table))), m.one(m.table.new_ones(x.shape[-1], 4))
        return m.main(x) + first.sum(0) + second.sum(0)

    parts = {"one": nn.Linear(4, 6), "two": nn.Linear(6, 6), "main": nn.Linear(5, 6)}
    model = seeded(lambda: Lambda(forward, **parts, table=torch.randn(3, 4)))
    gm = annotated(model, image(2, 5))
    assert [n.name for n in of_kind(gm, "linear") if decided(gm, n.name)] == ["main"]
    assert {(n.node, n.rule) for n in notes(gm) if "computed once" in n.text} == {
        ("one", "R18"), ("two", "R18"), ("one_1", "R18"),
    }  # fmt: skip
    wished = annotated(model, image(2, 5), recipe=rules(Rule("two", EdgeSpecs(input=MAX, weight=MAX))))
    assert {n.name for n in of_kind(wished, "linear") if decided(wished, n.name)} == {"main", "two"}


def test_integers_have_nothing_to_quantize() -> None:
    gm = annotated(
        Lambda2(lambda _, x, y: x @ y),
        torch.ones(2, 3, dtype=torch.int64),
        torch.ones(3, 2, dtype=torch.int64),
    )
    assert decided(gm, "matmul") == {}


# What a recipe's rules speak of.

MATCHES: dict[str, tuple[Any, set[str]]] = {
    "a path": ("fc1", {"fc1"}),
    "a glob": ("fc[12]", {"fc1", "fc2"}),
    "an expression": (r"re:fc\d|conv1", {"fc1", "fc2", "fc3", "conv1"}),
    "an expression fits the whole path": ("re:.*2|f", {"conv2", "fc2"}),
    "a glob over everything": ("*", set(ALL)),
    "an op kind": ("op:linear", {"fc1", "fc2", "fc3"}),
    "a glob over op kinds": ("op:conv*", {"conv1", "conv2"}),
    "a module type": (nn.Conv2d, {"conv1", "conv2"}),
    "the model's own type": (type(lenet()), set(ALL)),
    "every module type": (nn.Module, set(ALL)),
    "a predicate": (lambda n: n.name.endswith("2"), {"conv2", "fc2"}),
}


@pytest.mark.parametrize("case", MATCHES)
def test_matching(case: str) -> None:
    match, excluded = MATCHES[case]
    found = low(lenet(), image(*DIGITS), recipe=rules(Rule(match, None)))
    assert found == {name: edges for name, edges in ALL.items() if name not in excluded}


INSIDE = {
    "blocks.1": "blocks_1_",
    "blocks.1*": "blocks_1_",
    "*.1": "blocks_1_",
    "blocks.?": "blocks_",
    "blocks.1.downsample": "blocks_1_downsample",
    r"re:blocks\.\d": "blocks_",
}


@pytest.mark.parametrize("match", INSIDE)
def test_globs_hold_for_what_is_inside(match: str) -> None:
    x = image(2, 3, 16, 16)
    everything = low(basic_net(), x, recipe=Recipe())
    found = low(basic_net(), x, recipe=rules(Rule(match, None)))
    assert set(everything) - set(found) == {name for name in everything if name.startswith(INSIDE[match])}


def test_a_predicate_that_fails_is_the_recipes_fault() -> None:
    with pytest.raises(RecipeError) as caught:
        annotated(lenet(), image(*DIGITS), recipe=rules(Rule(lambda n: n.colour == "red", None)))
    assert "<lambda> failed on conv1: AttributeError" in caught.value.message
    assert (caught.value.node, caught.value.module_path) == ("conv1", "conv1")
    assert "toys.py:" in str(caught.value.source)


def test_a_type_holds_for_what_is_inside() -> None:
    x = image(2, 3, 16, 16)
    block = type(basic_net().blocks[0])  # type: ignore[index,union-attr]
    found = low(basic_net(), x, recipe=rules(Rule(block, None)))
    assert set(found) == {"stem_1", "fc"}


def test_star_holds_for_the_models_own_calls() -> None:
    model = seeded(lambda: Lambda(lambda m, x: F.conv2d(x, m.weight), weight=nn.Parameter(image(4, 3, 3, 3))))
    assert low(model, image(1, 3, 8, 8), recipe=rules(Rule("*", None))) == {}


def test_the_last_match_wins_edge_by_edge() -> None:
    recipe = rules(
        Rule("*", QSpec(method="entropy")),
        Rule("fc1", EdgeSpecs(weight=QSpec(dtype="int4"))),
        Rule("fc2", None),
        Rule("op:linear", EdgeSpecs(input=MAX)),
        Rule("fc3", EdgeSpecs(output=QSpec())),
    )
    gm = annotated(lenet(), image(*DIGITS), recipe=recipe)
    assert decided(gm, "conv1") == {
        0: "int8 per-tensor entropy recipe",
        1: "int8 per-channel(0) entropy recipe",
    }
    default = Target.load("tensorrt").weight.calibration.name
    assert decided(gm, "fc1") == {
        0: "int8 per-tensor max recipe",
        1: f"int4 per-channel(0) {default} recipe",
    }
    assert decided(gm, "fc2") == {0: "int8 per-tensor max recipe", 1: "float recipe"}
    assert decided(gm, "fc3")["output"] == "int8 per-tensor mse recipe"
    assert edge_annotations(node(gm, "fc3"))[0].priority == 3
    assert edge_annotations(node(gm, "fc3"))[1].priority == 0
    found = applied(node(gm, "fc3"), "output", recipe)
    assert found is not None
    assert found[0] == 4
    found = applied(node(gm, "conv1"), "output", recipe)
    assert found is not None
    assert found[0] == 0


def test_edge_specs_quantize_what_the_target_leaves_float() -> None:
    recipe = rules(
        Rule("op:relu", EdgeSpecs(output=QSpec())),
        Rule("op:max_pool2d", EdgeSpecs(input=QSpec(), weight="keep")),
    )
    gm = annotated(lenet(), image(*DIGITS), recipe=recipe)
    assert [decided(gm, n.name) for n in of_kind(gm, "relu")] == [{"output": "int8 per-tensor mse recipe"}] * 4
    assert [decided(gm, n.name) for n in of_kind(gm, "max_pool2d")] == [{0: "int8 per-tensor mse recipe"}] * 2


def test_edge_specs_reach_modules_kept_whole() -> None:
    model = seeded(lambda: Lambda(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(8, 8)))
    gm = prepared(model, image(3, 2, 8), recipe=rules(Rule("op:LSTM", EdgeSpecs(input=QSpec()))))
    assert reads(gm, "lstm") == ["x_quantizer"]


def test_a_parameter_is_a_weight_wherever_it_is_read() -> None:
    model = Lambda(lambda m, x: x * m.gain, gain=nn.Parameter(image(4)))
    gm = annotated(model, image(2, 4), recipe=rules(Rule("op:mul", EdgeSpecs(weight=QSpec(granularity="per-tensor")))))
    (edge,) = decided(gm, "mul")
    assert reads(gm, "mul")[int(edge)] == "gain"


def test_a_bare_spec_only_changes_how() -> None:
    """``QSpec(method=...)`` on everything must not quantize a single edge more."""
    x = image(2, 3, 16, 16)
    plain, changed = prepared(basic_net(), x), prepared(basic_net(), x, recipe=rules(Rule("*", MAX)))
    assert list(quantizers(plain)) == list(quantizers(changed))
    assert {q.spec.calibration.name for q in quantizers(changed).values()} == {"max"}


def test_half_an_operation_is_noted() -> None:
    recipe = rules(Rule("fc1", EdgeSpecs(input=None)), Rule("fc2", EdgeSpecs(weight=None)))
    gm = annotated(lenet(), image(*DIGITS), recipe=recipe)
    found = [(n.node, n.rule, n.text) for n in notes(gm, "advice")]
    assert found == [
        ("fc1", "R20", "it reads view in float, so it does not run in low precision"),
        ("fc2", "R20", "it reads fc2_weight in float, so it does not run in low precision"),
    ]


# What a recipe gets wrong.

WRONG: dict[str, tuple[Rule, str, str]] = {
    "a path that is not there": (
        Rule("fc9", None),
        "rule 0 ('fc9') matches no operation",
        "module paths here: conv1, conv2, fc1, fc2, fc3; op kinds: conv2d, linear, max_pool2d",
    ),
    "part of a name": (Rule("fc", None), "rule 0 ('fc') matches no operation", "module paths here"),
    "an op kind that is not there": (
        Rule("op:conv3d", MAX),
        "rule 0 ('op:conv3d') matches no operation",
        "op kinds",
    ),
    "a type that is not there": (
        Rule(nn.Conv3d, None),
        "rule 0 (Conv3d) matches no operation",
        "module paths",
    ),
    "a predicate that never holds": (Rule(lambda n: False, None), "matches no operation", "module paths"),  # noqa: ARG005
    "a bare spec on what stays float": (
        Rule("op:relu", QSpec()),
        "rule 0 ('op:relu') changes nothing: no edge of what it matches is quantized",
        "EdgeSpecs(input=..., weight=..., output=...) quantizes what the target leaves float",
    ),
    "a weight where there is none": (
        Rule("op:relu", EdgeSpecs(weight=QSpec())),
        "changes nothing",
        "the operations it matches have no such edge with floating-point values",
    ),
    "per channel without an axis": (
        Rule("fc1", EdgeSpecs(input=QSpec(granularity="per-channel"))),
        "input 0 of fc1 is to be quantized per channel without an axis",
        "give PerChannel(axis=...)",
    ),
    "an axis too many": (
        Rule("fc1", EdgeSpecs(weight=QSpec(granularity=PerChannel(2)))),
        "weight 1 of fc1 has 2 dimensions and no axis 2",
        "give PerChannel()",
    ),
    "an output's axis too many": (
        Rule("fc1", EdgeSpecs(output=QSpec(granularity=PerChannel(-3)))),
        "output output of fc1 has 2 dimensions and no axis -3",
        "give PerChannel()",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_rules_that_cannot_be(case: str) -> None:
    rule, message, hint = WRONG[case]
    with pytest.raises(RecipeError) as caught:
        annotated(lenet(), image(*DIGITS), recipe=rules(rule))
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


def test_the_second_rule_is_named_by_its_number() -> None:
    with pytest.raises(RecipeError, match="rule 1 "):
        annotated(lenet(), image(*DIGITS), recipe=rules(Rule("fc1", None), Rule("nowhere", None)))


def test_a_rule_that_a_later_one_overrules_is_no_error() -> None:
    found = low(lenet(), image(*DIGITS), recipe=rules(Rule("fc1", MAX), Rule("op:linear", None)))
    assert set(found) == {"conv1", "conv2"}


def test_excluding_what_is_float_anyway_is_no_error() -> None:
    assert low(lenet(), image(*DIGITS), recipe=rules(Rule("op:relu", None))) == ALL


def test_negative_axes_count_from_the_back() -> None:
    recipe = rules(
        Rule(
            "fc1",
            EdgeSpecs(input=QSpec(granularity=PerChannel(-1)), weight=QSpec(granularity=PerChannel(-2))),
        )
    )
    gm = annotated(lenet(), image(*DIGITS), recipe=recipe)
    specs = [edge_annotations(node(gm, "fc1"))[edge].spec for edge in (0, 1)]
    assert [spec.axis for spec in specs if spec is not None] == [1, 0]


# Other targets.


def with_ops(change: Callable[[OpPlacement], OpPlacement]) -> Target:
    base = Target.load("tensorrt")
    return replace(base, ops={kind: change(placement) for kind, placement in base.ops.items()})


def test_a_target_that_quantizes_outputs() -> None:
    target = with_ops(lambda p: replace(p, output=True))
    gm = prepared(lenet(), image(*DIGITS), target=target)
    assert decided(gm, "conv1")["output"] == "int8 per-tensor mse R20"
    assert reads(gm, "relu") == ["conv1_quantizer"]
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    assert reads(gm, output.name) == ["fc3_quantizer"]


def test_a_target_with_asymmetric_activations() -> None:
    target = replace(
        Target.load("tensorrt"),
        activation=QSpec("uint8", symmetric=False, granularity="per-tensor", method="max"),
    )
    gm = prepared(lenet(), image(*DIGITS), target=target)
    calibrate(gm, [image(*DIGITS)], progress=False)
    held = quantizers(gm)
    assert int(held["x"].zero_point) > 0  # the image has negative values
    assert int(held["max_pool2d"].zero_point) == 0  # behind a ReLU there are none
    quantized = convert(gm)
    with torch.no_grad():
        error = (quantized(image(*DIGITS)) - lenet()(image(*DIGITS))).abs().max()
    assert 0 < error < 0.01


def test_a_target_with_unknown_kinds() -> None:
    target = replace(Target.load("tensorrt"), ties=frozenset({"cat", "concatenate"}))
    with pytest.raises(TargetError, match="speaks of concatenate, which are no op kinds"):
        prepared(lenet(), image(*DIGITS), target=target)
    with pytest.raises(TargetError, match="speaks of linaer") as caught:
        prepared(lenet(), image(*DIGITS), target=replace(target, ties=frozenset({"linaer"})))
    assert str(caught.value.hint).startswith("is linear meant? ")


def test_a_target_whose_edges_do_not_exist() -> None:
    with pytest.raises(TargetError, match="quantizes argument 7 of conv1d, which it does not have") as caught:
        prepared(lenet(), image(*DIGITS), target=with_ops(lambda p: replace(p, weight=7)))
    assert caught.value.hint == "its tensors are 0 (input), 1 (weight), 2 (bias)"
    with pytest.raises(TargetError, match="weight_axis for conv2d is 5, and the weight has 4 dimensions") as caught:
        prepared(lenet(), image(*DIGITS), target=with_ops(lambda p: replace(p, weight_axis=5)))
    assert caught.value.node == "conv1"


def test_governing_annotation() -> None:
    gm = annotated(basic_net(), image(2, 3, 16, 16), recipe=rules(Rule("blocks.1.conv1", MAX)))
    tensor = node(gm, "blocks_0_relu_1")  # read by blocks.1.conv1 and by the downsample convolution
    assert {kind_name(user) for user in tensor.users} == {"conv2d"}
    found = governing(tensor)
    assert found is not None
    assert (found.priority, found.spec and found.spec.calibration.name) == (0, "max")
    assert governing(node(gm, "pool")) is None


REFUSED = {
    "asymmetric input": (EdgeSpecs(input=QSpec(symmetric=False)), "R9: input 0 of conv1", "symmetric=True"),
    "asymmetric weight": (EdgeSpecs(weight=QSpec(symmetric=False)), "R9: weight 1 of conv1", "symmetric=True"),
    "asymmetric output": (EdgeSpecs(output=QSpec(symmetric=False)), "R9: output of conv1", "symmetric=True"),
    "uint8": (EdgeSpecs(input=QSpec("uint8")), "R10: input 0 of conv1", "dtype int8"),
    "symmetric uint8": (EdgeSpecs(input=QSpec("uint8", symmetric=True)), "R10: input 0 of conv1", "dtype int8"),
    "every edge": (QSpec(symmetric=False), "R9: input 0 of conv1", "symmetric=True"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-fast"])
def test_specs_that_the_target_refuses(case: str, target: str) -> None:
    edges, message, hint = REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        prepared(lenet(), image(*DIGITS), recipe=rules(Rule("conv1", edges)), target=target)
    assert caught.value.message.startswith(message)
    assert f"which target {target} refuses" in caught.value.message
    assert (caught.value.node, caught.value.module_path) == ("conv1", "conv1")
    assert "toys.py:" in str(caught.value.source)
    assert hint in str(caught.value.hint)
    assert prepared(lenet(), image(*DIGITS), recipe=rules(Rule("conv1", edges)), target=STUDY) is not None


@pytest.mark.parametrize("dtype", ["int4", "int2", "int16", "float8_e4m3fn"])
def test_other_types_are_simulated(dtype: str) -> None:
    gm = prepared(lenet(), image(*DIGITS), recipe=rules(Rule("conv1", QSpec(dtype))))
    assert decided(gm, "conv1")[0].startswith(f"{dtype} per-tensor")


def test_a_refused_skip() -> None:
    with pytest.raises(RecipeError, match="R10"):
        prepared(basic_net(), image(2, 3, 16, 16), recipe=rules(Rule("op:add", EdgeSpecs(input=QSpec("uint8")))))
    with pytest.raises(RecipeError, match="R10"):
        prepared(basic_net(), image(2, 3, 16, 16), recipe=rules(Rule("op:add", QSpec("uint8"))))
