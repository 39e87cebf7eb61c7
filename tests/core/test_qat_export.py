"""A graph that trained goes the way of a calibrated one: export, lint, ONNX Runtime node by node, engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import basic_net, image

import fxq
from fxq import qat
from fxq.backends.onnx_compare import compare_nodes


def trained_network() -> torch.fx.GraphModule:
    """The basic network after a few steps from its calibrated scales, converted."""
    gm = fxq.prepare_qat(basic_net(), image(4, 3, 16, 16))
    fxq.calibrate(gm, [image(4, 3, 16, 16, seed=1)], progress=False)
    optimizer = torch.optim.SGD(qat.parameter_groups(gm, lr=0.01), momentum=0.9)
    for number in range(3):
        optimizer.zero_grad()
        gm(image(4, 3, 16, 16, seed=2 + number)).square().mean().backward()
        optimizer.step()
    return fxq.convert(gm)


def test_lint_finds_no_fault_and_the_placement_is_that_of_post_training(tmp_path: Path) -> None:
    converted = trained_network()
    path = fxq.export(converted, tmp_path / "qat.onnx")
    plain = fxq.prepare(basic_net(), image(4, 3, 16, 16))
    fxq.calibrate(plain, [image(4, 3, 16, 16, seed=1)], progress=False)
    other = fxq.export(fxq.convert(plain), tmp_path / "ptq.onnx")
    mine, theirs = fxq.lint(path), fxq.lint(other)
    assert not mine.errors
    assert not mine.warnings
    assert [(f.rule, f.node) for f in mine] == [(f.rule, f.node) for f in theirs]


def test_onnx_runtime_agrees_node_by_node(tmp_path: Path) -> None:
    """Each operation fed the same inputs: a thousandth of the integers may differ, by one step."""
    converted = trained_network()
    path = fxq.export(converted, tmp_path / "qat.onnx")
    rows = compare_nodes(path, converted, (image(4, 3, 16, 16, seed=9),))
    whole = [row for row in rows if not row.dtype.is_floating_point]
    assert len(whole) >= 6
    assert all(row.share <= 1e-3 and row.largest <= 1 for row in whole)
    assert all(row.sqnr > 100 for row in rows if row.dtype.is_floating_point)


@pytest.mark.usefixtures("trt")
def test_every_weighted_kernel_of_the_engine_is_int8(tmp_path: Path) -> None:
    path = fxq.export(trained_network(), tmp_path / "qat.onnx", dynamic_shapes=None)
    engine = fxq.build(path, tmp_path / "qat.engine")
    assert len(engine.weighted_kernels) == 7
    assert engine.int8_kernels == engine.weighted_kernels


def test_export_says_what_tensorrt_cannot_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x = image(4, 3, 16, 16)
    four = fxq.quantize(basic_net(), [x], recipe=fxq.Recipe([fxq.Rule("fc", fxq.QSpec("int4"))]), progress=False)
    fxq.export(four, tmp_path / "four.onnx")
    (said,) = [record.getMessage() for record in caplog.records if record.name == "fxq.export_checks"]
    assert "four.onnx holds what TensorRT cannot run" in said
    assert "R12" in said
    assert "flatten" in said
    caplog.clear()
    fxq.export(fxq.quantize(basic_net(), [x], progress=False), tmp_path / "eight.onnx")
    assert [record for record in caplog.records if record.name == "fxq.export_checks"] == []
