"""ONNX → TensorRT engine, strongly typed: the types in the file are the types of the engine.

Works with TensorRT 10.12 to 11.x and with TensorRT-RTX. Nothing is touched that 11 removed (R1, R2): no precision
flags, no calibrators, no dynamic ranges, no explicit-batch flag.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import BuildError
from .files import check_target, write_whole
from .onnx_names import not_for_tensorrt
from .trt_api import Library, Platform, fxq_version, load_library, this_platform
from .trt_callbacks import BuildLog, capturing, progress_monitor, tensorrt_logger
from .trt_engine import Engine
from .trt_kernels import kernels_from_log
from .trt_loading import inspect_engine
from .trt_options import BuildOptions, configure
from .trt_parse import OnnxSource, parse_onnx, refusal
from .trt_profiles import Profiles, Ranges, profile_shapes, recorded_profiles
from .trt_record import BuildRecord, EngineCache, sha256

__all__ = ["build"]

# All builds share one logger (see trt_callbacks), so two at once would read each other's log.
_one_build = threading.Lock()


def build(
    onnx_path: str | PathLike[str] | bytes,
    engine_path: str | PathLike[str],
    *,
    library: Library | None = None,
    profiles: Profiles | None = None,
    timing_cache: str | PathLike[str] | None = None,
    cache: str | PathLike[str] | None = None,
    progress: bool = False,
    verbose_log: str | PathLike[str] | None = None,
    **options: Any,
) -> Engine:
    """Build a TensorRT engine from an ONNX file.

    The network is strongly typed, so a float32 file gives float32 kernels wherever nothing is quantized: choose types
    with ``fxq.export(compute_dtype=...)``. Building needs a GPU with TensorRT, and none with a builder that works
    ahead of time. The engine is not loaded. Beside it goes a record of how it was built
    (:mod:`fxq.backends.trt_record`).

    Args:
        onnx_path: The ONNX file, or its bytes (which must then hold all weights).
        engine_path: Where the engine goes. It is written whole or, after an error, not at all.
        library: ``"tensorrt"``, ``"tensorrt_rtx"``, or None (default) for the first that is installed.
        profiles: For each dynamic input its shapes as ``(min, opt, max)``. None: what the file says, where fxq
            exported it with ranges or after calibration; else a dynamic first dimension is taken for the batch and
            gets 1, 8 and 32, and any other dynamic dimension is an error.
        timing_cache: A file of kernel timings, read if it exists and brought up to date after the build,
            which makes the next build faster.
        cache: A folder of built engines. What was built there before, of the same file with its weights, the same
            options, shapes, library and GPU, is copied instead of built.
        progress: Show TensorRT's build phases as progress bars on the terminal.
        verbose_log: A file for the builder's whole log, written whether or not the build succeeds. The cache is not
            asked then, because an engine from it has no log.
        options: The fields of :class:`fxq.backends.trt_options.BuildOptions`: ``workspace_bytes``,
            ``optimization_level``, ``hardware``, ``version_compatible``, ``weights``, ``compute_capabilities``.

    Returns:
        The engine with its kernels, as far as they can be told without running it.

    Raises:
        BuildError: The file is missing or TensorRT refuses it, or an option. The message has every reason that
            TensorRT gives and, where the file was exported by fxq, FX node, module path and source line of the
            nodes at fault.
        FxqError: The engine, the log or the timing cache would replace the ONNX file, or a folder.
        MissingDependencyError: ``tensorrt`` is not installed, or older than 10.12.
    """
    given = None if isinstance(onnx_path, bytes) else onnx_path
    for written in (engine_path, verbose_log, timing_cache):
        if written is not None:
            check_target(written, given)
    source = OnnxSource.read(onnx_path)
    _check_family(source)
    trt = load_library(library, purpose="building an engine")
    chosen = _options(options)
    _check_refit(source, chosen)
    target = Path(engine_path)
    key = _key(trt, source, chosen, profiles)
    held = None if cache is None else EngineCache(cache)
    if held is not None and verbose_log is None:
        record = held.take(key, target)
        if record is not None:
            return Engine.of(target, record)
    job = _Job(trt, source, chosen, None if timing_cache is None else Path(timing_cache), profiles)
    with _one_build, capturing() as log:
        try:
            plan, ranges, seconds = job.run(log, progress=progress)
        finally:
            if verbose_log is not None:
                write_whole(verbose_log, log.text().encode())
    write_whole(target, plan)
    kernels = kernels_from_log(text for _, text in log.messages) or inspect_engine(trt, target)
    here = this_platform()
    record = BuildRecord(
        library=trt.__name__,
        version=trt.__version__,
        fxq=fxq_version(),
        system=here.system,
        device=here.device,
        capability=here.capability,
        onnx_sha256=source.digest(),
        engine_sha256=sha256(target),
        key=key,
        options=chosen.as_dict(),
        profiles={name: [list(shape) for shape in shapes] for name, shapes in ranges.items()},
        build_seconds=seconds,
        kernels=kernels,
    )
    record.write(target)
    if held is not None:
        held.keep(target, record)
    return Engine.of(target, record)


def _options(given: dict[str, Any]) -> BuildOptions:
    unknown = sorted(set(given) - set(BuildOptions.__dataclass_fields__))
    if unknown:
        raise BuildError(
            f"there is no build option {', '.join(unknown)}",
            hint=f"there are {', '.join(BuildOptions.__dataclass_fields__)}",
        )
    return BuildOptions(**given)


def _check_family(source: OnnxSource) -> None:
    """A file that was quantized by another backend's rules says so: TensorRT takes uint8 for int8, without a word."""
    refused = not_for_tensorrt(source.name, source.metadata())
    if refused is not None and source.quantized:
        raise BuildError(refused[0], hint=refused[1])


