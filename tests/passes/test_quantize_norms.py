"""What lies between a convolution and a normalization, and the stream of a ConvNeXt, is stored in INT8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from placing import MAX, Lambda, activation_quantizers, before, check_pass, decided, notes, prepared, reads
from torch import Tensor, nn
from toys import image, seeded

import fxq
from fxq.passes.quantize_norms import QuantizeNorms
from fxq.recipe import EdgeSpecs, QSpec, Recipe, Rule
from fxq.target import Target
from fxq.target_parts import Norms

X = (2, 8, 8, 8)


class Block(nn.Module):
    """A block as ConvNeXt's: depthwise convolution, norm over channels, two linear layers, a scale, the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + self.scale * self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


def blocks() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Conv2d(8, 8, 1), Block(), Block()))


def test_convnext() -> None:
    """Convolution to norm in INT8, and the stream between blocks in INT8 alone."""
    gm = prepared(blocks(), image(*X), recipe=MAX)
    norms = {f"_{block}_conv" for block in (1, 2)}
    assert norms <= set(activation_quantizers(gm))
    assert decided(gm, "_1_conv")["output"] == "int8 per-tensor max R38"
    for add, stream in (("_1_add", "_0"), ("_2_add", "_1_add")):
        assert f"{stream}_quantizer" in reads(gm, add)
        assert set(decided(gm, add).values()) == {"int8 per-tensor max R29"}
    assert not notes(gm)


def test_golden_and_second_run() -> None:
    result = check_pass(QuantizeNorms(), before("quantize-norms", blocks(), image(*X)), "passes/quantize_norms")
    assert result.counts == {"annotated": 2}
    assert result.notes == ()


def model(function: Any) -> nn.Module:
    made = {"a": nn.Conv2d(8, 8, 1), "b": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}
    return seeded(lambda: Lambda(function, **made))


def plain(m: Any, x: Tensor) -> Any:
    return m.b(m.norm(m.a(x).permute(0, 2, 3, 1)))


def read_twice(m: Any, x: Tensor) -> Any:
    y = m.a(x).permute(0, 2, 3, 1)
    return m.b(m.norm(y)), y


def float_behind(m: Any, x: Tensor) -> Any:
    return m.norm(m.a(x).permute(0, 2, 3, 1)).softmax(-1)


def activated(m: Any, x: Tensor) -> Any:
    return m.b(m.norm(m.a(x).relu().permute(0, 2, 3, 1)))


def no_convolution(m: Any, x: Tensor) -> Any:
    return m.b(m.norm(m.b(x.permute(0, 2, 3, 1))))


@pytest.mark.parametrize("converted", [False, True])
def test_the_norm_is_said_to_read_what_the_convolution_writes(converted: bool) -> None:
    x = image(*X)
    gm = fxq.prepare(model(plain), x)
    if converted:
        fxq.calibrate(gm, [x], progress=False)
        gm = fxq.convert(gm)
    (edge,) = [e for e in fxq.explain(gm) if e.kind == "layer_norm"]
    assert (edge.quantized, edge.role, edge.tensor, edge.rule) == (True, "input", "permute", "R38")
    assert edge.reason == "the kernel of a writes INT8, and this operation reads it: it gives INT8 itself"
    (edge,) = [e for e in fxq.explain(prepared(model(float_behind), x)) if e.kind == "layer_norm"]
    assert not edge.quantized


@pytest.mark.parametrize("function", [read_twice, float_behind, activated, no_convolution])
def test_declined(function: Any) -> None:
    assert "a" in activation_quantizers(prepared(model(plain), image(*X)))
    gm = prepared(model(function), image(*X))
    assert "a" not in activation_quantizers(gm)
    assert not any(a.endswith("R38") for n in gm.graph.nodes for a in decided(gm, n.name).values())


@pytest.mark.parametrize(
    "rule",
    [
        Rule("a", None),
        Rule("op:conv2d", EdgeSpecs(output=None)),
        Rule("op:layer_norm", None),
        Rule("op:layer_norm", EdgeSpecs(input=None)),
    ],
)
def test_a_recipe_keeps_it_float(rule: Rule) -> None:
    assert "a" not in activation_quantizers(prepared(model(plain), image(*X), recipe=Recipe([rule])))


def test_a_recipe_says_how() -> None:
    recipe = Recipe([Rule("op:layer_norm", QSpec(method="entropy"))])
    assert decided(prepared(model(plain), image(*X), recipe=recipe), "a")["output"] == "int8 per-tensor entropy R38"


def test_other_targets_leave_it() -> None:
    target = replace(Target.load("tensorrt"), norms=Norms())
    assert "a" not in activation_quantizers(prepared(model(plain), image(*X), target=target))
