"""Quantization between quantized operations, as a target's data ask for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from placing import Lambda, before, check_pass, decided, notes, prepared, reads
from torch import Tensor, nn
from toys import basic_net, image, seeded

import fxq
from fxq.errors import ExportError, RecipeError, TargetError
from fxq.graph import edge_annotations
from fxq.ops import kind_name
from fxq.passes import PropagateQuantization
from fxq.quantizer import quantizers
from fxq.recipe import EdgeSpecs, QSpec, Recipe, Rule
from fxq.target import Target
from fxq.target_parts import OpPlacement

X = (2, 8, 8, 8)
ORT = Target.load("onnxruntime")


def model(forward: Callable[..., Any], **parts: nn.Module) -> nn.Module:
    parts = {"a": nn.Conv2d(8, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 3, padding=1), **parts}
    return seeded(lambda: Lambda(forward, **parts))


def quantized(forward: Callable[..., Any], recipe: Recipe | None = None, **parts: nn.Module) -> list[str]:
    """The activations that have a quantizer."""
    gm = prepared(model(forward, **parts), image(*X), recipe=recipe, target=ORT)
    return [name for name, quantizer in quantizers(gm).items() if not quantizer.weight]


def test_golden_and_second_run() -> None:
    gm = before("propagate-quantization", basic_net(), image(2, 3, 16, 16), target=ORT)
    result = check_pass(PropagateQuantization(), gm, "passes/propagate_quantization_basic")
    assert result.notes == ()


def test_a_target_without_such_data_is_left_alone() -> None:
    gm = before("propagate-quantization", basic_net(), image(2, 3, 16, 16))
    assert not PropagateQuantization()(gm).modified


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(0, 4),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_quantizer_stands_behind_the_activation(name: str) -> None:
    assert quantized(lambda m, x: ACTIVATIONS[name](m.a(x))) == ["x", name]


def test_the_quantizer_stays_before_what_is_not_absorbed_or_not_alone() -> None:
    assert quantized(lambda m, x: F.gelu(m.a(x))) == ["x", "a"]
    assert quantized(lambda m, x: torch.relu(m.a(x)) * m.a(x).tanh()) == ["x", "relu", "a_1"]

    def shared(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return torch.relu(y) * y.tanh()

    assert quantized(shared) == ["x", "a"]


def test_the_reason_of_both_edges() -> None:
    gm = prepared(model(lambda m, x: torch.relu(m.a(x))), image(*X), target=ORT)
    assert decided(gm, "a")["output"] == "float ORT1"
    assert decided(gm, "relu") == {"output": "uint8 asymmetric per-tensor mse ORT1"}
    (conv,) = [n for n in gm.graph.nodes if n.name == "a"]
    assert edge_annotations(conv)["output"].reason == (
        "relu is computed in the kernel, so the quantizer of the result stands behind it"
    )


JOINED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "add": lambda m, x: m.a(x) + m.b(x),
    "max_pool2d": lambda m, x: F.max_pool2d(m.a(x), 2),
    "avg_pool2d": lambda m, x: F.avg_pool2d(m.a(x), 2),
    "adaptive_avg_pool2d": lambda m, x: F.adaptive_avg_pool2d(m.a(x), 1),
    "cat": lambda m, x: torch.cat([m.a(x), m.b(x)], 1),
}


@pytest.mark.parametrize("name", JOINED)
def test_what_reads_quantized_tensors_alone_is_quantized(name: str) -> None:
    assert quantized(JOINED[name])[-1] == name


def test_chains_are_followed_in_the_graphs_order() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.relu(m.a(x) + F.max_pool2d(m.b(x), 3, 1, 1))
        return F.adaptive_avg_pool2d(torch.cat([y, m.a(y)], 1), 1)

    assert quantized(forward) == ["x", "a", "b", "max_pool2d", "relu", "a_1", "cat", "adaptive_avg_pool2d"]


def test_data_movement_is_looked_through() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, 1)
        return torch.cat([left, m.d(right)], 1)

    assert quantized(forward, d=nn.Conv2d(4, 48, 1)) == ["x", "a", "getitem", "getitem_1", "d", "cat"]


def test_a_shortcut_that_is_sliced_and_padded() -> None:
    """The parameter-free shortcut of CIFAR's residual networks (He et al. 2015, option A)."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.relu(m.a(x))
        shortcut = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return torch.relu(m.d(y) + shortcut)

    gm = prepared(model(forward, d=nn.Conv2d(8, 16, 3, 2, 1)), image(*X), target=ORT)
    found = {name: q.tie for name, q in quantizers(gm).items() if not q.weight}
    assert found == {"x": None, "relu": "relu", "getitem": "relu", "pad": "relu", "d": None, "relu_1": None}


