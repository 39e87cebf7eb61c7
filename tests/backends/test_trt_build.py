"""Real engines, built by TensorRT's builder on a CPU."""

from __future__ import annotations

import ast
import inspect
import re
import stat
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
import trt_cpu
from qdq_onnx import QdqModel, residual_model

from fxq.backends import trt_build, trt_engine, trt_loading, trt_session
from fxq.backends.trt_build import build
from fxq.backends.trt_callbacks import capturing, progress_monitor, tensorrt_logger
from fxq.backends.trt_engine import Engine
from fxq.backends.trt_session import TORCH_DTYPES
from fxq.errors import BuildError, EngineError, MissingDependencyError

WEIGHTED = ["stem", "conv1", "conv2", "conv3", "fc"]


def onnx_sources(engine: Engine) -> list[str]:
    """The weighted ONNX node that each weighted kernel came from, in order."""
    return [next(name for name in kernel.onnx_nodes if name in WEIGHTED) for kernel in engine.weighted_kernels]


def residual_kernel(engine: Engine) -> list[str]:
    """The types of what the kernel that computes the residual add reads."""
    assert engine.kernels is not None
    (kernel,) = [kernel for kernel in engine.kernels if "add" in kernel.onnx_nodes]
    return sorted(tensor.dtype for tensor in kernel.inputs)


