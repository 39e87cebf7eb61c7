"""Options, records and the cache of engines, with real builds; and the door to TensorRT's modules."""

from __future__ import annotations

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from qdq_onnx import QdqModel, residual_model
from torch import nn

import fxq
from fxq.backends import trt_build
from fxq.backends.trt_api import Platform, load_library, network_flags, require_flag, this_platform
from fxq.backends.trt_build import build
from fxq.backends.trt_engine import Engine
from fxq.backends.trt_loading import give_weights
from fxq.backends.trt_options import BuildOptions, _set_hardware, configure
from fxq.backends.trt_parse import _Origin
from fxq.backends.trt_record import BuildRecord, EngineCache, record_path, sha256
from fxq.errors import BuildError, EngineError, MissingDependencyError

MODEL = residual_model(1).SerializeToString()


def fake(name: str, version: str) -> ModuleType:
    module = ModuleType(name)
    module.__version__ = version  # type: ignore[attr-defined]
    return module


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


@pytest.mark.usefixtures("trt")
class TestRecord:
    """A file beside the engine says how it was built."""

    def test_an_engine_from_elsewhere_says_what_it_is(self, tmp_path: Path, trt: ModuleType) -> None:
        built = build(MODEL, tmp_path / "m.engine", optimization_level=2)
        loaded = Engine.load(tmp_path / "m.engine")
        assert loaded == built
        assert loaded.kernels == built.kernels
        assert loaded.kernels is not None
        assert loaded.summary() == built.summary()
        assert loaded.record is not None
        assert (loaded.record.library, loaded.record.version) == ("tensorrt", trt.__version__)
        assert loaded.record.options["optimization_level"] == 2
        assert str(loaded.record).startswith(f"tensorrt {trt.__version__} on linux x86_64 without a GPU, by fxq ")
        assert loaded.mismatches() == []

    def test_an_engine_of_another_tool_has_no_record(self, tmp_path: Path) -> None:
        build(MODEL, tmp_path / "m.engine")
        record_path(tmp_path / "m.engine").unlink()
        loaded = Engine.load(tmp_path / "m.engine")
        assert (loaded.record, loaded.tensorrt_version, loaded.mismatches()) == (None, "unknown", [])

    def test_record_and_engine_belong_together(self, tmp_path: Path) -> None:
        path = build(MODEL, tmp_path / "m.engine").path
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(EngineError, match=r"is not the engine that m\.engine\.json speaks of"):
            Engine.load(path)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "kernels": null}'])
    def test_a_damaged_record(self, tmp_path: Path, text: str) -> None:
        path = build(MODEL, tmp_path / "m.engine").path
        record_path(path).write_text(text)
        with pytest.raises(EngineError, match="cannot be read"):
            Engine.load(path)

    def test_a_record_of_a_later_fxq(self, tmp_path: Path) -> None:
        path = build(MODEL, tmp_path / "m.engine").path
        held = json.loads(record_path(path).read_text())
        record_path(path).write_text(json.dumps({**held, "format": 2}))
        with pytest.raises(EngineError, match="has format 2, and this fxq reads 1"):
            Engine.load(path)

    def test_missing_engine(self, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match="there is no engine file"):
            Engine.load(tmp_path / "m.engine")


RECORD = BuildRecord(
    library="tensorrt",
    version="11.2.0.5",
    fxq="0.1",
    system="linux x86_64",
    device="NVIDIA L4",
    capability="8.9",
    onnx_sha256="0" * 64,
    engine_sha256="1" * 64,
    key="2" * 64,
    options=BuildOptions().as_dict(),
    profiles={},
    build_seconds=1.0,
)
L4 = Platform("linux x86_64", "NVIDIA L4", "8.9")


def changed(**options: Any) -> BuildRecord:
    return dataclasses.replace(RECORD, options={**RECORD.options, **options})


