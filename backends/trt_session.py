"""Running a deserialized engine with torch tensors, on a stream of its own, by CUDA graphs where asked.

Everything here goes through the methods of TensorRT's engine and execution context, so whatever has these methods
can be run: the tests run torch functions through it, on a GPU where there is one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import EngineError
from .trt_callbacks import capturing

__all__ = ["TORCH_DTYPES", "Inputs", "Session"]

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

TORCH_DTYPES: Final = {
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
"""TensorRT's DataType by name, as torch's."""

_GRAPHS: Final = 8
"""Captured graphs that are kept, one for each combination of input shapes; each holds its own buffers."""


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph with the tensors that it reads and writes, and the context whose memory it uses."""

    graph: Any
    context: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Session:
    """A deserialized engine, its execution context and a stream. It holds device memory as long as it lives.

    One run at a time: threads wait for each other.

    Args:
        trt: TensorRT's module.
        engine: An ``ICudaEngine``.
        device: Where it runs.
        name: What messages call it.

    Attributes:
        inputs: Names of the inputs in the engine's order.
        outputs: Names of the outputs.

    Raises:
        EngineError: TensorRT gives no execution context.
    """

    def __init__(self, trt: ModuleType, engine: Any, device: torch.device, name: str) -> None:
        self.trt, self.engine, self.device, self.name = trt, engine, device, name
        self.context = self._new_context()
        self.stream = _stream(device) if device.type == "cuda" else None
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        self._graphs: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, inputs: Inputs, *, cuda_graph: bool = False) -> dict[str, Tensor]:
        """Queue one inference; see :meth:`fxq.backends.trt_engine.Engine.run`."""
        with self._lock, torch.cuda.device(self.device) if self.stream else nullcontext():
            # Made on the caller's stream, which waits for ours below: so torch's allocator, which hands memory on in
            # stream order, cannot give it away too early.
            given = self.placed(inputs)
            if cuda_graph:
                return self._replay(given)
            outputs = self._bind(self.context, given)
            with self._own_stream():
                self._enqueue(self.context)
            return outputs

    def placed(self, inputs: Inputs) -> dict[str, Tensor]:
        """Inputs by name, where the engine reads them; those that lie there already as they are.

        Raises:
            EngineError: They are not the engine's inputs, or of other types.
        """
        return {name: self._fitted(name, tensor) for name, tensor in self._by_name(inputs).items()}

    def example_inputs(
        self, batch: int | None = None, shapes: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Tensor]:
        """Random inputs: normal floats, zeros for all else.

        Args:
            batch: The size of a first dimension that is dynamic; None for the one that the engine is tuned for.
            shapes: Whole shapes of some inputs, by name; the others get those that the engine is tuned for.

        Raises:
            EngineError: There is no such input.
        """
        wanted = dict(shapes or {})
        if unknown := sorted(set(wanted) - set(self.inputs)):
            raise EngineError(f"{self.name} has no input {', '.join(unknown)}, but {', '.join(self.inputs)}")
        return {name: self._example(name, wanted.get(name) or self._tuned(name, batch)) for name in self.inputs}

    def _tuned(self, name: str, batch: int | None) -> tuple[int, ...]:
        shape = tuple(self.engine.get_tensor_shape(name))
        if not any(dim < 0 for dim in shape):
            return shape
        tuned = tuple(self.engine.get_tensor_profile_shape(name, 0)[1])
        return (batch, *tuned[1:]) if batch is not None and shape[0] < 0 else tuned

    def _example(self, name: str, shape: Sequence[int]) -> Tensor:
        dtype = self._dtype(name)
        made = torch.zeros(tuple(shape), dtype=dtype, device=self._place(name))
        return made.normal_() if dtype in (torch.float32, torch.float16, torch.bfloat16) else made

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Work inside the block goes to the session's stream, after what the caller queued and before what follows."""
        if self.stream is None:
            yield
            return
        callers = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(callers)
        with torch.cuda.stream(self.stream):
            yield
        callers.wait_stream(self.stream)

    def _replay(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.stream is None:
            raise EngineError(f"{self.name}: there are no CUDA graphs on {self.device}", hint="use cuda_graph=False")
        key = tuple((name, tuple(tensor.shape)) for name, tensor in given.items())
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._graphs[key] = self._capture(given)
            while len(self._graphs) > _GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        with self._own_stream():
            for name, tensor in given.items():
                captured.inputs[name].copy_(tensor)
            captured.graph.replay()
        # The next replay writes the same buffers.
        return {name: tensor.clone() for name, tensor in captured.outputs.items()}

    def _capture(self, given: Mapping[str, Tensor]) -> _Captured:
        """Record one inference at the shapes of `given`, in a context of its own, which no other shape changes."""
        context = self._new_context()
        inputs = {name: tensor.clone() for name, tensor in given.items()}
        outputs = self._bind(context, inputs)
        with self._own_stream():
            self._enqueue(context)  # the first run after new shapes does work that a capture must not hold
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._enqueue(context)
        return _Captured(graph, context, inputs, outputs)

    def _bind(self, context: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tell a context where its inputs are, and make its outputs."""
        for name, tensor in given.items():
            with capturing() as log:
                fits = context.set_input_shape(name, tuple(tensor.shape))
            if not fits:
                raise self._outside(name, tensor, log.errors())
            context.set_tensor_address(name, tensor.data_ptr())
        missing = context.infer_shapes()
        if missing:
            raise EngineError(f"{self.name}: the shapes of {', '.join(missing)} are not determined by the inputs")
        return {name: self._output(context, name) for name in self.outputs}

    def _output(self, context: Any, name: str) -> Tensor:
        shape = tuple(context.get_tensor_shape(name))
        if any(dim < 0 for dim in shape):
            raise EngineError(f"{self.name}: the shape of output {name}, {shape}, depends on the data, not on shapes")
        tensor = torch.empty(shape, dtype=self._dtype(name), device=self._place(name))
        context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _enqueue(self, context: Any) -> None:
        with capturing() as log:
            queued = context.execute_async_v3(self.stream.cuda_stream if self.stream else 0)
        if not queued:
            raise EngineError(f"{self.name} could not be run: {'; '.join(log.errors()) or 'no reason given'}")

    def _by_name(self, inputs: Inputs) -> dict[str, Tensor]:
        if isinstance(inputs, Mapping):
            named = dict(inputs)
        else:
            tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs)
            if len(tensors) != len(self.inputs):
                raise EngineError(f"{self.name} takes {len(self.inputs)} inputs and got {len(tensors)}")
            named = dict(zip(self.inputs, tensors, strict=True))
        if set(named) != set(self.inputs):
            raise EngineError(f"{self.name} takes the inputs {self.inputs} and got {sorted(named)}")
        return {name: named[name] for name in self.inputs}

    def _fitted(self, name: str, tensor: Tensor) -> Tensor:
        """An input as the engine takes it: itself where it lies on the device already."""
        dtype = self._dtype(name)
        if tensor.dtype != dtype:
            raise EngineError(
                f"{self.name}: input {name} is {dtype} and got {tensor.dtype}", hint=f"pass {name}.to({dtype})"
            )
        return tensor.detach().to(self._place(name)).contiguous()

    def _outside(self, name: str, tensor: Tensor, reasons: list[str]) -> EngineError:
        low, _, high = self.engine.get_tensor_profile_shape(name, 0)
        return EngineError(
            f"{self.name}: input {name} of shape {tuple(tensor.shape)} is outside the engine's profile, "
            f"{tuple(low)} to {tuple(high)}: {'; '.join(reasons)}",
            hint="build the engine with a profile that covers this shape",
        )

    def _new_context(self) -> Any:
        context = self.engine.create_execution_context()
        if context is None:
            raise EngineError(f"{self.name}: no execution context", hint="the GPU's memory may be exhausted")
        return context

    def _place(self, name: str) -> torch.device:
        """Shape tensors live in host memory, all others on the device."""
        on_host = self.engine.get_tensor_location(name) == self.trt.TensorLocation.HOST
        return torch.device("cpu") if on_host else self.device

    def _dtype(self, name: str) -> torch.dtype:
        word = self.engine.get_tensor_dtype(name).name
        if word not in TORCH_DTYPES:
            raise EngineError(f"{self.name}: tensor {name} has TensorRT's type {word}, which torch has not")
        return TORCH_DTYPES[word]


def _stream(device: torch.device) -> torch.cuda.Stream:
    cuda: Any = torch.cuda  # torch annotates no Stream.__new__
    stream: torch.cuda.Stream = cuda.Stream(device)
    return stream
