"""Explanations: the rule and the sentence of every edge, through all stages."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from placing import Lambda
from torch import fx, nn
from toys import basic_net, image, preactivation_net, seeded

import fxq
from fxq import QSpec, Recipe, Rule
from fxq.errors import PassError, RecipeError
from fxq.explanations import EdgeReason, Explanation


def conv(inputs: int = 16, outputs: int = 16) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def explained(function: Any, *, where: str = "*", recipe: Recipe | None = None, **parts: nn.Module) -> Explanation:
    model = seeded(lambda: Lambda(function, **parts))
    return fxq.explain(fxq.prepare(model, image(2, 16, 8, 8), recipe=recipe), where)


def edge(explanation: Explanation, node: str, tensor: str) -> EdgeReason:
    (found,) = [e for e in explanation if (e.node, e.tensor) == (node, tensor)]
    return found


def stages() -> list[fx.GraphModule]:
    """One network prepared, calibrated, converted and in training."""
    x = image(2, 3, 16, 16)
    prepared, calibrated, trained = (
        fxq.prepare(basic_net(), x),
        fxq.prepare(basic_net(), x),
        fxq.prepare_qat(basic_net(), x),
    )
    fxq.calibrate(calibrated, [x], progress=False)
    return [prepared, calibrated, fxq.convert(calibrated), trained]


def test_every_stage_says_the_same() -> None:
    found = [fxq.explain(gm) for gm in stages()]
    assert [e.stage for e in found] == ["prepared", "calibrated", "quantized", "prepared"]
    first = [(e.kind, e.module_path, e.role, e.quantized, e.rule) for e in found[0]]
    assert [[(e.kind, e.module_path, e.role, e.quantized, e.rule) for e in other] for other in found[1:3]] == [
        first
    ] * 2
    quantized = [(e.module_path, e.role, e.rule) for e in found[0] if e.quantized]
    assert [(e.module_path, e.role, e.rule) for e in found[3] if e.quantized] == quantized
    assert all(e.scale is not None for e in found[2] if e.quantized)
    assert len(quantized) == 16
    assert len(found[0]) == 24


def test_every_quantizer_is_explained() -> None:
    for gm in stages():
        report, explanation = fxq.report(gm), fxq.explain(gm)
        low = {(row.node, e.edge) for row in report.rows for e in row.edges if e.quantized}
        assert low == {(e.node, e.edge) for e in explanation if e.quantized}
        assert all(e.rule and e.reason for e in explanation)


def test_residual_additions() -> None:
    explanation = fxq.explain(fxq.prepare(basic_net(), image(2, 3, 16, 16)), "op:add")
    skip, way = edge(explanation, "blocks_0_add", "stem_2"), edge(explanation, "blocks_0_add", "blocks_0_bn2")
    assert (skip.role, skip.quantized, skip.rule) == ("skip", True, "R24")
    assert (way.role, way.quantized, way.rule) == ("input", False, "R23")
    assert way.reason == "blocks_0_bn2 takes the addition into its kernel, whose result is float until it is added"
    assert way.nearest_miss is None


def test_the_nearest_miss_of_an_addition() -> None:
    def blocked(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(m.conv(x)) + x

    def shared(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return (y + x) * y

    def far(_: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x) + x

    def transformer(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(m.linear(x)) + x

    linear = edge(explained(transformer, linear=nn.Linear(8, 8)), "add", "gelu")
    assert linear.nearest_miss == "linear comes before it, but is a linear, which takes no addition along"
    between, skip = (edge(explained(blocked, conv=conv()), "add", tensor) for tensor in ("gelu", "x"))
    assert (between.quantized, between.rule) == (False, "R29")
    assert (skip.quantized, skip.role, skip.rule) == (True, "skip", "R29")  # the convolution reads x in INT8
    assert between.nearest_miss == "conv would take it along, but gelu (gelu) stands between them"
    both = edge(explained(shared, conv=conv()), "add", "conv")
    assert both.nearest_miss == "conv would take it along, but mul also reads its result"
    assert edge(explained(far), "add", "x").nearest_miss is None

    def gated(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(F.relu(x))
        return y * torch.sigmoid(y.mean((2, 3), keepdim=True)) + x

    gate = edge(explained(gated, conv=conv()), "add", "x")
    assert gate.nearest_miss == "conv would take it along, but mul (mul) stands between them"


def test_what_has_no_weights() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(m.first(x))
        b = torch.cat([F.max_pool2d(a, 2), F.avg_pool2d(a, 2)], 1)
        y = torch.sigmoid(m.second(b).mean((2, 3)))
        return F.max_pool2d(F.softmax(a * y[:, :, None, None], 1), 2)

    found = explained(forward, first=conv(), second=conv(32, 16))
    said = {(e.node, e.tensor): (e.rule, e.reason) for e in found if not e.quantized}
    assert said["relu", "first"][0] == "R44"
    assert "in the kernel of first" in said["relu", "first"][1]
    assert said["max_pool2d", "relu"] == (
        "R19",
        "max_pool2d only passes values on, so the quantizer behind it, of cat, holds before it too",
    )
    assert {said["cat", part][0] for part in ("max_pool2d", "avg_pool2d")} == {"R27"}
    assert said["avg_pool2d", "relu"][0] == "R39"
    assert said["sigmoid", "mean"][0] == said["softmax", "mul"][0] == "R38"
    assert said["max_pool2d_1", "softmax"] == (
        "R26",
        "nothing behind this max_pool2d reads it quantized, and alone it gains nothing",
    )


def test_what_a_recipe_says() -> None:
    recipe = Recipe([Rule("first", None, reason="the first layer is sensitive")])
    found = explained(lambda m, x: m.second(m.first(x)), recipe=recipe, first=conv(), second=conv())
    reason = edge(found, "first", "x")
    assert (reason.quantized, reason.rule, reason.reason) == (False, "recipe", "the first layer is sensitive")


def test_what_is_kept_whole() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 4)))
    found = fxq.explain(fxq.prepare(model, image(2, 3, 8)), "1")
    (lstm,) = [e for e in found if e.kind == "LSTM"]
    assert not lstm.quantized
    assert "LSTM is kept whole" in lstm.reason


def test_the_filter() -> None:
    prepared = fxq.prepare(basic_net(), image(2, 3, 16, 16))
    part = fxq.explain(prepared, "blocks.1.*")
    assert {e.module_path.split(".conv")[0] for e in part if "conv" in e.module_path} == {"blocks.1"}
    assert len(fxq.explain(prepared, "blocks.1")) > len(part)
    assert {e.kind for e in fxq.explain(prepared, "op:conv*")} == {"conv2d"}
    with pytest.raises(RecipeError, match=r"no operation matches 'layer9\.\*'") as error:
        fxq.explain(prepared, "layer9.*")
    assert "blocks.0.conv1" in (error.value.hint or "")
    with pytest.raises(RecipeError, match="is no regular expression"):
        fxq.explain(prepared, "re:(")
    with pytest.raises(PassError, match="nothing is placed in this graph yet"):
        fxq.explain(fxq.trace(basic_net(), image(2, 3, 16, 16)))


def test_text_and_dictionary() -> None:
    found = fxq.explain(fxq.prepare(basic_net(), image(2, 3, 16, 16)), "blocks.0")
    lines = str(found).splitlines()
    assert lines[0] == "prepared for tensorrt: 5 of 8 edges under blocks.0 are quantized"
    assert all(len(line) <= 120 or "toys.py" in line for line in lines)
    assert "  skip stem_2: int8 per-tensor mse" in lines
    again = json.loads(json.dumps(found.to_dict()))
    assert len(again["edges"]) == len(found) == 8
    assert again["edges"][0]["module_path"] == "blocks.0.conv1"


class TestReportsAgree:
    """What the report says of skips."""

    def test_a_preactivation_block_has_identity_skips(self) -> None:
        totals = fxq.report(fxq.prepare(preactivation_net(norm=True), image(2, 3, 8, 8))).totals
        assert (totals.skips_quantized, totals.identity_skips_quantized) == (2, 2)

    def test_what_a_recipe_quantizes_is_no_skip(self) -> None:
        recipe = Recipe([Rule("op:mul", fxq.EdgeSpecs(input=QSpec()))])
        model = seeded(lambda: Lambda(lambda m, x: m.conv(x) * x, conv=conv()))
        report = fxq.report(fxq.prepare(model, image(2, 16, 8, 8), recipe=recipe))
        (row,) = [r for r in report.rows if r.kind == "mul"]
        assert {e.role for e in row.edges} == {"input"}
        assert "skip" not in str(report)
        assert report.skips == ()

    def test_random_data_is_said_at_once(self) -> None:
        prepared = fxq.prepare(basic_net(), image(2, 3, 16, 16))
        found = fxq.calibrate(prepared, None, performance_only=True, progress=False)
        assert "WARNING: calibrated on random data" in str(found)
        assert found.warnings == fxq.report(prepared).warnings == fxq.explain(prepared).warnings
        assert fxq.calibrate(prepared, [image(2, 3, 16, 16)], progress=False).warnings == ()
