"""Loading an engine file: deserialized, asked for its kernels, given back its weights."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import EngineError
from .trt_callbacks import capturing, tensorrt_logger
from .trt_kernels import LayerInfo, kernels_from_inspector
from .trt_parse import OnnxSource
from .trt_record import BuildRecord

__all__ = ["give_weights", "inspect_engine", "load_engine", "require_file"]


def require_file(path: Path) -> None:
    """Raise if there is no engine file.

    Raises:
        EngineError: There is none.
    """
    if not path.is_file():
        raise EngineError(f"there is no engine file {path}", hint="build it first: fxq.build(onnx_path, engine_path)")


def load_engine(trt: ModuleType, path: Path, *, host_code: bool = False) -> Any:
    """Deserialize an engine file.

    Args:
        trt: TensorRT's module.
        path: The file.
        host_code: Let the engine bring code for the CPU, as version-compatible ones do.

    Raises:
        EngineError: The file is missing, or TensorRT cannot load it on this machine; the message has its
            reasons.
    """
    require_file(path)
    with capturing() as log:
        runtime = trt.Runtime(tensorrt_logger(trt))
        if host_code:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise EngineError(
            f"TensorRT {trt.__version__} cannot load {path}: {'; '.join(log.errors()) or 'no reason given'}",
            hint="an engine runs on the kind of GPU and with the TensorRT version that it was built with",
        )
    return engine


def inspect_engine(trt: ModuleType, path: Path) -> tuple[LayerInfo, ...] | None:
    """The kernels of an engine file by TensorRT's inspector, or None where no GPU here can load it."""
    if not torch.cuda.is_available():
        return None
    try:
        engine = load_engine(trt, path)
    except EngineError:
        return None
    return kernels_from_inspector(
        engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    )


def give_weights(trt: ModuleType, engine: Any, path: Path, record: BuildRecord, weights_from: Path | None) -> None:
    """Put the weights of the ONNX file into an engine that was built without.

    Args:
        trt: TensorRT's module.
        engine: The deserialized engine.
        path: Its file, for messages.
        record: How it was built.
        weights_from: The ONNX file.

    Raises:
        EngineError: There is no such file, it is another one, or the engine does not take its weights.
    """
    if weights_from is None or not weights_from.is_file():
        raise EngineError(
            f"{path} was built without its weights",
            hint="name the ONNX file that it was built from: Engine.load(path, weights_from=onnx_path)",
        )
    if OnnxSource.read(weights_from).digest() != record.onnx_sha256:
        raise EngineError(
            f"{weights_from} is not the file that {path} was built from: its weights may differ",
            hint="build the engine again from this file",
        )
    with capturing() as log:
        refitter = trt.Refitter(engine, tensorrt_logger(trt))
        parser = trt.OnnxParserRefitter(refitter, tensorrt_logger(trt))
        done = parser.refit_from_file(str(weights_from)) and refitter.refit_cuda_engine()
    if not done:
        raise EngineError(f"{path} does not take the weights back: {'; '.join(log.errors()) or 'no reason'}")