def _check_refit(source: OnnxSource, options: BuildOptions) -> None:
    """R30: what a refit may change, TensorRT may not rely on, and equal scales are what Q/DQ fusions rely on."""
    if options.weights != "refittable" or not source.quantized:
        return
    raise BuildError(
        f"{source.name} has Q/DQ, whose scales a refit could change: TensorRT then leaves out every rewrite that "
        "needs equal scales, and the engine falls out of INT8 at concatenations and pools (R30)",
        hint='use weights="stripped": the engine takes back just the weights that it was built with',
    )


def _key(trt: ModuleType, source: OnnxSource, options: BuildOptions, profiles: Profiles | None) -> str:
    """A digest of everything that decides what is built."""
    here: Platform = this_platform()
    facts = {
        "onnx": source.digest(),
        "options": options.as_dict(),
        "profiles": {name: [list(map(int, shape)) for shape in shapes] for name, shapes in (profiles or {}).items()},
        "library": [trt.__name__, trt.__version__],
        "fxq": fxq_version(),
        "platform": asdict(here),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Job:
    """One build."""

    trt: ModuleType
    source: OnnxSource
    options: BuildOptions
    timing_cache: Path | None
    profiles: Profiles | None

    def run(self, log: BuildLog, *, progress: bool) -> tuple[memoryview, Ranges, float]:
        """The serialized engine, the shapes that it takes, and the seconds that the builder took."""
        trt, source = self.trt, self.source
        builder = _make_builder(trt, log)
        network, parser = parse_onnx(trt, builder, source)
        config = configure(trt, builder, self.options, self.timing_cache)
        ranges = self._add_profile(builder, config, network)
        with ExitStack() as stack:
            if progress:
                config.progress_monitor = stack.enter_context(progress_monitor(trt, f"building {source.name}"))
            start = time.perf_counter()
            plan = builder.build_serialized_network(network, config)
            seconds = time.perf_counter() - start
        del parser  # it owns the weights, so it lives until here
        if plan is None:
            raise refusal(source, log.errors(), _next_step(self.options, this_platform()))
        if self.timing_cache is not None:
            write_whole(self.timing_cache, memoryview(config.get_timing_cache().serialize()))
        return memoryview(plan), ranges, seconds

    def _add_profile(self, builder: Any, config: Any, network: Any) -> Ranges:
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        if shapes := [tensor.name for tensor in inputs if _is_shape(self.trt, tensor)]:
            raise BuildError(
                f"the inputs {', '.join(shapes)} are used as shapes, which fxq gives no profile for",
                hint="export the model with shapes that follow from its tensors",
            )
        known = {tensor.name: tuple(tensor.shape) for tensor in inputs}
        ranges = profile_shapes(known, self.profiles, recorded_profiles(self.source.metadata()))
        if not ranges:
            return ranges
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in ranges.items():
            profile.set_shape(name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT does not take the optimization profile {ranges}")
        return ranges


def _next_step(options: BuildOptions, here: Platform) -> str | None:
    """What to do about a refused build whose options ask for more than the ordinary one does."""
    if options.version_compatible:
        return (
            "version_compatible takes TensorRT's lean runtime (libnvinfer_lean) along, which has to be installed "
            "beside the builder; without the option the engine needs this very version"
        )
    if options.weights != "embedded" and here.device is None:
        return f"the builder compiles weights={options.weights!r} for the GPU at hand, and there is none: build there"
    return None


def _make_builder(trt: ModuleType, log: BuildLog) -> Any:
    try:
        return trt.Builder(tensorrt_logger(trt))
    except TypeError as error:  # how the bindings say that the library returned no builder
        raise BuildError(
            "\n".join(["TensorRT has no builder here:", *(f"  - {line}" for line in log.errors())]),
            hint="TensorRT's builder needs an NVIDIA GPU and its driver",
        ) from error


def _is_shape(trt: ModuleType, tensor: Any) -> bool:
    """Whether an input's values are read as a shape, which can only be of integers and of rank 0 or 1."""
    integers = tensor.dtype in {trt.DataType.INT32, trt.DataType.INT64}
    return integers and len(tensor.shape) <= 1 and bool(tensor.is_shape_tensor)
