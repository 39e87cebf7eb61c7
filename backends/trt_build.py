"""ONNX → TensorRT engine, strongly typed: the types in the file are the types of the engine.

Works with TensorRT 10.12 to 11.x. Nothing is touched that 11 removed (R1, R2): no precision flags, no
calibrators, no dynamic ranges, no explicit-batch flag.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import BuildError, MissingDependencyError
from ..optional import require
from .files import write_whole
from .trt_callbacks import BuildLog, capturing, progress_monitor, tensorrt_logger
from .trt_engine import Engine, inspect_engine
from .trt_kernels import kernels_from_log
from .trt_parse import OnnxSource, parse_onnx, refusal
from .trt_profiles import Profiles, profile_shapes

__all__ = ["build"]

_OLDEST = (10, 12)

# All builds share one logger (see trt_callbacks), so two at once would read each other's log.
_one_build = threading.Lock()


def build(
    onnx_path: str | PathLike[str] | bytes,
    engine_path: str | PathLike[str],
    *,
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
    timing_cache: str | PathLike[str] | None = None,
    profiles: Profiles | None = None,
    progress: bool = False,
    verbose_log: str | PathLike[str] | None = None,
) -> Engine:
    """Build a TensorRT engine from an ONNX file.

    The network is strongly typed, so a float32 file gives float32 kernels wherever nothing is quantized.
    Building needs a GPU with TensorRT, and none with a builder that works ahead of time. The engine is not
    loaded.

    Args:
        onnx_path: The ONNX file, or its bytes (which must then hold all weights).
        engine_path: Where the engine goes. It is written whole or, after an error, not at all.
        workspace_bytes: Most GPU memory that a kernel may use as scratch space. None: TensorRT's default, all
            of it.
        optimization_level: 0 to 5; higher searches longer. None: TensorRT's default, 3.
        timing_cache: A file of kernel timings, read if it exists and brought up to date after the build,
            which makes the next build faster.
        profiles: For each dynamic input its shapes as ``(min, opt, max)``. None: a dynamic first dimension is
            taken for the batch and gets 1, 8 and 32; any other dynamic dimension is an error.
        progress: Show TensorRT's build phases as progress bars on the terminal.
        verbose_log: A file for the builder's whole log, written whether or not the build succeeds.

    Returns:
        The engine with its kernels, as far as they can be told without running it.

    Raises:
        BuildError: The file is missing or TensorRT refuses it. The message has every reason that TensorRT
            gives and, where the file was exported by fxq, the module path and source line of the nodes at
            fault.
        MissingDependencyError: ``tensorrt`` is not installed, or older than 10.12.
    """
    trt = require("tensorrt", extra="trt", purpose="building an engine")
    _check_version(trt)
    source = OnnxSource.read(onnx_path)
    target = Path(engine_path)
    options = _Options(workspace_bytes, optimization_level, None if timing_cache is None else Path(timing_cache))
    with _one_build, capturing() as log:
        try:
            plan, seconds = _build_plan(trt, source, log, options, profiles, progress)
        finally:
            if verbose_log is not None:
                write_whole(verbose_log, log.text().encode())
    write_whole(target, plan)
    kernels = kernels_from_log(text for _, text in log.messages) or inspect_engine(trt, target)
    return Engine(target, len(plan), trt.__version__, kernels, seconds)


@dataclass(frozen=True)
class _Options:
    """What is set on the builder's configuration."""

    workspace_bytes: int | None
    optimization_level: int | None
    timing_cache: Path | None


def _build_plan(
    trt: ModuleType,
    source: OnnxSource,
    log: BuildLog,
    options: _Options,
    profiles: Profiles | None,
    progress: bool,
) -> tuple[memoryview, float]:
    """The serialized engine, and the seconds that the builder took."""
    builder = _make_builder(trt, log)
    network, parser = parse_onnx(trt, builder, source)
    config = _configure(trt, builder, options)
    _add_profile(trt, builder, config, network, profiles)
    with ExitStack() as stack:
        if progress:
            config.progress_monitor = stack.enter_context(progress_monitor(trt, f"building {source.name}"))
        start = time.perf_counter()
        plan = builder.build_serialized_network(network, config)
        seconds = time.perf_counter() - start
    del parser  # it owns the weights, so it lives until here
    if plan is None:
        raise refusal(source, log.errors())
    if options.timing_cache is not None:
        write_whole(options.timing_cache, memoryview(config.get_timing_cache().serialize()))
    return memoryview(plan), seconds


def _check_version(trt: ModuleType) -> None:
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < _OLDEST:
        raise MissingDependencyError(
            f"building an engine needs TensorRT {_OLDEST[0]}.{_OLDEST[1]} or newer; {trt.__version__} is installed",
            hint="pip install --upgrade 'fxq[trt]'",
        )


def _make_builder(trt: ModuleType, log: BuildLog) -> Any:
    try:
        return trt.Builder(tensorrt_logger(trt))
    except TypeError as error:  # how the bindings say that the library returned no builder
        raise BuildError(
            "\n".join(["TensorRT has no builder here:", *(f"  - {line}" for line in log.errors())]),
            hint="TensorRT's builder needs an NVIDIA GPU and its driver",
        ) from error


def _configure(trt: ModuleType, builder: Any, options: _Options) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the kernels' types would not be listed
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        if not 0 <= options.optimization_level <= 5:
            raise BuildError(f"optimization_level is 0 to 5, not {options.optimization_level}")
        config.builder_optimization_level = options.optimization_level
    if options.timing_cache is not None:
        path = options.timing_cache
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise BuildError(
                f"TensorRT does not take the timing cache {path}",
                hint="it was made by another version or on another GPU: remove the file, or name another one",
            )
    return config


def _is_shape(trt: ModuleType, tensor: Any) -> bool:
    """Whether an input's values are read as a shape, which can only be of integers and of rank 0 or 1."""
    integers = tensor.dtype in {trt.DataType.INT32, trt.DataType.INT64}
    return integers and len(tensor.shape) <= 1 and bool(tensor.is_shape_tensor)


def _add_profile(trt: ModuleType, builder: Any, config: Any, network: Any, profiles: Profiles | None) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if shapes := [tensor.name for tensor in inputs if _is_shape(trt, tensor)]:
        raise BuildError(
            f"the inputs {', '.join(shapes)} are used as shapes, which fxq gives no profile for",
            hint="export the model with shapes that follow from its tensors",
        )
    ranges = profile_shapes({tensor.name: tuple(tensor.shape) for tensor in inputs}, profiles)
    if not ranges:
        return
    profile = builder.create_optimization_profile()
    for name, (low, best, high) in ranges.items():
        profile.set_shape(name, low, best, high)
    if config.add_optimization_profile(profile) < 0:
        raise BuildError(f"TensorRT does not take the optimization profile {ranges}")
