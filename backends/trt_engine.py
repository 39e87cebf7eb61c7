"""A built TensorRT engine: what is in it, and running it on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineError
from ..optional import require
from .trt_callbacks import capturing, tensorrt_logger
from .trt_kernels import LayerInfo, kernels_from_inspector

__all__ = ["Engine"]

_LISTED = 8
"""How many kernels a summary names one by one."""


@dataclass(frozen=True)
class Engine:
    """An engine file and what is known about it. Nothing is loaded before it is run.

    Attributes:
        path: The engine file.
        nbytes: Its size in bytes.
        tensorrt_version: Version of the TensorRT Python module that built it.
        kernels: Its kernels in the order in which they run, or None where the builder did not list them and
            no GPU could load the engine to ask it.
        build_seconds: Wall time of the build, without parsing.
    """

    path: Path
    nbytes: int
    tensorrt_version: str
    kernels: tuple[LayerInfo, ...] | None = field(default=None, repr=False)
    build_seconds: float = 0.0

    @property
    def weighted_kernels(self) -> tuple[LayerInfo, ...]:
        """The kernels that are convolutions or matrix products; none where the kernels are not known."""
        return tuple(kernel for kernel in self.kernels or () if kernel.weighted)

    @property
    def int8_kernels(self) -> tuple[LayerInfo, ...]:
        """The weighted kernels whose activation and weights come in as INT8."""
        return tuple(kernel for kernel in self.weighted_kernels if kernel.reads_int8)

    @property
    def activation_bytes(self) -> int | None:
        """Bytes of activations that one inference reads and writes, summed over the kernels.

        None where a shape is dynamic (the sizes then depend on the batch: build a file of static shape to
        have the figure) or the kernels are not known. Padding of vectorized formats is not counted.
        """
        if self.kernels is None:
            return None
        sizes = [kernel.activation_bytes for kernel in self.kernels]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def summary(self) -> str:
        """Kernels, the share of weighted ones that read INT8, and bytes moved, as text of a few lines."""
        head = f"{self.path.name}: {_readable(self.nbytes)}, TensorRT {self.tensorrt_version}"
        if self.build_seconds:
            head += f", built in {self.build_seconds:.1f} s"
        if self.kernels is None:
            return f"{head}\n  kernels: not listed by this builder, and no GPU here could load the engine"
        kinds = Counter(kernel.kind for kernel in self.kernels).most_common()
        bytes_moved = self.activation_bytes
        lines = [
            head,
            f"  kernels: {len(self.kernels)} ({', '.join(f'{n} {kind}' for kind, n in kinds)})",
            f"  weighted kernels reading INT8: {len(self.int8_kernels)} of {len(self.weighted_kernels)}",
            "  activations moved: "
            + (_readable(bytes_moved) if bytes_moved is not None else "depends on the batch (dynamic shapes)"),
        ]
        wide = [kernel for kernel in self.weighted_kernels if not kernel.reads_int8]
        lines += [f"  not INT8: {k.name} from {', '.join(k.onnx_nodes) or '?'}" for k in wide[:_LISTED]]
        if len(wide) > _LISTED:
            lines.append(f"  not INT8: {len(wide) - _LISTED} more")
        return "\n".join(lines)

    def run(self, inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the engine once on the current CUDA device and torch stream.

        Args:
            inputs: One tensor, several in the engine's order, or a mapping from input name to tensor. Tensors
                on another device are copied; dtypes must be the engine's and shapes within its optimization
                profile.

        Returns:
            Output name to tensor, in the engine's order, on the GPU. As for any CUDA operation the work is
            queued on the stream when this returns.

        Raises:
            EngineError: No GPU, an engine that this GPU or TensorRT cannot load, or inputs that do not fit.
            MissingDependencyError: ``tensorrt`` is not installed.
        """
        return self._session.run(inputs)

    @cached_property
    def _session(self) -> _Session:
        return _Session(self.path)