@pytest.mark.usefixtures("trt")
class TestKernels:
    """What the builder makes of the model is what the engine says."""

    def test_every_weighted_op_is_one_int8_kernel(self, tmp_path: Path) -> None:
        engine = build(residual_model(batch=8).SerializeToString(), tmp_path / "net.engine")
        assert onnx_sources(engine) == WEIGHTED
        assert engine.int8_kernels == engine.weighted_kernels
        assert engine.path.stat().st_size == engine.nbytes > 10_000

    def test_quantized_skip_is_read_as_int8_and_float_skip_is_not(self, tmp_path: Path) -> None:
        quantized = build(residual_model(batch=8).SerializeToString(), tmp_path / "a.engine")
        left_float = build(residual_model(8, quantize_skip=False).SerializeToString(), tmp_path / "b.engine")
        assert residual_kernel(quantized) == ["float32", "int8"]
        assert residual_kernel(left_float) == ["float32", "float32"]
        assert quantized.activation_bytes is not None
        assert left_float.activation_bytes is not None
        # The skip, [8, 32, 16, 16], is read as 1 byte instead of 4, and not written as float beside INT8.
        skip = 8 * 32 * 16 * 16
        assert left_float.activation_bytes - quantized.activation_bytes == (4 - 1) * skip + 4 * skip

    def test_unquantized_weighted_op_is_not_counted_as_int8(self, tmp_path: Path) -> None:
        net = QdqModel(batch=4)
        net.op("Relu", [net.conv(net.qdq("x"), "stem", (16, 32))], "stem_relu")
        net.conv("stem_relu", "conv1", (32, 32), quantized=False)
        engine = build(net.model("conv1", (4, 32, 16, 16)).SerializeToString(), tmp_path / "net.engine")
        assert onnx_sources(engine) == ["stem", "conv1"]
        assert [kernel.reads_int8 for kernel in engine.weighted_kernels] == [True, False]
        assert "weighted kernels reading INT8: 1 of 2" in engine.summary()
        assert re.search(r"not INT8: \S+ from conv1$", engine.summary(), re.MULTILINE)

    def test_dynamic_batch_gets_a_default_profile(self, tmp_path: Path) -> None:
        log = tmp_path / "build.log"
        engine = build(residual_model().SerializeToString(), tmp_path / "net.engine", verbose_log=log)
        assert "MinShape: [1,16,16,16], OptShape: [8,16,16,16], MaxShape: [32,16,16,16]" in log.read_text()
        assert len(engine.int8_kernels) == 5
        assert engine.activation_bytes is None
        assert "depends on the batch" in engine.summary()

    def test_profile_of_the_caller_is_used(self, tmp_path: Path) -> None:
        shapes = [(batch, 16, 16, 16) for batch in (2, 3, 5)]
        log = tmp_path / "build.log"
        build(
            residual_model().SerializeToString(),
            tmp_path / "net.engine",
            profiles={"x": (shapes[0], shapes[1], shapes[2])},
            verbose_log=log,
        )
        assert "MinShape: [2,16,16,16], OptShape: [3,16,16,16], MaxShape: [5,16,16,16]" in log.read_text()

    def test_options_reach_the_builder(self, tmp_path: Path, trt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        configure = trt_build.configure

        def spy(*args: object) -> object:
            config = configure(*args)  # type: ignore[arg-type]
            limit = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
            seen.append((limit, config.builder_optimization_level, config.profiling_verbosity))
            return config

        monkeypatch.setattr(trt_build, "configure", spy)
        build(
            residual_model(1).SerializeToString(),
            tmp_path / "net.engine",
            workspace_bytes=1 << 26,
            optimization_level=1,
        )
        assert seen == [(1 << 26, 1, trt.ProfilingVerbosity.DETAILED)]

    def test_timing_cache_is_made_and_taken_again(self, tmp_path: Path) -> None:
        cache = tmp_path / "kept" / "timing.cache"
        model = residual_model(1).SerializeToString()
        first = build(model, tmp_path / "a.engine", timing_cache=cache)
        assert cache.stat().st_size > 0
        second = build(model, tmp_path / "b.engine", timing_cache=cache)
        assert first.kernels is not None
        assert second.kernels is not None
        assert [kernel.kind for kernel in first.kernels] == [kernel.kind for kernel in second.kernels]

    def test_weights_beside_the_file_are_found(self, tmp_path: Path) -> None:
        path = tmp_path / "net.onnx"
        onnx.save(residual_model(1), path, save_as_external_data=True, location="net.weights", size_threshold=64)
        assert (tmp_path / "net.weights").exists()
        assert len(build(path, tmp_path / "net.engine").int8_kernels) == 5

    def test_progress_bars_show_the_phases(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        build(residual_model(1).SerializeToString(), tmp_path / "net.engine", progress=True)
        captured = capsys.readouterr()
        assert "Error" not in captured.err

    def test_polygraphy_builds_the_same_network(self, tmp_path: Path) -> None:
        """An independent route through the same builder ends in an engine of the same size."""
        polygraphy = pytest.importorskip("polygraphy.backend.trt")
        trt_cpu.mend_polygraphy()
        path = tmp_path / "net.onnx"
        onnx.save(residual_model(4), path)
        ours = build(path, tmp_path / "net.engine")
        network = polygraphy.network_from_onnx_path(str(path), strongly_typed=True)
        config = polygraphy.CreateConfig(profiling_verbosity=polygraphy_detailed())
        theirs = polygraphy.engine_bytes_from_network(network, config=config)
        assert abs(len(memoryview(theirs)) - ours.nbytes) < 1000


def polygraphy_detailed() -> object:
    import tensorrt

    return tensorrt.ProfilingVerbosity.DETAILED


class TestErrors:
    """What goes wrong names the place and the next step, and leaves no file behind."""

    @pytest.mark.usefixtures("trt")
    def test_every_error_names_the_onnx_node_and_the_users_line(self, tmp_path: Path) -> None:
        net = QdqModel(batch=1)
        net.op("NoSuchOp", [net.qdq("x", zero_point=3)], "mystery", domain="nowhere")
        model = net.model("mystery", (1, 16, 16, 16))
        with pytest.raises(BuildError) as caught:
            build(model.SerializeToString(), tmp_path / "net.engine")
        error = caught.value
        assert (error.node, error.module_path, error.source) == ("x_q", "net.x_q", "net.py:1")
        assert "x_q (QuantizeLinear), from net.x_q at net.py:1: " in str(error)
        assert "zero point" in str(error)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("trt")
    def test_all_parser_errors_are_told(self, tmp_path: Path) -> None:
        net = QdqModel(batch=1)
        net.op("NoSuchOp", ["x"], "first", domain="nowhere")
        net.op("NorThis", ["first"], "second", domain="nowhere")
        model = net.model("second", (1, 16, 16, 16))
        with pytest.raises(BuildError) as caught:
            build(model.SerializeToString(), tmp_path / "net.engine")
        assert caught.value.node == "first"
        assert "first (NoSuchOp), from net.first at net.py:1" in str(caught.value)

    @pytest.mark.usefixtures("trt")
    def test_types_that_do_not_agree_are_an_error_not_a_cast(self, tmp_path: Path) -> None:
        """Strongly typed: TensorRT may not reconcile float32 and float16 by itself (R1, R4)."""
        net = QdqModel(batch=1)
        half = net.constant("half", np.ones((1, 16, 16, 16), np.float16))
        net.op("Add", ["x", half], "adder")
        with pytest.raises(BuildError, match=r"(?s)adder \(Add\), from net.adder at net.py:1.*Float and Half"):
            build(net.model("adder", (1, 16, 16, 16)).SerializeToString(), tmp_path / "net.engine")

    @pytest.mark.usefixtures("trt")
    @pytest.mark.parametrize("data", [b"", b"this is no protobuf at all"], ids=["empty", "garbage"])
    def test_what_is_no_model_is_an_error(self, tmp_path: Path, data: bytes) -> None:
        path = tmp_path / "net.onnx"
        path.write_bytes(data)
        with pytest.raises(BuildError, match=r"net\.onnx"):
            build(path, tmp_path / "net.engine")
        assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]

    @pytest.mark.usefixtures("trt")
    def test_missing_file_names_it(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match=r"no ONNX file .*absent\.onnx"):
            build(tmp_path / "absent.onnx", tmp_path / "net.engine")

    @pytest.mark.usefixtures("trt")
    def test_log_is_kept_of_a_build_that_fails(self, tmp_path: Path) -> None:
        net = QdqModel(batch=1)
        net.op("NoSuchOp", ["x"], "mystery", domain="nowhere")
        with pytest.raises(BuildError):
            build(
                net.model("mystery", (1, 16, 16, 16)).SerializeToString(),
                tmp_path / "net.engine",
                verbose_log=tmp_path / "build.log",
            )
        assert "[ERROR]" in (tmp_path / "build.log").read_text()

    @pytest.mark.usefixtures("trt")
    def test_an_engine_that_is_there_survives_a_failed_build(self, tmp_path: Path) -> None:
        target = tmp_path / "net.engine"
        target.write_bytes(b"the engine of yesterday")
        with pytest.raises(BuildError):
            build(b"no model", target)
        assert target.read_bytes() == b"the engine of yesterday"

    @pytest.mark.usefixtures("trt")
    def test_builder_without_a_plan_tells_its_reasons(
        self, tmp_path: Path, trt: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The builder rarely refuses what its parser took; a cancelled build is a refusal one can make."""

        class Cancel(trt.IProgressMonitor):  # type: ignore[misc, name-defined] # known at run time
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, *_args: object) -> None:
                """Nothing to do."""

            def phase_finish(self, *_args: object) -> None:
                """Nothing to do."""

            def step_complete(self, *_args: object) -> bool:
                return False

        configure = trt_build.configure
        monitor = Cancel()

        def cancelling(*args: object) -> object:
            config = configure(*args)  # type: ignore[arg-type]
            config.progress_monitor = monitor
            return config

        monkeypatch.setattr(trt_build, "configure", cancelling)
        with pytest.raises(BuildError, match="TensorRT cannot build the ONNX model"):
            build(residual_model(1).SerializeToString(), tmp_path / "net.engine")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("trt")
    @pytest.mark.parametrize("level", [-1, 6])
    def test_optimization_level_out_of_range(self, tmp_path: Path, level: int) -> None:
        with pytest.raises(BuildError, match="0 to 5"):
            build(residual_model(1).SerializeToString(), tmp_path / "net.engine", optimization_level=level)

    def test_without_tensorrt_says_what_to_install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(MissingDependencyError, match=r"fxq\[trt\]"):
            build(residual_model(1).SerializeToString(), tmp_path / "net.engine")

    def test_old_tensorrt_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        old = ModuleType("tensorrt")
        old.__version__ = "10.3.0"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tensorrt", old)
        with pytest.raises(MissingDependencyError, match=r"10\.12 or newer; 10\.3\.0"):
            build(residual_model(1).SerializeToString(), tmp_path / "net.engine")


@pytest.mark.usefixtures("trt")
class TestRun:
    """Running needs a device; refusing to without one does not."""

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_gpu_is_told(self, tmp_path: Path) -> None:
        engine = build(residual_model(1).SerializeToString(), tmp_path / "net.engine")
        with pytest.raises(EngineError, match="no CUDA GPU"):
            engine.run(torch.zeros(1, 16, 16, 16))

    def test_code_for_the_gpu_names_only_what_the_bindings_have(self, trt: ModuleType) -> None:
        """The one check of that code against TensorRT that needs no device: nothing in it is misspelt or gone."""
        owners = {
            "engine": trt.ICudaEngine,
            "context": trt.IExecutionContext,
            "trt": trt,
            "runtime": trt.Runtime,
            "refitter": trt.Refitter,
            "parser": trt.OnnxParserRefitter,
        }
        used = set()
        for room in (trt_engine, trt_loading, trt_session):
            for node in ast.walk(ast.parse(inspect.getsource(room))):
                if isinstance(node, ast.Attribute):
                    base = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                    if base in owners and not node.attr.startswith("_"):
                        used.add((base, node.attr))
        assert {base for base, _ in used} == set(owners)
        assert len(used) > 20
        missing = sorted((base, name) for base, name in used if not hasattr(owners[base], name))
        assert missing == []
        assert set(TORCH_DTYPES) <= set(trt.DataType.__members__)

    @pytest.mark.gpu
    @pytest.mark.parametrize("batch", [1, 5])
    def test_agrees_with_onnx_runtime(self, tmp_path: Path, batch: int) -> None:
        """Engine and ONNX Runtime agree up to the steps that rounding moves."""
        import onnxruntime

        path = tmp_path / "net.onnx"
        onnx.save(residual_model(), path)
        engine = build(path, tmp_path / "net.engine")
        x = torch.randn(batch, 16, 16, 16)
        (expected,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
        got = engine.run({"x": x})["fc"].cpu()
        reference = torch.from_numpy(expected)
        noise = (got - reference).square().mean()
        assert 10 * torch.log10(reference.square().mean() / noise) > 30

    @pytest.mark.gpu
    def test_shape_outside_the_profile_is_an_error(self, tmp_path: Path) -> None:
        engine = build(residual_model().SerializeToString(), tmp_path / "net.engine")
        with pytest.raises(EngineError, match="outside the engine's profile"):
            engine.run(torch.zeros(33, 16, 16, 16))


class TestCallbacks:
    """The one logger and the progress bars."""

    def test_captures_nest_and_close(self, trt: ModuleType) -> None:
        logger = tensorrt_logger(trt)
        assert tensorrt_logger(trt) is logger
        with capturing() as outer:
            logger.log(trt.ILogger.INFO, "one")
            with capturing() as inner:
                logger.log(trt.ILogger.ERROR, "two")
        logger.log(trt.ILogger.ERROR, "three")
        assert outer.messages == [("INFO", "one"), ("ERROR", "two")]
        assert inner.messages == [("ERROR", "two")]
        assert inner.text() == "[ERROR] two\n"

    def test_errors_leave_out_the_missing_driver_unless_it_is_all(self, trt: ModuleType) -> None:
        logger = tensorrt_logger(trt)
        with capturing() as log:
            logger.log(trt.ILogger.ERROR, "Error Code 1: Cuda Runtime (no driver)")
        assert log.errors() == ["Error Code 1: Cuda Runtime (no driver)"]
        with capturing() as log:
            logger.log(trt.ILogger.ERROR, "Error Code 1: Cuda Runtime (no driver)")
            logger.log(trt.ILogger.ERROR, "the true one")
            logger.log(trt.ILogger.ERROR, "the true one")
        assert log.errors() == ["the true one"]

    def test_phases_become_nested_bars(self, trt: ModuleType) -> None:
        with progress_monitor(trt, "building net") as monitor:
            monitor.phase_start("Building engine", None, 6)
            monitor.phase_start("Cloning network graph", "Building engine", 77)
            assert monitor.step_complete("Cloning network graph", 0)
            assert monitor.depth == {"Building engine": 0, "Cloning network graph": 1}
            monitor.phase_finish("Cloning network graph")
            assert list(monitor.tasks) == ["Building engine"]


@pytest.mark.usefixtures("trt")
def test_engine_file_gets_ordinary_permissions(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    engine = build(residual_model(1).SerializeToString(), tmp_path / "net.engine")
    assert stat.S_IMODE(engine.path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.usefixtures("trt")
def test_somebody_elses_builder_does_not_hide_the_log(tmp_path: Path, trt: ModuleType) -> None:
    """TensorRT registers one logger per process; a live object with another must not cost the kernels."""
    theirs = trt.Builder(trt.Logger(trt.Logger.ERROR))
    engine = build(residual_model(1).SerializeToString(), tmp_path / "net.engine")
    assert len(engine.int8_kernels) == 5
    del theirs


@pytest.mark.usefixtures("trt")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the inspector may then know the kernels")
def test_builder_that_lists_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT proper logs no listing, and without a GPU nothing can be asked: unknown is not none."""
    monkeypatch.setattr(trt_build, "kernels_from_log", lambda _messages: None)
    engine = build(residual_model(1).SerializeToString(), tmp_path / "net.engine")
    assert engine.kernels is None
    assert engine.weighted_kernels == ()
    assert engine.activation_bytes is None
    assert "kernels: not listed by this builder" in engine.summary()
    assert "INT8" not in engine.summary()


def test_model_of_this_file_is_valid() -> None:
    onnx.checker.check_model(residual_model(), full_check=True)
