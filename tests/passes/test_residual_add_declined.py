"""Additions that the residual placement leaves float, each with its reason."""

from __future__ import annotations

import torch
from placing import (
    Lambda,
    Lambda2,
    activation_quantizers,
    decided,
    notes,
    prepared,
    reads,
)
from residual_blocks import X, block, conv, the_addition, why_not
from torch import Tensor, nn
from toys import image, seeded


def test_gelu_of_a_convolution_plus_that_convolution() -> None:
    """What both inputs have in common is the convolution itself: no residual (R25)."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv1(x)
        return nn.functional.gelu(y) + y

    rule, text = why_not(block(forward), image(*X))
    assert rule == "R25"
    assert text == "gelu comes from conv1 without another weighted operation between them"


def test_a_branch_from_a_convolution_that_is_the_skip() -> None:
    """Here a convolution lies between: a residual whose skip is the first convolution's output."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv1(x)
        return m.conv2(nn.functional.gelu(y)) + y

    gm = prepared(block(forward), image(*X))
    assert reads(gm, the_addition(gm).name) == ["conv2", "conv1_quantizer"]


def test_nothing_straight_from_a_convolution() -> None:
    expected = ("R23", "neither input comes straight from a convolution that nothing else reads")
    assert why_not(block(lambda m, x: torch.relu(m.conv1(x.sigmoid())) + x), image(*X)) == expected

    def read_twice(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv1(torch.relu(x))
        return (y + x) * y

    assert why_not(block(read_twice), image(*X)) == expected


def test_a_convolution_that_is_not_only_scaled_or_shifted() -> None:
    """A kernel scales and shifts its result by constants; it does not divide by it, nor broadcast it."""
    expected = ("R23", "neither input comes straight from a convolution that nothing else reads")
    assert why_not(block(lambda m, x: 2.0 / m.conv1(torch.relu(x)) + x), image(*X)) == expected
    parts = {"one": nn.Conv2d(16, 16, 1), "wide": image(*X[1:])}
    pooled = Lambda(lambda m, x: m.one(torch.relu(x.mean((2, 3), keepdim=True))) * m.wide + x, **parts)
    assert why_not(pooled, image(*X)) == expected


def test_a_linear_layer_is_no_convolution() -> None:
    model = seeded(lambda: Lambda(lambda m, x: m.fc(torch.relu(x)) + x, fc=nn.Linear(8, 8)))
    assert why_not(model, image(2, 8))[0] == "R23"


def test_one_tensor_twice() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv1(x)
        return y + y

    assert why_not(block(forward), image(*X)) == ("R25", "both inputs are one tensor")


def test_a_constant_or_parameter() -> None:
    for part in (nn.Parameter(torch.ones(2, 16, 8, 8)), torch.ones(2, 16, 8, 8)):
        model = block(lambda m, x: m.conv1(x) + m.shift, shift=part)
        assert why_not(model, image(*X)) == ("R25", "one input is a constant")
    computed = block(lambda m, x: m.conv1(x) + m.shift * 2, shift=nn.Parameter(torch.ones(2, 16, 8, 8)))
    assert why_not(computed, image(*X)) == ("R25", "its inputs have no tensor in common that they come from")


def test_a_number_is_no_addition_of_tensors() -> None:
    gm = prepared(block(lambda m, x: m.conv1(x) + 3), image(*X))
    assert decided(gm, the_addition(gm).name) == {}
    assert notes(gm) == []


def test_broadcasting() -> None:
    rule, text = why_not(block(lambda m, x: m.conv1(x) + m.down(x.mean((2, 3), keepdim=True))), image(*X))
    assert (rule, text) == (
        "R44",
        "its inputs [2, 16, 8, 8] and [2, 16, 1, 1] broadcast, which does not fuse",
    )


def test_unrelated_inputs() -> None:
    model = seeded(lambda: Lambda2(lambda m, x, y: m.conv1(x) + y, conv1=conv()))
    assert why_not(model, image(*X), image(*X, seed=1)) == (
        "R25",
        "its inputs have no tensor in common that they come from",
    )


def test_integers() -> None:
    model = block(lambda m, x: m.conv1(x) + (x > 0).to(torch.int32))
    assert why_not(model, image(*X)) == ("R25", "its inputs are float32 and int32")


def test_alpha_is_another_operation() -> None:
    gm = prepared(block(lambda m, x: torch.add(m.conv1(x), x, alpha=2)), image(*X))
    assert activation_quantizers(gm) == ["x"]
    assert [n for n in gm.graph.nodes if n.target is torch.add]