@pytest.mark.parametrize(
    ("record", "here", "library", "version", "said"),
    [
        (RECORD, L4, "tensorrt", "11.2.0.5", []),
        (RECORD, L4, "tensorrt", "11.2.0.9", []),
        (RECORD, L4, "tensorrt", "11.3.0.1", ["11.3.0.1 is installed"]),
        (RECORD, L4, "tensorrt_rtx", "1.3.0", ["tensorrt_rtx would run it"]),
        (changed(version_compatible=True), L4, "tensorrt", "11.3.0.1", []),
        (changed(version_compatible=True), L4, "tensorrt", "11.1.0.1", ["11.1.0.1 is installed"]),
        (changed(version_compatible=True), L4, "tensorrt", "12.0.0.1", ["12.0.0.1 is installed"]),
        (RECORD, Platform("windows amd64", "NVIDIA L4", "8.9"), "tensorrt", "11.2.0.5", ["this is windows amd64"]),
        (RECORD, Platform("linux x86_64", "NVIDIA A10", "8.6"), "tensorrt", "11.2.0.5", ["NVIDIA A10 (8.6)"]),
        (changed(hardware="ampere-plus"), Platform("linux x86_64", "A10", "8.6"), "tensorrt", "11.2.0.5", []),
        (changed(hardware="ampere-plus"), Platform("linux x86_64", "T4", "7.5"), "tensorrt", "11.2.0.5", ["T4 (7.5)"]),
        (changed(hardware="same-capability"), Platform("linux x86_64", "L40", "8.9"), "tensorrt", "11.2.0.5", []),
        (
            changed(compute_capabilities=["8.6"]),
            L4,
            "tensorrt",
            "11.2.0.5",
            ["NVIDIA L4 (8.9)"],
        ),
    ],
)
def test_mismatches(record: BuildRecord, here: Platform, library: str, version: str, said: list[str]) -> None:
    found = record.mismatches(here, library, version)
    assert len(found) == len(said)
    assert all(end in line for end, line in zip(said, found, strict=True))


