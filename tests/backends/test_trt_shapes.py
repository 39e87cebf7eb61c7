"""What a file says of shapes and of its nodes' origins, as the builder uses it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from qdq_onnx import residual_model
from torch import nn

import fxq
from fxq.backends.trt_build import build
from fxq.backends.trt_parse import _Origin
from fxq.errors import BuildError


def net() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)), torch.randn(4, 3, 12, 12)


def profile(path: Path) -> Any:
    held = {p.key: p.value for p in onnx.load(path).metadata_props}
    return json.loads(held["fxq.profiles"]) if "fxq.profiles" in held else None


class TestShapes:
    """Shapes that were given or seen come through the file to the engine."""

    def test_batches_that_calibration_saw(self, tmp_path: Path, trt: ModuleType) -> None:
        model, x = net()
        quantized = fxq.quantize(model, [x, x, x[:1].repeat(6, 1, 1, 1), x[:3]], progress=False)
        path = fxq.export(quantized, tmp_path / "m.onnx")
        assert profile(path) == {"input": [[1, 3, 12, 12], [4, 3, 12, 12], [6, 3, 12, 12]]}
        engine = build(path, tmp_path / "m.engine")
        assert engine.record is not None
        assert engine.record.profiles == profile(path)
        wide = ((1, 3, 12, 12), (2, 3, 12, 12), (9, 3, 12, 12))
        given = build(path, tmp_path / "m.engine", profiles={"input": wide})
        assert given.record is not None
        assert given.record.profiles == {"input": [list(shape) for shape in wide]}

    def test_ranges_that_export_was_given(self, tmp_path: Path) -> None:
        model, x = net()
        dims = {"input": {0: (1, 16), 2: (8, 64)}}
        path = fxq.export(fxq.trace(model, x), tmp_path / "m.onnx", dynamic_shapes=dims)
        assert profile(path) == {"input": [[1, 3, 8, 12], [4, 3, 12, 12], [16, 3, 64, 12]]}

    def test_ranges_hold_over_what_was_seen(self, tmp_path: Path) -> None:
        model, x = net()
        quantized = fxq.quantize(model, [x, torch.randn(4, 3, 12, 20), torch.randn(4, 3, 12, 20)], progress=False)
        path = fxq.export(quantized, tmp_path / "m.onnx", dynamic_shapes={"input": {0: (2, 8), 3: (6, 20)}})
        assert profile(path) == {"input": [[2, 3, 12, 6], [4, 3, 12, 20], [8, 3, 12, 20]]}

    def test_nothing_is_made_up(self, tmp_path: Path) -> None:
        model, x = net()
        path = fxq.export(fxq.trace(model, x), tmp_path / "m.onnx")
        assert profile(path) is None
        assert profile(fxq.export(fxq.trace(model, x), path, dynamic_shapes=None)) is None

    @pytest.mark.usefixtures("trt")
    def test_a_damaged_entry(self, tmp_path: Path) -> None:
        model = residual_model()
        model.metadata_props.add(key="fxq.profiles", value='{"x": 3}')
        with pytest.raises(BuildError, match=r"the file's entry fxq\.profiles is damaged"):
            build(model.SerializeToString(), tmp_path / "m.engine")


@pytest.mark.usefixtures("trt")
def test_an_operation_that_tensorrt_lacks_is_named_as_the_user_wrote_it(tmp_path: Path) -> None:
    class Determinant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.det(x)

    path = fxq.export(fxq.trace(nn.Sequential(Determinant()), torch.randn(2, 3, 3)), tmp_path / "m.onnx")
    with pytest.raises(BuildError) as caught:
        build(path, tmp_path / "m.engine")
    error = caught.value
    assert error.module_path == "0"
    assert error.source is not None
    assert "test_trt_shapes.py" in error.source
    assert error.node == "linalg_det"
    assert "linalg_det (Det), from 0 at " in str(error)
    where = _Origin("layer1.conv", "Conv", "layer1.conv", "net.py:3", "layer1_conv")
    assert str(where) == "layer1.conv (Conv), FX node layer1_conv, from layer1.conv at net.py:3"
