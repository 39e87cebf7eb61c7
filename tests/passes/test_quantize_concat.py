"""Concatenations behind which a normalization or an activation stands: which travel in INT8, and which do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from placing import MAX, Lambda, activation_quantizers, before, check_pass, decided, node, notes, prepared
from torch import Tensor, nn
from toys import image, seeded

from fxq.calibration import calibrate
from fxq.passes.quantize_concat import QuantizeConcat
from fxq.quantizer import quantizers
from fxq.recipe import EdgeSpecs, QSpec, Recipe, Rule
from fxq.target import Target
from fxq.target_parts import Concat

X = (2, 8, 8, 8)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


class Dense(nn.Module):
    """Two dense layers on a max-pool, as DenseNet's begin: norm, ReLU, convolution of all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList([norm(8), norm(16), norm(24)])
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(24, 8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        features = [F.max_pool2d(self.stem(x).relu(), 2)]
        for layer, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(layer(torch.cat(features, 1) if len(features) > 1 else features[0]).relu()))
        return features[-1]


def dense() -> nn.Module:
    return seeded(Dense)


def test_dense_block_has_one_scale() -> None:
    """The pool, each layer's result and each concatenation; what the convolutions read keeps its own."""
    gm = prepared(dense(), image(*X), recipe=MAX)
    ties = {q.tensor: q.tie for q in quantizers(gm).values() if not q.weight}
    shared = {tensor for tensor, tie in ties.items() if tie is not None}
    assert shared == {"max_pool2d", "convs_0", "convs_1", "cat", "cat_1"}
    assert {tie for tie in ties.values() if tie is not None} == {"max_pool2d"}
    rows = {row.name: row for row in calibrate(gm, [image(*X)], progress=False).rows}
    assert len({rows[tensor].scale for tensor in shared}) == 1
    assert decided(gm, "cat") == {"output": "int8 per-tensor max R27"}
    assert node(gm, "norms_1").args[0] is node(gm, "cat_quantizer")


def test_golden_and_second_run() -> None:
    result = check_pass(QuantizeConcat(), before("quantize-concat", dense(), image(*X)), "passes/quantize_concat")
    assert result.counts == {"annotated": 5}
    assert result.notes == ()


THROUGH: dict[str, Any] = {
    "batch norm": lambda m, x: m.norm(x),
    "activation": lambda m, x: F.hardswish(x),  # noqa: ARG005
    "by a constant": lambda m, x: x * 2 + 1,  # noqa: ARG005
    "pools and views": lambda m, x: F.avg_pool2d(x, 2).flatten(2).unflatten(2, (4, 4)),  # noqa: ARG005
}


def parts(m: Any, x: Tensor) -> Any:
    """A concatenation whose first part another branch reads too."""
    left, right = m.a(x), m.b(x)
    return m.c(torch.cat([left, right], 1).relu()), m.d(left.relu())


def model(function: Any, **more: nn.Module) -> nn.Module:
    made = {name: nn.Conv2d(8, 8, 1) for name in "abd"} | {"c": nn.Conv2d(16, 8, 1), "norm": norm(16)}
    return seeded(lambda: Lambda(function, **made, **more))


