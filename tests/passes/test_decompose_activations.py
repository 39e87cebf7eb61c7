"""SiLU and HardSwish as products, and HardSigmoid as a sum among integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from placing import Lambda, before, check_pass, decided, of_kind, prepared
from torch import Tensor, fx, nn
from toys import image, seeded

import fxq
from fxq.errors import TargetError
from fxq.passes import CONVERT, DecomposeActivations, WriteClampedSums
from fxq.printer import format_graph
from fxq.quantizer import quantizers
from fxq.recipe import QSpec, Recipe, Rule
from fxq.target import Target

X = (2, 8, 8, 8)
ORT = Target.load("onnxruntime")


def model(activation: Callable[[Tensor], Tensor]) -> nn.Module:
    parts = {"a": nn.Conv2d(8, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 3, padding=1)}
    return seeded(lambda: Lambda(lambda m, x: m.b(activation(m.a(x))), **parts)).eval()


@pytest.mark.parametrize("activation", [F.silu, F.hardswish])
def test_a_product_takes_the_activations_place(activation: Callable[[Tensor], Tensor]) -> None:
    net = model(activation)
    gm = before("decompose-activations", net, image(*X), target=ORT)
    result = check_pass(DecomposeActivations(), gm, f"passes/decompose_activations_{activation.__name__}")
    with torch.no_grad():
        torch.testing.assert_close(result.graph_module(image(*X)), net(image(*X)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", [F.silu, F.hardswish])
def test_every_tensor_of_the_product_is_quantized(activation: Callable[[Tensor], Tensor]) -> None:
    gm = prepared(model(activation), image(*X), target=ORT)
    name = activation.__name__
    assert [n for n, q in quantizers(gm).items() if not q.weight] == ["x", "a", f"{name}_gate", name, "b"]
    assert decided(gm, name) == dict.fromkeys((0, 1, "output"), "uint8 asymmetric per-tensor mse ORT4")


def test_other_activations_and_other_targets_are_left_alone() -> None:
    assert not DecomposeActivations()(before("decompose-activations", model(F.gelu), image(*X), target=ORT)).modified
    assert not DecomposeActivations()(before("decompose-activations", model(F.silu), image(*X))).modified


def test_a_target_that_asks_for_what_is_not_known() -> None:
    with pytest.raises(TargetError, match=r"decomposes gelu, for which fxq knows no product[\s\S]*silu, hardswish"):
        prepared(model(F.gelu), image(*X), target=replace(ORT, decomposes=frozenset({"gelu"})))
    gm = prepared(model(F.gelu), image(*X), target=replace(ORT, adds=frozenset({"gelu"})))
    fxq.calibrate(gm, [image(*X)], progress=False)
    with pytest.raises(TargetError, match=r"adds gelu, for which fxq knows no sum[\s\S]*hardsigmoid"):
        fxq.convert(gm)


def converted(net: nn.Module, recipe: Recipe | None = None) -> fx.GraphModule:
    """The graph that ``write-clamped-sums`` gets."""
    gm = prepared(net, image(*X), recipe=recipe, target=ORT)
    fxq.calibrate(gm, [image(*X, seed=seed) for seed in range(4)], progress=False)
    names = [p.name for p in CONVERT]
    return fxq.convert(gm, replace(CONVERT, passes=CONVERT.passes[: names.index("write-clamped-sums")]))


def test_golden_and_the_same_integers() -> None:
    gm = converted(model(F.hardswish))
    result = check_pass(WriteClampedSums(), gm, "passes/write_clamped_sums")
    assert [n.name for n in of_kind(result.graph_module, "clamp")] == ["hardswish_gate"]
    assert {row.kind: row.precision for row in fxq.report(result.graph_module).rows if not row.weighted} == {
        "add": "uint8",
        "clamp": "uint8",
        "mul": "uint8",
    }
    with torch.no_grad():
        x = image(*X, seed=9)
        values = [_integers(g, x, "hardswish_gate_quantize") for g in (gm, result.graph_module)]
    assert values[0].dtype == torch.uint8
    steps = (values[0].int() - values[1].int()).abs()
    assert int(steps.max()) <= 1  # a value half-way between two integers may fall on either side
    assert float((steps > 0).double().mean()) < 0.001
    assert int(values[1].max()) > 200


def _integers(gm: fx.GraphModule, x: Tensor, name: str) -> Tensor:
    found: dict[str, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.name == name:
                found[name] = result
            return result

    Keep(gm).run(x)
    return found[name]


@pytest.mark.parametrize("rule", [Rule("op:hardsigmoid", None), Rule("op:mul", None), Rule("a", None)])
def test_declined_where_something_is_float(rule: Rule) -> None:
    gm = converted(model(F.hardswish), Recipe([rule]))
    text = format_graph(gm)
    assert not WriteClampedSums()(gm).modified
    assert format_graph(gm) == text
    assert of_kind(gm, "hardsigmoid")


def test_a_user_says_how_the_gate_is_quantized() -> None:
    gm = converted(model(F.hardswish), Recipe([Rule("op:hardsigmoid", QSpec(method="max"))]))
    assert WriteClampedSums()(gm).modified
