"""Files that export writes: whole or not at all, and big weights in one file beside."""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from converted_graphs import GraphBuilder, export, residual_net
from torch import fx

from fxq.backends import onnx_capture, onnx_files
from fxq.backends.onnxrt import Session
from fxq.errors import ExportError


def test_a_refused_model_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm, args = residual_net()
    path = tmp_path / "m.onnx"
    export(gm, args, path)
    before = path.read_bytes()
    translate = onnx_capture._translate

    def spoiled(*given: Any) -> Any:
        result = translate(*given)
        gemm = next(n for n in result.model.graph if n.op_type == "Gemm")
        gemm.attributes["transB"] = onnx_ir.AttrInt64("transB", 0)
        return result

    monkeypatch.setattr(onnx_capture, "_translate", spoiled)
    with pytest.raises(ExportError, match="refuses the model") as caught:
        export(gm, args, path)
    assert caught.value.node == "fc"
    assert caught.value.source
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    gm, args = residual_net()
    export(gm, args, tmp_path / "m.onnx")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "m.onnx").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    gm, args = residual_net()
    with pytest.raises(ExportError, match="there is no folder"):
        export(gm, args, tmp_path / "none" / "m.onnx")


def wide_net(seed: int) -> tuple[fx.GraphModule, tuple[torch.Tensor]]:
    torch.manual_seed(seed)
    b = GraphBuilder()
    return b.build(b.linear(b.qdq(b.input("x"), 0.02), "wide", (64, 64))), (torch.randn(2, 64),)


def test_weights_beyond_the_limit_go_into_one_file_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    gm, args = wide_net(0)
    export(gm, args, path)
    assert list(tmp_path.iterdir()) == [path]  # below the limit all is in one file
    monkeypatch.setattr(onnx_files, "_LIMIT", 2000)
    export(gm, args, path)
    files = {file.name for file in tmp_path.iterdir()}
    (data,) = files - {path.name}
    assert data.startswith("m.onnx.")
    assert data.endswith(".data")
    (got,) = Session(path, optimize=False).run(*args)
    torch.testing.assert_close(got, gm(*args), rtol=1e-5, atol=1e-6)
    # Other weights make another data file, and the old one goes.
    other, args = wide_net(1)
    export(other, args, path)
    (replaced,) = {file.name for file in tmp_path.iterdir()} - {path.name}
    assert replaced != data
    (got,) = Session(path, optimize=False).run(*args)
    torch.testing.assert_close(got, other(*args), rtol=1e-5, atol=1e-6)
    monkeypatch.undo()
    export(other, args, path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_beyond_the_limit_leaves_both_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "_LIMIT", 2000)
    path = tmp_path / "m.onnx"
    gm, args = wide_net(0)
    export(gm, args, path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before) == 2

    def refuse(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("no")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match="refuses"):
        export(*wide_net(1), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    # The same weights again: their file is in use, so a failure must not remove it.
    with pytest.raises(ExportError, match="refuses"):
        export(gm, args, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    (got,) = Session(path).run(*args)
    assert math.isfinite(got.sum())