class _Session:
    """A deserialized engine with its execution context. It holds GPU memory as long as it lives."""

    def __init__(self, path: Path) -> None:
        if not torch.cuda.is_available():
            raise EngineError(
                f"{path} cannot be run here: torch sees no CUDA GPU",
                hint="run it on a machine with an NVIDIA GPU and a CUDA build of torch",
            )
        self.trt = require("tensorrt", extra="trt", purpose="running an engine")
        self.path = path
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.engine = load_engine(self.trt, path)
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise EngineError(f"{path}: no execution context", hint="the GPU's memory may be exhausted")
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self.inputs = [name for name in names if self._mode(name) == self.trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if self._mode(name) == self.trt.TensorIOMode.OUTPUT]

    def run(self, inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.cuda.device(self.device):
            # Held until the work is queued. torch's allocator reuses memory in stream order, so that is long
            # enough.
            fed = {name: self._bind_input(name, tensor) for name, tensor in self._by_name(inputs).items()}
            missing = self.context.infer_shapes()
            if missing:
                raise EngineError(f"{self.path}: the shapes of {', '.join(missing)} are not determined by the inputs")
            outputs = {name: self._bind_output(name) for name in self.outputs}
            with capturing() as log:
                queued = self.context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream)
            if not queued:
                raise EngineError(f"{self.path} could not be run: {'; '.join(log.errors()) or 'no reason given'}")
            del fed
        return outputs

    def _by_name(self, inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(inputs, Mapping):
            named = dict(inputs)
        else:
            tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs)
            if len(tensors) != len(self.inputs):
                raise EngineError(f"{self.path} takes {len(self.inputs)} inputs and got {len(tensors)}")
            named = dict(zip(self.inputs, tensors, strict=True))
        if set(named) != set(self.inputs):
            raise EngineError(f"{self.path} takes the inputs {self.inputs} and got {sorted(named)}")
        return named

    def _bind_input(self, name: str, tensor: Tensor) -> Tensor:
        dtype = self._dtype(name)
        if tensor.dtype != dtype:
            raise EngineError(f"{self.path}: input {name} is {dtype} and got {tensor.dtype}")
        tensor = tensor.detach().to(self._place(name)).contiguous()
        with capturing() as log:
            fits = self.context.set_input_shape(name, tuple(tensor.shape))
        if not fits:
            low, _, high = self.engine.get_tensor_profile_shape(name, 0)
            raise EngineError(
                f"{self.path}: input {name} of shape {tuple(tensor.shape)} is outside the engine's profile, "
                f"{tuple(low)} to {tuple(high)}: {'; '.join(log.errors())}",
                hint="build the engine with a profile that covers this shape",
            )
        self.context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _bind_output(self, name: str) -> Tensor:
        shape = tuple(self.context.get_tensor_shape(name))
        if any(dim < 0 for dim in shape):
            raise EngineError(f"{self.path}: the shape of output {name}, {shape}, depends on the data, not on shapes")
        tensor = torch.empty(shape, dtype=self._dtype(name), device=self._place(name))
        self.context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _mode(self, name: str) -> Any:
        return self.engine.get_tensor_mode(name)

    def _place(self, name: str) -> torch.device:
        """Shape tensors live in host memory, all others on the GPU."""
        on_host = self.engine.get_tensor_location(name) == self.trt.TensorLocation.HOST
        return torch.device("cpu") if on_host else self.device

    def _dtype(self, name: str) -> torch.dtype:
        word = self.engine.get_tensor_dtype(name).name
        if word not in _TORCH_DTYPES:
            raise EngineError(f"{self.path}: tensor {name} has TensorRT's type {word}, which torch has not")
        return _TORCH_DTYPES[word]


# TensorRT's DataType by name -> torch's.
_TORCH_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


def load_engine(trt: ModuleType, path: Path) -> Any:
    """Deserialize an engine file.

    Raises:
        EngineError: The file is missing, or TensorRT cannot load it on this machine; the message has its
            reasons.
    """
    if not path.is_file():
        raise EngineError(f"there is no engine file {path}", hint="build it first: fxq.build(onnx_path, engine_path)")
    with capturing() as log:
        runtime = trt.Runtime(tensorrt_logger(trt))
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


def _readable(size: float) -> str:
    """Bytes with a decimal unit, as in ``1.08 MB``."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
