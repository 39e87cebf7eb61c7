"""Advice: the kernel heuristics of the target, noted or followed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from placing import Lambda, Lambda2, before, check_pass, decided, node, notes, prepared
from torch import nn
from toys import image, lenet, seeded

import fxq
from fxq.errors import TargetError
from fxq.passes.advise import CHECKS, Advise
from fxq.recipe import QSpec, Recipe, Rule
from fxq.target import Target
from fxq.target_parts import Heuristic

TENSORRT = Target.load("tensorrt")


def with_action(action: str) -> Target:
    """TensorRT's target with every heuristic acting so."""
    return replace(TENSORRT, heuristics=tuple(replace(h, action=action) for h in TENSORRT.heuristics))


def advice(model: nn.Module, *args: torch.Tensor, recipe: Recipe | None = None) -> list[tuple[str, str, str]]:
    """Node, rule and what was seen, for each advice on the model."""
    gm = prepared(model, *args, recipe=recipe)
    return [(n.node, n.rule, n.text.partition(": ")[2]) for n in notes(gm, "advice")]


def after_relu(*layers: nn.Module) -> nn.Module:
    """The layers behind a ReLU, so that none of them is the first of the network."""
    return seeded(lambda: nn.Sequential(nn.ReLU(), *layers))


def conv(inputs: int, outputs: int, kernel: Any = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, groups=groups, padding="same")


# R35: IC or OC below 16, except with one of them in eights, a square kernel, and first in the network or one
# from 16 on.
SMALL = [
    (16, 16, 3, None),
    (8, 16, 3, None),
    (16, 10, 3, None),
    (8, 8, 3, "8 input and 8 output channels with a 3x3 kernel"),
    (15, 17, 3, "15 input and 17 output channels with a 3x3 kernel"),
    (8, 16, (1, 3), "8 input and 16 output channels with a 1x3 kernel"),
    (16, 17, (1, 3), None),
]


@pytest.mark.parametrize(("inputs", "outputs", "kernel", "saw"), SMALL)
def test_small_channels(inputs: int, outputs: int, kernel: Any, saw: str | None) -> None:
    expected = [] if saw is None else [("_1", "R35", saw)]
    assert advice(after_relu(conv(inputs, outputs, kernel)), image(1, inputs, 8, 8)) == expected


def test_small_channels_in_the_first_layer() -> None:
    assert advice(seeded(lambda: nn.Sequential(conv(3, 8))), image(1, 3, 8, 8)) == []
    assert advice(seeded(lambda: nn.Sequential(conv(3, 7))), image(1, 3, 8, 8)) != []


def test_narrow_convolutions_stay_float_for_onnx_runtime() -> None:
    """And what only passes integers on stays float with them (ORT5)."""
    layers = [conv(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), conv(6, 16, 5), nn.ReLU(), conv(16, 16)]
    gm = fxq.prepare(seeded(lambda: nn.Sequential(*layers)), image(1, 1, 16, 16), target="onnxruntime")
    rows = {row.node: row.precision for row in fxq.report(gm).rows}
    assert rows == {"_0": "float", "_3": "float", "_5": "uint8/int8"}
    wide = fxq.prepare(seeded(lambda: nn.Sequential(conv(3, 33))), image(1, 3, 16, 16), target="onnxruntime")
    assert [row.precision for row in fxq.report(wide).rows] == ["uint8/int8"]
    branch = seeded(lambda: nn.Sequential(conv(3, 16), nn.ReLU(), Lambda(lambda _, x: x + 2 * x)))
    gm = fxq.prepare(branch, image(1, 3, 16, 16), target="onnxruntime")  # in float, each reader would transpose it
    assert fxq.report(gm).rows[0].precision == "uint8/int8"
    asked = Recipe([Rule("0", QSpec(method="max"))])
    gm = fxq.prepare(seeded(lambda: nn.Sequential(*layers)), image(1, 1, 16, 16), target="onnxruntime", recipe=asked)
    assert fxq.report(gm).rows[0].precision == "uint8/int8"
    assert [(n.node, n.rule) for n in notes(gm, "advice")] == [("_0", "ORT7")]


def test_grouped_channels() -> None:
    model = after_relu(conv(32, 32, 3, 32), conv(32, 36, 3, 4), conv(36, 32, 1, 4))
    assert advice(model, image(1, 32, 8, 8)) == [
        ("_2", "R35", "36 output channels in 4 groups with a 3x3 kernel"),
        ("_3", "R35", "32 output channels in 4 groups with a 1x1 kernel"),
    ]


def test_fp8_convolutions() -> None:
    fp8 = Recipe([Rule("op:conv2d", QSpec(dtype="float8_e4m3fn"))])
    model = after_relu(conv(32, 32), conv(32, 16), conv(16, 32, 7), conv(32, 32, 3, 2))
    found = [row for row in advice(model, image(1, 32, 8, 8), recipe=fp8) if row[1] == "R36"]
    assert [row[2] for row in found] == [
        "32 input and 16 output channels in 1 groups with a 3x3 kernel",
        "16 input and 32 output channels in 1 groups with a 7x7 kernel",
        "32 input and 32 output channels in 2 groups with a 3x3 kernel",
    ]
    assert [row for row in advice(model, image(1, 32, 8, 8)) if row[1] == "R36"] == []


