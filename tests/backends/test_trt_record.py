"""Records and the cache of engines, with real builds."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from fake_tensorrt import RECORD, fake
from qdq_onnx import residual_model

from fxq.backends import trt_build
from fxq.backends.trt_api import Platform, this_platform
from fxq.backends.trt_build import build
from fxq.backends.trt_engine import Engine
from fxq.backends.trt_loading import give_weights
from fxq.backends.trt_options import BuildOptions
from fxq.backends.trt_record import BuildRecord, EngineCache, record_path, sha256
from fxq.errors import BuildError, EngineError

MODEL = residual_model(1).SerializeToString()


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


def test_here() -> None:
    here = this_platform()
    assert here.system.split()[0] in ("linux", "windows", "darwin")
    assert (here.device is None) == (not torch.cuda.is_available())
