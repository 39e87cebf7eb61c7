"""Ties: which tensors share one scale, and which do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from placing import MAX, STUDY, Lambda, before, check_pass, convert, node, notes, prepared, reads
from torch import Tensor, fx, nn
from toys import image, seeded

import fxq
from fxq.calibration import calibrate
from fxq.passes.tie_scales import TieScales
from fxq.quantizer import quantizers
from fxq.recipe import EdgeSpecs, QSpec, Recipe, Rule

X = (2, 8, 8, 8)


def conv(inputs: int = 8, outputs: int = 8) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def model(function: Any, **parts: nn.Module) -> nn.Module:
    made = {"a": conv(), "b": conv(), "c": conv(16, 8), **parts}
    return seeded(lambda: Lambda(function, **made))


def ties(gm: fx.GraphModule) -> dict[str, str | None]:
    """Activation tensor to tie, in the graph's order."""
    return {q.tensor: q.tie for q in quantizers(gm).values() if not q.weight}


def grouped(gm: fx.GraphModule) -> list[list[str]]:
    """Tensors that share a scale, in groups of two or more."""
    groups: dict[str, list[str]] = {}
    for tensor, tie in ties(gm).items():
        if tie is not None:
            groups.setdefault(tie, []).append(tensor)
    return list(groups.values())


def concat(m: nn.Module, x: Tensor) -> Tensor:
    """Both inputs are quantized for other readers, and so is the concatenation."""
    left, right = torch.relu(x), torch.sigmoid(x) * 5
    return m.a(left) * m.b(right) + m.c(torch.cat([left, right], 1))


def test_concat() -> None:
    gm = prepared(model(concat), image(*X), recipe=MAX)
    assert grouped(gm) == [["relu", "mul", "cat"]]
    report = calibrate(gm, [image(*X)], progress=False)
    scales = {row.name: row.scale for row in report.rows}
    assert scales["relu"] == scales["mul"] == scales["cat"]
    expected = max(image(*X).relu().max(), (image(*X).sigmoid() * 5).max()) / 127
    assert scales["cat"][0] == pytest.approx(float(expected), rel=1e-6)
    converted = convert(gm)
    assert float(converted.get_buffer("quantizers.relu.scale")) == float(converted.get_buffer("quantizers.cat.scale"))


def test_golden_and_second_run() -> None:
    result = check_pass(TieScales(), before("tie-scales", model(concat), image(*X)), "passes/tie_scales_concat")
    assert result.counts == {"annotated": 3}
    assert result.notes == ()


def test_concat_with_one_input_unquantized() -> None:
    """The float input needs no tie: TensorRT moves the quantizer behind the concatenation onto it."""
    gm = prepared(model(lambda m, x: m.a(torch.relu(x)) * m.c(torch.cat([torch.relu(x), x.sigmoid()], 1))), image(*X))
    assert set(ties(gm)) == {"relu", "cat"}
    assert grouped(gm) == []  # two relu nodes: the one that the concatenation reads has no quantizer

    def shared(m: nn.Module, x: Tensor) -> Tensor:
        left = torch.relu(x)
        return m.a(left) * m.c(torch.cat([left, x.sigmoid()], 1))

    gm = prepared(model(shared), image(*X))
    assert grouped(gm) == [["relu", "cat"]]


def test_nested_concat_through_max_pool() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        left = torch.relu(x)
        inner = torch.cat([left, x.sigmoid()], 1)
        pooled = F.max_pool2d(inner, 3, 1, 1)
        outer = torch.cat([pooled, inner], 1)
        return m.a(left) + m.c(inner) + m.c2(pooled) + m.d(outer)

    gm = prepared(model(forward, c2=conv(16, 8), d=conv(32, 8)), image(*X))
    assert grouped(gm) == [["relu", "cat", "max_pool2d", "cat_1"]]


MOVES: dict[str, Any] = {
    "flatten": lambda x: x.flatten(2).unflatten(2, (8, 8)).flatten(2),
    "reshape": lambda x: x.view(2, 8, 64),
    "permute and transpose": lambda x: x.flatten(2).permute(0, 2, 1).transpose(1, 2),
    "chunk and getitem": lambda x: x.flatten(2).chunk(2, 2)[1],
    "split": lambda x: torch.split(x.flatten(2), 32, 2)[0],
    "unbind and stack": lambda x: torch.stack(x.flatten(2).unbind(2), 2),
    "slice": lambda x: x.flatten(2)[:, :, ::2],
    "max pool": lambda x: F.max_pool2d(x, 2).flatten(2),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, 2).flatten(2),
    "squeeze": lambda x: x.flatten(2).unsqueeze(1).squeeze(1),
    "expand and repeat": lambda x: x.flatten(2)[:1].expand(2, 8, 64).repeat(1, 1, 2),
    "flip and roll": lambda x: x.flatten(2).flip(2).roll(3, 2),
    "pixel shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2).flatten(2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2).flatten(2),
    "concat": lambda x: torch.cat([x, x], 1)[:, :8].flatten(2),
}