def test_declined_with_some_inputs_float() -> None:
    gm = prepared(model(lambda m, x: m.a(x) + x.tanh()), image(*X), target=ORT)
    (note,) = notes(gm)
    assert (note.node, note.rule, note.text) == ("add", "ORT4", "this add stays float: tanh is not quantized")
    assert decided(gm, "add") == {}


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x) + 1.0,
        lambda m, x: m.a(x) + m.offset,
        lambda _, x: x.exp() + x.tanh(),
        lambda _, x: torch.cat([x.exp(), x.tanh()], 1),
    ],
)
def test_declined_in_silence(forward: Callable[..., Any]) -> None:
    gm = prepared(model(forward, offset=torch.ones(1, 8, 1, 1)), image(*X), target=ORT)  # type: ignore[arg-type]
    assert notes(gm) == []
    assert all(decided(gm, n.name) == {} for n in gm.graph.nodes if kind_name(n) in ("add", "cat"))


# Recipes.


def test_what_a_recipe_leaves_float_stays_so() -> None:
    add = JOINED["add"]
    assert quantized(add, Recipe([Rule("op:add", None)])) == ["x", "a", "b"]
    assert quantized(add, Recipe([Rule("b", None)])) == ["x", "a"]
    assert quantized(lambda m, x: torch.relu(m.a(x)), Recipe([Rule("a", None)])) == []


def test_a_recipe_says_how_and_the_quantizer_moves_all_the_same() -> None:
    recipe = Recipe([Rule("op:add", QSpec(method="entropy")), Rule("a", QSpec(method="max"))])
    gm = prepared(model(lambda m, x: torch.relu(m.a(x)) + m.b(x)), image(*X), recipe=recipe, target=ORT)
    assert decided(gm, "relu")["output"] == "uint8 asymmetric per-tensor max recipe"
    assert decided(gm, "add") == {
        0: "uint8 asymmetric per-tensor max ORT4",
        1: "uint8 asymmetric per-tensor entropy ORT4",
        "output": "uint8 asymmetric per-tensor entropy ORT4",
    }


def test_a_quantizer_that_a_recipe_asks_for_just_there_stays() -> None:
    recipe = Recipe([Rule("a", EdgeSpecs(output=QSpec(method="max")))])
    assert quantized(lambda m, x: torch.relu(m.a(x)), recipe) == ["x", "a"]


def test_fp8_is_refused_and_a_zero_point_is_not() -> None:
    with pytest.raises(RecipeError, match="ORT11: input 0 of a is to be float8_e4m3fn"):
        quantized(lambda m, x: m.a(x), Recipe([Rule("a", QSpec("float8_e4m3fn"))]))
    assert quantized(lambda m, x: m.a(x), Recipe([Rule("a", QSpec("int8", symmetric=False))])) == ["x", "a"]


# Targets are data.