@pytest.mark.parametrize("name", THROUGH)
def test_what_may_stand_between(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        left, right = m.a(x), m.b(x)
        return m.c(THROUGH[name](m, torch.cat([left, right], 1))), m.d(left.relu())

    assert {"a", "b", "cat"} <= set(activation_quantizers(prepared(model(forward), image(*X))))


def softmax(m: Any, x: Tensor) -> Any:
    left, right = m.a(x), m.b(x)
    whole = torch.cat([left, right], 1)
    return m.c(whole.relu()), m.d(left.relu()), whole.softmax(1)


def returned(m: Any, x: Tensor) -> Any:
    left, right = m.a(x), m.b(x)
    return m.c(torch.cat([left, right], 1).relu()), left


def added(m: Any, x: Tensor) -> Any:
    """A residual addition takes the convolution's result in float: a quantizer would part them (R23)."""
    left, right = m.a(x), m.b(x)
    return m.c(torch.cat([left, right], 1).relu()), m.d(left + x)


def gated(m: Any, x: Tensor) -> Any:
    """A product of two activations."""
    left, right = m.a(x), m.b(x)
    return m.c(torch.cat([left, right], 1).relu()), m.d(left * right)


DECLINED: dict[str, tuple[Any, str]] = {
    "softmax": (softmax, "softmax reads cat"),
    "an output of the model": (returned, "output reads a"),
    "a residual addition": (added, "add reads a"),
    "a product of two activations": (gated, "mul reads a"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined_for_a_reader(name: str) -> None:
    function, said = DECLINED[name]
    gm = prepared(model(function), image(*X))
    assert not {"a", "b", "cat"} & set(activation_quantizers(gm))
    assert [(n.rule, n.text) for n in notes(gm) if n.node == "cat"] == [
        ("R26", f"this concatenation stays float: {said} and gives no INT8")
    ]


def test_a_quantizer_right_behind_is_enough() -> None:
    """TensorRT moves it onto the parts; a second one would only round twice."""

    def direct(m: Any, x: Tensor) -> Any:
        left, right = m.a(x), m.b(x)
        return m.c(torch.cat([left, right], 1)), m.d(left.relu())

    def pooled(m: Any, x: Tensor) -> Any:
        left, right = m.a(x), m.b(x)
        return m.c(F.max_pool2d(torch.cat([left, right], 1), 2)), m.d(left.relu())

    assert activation_quantizers(prepared(model(direct), image(*X))) == ["x", "cat", "relu"]
    assert activation_quantizers(prepared(model(pooled), image(*X))) == ["x", "max_pool2d", "relu"]


def test_nothing_is_read_twice() -> None:
    def once(m: Any, x: Tensor) -> Tensor:
        return m.c(torch.cat([m.a(x), m.b(x)], 1).relu())

    gm = prepared(model(once), image(*X))
    assert activation_quantizers(gm) == ["x", "relu"]
    assert not notes(gm)


def test_several_types() -> None:
    def mixed(m: Any, x: Tensor) -> Any:
        left = m.a(x)
        indices = torch.cat([left.argmax(1), left.argmin(1)], 1)
        return m.d(left.relu()), indices, indices + 1

    gm = prepared(model(mixed), image(*X))
    assert activation_quantizers(gm) == ["x", "relu"]


def test_recipes_decide() -> None:
    keep = Recipe([Rule("op:cat", None, reason="wanted in float")])
    gm = prepared(model(parts), image(*X), recipe=keep)
    assert activation_quantizers(gm) == ["x", "relu", "relu_1"]
    assert [(n.rule, n.text) for n in notes(gm)] == [("recipe", "this concatenation stays float: cat, wanted in float")]
    how = Recipe([Rule("op:cat", EdgeSpecs(output=QSpec(method="entropy")))])
    assert "cat" in activation_quantizers(prepared(model(parts), image(*X), recipe=how))
    off = Recipe([Rule("[cd]", None)])
    assert activation_quantizers(prepared(model(parts), image(*X), recipe=off)) == ["x"]
    for match in ("*", "op:cat"):
        method = Recipe([Rule(match, QSpec(method="percentile"))])
        gm = prepared(model(parts), image(*X), recipe=method)
        assert decided(gm, "a") | {0: "", 1: ""} == {0: "", 1: "", "output": "int8 per-tensor percentile R27"}


def test_other_targets_leave_them() -> None:
    """What a target does not speak of does not happen."""
    target = replace(Target.load("tensorrt"), concat=Concat())
    assert activation_quantizers(prepared(model(parts), image(*X), target=target)) == ["x", "relu", "relu_1"]
