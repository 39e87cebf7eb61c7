"""What ``fxq run`` runs, and what it sets beside it: ONNX files, engines, PyTorch models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..batches import model_inputs
from ..deployment import load_engine
from ..onnx_comparison import FileComparison, compare_onnx
from .entry_points import load_model

if TYPE_CHECKING:
    from ..backends.latency import Timings

__all__ = ["EngineRunner", "FileRunner", "Reference", "Runner", "is_engine", "runner_of"]

ENGINE_FILES: Final = frozenset({".engine", ".plan", ".rtx", ".trt"})
"""Endings of engine files; a file with a record beside it is an engine too."""


class Runner(Protocol):
    """A file that can be run."""

    name: str

    @property
    def input_names(self) -> Sequence[str]:
        """In their order."""
        ...

    def describe(self) -> str:
        """What it is, before it runs."""
        ...

    def example_inputs(self, batch: int | None, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Random inputs; `batch` and `shapes` say how large where dimensions are dynamic."""
        ...

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name."""
        ...

    def timed(self, inputs: Mapping[str, Tensor], beside: Runner | None, *, warmup: int, iterations: int) -> str:
        """Its latency as text; in turns with another one of its kind."""
        ...


class FileRunner:
    """An ONNX file in ONNX Runtime."""

    def __init__(self, path: Path, *, threads: int | None = None, optimize: bool = True) -> None:
        from ..backends.onnxrt import Session

        self.path, self.name = path, path.name
        self.session = Session(path, threads=threads, optimize=optimize)
        self.input_names = self.session.input_names

    def describe(self) -> str:
        """Library, and types of the inputs."""
        import onnxruntime

        types = {name: str(dtype).removeprefix("torch.") for name, dtype in self.session.input_dtypes.items()}
        takes = ", ".join(f"{name} {types.get(name, '?')}" for name in self.input_names)
        return f"{self.name}: ONNX Runtime {onnxruntime.__version__} on the CPU; takes {takes}"

    def example_inputs(self, batch: int | None, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Of the file's shapes; one sample where the batch is dynamic and no other is given."""
        return self.session.random_inputs(batch or 1, shapes)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the CPU."""
        return self.session.run(self._cast(inputs))

    def _cast(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Floats in the types that the file takes."""
        dtypes = self.session.input_dtypes
        return {
            name: tensor.to(dtypes.get(name, tensor.dtype)) if tensor.is_floating_point() else tensor
            for name, tensor in inputs.items()
        }

    def timed(self, inputs: Mapping[str, Tensor], beside: Runner | None, *, warmup: int, iterations: int) -> str:
        """By the clock."""
        from ..backends.onnxrt import benchmark

        sessions = {self.name: self.session}
        if isinstance(beside, FileRunner):
            sessions[_apart(beside, self.name)] = beside.session
        timings = benchmark(sessions, self._cast(inputs), warmup=warmup, iterations=iterations)
        return _timings(timings, self.name)


