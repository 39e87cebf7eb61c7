"""The door to TensorRT's modules, and the options of a build."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from fake_tensorrt import fake
from qdq_onnx import QdqModel, residual_model

from fxq.backends import trt_build
from fxq.backends.trt_api import load_library, network_flags, require_flag
from fxq.backends.trt_build import build
from fxq.backends.trt_engine import Engine
from fxq.backends.trt_options import BuildOptions, _set_hardware, configure
from fxq.errors import BuildError, MissingDependencyError

MODEL = residual_model(1).SerializeToString()


class TestDoor:
    """Which module is used, and what it must have."""

    def test_rtx_alone_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = {"tensorrt": None, "tensorrt_rtx": object()}
        monkeypatch.setattr("importlib.util.find_spec", found.__getitem__)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake("tensorrt_rtx", "1.3.0.35"))
        assert load_library(None, purpose="a test").__name__ == "tensorrt_rtx"

    def test_each_is_used_on_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake("tensorrt_rtx", "1.3.0.35"))
        monkeypatch.setitem(sys.modules, "tensorrt", fake("tensorrt", "10.12.0.36"))
        assert load_library("tensorrt_rtx", purpose="a test").__name__ == "tensorrt_rtx"
        assert load_library("tensorrt", purpose="a test").__name__ == "tensorrt"

    def test_what_is_not_there_or_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        with pytest.raises(MissingDependencyError, match="tensorrt_rtx"):
            load_library("tensorrt_rtx", purpose="a test")
        monkeypatch.setitem(sys.modules, "tensorrt", fake("tensorrt", "10.11.0"))
        with pytest.raises(MissingDependencyError, match=r"tensorrt 10\.12 or newer; 10\.11\.0"):
            load_library("tensorrt", purpose="a test")
        with pytest.raises(BuildError, match="no library is called 'trt'"):
            load_library("trt", purpose="a test")  # type: ignore[arg-type]

    def test_strongly_typed_where_there_is_such_a_flag(self, trt: ModuleType) -> None:
        assert network_flags(trt) == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        gone = fake("tensorrt", "12.0")
        gone.NetworkDefinitionCreationFlag = object()  # type: ignore[attr-defined]
        assert network_flags(gone) == 0

    def test_a_member_that_is_not_there(self, trt: ModuleType) -> None:
        with pytest.raises(BuildError, match=r"tensorrt .* has no flag of old \(BuilderFlag\.INT8\)"):
            require_flag(trt, "BuilderFlag", "INT8", option="flag of old")


class TestOptions:
    """Each option reaches the builder, and nonsense does not."""

    def configured(self, trt: ModuleType, **options: Any) -> Any:
        from fxq.backends.trt_callbacks import tensorrt_logger

        return configure(trt, trt.Builder(tensorrt_logger(trt)), BuildOptions(**options), None)

    def test_compatibility(self, trt: ModuleType) -> None:
        config = self.configured(trt, version_compatible=True)
        assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        assert not self.configured(trt).get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)

    def test_hardware(self, trt: ModuleType) -> None:
        taking, leaving = SimpleNamespace(), self.configured(trt)
        _set_hardware(trt, taking, "ampere-plus")
        assert taking.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
        with pytest.raises(BuildError, match="does not take hardware='ampere-plus'"):
            _set_hardware(trt, leaving, "ampere-plus")  # TensorRT-RTX's, as it is behind this module

    def test_weights(self, trt: ModuleType) -> None:
        config = self.configured(trt, weights="stripped")
        assert config.get_flag(trt.BuilderFlag.STRIP_PLAN)
        assert config.get_flag(trt.BuilderFlag.REFIT_IDENTICAL)
        assert self.configured(trt, weights="refittable").get_flag(trt.BuilderFlag.REFIT)
        assert not self.configured(trt).get_flag(trt.BuilderFlag.REFIT)

    def test_compute_capabilities_are_for_rtx(self, trt: ModuleType) -> None:
        with pytest.raises(BuildError, match="builds for the GPU that is there"):
            self.configured(trt, compute_capabilities=["8.9"])

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"optimization_level": 6}, "0 to 5"),
            ({"workspace_bytes": -1}, "workspace_bytes is -1"),
            ({"hardware": "all"}, "hardware is 'all'"),
            ({"weights": "none"}, "weights is 'none'"),
            ({"fp16": True}, "there is no build option fp16"),
        ],
        ids=str,
    )
    @pytest.mark.usefixtures("trt")
    def test_what_is_no_option(self, tmp_path: Path, option: dict[str, Any], message: str) -> None:
        with pytest.raises(BuildError, match=message):
            build(MODEL, tmp_path / "m.engine", **option)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("trt")
    def test_refit_of_quantized_networks_is_refused_with_the_rule(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match=r"scales a refit could change.*\(R30\)"):
            build(MODEL, tmp_path / "m.engine", weights="refittable")
        net = QdqModel(batch=1)
        net.conv("x", "conv", (16, 16), quantized=False)
        plain = net.model("conv", (1, 16, 16, 16)).SerializeToString()
        trt_build._check_refit(trt_build.OnnxSource(plain), BuildOptions(weights="refittable"))

    @pytest.mark.usefixtures("trt")
    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's builder may take them")
    @pytest.mark.parametrize(
        ("quantized", "option", "message"),
        [
            (True, {"weights": "stripped"}, r"weights='stripped' for the GPU at hand, and there is none"),
            (False, {"weights": "refittable"}, r"weights='refittable' for the GPU at hand, and there is none"),
            (True, {"version_compatible": True}, r"libnvinfer_lean.*lean runtime"),
        ],
        ids=str,
    )
    def test_what_this_builder_refuses_says_why_and_leaves_nothing(
        self, tmp_path: Path, quantized: bool, option: dict[str, Any], message: str
    ) -> None:
        net = QdqModel(batch=1)
        net.conv(net.qdq("x") if quantized else "x", "conv", (16, 16), quantized=quantized)
        model = net.model("conv", (1, 16, 16, 16)).SerializeToString()
        with pytest.raises(BuildError, match=f"(?s)TensorRT cannot build the ONNX model:\n  - .*{message}"):
            build(model, tmp_path / "m.engine", **option)
        assert list(tmp_path.iterdir()) == []
        build(model, tmp_path / "m.engine")  # the builder is none the worse for it

    @pytest.mark.gpu
    @pytest.mark.usefixtures("trt")
    @pytest.mark.parametrize("quantized", [True, False])
    def test_stripped_engines_take_their_weights_back(self, tmp_path: Path, quantized: bool) -> None:
        """The builder compiles such engines for the GPU at hand, so there has to be one."""
        net = QdqModel(batch=1, channels=256)
        net.conv(net.qdq("x") if quantized else "x", "conv", (256, 256), quantized=quantized)
        onnx.save(net.model("conv", (1, 256, 16, 16)), tmp_path / "m.onnx")
        whole = build(tmp_path / "m.onnx", tmp_path / "a.engine")
        stripped = build(tmp_path / "m.onnx", tmp_path / "b.engine", weights="stripped")
        assert stripped.nbytes < whole.nbytes - 256 * 256 * 9 // 2
        x = torch.randn(1, 256, 16, 16)
        again = Engine.load(stripped.path, weights_from=tmp_path / "m.onnx")
        torch.testing.assert_close(again.run(x)["conv"], whole.run(x)["conv"])