@pytest.mark.usefixtures("trt")
def test_a_mismatch_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(MODEL, tmp_path / "m.engine")
    assert engine.record is not None
    moved = dataclasses.replace(engine, record=dataclasses.replace(engine.record, version="10.13.0.35"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("fxq.backends.trt_engine.this_platform", lambda: L4)
    monkeypatch.setattr("fxq.backends.trt_engine.load_engine", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(
        EngineError, match=r"cannot be run here: it was built with tensorrt 10\.13\.0\.35 and .* is inst"
    ):
        moved.run(torch.zeros(1, 16, 16, 16))


@pytest.mark.usefixtures("trt")
def test_an_engine_without_weights_asks_for_its_own(tmp_path: Path, trt: ModuleType) -> None:
    engine = build(MODEL, tmp_path / "m.engine")
    assert engine.record is not None
    with pytest.raises(EngineError, match="was built without its weights"):
        give_weights(trt, object(), engine.path, engine.record, None)
    other = tmp_path / "other.onnx"
    onnx.save(residual_model(1, quantize_skip=False), other)
    with pytest.raises(EngineError, match="is not the file"):
        give_weights(trt, object(), engine.path, engine.record, other)


def refuse_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_build._Job, "run", lambda *_, **__: pytest.fail("it was built"))


@pytest.mark.usefixtures("trt")
class TestCache:
    """The second build of the same thing is a file read; of anything else it is a build."""

    def test_the_second_build_is_a_file_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = build(MODEL, tmp_path / "a.engine", cache=tmp_path / "kept")
        refuse_to_build(monkeypatch)
        second = build(MODEL, tmp_path / "b.engine", cache=tmp_path / "kept")
        assert second.path.read_bytes() == first.path.read_bytes()
        assert (second.record, second.kernels) == (first.record, first.kernels)
        assert Engine.load(second.path) == second

    @pytest.mark.parametrize(
        "other",
        [{"optimization_level": 1}, {"workspace_bytes": 1 << 25}, {"profiles": {"x": [(1, 16, 16, 16)] * 3}}],
        ids=str,
    )
    def test_every_option_counts(self, tmp_path: Path, other: dict[str, Any]) -> None:
        cache = tmp_path / "kept"
        model = residual_model().SerializeToString()
        keys = {build(model, tmp_path / "m.engine", cache=cache, **o).record.key for o in ({}, other)}  # type: ignore[union-attr]
        assert len(keys) == len(list(cache.glob("*.engine"))) == 2

    def test_fields_of_the_options_count(self) -> None:
        chosen: list[dict[str, Any]] = [
            {},
            {"hardware": "ampere-plus"},
            {"version_compatible": True},
            {"weights": "stripped"},
            {"compute_capabilities": ("8.9",)},
        ]
        source = trt_build.OnnxSource(MODEL)
        keys = {trt_build._key(fake("tensorrt", "11.2"), source, BuildOptions(**one), None) for one in chosen}
        assert len(keys) == len(chosen)

    def test_model_platform_version_and_shapes_count(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, options = trt_build.OnnxSource(MODEL), BuildOptions()
        module = fake("tensorrt", "11.2.0.5")
        keys = [trt_build._key(module, source, options, None)]
        keys.append(trt_build._key(fake("tensorrt", "11.3.0.5"), source, options, None))
        keys.append(trt_build._key(fake("tensorrt_rtx", "11.2.0.5"), source, options, None))
        keys.append(trt_build._key(module, source, options, {"x": ((1,), (2,), (3,))}))
        keys.append(trt_build._key(module, trt_build.OnnxSource(residual_model(2).SerializeToString()), options, None))
        monkeypatch.setattr(trt_build, "this_platform", lambda: L4)
        keys.append(trt_build._key(module, source, options, None))
        assert len(set(keys)) == len(keys)

    def test_weights_beside_the_file_count(self, tmp_path: Path) -> None:
        path = tmp_path / "net.onnx"
        onnx.save(residual_model(1), path, save_as_external_data=True, location="net.weights", size_threshold=64)
        before = trt_build.OnnxSource.read(path).digest()
        weights = tmp_path / "net.weights"
        weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
        assert trt_build.OnnxSource.read(path).digest() != before
        weights.unlink()
        with pytest.raises(BuildError, match=r"keeps weights in .*net\.weights, which cannot be read"):
            trt_build.OnnxSource.read(path).digest()

    def test_a_damaged_entry_is_built_anew(self, tmp_path: Path) -> None:
        cache = tmp_path / "kept"
        build(MODEL, tmp_path / "a.engine", cache=cache)
        (held,) = cache.glob("*.engine")
        held.write_bytes(b"half of it")
        again = build(MODEL, tmp_path / "a.engine", cache=cache)
        assert again.nbytes > 10_000
        assert held.read_bytes() == again.path.read_bytes()

    def test_several_keep_the_same_engine_at_once(self, tmp_path: Path) -> None:
        engine = tmp_path / "net.engine"
        engine.write_bytes(bytes(1 << 20))
        record = dataclasses.replace(RECORD, key="same", engine_sha256=sha256(engine))
        cache = EngineCache(tmp_path / "kept")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: cache.keep(engine, record), range(40)))
        assert cache.take("same", tmp_path / "again.engine") == record
        assert sorted(path.suffix for path in cache.folder.iterdir()) == [".engine", ".json"]

    def test_who_wants_a_log_gets_a_build(self, tmp_path: Path) -> None:
        build(MODEL, tmp_path / "a.engine", cache=tmp_path / "kept")
        build(MODEL, tmp_path / "a.engine", cache=tmp_path / "kept", verbose_log=tmp_path / "build.log")
        assert "Layers:" in (tmp_path / "build.log").read_text()


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
    assert "test_trt_record.py" in error.source
    assert error.node == "linalg_det"
    assert "linalg_det (Det), from 0 at " in str(error)
    where = _Origin("layer1.conv", "Conv", "layer1.conv", "net.py:3", "layer1_conv")
    assert str(where) == "layer1.conv (Conv), FX node layer1_conv, from layer1.conv at net.py:3"


def test_here() -> None:
    here = this_platform()
    assert here.system.split()[0] in ("linux", "windows", "darwin")
    assert (here.device is None) == (not torch.cuda.is_available())