class EngineRunner:
    """A TensorRT engine."""

    def __init__(self, path: Path, *, cuda_graph: bool = False, weights_from: Path | None = None) -> None:
        self.path, self.name, self.cuda_graph = path, path.name, cuda_graph
        self.engine = load_engine(path, weights_from=weights_from)

    @property
    def input_names(self) -> Sequence[str]:
        """Of the engine, which is loaded for that."""
        return self.engine.input_names

    def describe(self) -> str:
        """What it was built with, by its record; nothing of it is loaded yet."""
        record = self.engine.record
        if record is None:
            return f"{self.name}: nothing is known of how it was built; TensorRT says whether it runs here"
        return "\n".join([f"{self.name}: built with {record.text()}", *self.engine.summary().splitlines()[1:]])

    def example_inputs(self, batch: int | None, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Of the shapes that the engine is tuned for, where no others are given."""
        return self.engine.example_inputs(batch, shapes)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the GPU."""
        return self.engine.run(inputs, cuda_graph=self.cuda_graph)

    def timed(self, inputs: Mapping[str, Tensor], beside: Runner | None, *, warmup: int, iterations: int) -> str:
        """By CUDA events, on inputs that are on the GPU."""
        from ..backends.trt_engine import benchmark

        engines = {self.name: self.engine}
        if isinstance(beside, EngineRunner):
            engines[_apart(beside, self.name)] = beside.engine
        placed = self.engine.placed(inputs)
        timings = benchmark(engines, placed, warmup=warmup, iterations=iterations, cuda_graph=self.cuda_graph)
        return _timings(timings, self.name)


def is_engine(path: Path) -> bool:
    """Whether a file is an engine, by its ending or a record beside it."""
    from ..backends.trt_record import record_path

    return path.suffix in ENGINE_FILES or (path.is_file() and record_path(path).is_file())


@dataclass(frozen=True)
class Reference:
    """What outputs should be.

    Attributes:
        runner: A file or an engine; None for a model.
        model: A PyTorch model; None for a file.
    """

    runner: Runner | None = None
    model: nn.Module | None = None

    @classmethod
    def of(cls, text: str, weights: Path | None, beside: Runner) -> Reference:
        """What a command line names.

        Args:
            text: ``module:name`` of a model, or a file, which runs in the way of `beside` where it is of its kind.
            weights: The model's state dict.
            beside: What is compared with it.

        Raises:
            FxqError: There is no such file or model.
        """
        path = Path(text)
        if is_engine(path):
            graphs = isinstance(beside, EngineRunner) and beside.cuda_graph
            return cls(EngineRunner(path, cuda_graph=graphs))
        if path.suffix == ".onnx":
            if isinstance(beside, FileRunner):
                held = beside.session
                return cls(FileRunner(path, threads=held.threads, optimize=held.optimize))
            return cls(FileRunner(path, optimize=False))
        return cls(model=load_model(text, weights))

    def compare(self, runner: Runner, given: Mapping[str, Tensor], results: Mapping[str, Tensor]) -> FileComparison:
        """Layer by layer where `runner` is an ONNX file and this is one or a model; else the outputs.

        Args:
            runner: What was run.
            given: The inputs that it had.
            results: The outputs that it gave.
        """
        if isinstance(runner, FileRunner):
            if self.model is not None:
                return compare_onnx(runner.path, self.model, dict(given))
            if isinstance(self.runner, FileRunner):
                return compare_onnx(runner.path, self.runner.path, dict(given))
        return FileComparison.of_outputs(results, self._outputs(given))

    def _outputs(self, given: Mapping[str, Tensor]) -> list[Tensor]:
        if self.runner is not None:
            return list(self.runner.run(given).values())
        assert self.model is not None
        args, kwargs = model_inputs(self.model, tuple(tensor.cpu() for tensor in given.values()))
        with torch.inference_mode():
            found = self.model(*args, **kwargs)
        return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def runner_of(
    path: Path, *, threads: int | None, optimize: bool, cuda_graph: bool, weights_from: Path | None
) -> FileRunner | EngineRunner:
    """What runs a file.

    Args:
        path: An ONNX file or an engine.
        threads: Of ONNX Runtime, inside one operation.
        optimize: Whether ONNX Runtime may rewrite the file.
        cuda_graph: Whether the engine is replayed as a CUDA graph.
        weights_from: The ONNX file of an engine without weights.

    Raises:
        EngineError: There is no such file, or it cannot be run.
    """
    if is_engine(path):
        return EngineRunner(path, cuda_graph=cuda_graph, weights_from=weights_from)
    return FileRunner(path, threads=threads, optimize=optimize)


def _apart(other: Runner, name: str) -> str:
    """A name for what is timed beside something of the same name."""
    return other.name if other.name != name else f"{other.name} (reference)"


def _timings(timings: Timings, name: str) -> str:
    """The table, or one line where only one was timed."""
    return str(timings) if len(timings.latencies) > 1 else f"latency: {timings.latencies[name]}"