def test_thin_matrices() -> None:
    linear = lambda i, o: seeded(lambda: nn.Sequential(nn.Linear(i, o)))  # noqa: E731
    assert advice(linear(64, 64), image(4, 64)) == []
    assert advice(linear(64, 64), image(1, 64)) == []  # the batch of the example says nothing
    assert advice(linear(64, 10), image(4, 64))[0][2] == "Nx64 times 64x10"
    assert advice(linear(8, 64), image(4, 64 // 8, 8))[0][2] == "8x8 times 8x64"
    assert advice(linear(64, 64), image(4, 1, 64))[0][2] == "1x64 times 64x64"
    product = Lambda2(lambda _, x, y: x @ y)
    assert advice(product, image(2, 32, 64), image(2, 64, 32)) == []
    assert advice(product, image(2, 1, 64), image(2, 64, 32))[0][1:] == ("R37", "1x64 times 64x32")
    assert advice(product, image(32, 64), image(64)) == []  # a vector has no columns to count


def test_transposed_convolutions() -> None:
    model = after_relu(nn.ConvTranspose2d(32, 32, 3))
    assert advice(model, image(1, 32, 8, 8)) == [("_1", "R43", "whatever its shape")]


def test_float_operations_are_left_alone() -> None:
    recipe = Recipe([Rule("*", None)])
    assert advice(lenet(), image(1, 1, 28, 28), recipe=recipe) == []


def test_advising_changes_nothing() -> None:
    result = check_pass(Advise(), before("advise", lenet(), image(1, 1, 28, 28)))
    assert not result.modified
    assert [(n.node, n.rule, n.kind) for n in result.notes] == [
        ("conv1", "R35", "advice"),
        ("fc3", "R37", "advice"),
    ]
    assert result.notes[0].module_path == "conv1"
    assert "toys.py:" in str(result.notes[0].source)


def test_excluding() -> None:
    gm = before("advise", lenet(), image(1, 1, 28, 28))
    gm.meta["fxq"] = replace(gm.meta["fxq"], target=with_action("exclude"))
    result = check_pass(Advise(), gm, "passes/advise_exclude")
    assert result.counts == {"annotated": 4}
    assert result.notes == ()
    done = result.graph_module
    assert decided(done, "conv1") == {0: "float R35", 1: "float R35"}
    assert decided(done, "conv2") == {0: "int8 per-tensor mse R20", 1: decided(gm, "conv2")[1]}
    assert decided(done, "fc3") == {0: "float R37", 1: "float R37"}
    x = image(1, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(done(x), lenet()(x), rtol=0, atol=1e-6)


def test_excluded_operations_read_float() -> None:
    gm = prepared(lenet(), image(1, 1, 28, 28), target=with_action("exclude"))
    assert node(gm, "conv1").args[0].name == "x"  # type: ignore[union-attr]
    row = next(r for r in fxq.report(gm).rows if r.node == "conv1")
    assert (row.precision, row.edges[0].rule) == ("float", "R35")


def test_what_a_recipe_asked_for_is_not_excluded() -> None:
    recipe = Recipe([Rule("conv1", QSpec(method="max"))])
    gm = prepared(lenet(), image(1, 1, 28, 28), target=with_action("exclude"), recipe=recipe)
    assert decided(gm, "conv1") == {0: "int8 per-tensor max recipe", 1: "int8 per-channel(0) max recipe"}
    assert [n.node for n in notes(gm, "advice")] == ["conv1"]


def test_unknown_checks_and_parameters() -> None:
    for heuristic, text in (
        (Heuristic("R35", "no-such", frozenset({"conv2d"}), "advise", "why"), "unknown check 'no-such'"),
        (
            Heuristic("R37", "thin-matrix", frozenset({"linear"}), "advise", "why", {"many": 1}),
            "parameters many",
        ),
        (Heuristic("R37", "thin-matrix", frozenset({"linear"}), "advise", "why"), "parameters none"),
    ):
        target = replace(TENSORRT, heuristics=(heuristic,))
        with pytest.raises(TargetError, match=text):
            prepared(lenet(), image(1, 1, 28, 28), target=target)


def test_every_check_is_used_by_a_target() -> None:
    targets = (TENSORRT, Target.load("onnxruntime"))
    assert {h.check for target in targets for h in target.heuristics} == set(CHECKS)


def test_a_model_without_quantized_operations() -> None:
    gm = before("advise", seeded(lambda: Lambda(lambda _, x: x.relu())), image(1, 4))
    assert not check_pass(Advise(), gm).modified


def test_ignoring() -> None:
    gm = prepared(lenet(), image(1, 1, 28, 28), target=with_action("ignore"))
    assert notes(gm, "advice") == []
    assert decided(gm, "conv1")[0] == "int8 per-tensor mse R20"


def test_tensorrt_fast_leaves_what_does_not_pay_float() -> None:
    model = after_relu(conv(32, 8), conv(8, 8), nn.ConvTranspose2d(8, 32, 3), conv(32, 32))
    for target, expected in (
        ("tensorrt", ["int8 R20", "int8 R20", "int8 R20", "int8 R20"]),
        ("tensorrt-fast", ["int8 R20", "float R35", "float R43", "int8 R20"]),
    ):
        rows = fxq.report(fxq.prepare(model, image(1, 32, 8, 8), target=target)).rows
        assert [f"{row.precision} {row.edges[0].rule}" for row in rows] == expected
    product = Lambda2(lambda _, x, y: x @ y)
    thin = (image(2, 1, 64), image(2, 64, 32))
    assert [r.precision for r in fxq.report(fxq.prepare(product, thin)).rows] == ["int8"]
    report = fxq.report(fxq.prepare(product, thin, target="tensorrt-fast"))
    assert [(r.precision, r.edges[0].rule) for r in report.rows] == [("float", "R37")]
    assert "R37" in str(report)
