"""Placement on models that nobody chose: what holds of every prepared graph."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import fxq
from fxq.graph import constant, edge_annotations, state
from fxq.ops import kind_name
from fxq.quantizer import Mode, quantizers
from fxq.random_models import SHAPE, random_model
from fxq.verify import is_quantizer, quantizer_of

MODELS = st.integers(0, 10_000)
IMAGES = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def behind(read: fx.Node) -> fx.Node:
    """The tensor that an edge reads, through a quantizer or without."""
    tensor = read.args[0] if is_quantizer(read) else read
    assert isinstance(tensor, fx.Node)
    return tensor


def fused_convolution(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The convolution of whose result nobody but the addition behind reads anything, past constants."""
    while len(node.users) == 1:
        if kind_name(node) in state(gm).target.residual.weighted:
            return node
        moving = [n for n in node.all_input_nodes if constant(n) is None]
        if kind_name(node) not in ("add", "sub", "mul", "div") or len(moving) != 1:
            return None
        node = moving[0]
    return None


@given(MODELS)
@settings(max_examples=40, deadline=None)
def test_every_prepared_graph(seed: int) -> None:
    model = random_model(seed, layers=14)
    gm = fxq.prepare(model, IMAGES)
    nodes = list(gm.graph.nodes)
    readers = Counter(node.args[0] for node in nodes if is_quantizer(node))
    assert not readers or max(readers.values()) == 1  # R29
    for node in nodes:
        low = [e for e, a in edge_annotations(node).items() if isinstance(e, int) and a.spec is not None]
        assert all(is_quantizer(node.args[edge]) for edge in low)  # type: ignore[arg-type]
        kind = kind_name(node)
        if kind in state(gm).target.ops:
            assert len(low) in (0, 2)  # R20: both or none
        elif kind == "add" and low:
            (skip,) = low  # R23: never both
            other = node.args[1 - skip]
            assert isinstance(other, fx.Node)
            assert not is_quantizer(other)
            if edge_annotations(node)[skip].rule == "R29":  # a kernel of its own, which reads what is stored anyway
                assert len(node.args[skip].users) > 1  # type: ignore[union-attr]
                continue
            convolution = fused_convolution(gm, other)
            assert convolution is not None
            assert all(a.spec is not None for e, a in edge_annotations(convolution).items() if e != "output")
        else:
            assert not low
    for quantizer in quantizers(gm).values():
        quantizer.mode = Mode.OFF
    with torch.no_grad():
        torch.testing.assert_close(gm(IMAGES.clone()), model(IMAGES.clone()), rtol=1e-4, atol=1e-4)


@given(MODELS)
@settings(max_examples=15, deadline=None)
def test_tied_tensors_have_one_scale_on_both_sides_of_what_moves_them(seed: int) -> None:
    gm = fxq.prepare(random_model(seed, layers=14), IMAGES)
    if quantizers(gm):
        fxq.calibrate(gm, [IMAGES.clone()], progress=False, bias_correction=False)
    ties = state(gm).target.ties
    for node in gm.graph.nodes:
        own = next((q for user in node.users if (q := quantizer_of(user)) is not None), None)
        if kind_name(node) not in ties or own is None:
            continue
        for read in node.all_input_nodes:
            source = None if read.op == "get_attr" else quantizer_of(read)
            beside = next((q for user in behind(read).users if (q := quantizer_of(user)) is not None), None)
            for other in filter(None, (source, beside)):
                assert other.tie == own.tie is not None
                assert torch.equal(other.scale, own.scale)
