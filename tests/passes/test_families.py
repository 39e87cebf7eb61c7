"""Placement for every family of operations: the decisions as goldens, and the way to an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES, SHAPE, family
from golden import check_golden
from placing import same_numbers
from torch import fx
from toys import image

import fxq
from fxq.backends.onnxrt import Session
from fxq.graph import edge_annotations, state
from fxq.ops import kind_name


def decisions(gm: fx.GraphModule) -> Iterator[str]:
    """Each edge that placement decided on, with its rule and tie, and each note."""
    for node in gm.graph.nodes:
        for edge, a in edge_annotations(node).items():
            read = node.args[edge] if isinstance(edge, int) else node
            tie = f" tie={a.tie}" if a.tie else ""
            yield f"{node.name} ({kind_name(node)}) {edge} {read}: {a.spec or 'float'} {a.rule}{tie}"
    for note in state(gm).notes:
        yield f"{note.node}: {note.kind} {note.rule}: {note.text}"


@pytest.mark.parametrize("name", FAMILIES)
def test_placement(name: str) -> None:
    model = family(name)
    gm = fxq.prepare(model, image(*SHAPE))
    check_golden(f"passes/families/{name.replace(' ', '_')}", "\n".join(decisions(gm)) + "\n")
    if name != "shared input":
        same_numbers(gm, model, image(*SHAPE))


ADVICE = {"transposed": {"R43"}}
"""Rules that the check of the file speaks of, as advice; nothing is ever worse."""
FLOAT = {"transposed": 2, "whole attention": 2}
"""Weighted kernels that this builder runs in float: transposed convolutions always, attention by rule."""
FUSED = {"tokens": 4, "windows": 4, "whole attention": 1}
"""Products that share a kernel: those of attention have one of their own, queries, keys and values another."""


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_way_to_an_engine(name: str, tmp_path: Path) -> None:
    model, x = family(name), image(*SHAPE, seed=3)
    prepared = fxq.prepare(model, image(*SHAPE))
    fxq.calibrate(prepared, [image(*SHAPE, seed=s) for s in range(2)], progress=False)
    quantized = fxq.convert(prepared)
    path = fxq.export(quantized, tmp_path / "m.onnx", dynamic_shapes=None)
    findings = fxq.lint(path)
    assert not findings.errors
    assert not findings.warnings
    assert {f.rule for f in findings} == ADVICE.get(name, set())
    with torch.no_grad():
        ours = quantized(x)
    for got, want in zip(
        Session(path, optimize=False).run(x), ours if isinstance(ours, tuple) else (ours,), strict=True
    ):
        power, noise = want.square().sum(), (got - want).square().sum()
        assert noise <= 1e-3 * power, "ONNX Runtime computes something else"
    engine = fxq.build(path, tmp_path / "m.engine")
    totals = fxq.report(quantized).totals
    expected = totals.weighted - FUSED.get(name, 0)
    assert len(engine.weighted_kernels) == expected
    assert len(engine.int8_kernels) == expected - FLOAT.get(name, 0)