@pytest.mark.parametrize("name", MOVES)
def test_data_movement_ties(name: str) -> None:
    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(x)
        return m.a(y), m.e(MOVES[name](y))

    gm = prepared(model(forward, e=nn.Conv1d(8, 4, 1)), image(*X))
    ((first, second),) = grouped(gm)
    assert first == "relu"
    assert reads(gm, "e")[0] == f"{second}_quantizer"


CHANGES: dict[str, Any] = {
    "avg pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "adaptive avg pool": lambda x: F.adaptive_avg_pool2d(x, 8),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "relu6": F.relu6,
    "relu": lambda x: torch.relu(x - 1),
    "sum": lambda x: x + x,
    "clamp": lambda x: x.clamp(0, 1),
    "upsampling": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_values_is_not_tied(name: str) -> None:
    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.sigmoid(x)
        return m.a(y), m.b(CHANGES[name](y))

    gm = prepared(model(forward), image(*X))
    assert set(ties(gm).values()) == {None}
    assert len(ties(gm)) == 2


def test_chunks_of_one_tensor_share_its_scale() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        left, right = torch.relu(x).chunk(2, 1)
        return m.l(left) * m.l2(right)

    gm = prepared(model(forward, l=conv(4, 4), l2=conv(4, 4)), image(*X))
    assert grouped(gm) == [["getitem", "getitem_1"]]


def test_results_of_a_module_kept_whole_are_not_tied() -> None:
    """An LSTM's output and its cell state come out of one node and have ranges of their own."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        out, (_, cell) = m.lstm(x)
        return m.p(out) + m.q(cell).sum()

    made = model(forward, lstm=nn.LSTM(8, 8, batch_first=True), p=nn.Linear(8, 8), q=nn.Linear(8, 8))
    gm = prepared(made, image(2, 5, 8))
    assert len(ties(gm)) == 2
    assert grouped(gm) == []


def test_weights_are_not_tied() -> None:
    """A stored tensor that is concatenated with an activation, and read by a matrix product too."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.relu(x)
        return m.f(torch.cat([y, m.token], 0)) @ m.token.t() + m.g(y).sum()

    made = model(forward, token=nn.Parameter(torch.randn(3, 8)), f=nn.Linear(8, 8), g=nn.Linear(8, 8))
    gm = prepared(made, image(2, 8))
    assert grouped(gm) == [["relu", "cat"]]


def test_different_data_types_share_no_scale() -> None:
    recipe = Recipe([Rule("c", EdgeSpecs(input=QSpec(dtype="uint8", symmetric=False)))])
    gm = prepared(model(concat), image(*X), recipe=recipe, target=STUDY)
    assert grouped(gm) == [["relu", "mul"]]
    assert ties(gm)["cat"] is None
    assert [(n.node, n.rule) for n in notes(gm)] == [("cat", "R27")]
    assert "uint8 asymmetric per-tensor" in notes(gm)[0].text
    result = check_pass(TieScales(), before("tie-scales", model(concat), image(*X), recipe=recipe, target=STUDY))
    assert result.counts == {"annotated": 2}


def test_per_channel_activations_are_not_tied() -> None:
    per_channel = QSpec(granularity=fxq.PerChannel(1), method="max")
    gm = prepared(model(concat), image(*X), recipe=Recipe([Rule("op:conv2d", EdgeSpecs(input=per_channel))]))
    assert grouped(gm) == []
    calibrate(gm, [image(*X)], progress=False)


def test_one_method_for_all_of_a_tie() -> None:
    """Statistics are merged, so the method is one: that of the latest rule among the tied tensors."""
    recipe = Recipe([Rule("c", QSpec(method="max")), Rule("a", QSpec(method="entropy"))])
    gm = prepared(model(concat), image(*X), recipe=recipe)
    assert grouped(gm) == [["relu", "mul", "cat"]]
    held = [q for q in quantizers(gm).values() if q.tie is not None]
    assert {str(q.spec) for q in held} == {"int8 per-tensor entropy"}
    calibrate(gm, [image(*X)], progress=False)
    assert len({float(q.scale) for q in held}) == 1


def test_a_quantized_output_is_tied_too() -> None:
    recipe = Recipe([Rule("a", EdgeSpecs(output=QSpec()))])
    gm = prepared(model(lambda m, x: m.c(torch.cat([m.a(x), x], 1))), image(*X), recipe=recipe)
    assert grouped(gm) == [["x", "a", "cat"]]
    assert node(gm, "cat").args[0][0].name == "a_quantizer"  # type: ignore[index,union-attr]


def test_a_long_chain_of_moves_is_one_group() -> None:
    """Deep chains neither recurse nor slow down: every node is looked up a bounded number of times."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = x
        for _ in range(1500):
            y = y.transpose(2, 3)
        return m.a(x) + m.b(y)

    gm = before("tie-scales", model(forward), image(1, 8, 2, 2))
    assert TieScales()(gm, inplace=True).counts == {"annotated": 2}
