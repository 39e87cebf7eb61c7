"""An engine and execution context with TensorRT's methods that run a torch function on raw addresses.

What binds buffers, streams and graphs cannot tell it from TensorRT's: it is given addresses and a stream's handle,
and nothing else, and works on that stream. It runs on CUDA, where it can be captured, and on the CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

TRT = SimpleNamespace(
    TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
    TensorLocation=SimpleNamespace(DEVICE="device", HOST="host"),
)
"""The members of TensorRT's module that a session asks for."""

_WORDS = {torch.float32: "FLOAT", torch.float16: "HALF", torch.int64: "INT64", torch.bfloat16: "BF16"}
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}


class TorchEngine:
    """An engine that computes ``function(**inputs)``.

    Args:
        function: From input tensors by name to output tensors by name.
        inputs: Name to dtype and smallest, tuned-for and largest shape.
        outputs: Name to dtype.
        device: Where it runs.
    """

    def __init__(
        self,
        function: Callable[..., Mapping[str, Tensor]],
        inputs: Mapping[str, tuple[torch.dtype, tuple[int, ...], tuple[int, ...], tuple[int, ...]]],
        outputs: Mapping[str, torch.dtype],
        device: str = "cpu",
    ) -> None:
        self.function, self.inputs, self.outputs, self.device = function, inputs, outputs, torch.device(device)
        self.names = [*inputs, *outputs]
        self.num_io_tensors = len(self.names)
        self.contexts: list[TorchContext] = []

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_WORDS[self.dtype(name)])

    def get_tensor_location(self, _name: str) -> str:
        return "device"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        low, high = self.inputs[name][1], self.inputs[name][3]
        return tuple(a if a == b else -1 for a, b in zip(low, high, strict=True))

    def get_tensor_profile_shape(self, name: str, _profile: int) -> list[tuple[int, ...]]:
        return list(self.inputs[name][1:])

    def create_execution_context(self) -> TorchContext:
        self.contexts.append(TorchContext(self))
        return self.contexts[-1]

    def dtype(self, name: str) -> torch.dtype:
        return self.inputs[name][0] if name in self.inputs else self.outputs[name]


class TorchContext:
    """Its execution context; ``calls`` holds the streams of the runs."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.calls: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        _, low, _, high = self.engine.inputs[name]
        self.shapes[name] = shape
        return len(low) == len(shape) and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        made = {n: torch.empty(self.shapes[n], dtype=self.engine.dtype(n), device="meta") for n in self.engine.inputs}
        return tuple(self.engine.function(**made)[name].shape)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        self.calls.append(stream)
        if self.engine.device.type != "cuda":
            self._compute()
            return True
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=self.engine.device)):
            self._compute()
        return True

    def _compute(self) -> None:
        given = {name: self._at(name, self.shapes[name]) for name in self.engine.inputs}
        for name, result in self.engine.function(**given).items():
            self._at(name, tuple(result.shape)).copy_(result)

    def _at(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The memory behind an address as a tensor; nothing is copied."""
        dtype, address = self.engine.dtype(name), self.addresses[name]
        if self.engine.device.type == "cuda":
            held = SimpleNamespace(
                __cuda_array_interface__={
                    "shape": shape,
                    "typestr": np.dtype(_NUMPY[dtype]).str,
                    "data": (address, False),
                    "version": 3,
                    "strides": None,
                }
            )
            return torch.as_tensor(held, device=self.engine.device)
        count = int(np.prod(shape)) * dtype.itemsize
        raw = (ctypes.c_char * count).from_address(address)
        return torch.frombuffer(raw, dtype=dtype).reshape(shape)
