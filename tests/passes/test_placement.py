"""What holds of placement on any network: random programs of convolutions, sums, concatenations, pools."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from placing import activation_quantizers, convert, fake_quantized, notes, of_kind, prepared
from torch import Tensor, fx, nn
from toys import image, seeded, traced

import fxq
from fxq.calibration import calibrate
from fxq.graph import edge_annotations
from fxq.passes import PREPARE
from fxq.printer import format_graph
from fxq.quantizer import quantizers
from fxq.verify import is_quantizer, verify

SHAPE = (1, 4, 5, 5)
STEPS = ("conv", "norm", "relu", "relu_", "add", "iadd", "cat", "pool", "average", "mul", "chunk", "clamp")

Program = list[tuple[str, int, int]]


class Net(nn.Module):
    """Runs a program: each step takes tensors made before it, counted from the end, and makes another."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in program)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in program)
        self.mixes = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in program)

    def forward(self, x: Tensor) -> Tensor:
        made = [x * 1]
        for index, (step, first, second) in enumerate(self.program):
            made.append(self.step(index, step, made[-1 - first % len(made)], made[-1 - second % len(made)]))
        return made[-1]

    def step(self, index: int, step: str, a: Tensor, b: Tensor) -> Tensor:
        simple: dict[str, Any] = {
            "conv": lambda: self.convs[index](a),
            "norm": lambda: self.norms[index](self.convs[index](a)),
            "relu": lambda: torch.relu(a),
            "relu_": lambda: torch.relu_(a),
            "add": lambda: a + b,
            "iadd": lambda: a.add_(b),
            "cat": lambda: self.mixes[index](torch.cat([a, b], 1)),
            "pool": lambda: F.max_pool2d(a, 3, 1, 1),
            "average": lambda: F.avg_pool2d(a, 3, 1, 1),
            "mul": lambda: a * torch.sigmoid(b),
            "chunk": lambda: torch.cat(a.chunk(2, 1)[::-1], 1),
            "clamp": lambda: F.relu6(a),
        }
        result: Tensor = simple[step]()
        return result


programs = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=12)


def net(program: Program) -> nn.Module:
    return seeded(lambda: Net(program))


def tensor_behind(edge: Any) -> fx.Node:
    """The tensor that an edge reads, through its quantizer or not."""
    return edge.args[0] if is_quantizer(edge) else edge


@settings(max_examples=60)
@given(program=programs)
def test_placement_of_any_network(program: Program) -> None:
    model = net(program)
    gm = prepared(model, image(*SHAPE))
    verify(gm)
    activation_quantizers(gm)  # no tensor has two
    with torch.no_grad():
        torch.testing.assert_close(gm(image(*SHAPE)), model(image(*SHAPE)), rtol=1e-3, atol=1e-4)
    declined = {note.node for note in notes(gm)}
    for add in of_kind(gm, "add"):
        quantized = [index for index in (0, 1) if is_quantizer(add.args[index])]
        if quantized:
            (skip,) = quantized
            rule = edge_annotations(add)[skip].rule
            others = [user for user in add.args[skip].users if user is not add]
            if rule == "R29":  # no convolution takes it along: it reads what is stored in INT8 for another reader
                assert others
                continue
            conv = add.args[1 - skip]
            assert conv.op == "call_function"
            assert conv.target is F.conv2d
            assert list(conv.users) == [add]
            assert all(is_quantizer(conv.args[k]) for k in (0, 1))
            assert rule in ("R23", "R24")
            assert others or rule == "R23"
        else:
            assert add.name in declined
    for conv in of_kind(gm, "conv2d"):
        assert all(is_quantizer(conv.args[k]) for k in (0, 1))


@settings(max_examples=40)
@given(program=programs)
def test_ties_of_any_network(program: Program) -> None:
    """Quantized tensors on both sides of a concatenation or max-pool share a scale; a tie is never alone."""
    gm = prepared(net(program), image(*SHAPE))
    held = {q.tensor: q for q in quantizers(gm).values()}
    for node in gm.graph.nodes:
        if node.target in (torch.cat, F.max_pool2d):
            parts = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
            around = [node, *map(tensor_behind, parts)]
            ties = {held[n.name].tie for n in around if n.name in held}
            assert len(ties) <= 1
            if sum(n.name in held for n in dict.fromkeys(around)) > 1:
                assert ties != {None}
    groups = [q.tie for q in held.values() if q.tie is not None]
    assert all(groups.count(tie) > 1 for tie in groups)
    assert all(q.tie is None for q in held.values() if q.weight)


@settings(max_examples=25)
@given(program=programs)
def test_conversion_of_any_network(program: Program) -> None:
    gm = prepared(net(program), image(*SHAPE))
    if not quantizers(gm):
        return
    calibrate(gm, [image(*SHAPE)], progress=False)
    quantized = convert(gm)
    with torch.no_grad():
        x = image(*SHAPE, seed=1)
        assert torch.equal(quantized(x), fake_quantized(gm)(x))
    totals = fxq.report(quantized).totals
    assert totals == fxq.report(gm).totals
    assert totals.weighted_quantized == totals.weighted == len(of_kind(quantized, "conv2d"))


@settings(max_examples=25)
@given(program=programs)
def test_passes_are_honest_on_any_network(program: Program) -> None:
    gm = traced(net(program), image(*SHAPE))
    for p in PREPARE:
        before = format_graph(gm)
        result = p(gm)
        gm = result.graph_module
        assert result.modified == (format_graph(gm) != before)
        again = p(gm)
        assert not again.modified, p.name
        assert again.notes == (), p.name