def test_a_users_file_says_what_joins_and_what_is_absorbed(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("""
name: mine
extends: onnxruntime
absorbs: [gelu]
ops:
  - {kinds: [mul], inputs: [0, 1], output: true, joins: any, rule: ORT4, reason: this backend multiplies integers}
  - {kinds: [max_pool2d], rule: ORT5, joins: all, reason: this backend pools in floating point}
""")

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return F.max_pool2d(torch.relu(m.a(x)) * F.gelu(m.b(x)), 2)

    gm = prepared(model(forward), image(*X), target=str(path))
    assert [name for name, q in quantizers(gm).items() if not q.weight] == ["x", "a", "relu", "gelu", "mul"]
    assert decided(gm, "mul")["output"] == "uint8 asymmetric per-tensor mse ORT4"
    assert reads(gm, "mul") == ["relu_quantizer", "gelu_quantizer"]


def test_placements_that_cannot_be() -> None:
    with pytest.raises(TargetError, match=r"joins of a placement \(ORT4\) is 'some'[\s\S]*all, any"):
        OpPlacement(inputs=(0,), joins="some", rule="ORT4")
    with pytest.raises(TargetError, match="has a weight, and joins"):
        OpPlacement(inputs=(0,), weight=1, joins="all")
    with pytest.raises(TargetError, match="no op kinds"):
        prepared(nn.ReLU(), image(*X), target=replace(ORT, absorbs=frozenset(("rellu",))))


def test_weighted_kinds_are_those_that_do_not_join() -> None:
    assert ORT.weighted == {"conv1d", "conv2d", "conv3d", "linear"}
    assert Target.load("tensorrt").weighted == set(Target.load("tensorrt").ops)
    report = fxq.report(prepared(basic_net(), image(2, 3, 16, 16), target=ORT))
    assert {row.kind for row in report.weighted} == {"conv2d", "linear"}
    assert report.totals.weighted == report.totals.weighted_quantized


# Reports.


def test_the_report_of_a_converted_graph() -> None:
    """Biases are integers there, results have quantizers, and an activation is part of the kernel before it."""
    gm = prepared(basic_net(), image(2, 3, 16, 16), target=ORT)
    fxq.calibrate(gm, [image(4, 3, 16, 16, seed=seed) for seed in range(2)], progress=False)
    before, after = fxq.report(gm), fxq.report(fxq.convert(gm))
    assert [(row.node, row.precision) for row in before.rows] == [(row.node, row.precision) for row in after.rows]
    found = {row.node: row.precision for row in after.rows}
    assert found["stem_1"] == "uint8/int8"
    assert {found[name] for name in ("stem_2", "blocks_0_add", "blocks_0_relu_1", "pool")} == {"uint8"}
    assert (after.totals.activation_quantizers, after.totals.weight_quantizers) == (11, 7)
    assert after.totals.float_bytes == before.totals.float_bytes
    biases = 8 + 8 + 8 + 16 + 16 + 16 + 10  # each keeps its four bytes and gains a scale of four
    assert after.totals.bytes == before.totals.bytes + 4 * biases


def test_explanations_cite_the_targets_own_rules() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return F.gelu(F.layer_norm(torch.relu(m.a(x)) * x.tanh(), (8, 8)))

    gm = prepared(model(forward), image(*X), target=ORT)
    found = {(e.node, e.edge): (e.rule, e.reason) for e in fxq.explain(gm)}
    assert found["relu", 0] == ("ORT1", "relu is computed in the kernel of a; a quantizer between them would part them")
    assert found["mul", 0][0] == found["mul", 1][0] == "ORT4"
    assert found["gelu", 0] == ("ORT9", "ONNX Runtime has no integer kernel for it, or gains little by it")
    assert all(rule.startswith("ORT") for rule, _ in found.values())


def test_weights_of_seven_bits_are_four_lines_of_a_file() -> None:
    """Two products of uint8 by such a weight stay within 16 bits (ORT10)."""
    net = model(lambda m, x: m.b(torch.relu(m.a(x))))
    gm = prepared(net, image(*X), target="onnxruntime-avx2")
    fxq.calibrate(gm, [image(*X, seed=seed) for seed in range(3)], progress=False)
    converted = fxq.convert(gm)
    weights = [converted.get_buffer(f"{name}.weight") for name in ("a", "b")]
    assert {w.dtype for w in weights} == {torch.int8}
    assert {int(w.abs().amax()) for w in weights} == {63}
    assert 2 * 255 * 64 < 2**15
    assert decided(gm, "a")[1] == "int7 per-channel(0) max ORT1"


def test_seven_bits_cannot_be_exported_for_activations(tmp_path: Path) -> None:
    recipe = Recipe([Rule("a", EdgeSpecs(input=QSpec("int7", symmetric=True)))])
    gm = prepared(model(lambda m, x: m.a(x)), image(*X), recipe=recipe, target=ORT)
    fxq.calibrate(gm, [image(*X, seed=seed) for seed in range(2)], progress=False)
    with pytest.raises(ExportError, match=r"QuantizeLinear does not take int7[\s\S]*int8"):
        fxq.export(fxq.convert(gm), tmp_path / "x.onnx")
