"""A built TensorRT engine: what is in it, and running it on a GPU."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import EngineError
from ..tables import readable
from .latency import Latency, Timings, measure
from .trt_api import Library, load_library, this_platform
from .trt_kernels import LayerInfo
from .trt_loading import give_weights, load_engine, require_file
from .trt_record import BuildRecord
from .trt_session import Inputs, Session

__all__ = ["Engine", "benchmark"]

_LOG: Final = logging.getLogger(__name__)
_LISTED: Final = 8
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
        record: How it was built; None for an engine of another tool.
        weights_from: The ONNX file from which an engine that was built without weights takes them back.
    """

    path: Path
    nbytes: int
    tensorrt_version: str
    kernels: tuple[LayerInfo, ...] | None = field(default=None, repr=False)
    build_seconds: float = 0.0
    record: BuildRecord | None = field(default=None, repr=False)
    weights_from: Path | None = field(default=None, repr=False)

    @classmethod
    def load(cls, path: str | PathLike[str], *, weights_from: str | PathLike[str] | None = None) -> Engine:
        """An engine file from here or elsewhere, with what its record says. Nothing of it is run or loaded yet.

        An engine holds code: run those only whose origin you trust.

        Args:
            path: The engine file; its record, ``<file>.json``, lies beside it where fxq built it.
            weights_from: For an engine with ``weights="stripped"``: the ONNX file that it was built from.

        Raises:
            EngineError: There is no such file, or its record is unreadable or belongs to another engine.
        """
        file = Path(path)
        require_file(file)
        record = BuildRecord.read(file)
        source = None if weights_from is None else Path(weights_from)
        if record is None:
            return cls(file, file.stat().st_size, "unknown", weights_from=source)
        return cls.of(file, record, weights_from=source)

    @classmethod
    def of(cls, path: Path, record: BuildRecord, *, weights_from: Path | None = None) -> Engine:
        """An engine file that a record speaks of."""
        size, seconds = path.stat().st_size, record.build_seconds
        return cls(path, size, record.version, record.kernels, seconds, record, weights_from)

    def mismatches(self) -> list[str]:
        """Why the engine cannot run here, by its record; empty if nothing speaks against it, or nothing is known.

        Raises:
            MissingDependencyError: The library that would run it is not installed.
        """
        trt = self._library()
        if self.record is None:
            return []
        return self.record.mismatches(this_platform(), trt.__name__, trt.__version__)

    def _library(self) -> ModuleType:
        known: dict[str, Library] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx"}
        wanted = None if self.record is None else known.get(self.record.library)
        return load_library(wanted, purpose="running an engine")

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
        library = "TensorRT-RTX" if self.record and self.record.library == "tensorrt_rtx" else "TensorRT"
        head = f"{self.path.name}: {readable(self.nbytes)}, {library} {self.tensorrt_version}"
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
            + (readable(bytes_moved) if bytes_moved is not None else "depends on the batch (dynamic shapes)"),
        ]
        wide = [kernel for kernel in self.weighted_kernels if not kernel.reads_int8]
        lines += [f"  not INT8: {k.name} from {', '.join(k.onnx_nodes) or '?'}" for k in wide[:_LISTED]]
        if len(wide) > _LISTED:
            lines.append(f"  not INT8: {len(wide) - _LISTED} more")
        return "\n".join(lines)

    def run(self, inputs: Inputs, *, cuda_graph: bool = False) -> dict[str, Tensor]:
        """Run the engine once on the current CUDA device.

        It works on a stream of its own, after what the current torch stream has been given and before what that is
        given next, so results can be used as those of any torch call.

        Args:
            inputs: One tensor, several in the engine's order, or a mapping from input name to tensor. Tensors on the
                GPU are read where they lie, others are copied there; dtypes must be the engine's and shapes within its
                optimization profile.
            cuda_graph: Replay a CUDA graph, which is recorded on the first run of each combination of shapes. It saves
                the launches of the kernels, which is what small engines spend their time on, for a copy of inputs and
                outputs.

        Returns:
            Output name to tensor, in the engine's order, on the GPU. As for any CUDA operation the work is
            queued on the stream when this returns.

        Raises:
            EngineError: No GPU; an engine that was not built for this library or GPU, or that cannot be loaded; or
                inputs that do not fit.
            MissingDependencyError: ``tensorrt`` is not installed.
        """
        return self._session.run(inputs, cuda_graph=cuda_graph)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs in the engine's order. The engine is loaded for that; errors as for :meth:`run`."""
        return tuple(self._session.inputs)

    def example_inputs(
        self, batch: int | None = None, shapes: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Tensor]:
        """Random inputs on the GPU, of the shapes that the engine is tuned for: normal floats, zeros for all else.

        Args:
            batch: Another size of a first dimension that is dynamic.
            shapes: Other shapes of some inputs, by name.

        Raises:
            EngineError: There is no such input, or as for :meth:`run`.
        """
        return self._session.example_inputs(batch, shapes)

    def placed(self, inputs: Inputs) -> dict[str, Tensor]:
        """Inputs by name on the GPU, so that :meth:`benchmark` times no copies.

        Raises:
            EngineError: As for :meth:`run`.
        """
        return self._session.placed(inputs)

    def benchmark(
        self,
        inputs: Inputs | None = None,
        *,
        warmup: int = 50,
        iterations: int = 200,
        cuda_graph: bool = False,
    ) -> Latency:
        """Time single inferences by CUDA events, queued one after the other.

        Args:
            inputs: As for :meth:`run`; put them on the GPU, or their copies are timed too. None: random ones of the
                shapes that the engine is tuned for.
            warmup: Inferences that do not count.
            iterations: Inferences that do.
            cuda_graph: As for :meth:`run`.

        Raises:
            EngineError: As for :meth:`run`.
        """
        return benchmark(
            {"engine": self}, inputs, warmup=warmup, iterations=iterations, cuda_graph=cuda_graph
        ).latencies["engine"]

    @cached_property
    def _session(self) -> Session:
        if not torch.cuda.is_available():
            raise EngineError(
                f"{self.path} cannot be run here: torch sees no CUDA GPU",
                hint="run it on a machine with an NVIDIA GPU and a CUDA build of torch",
            )
        if mismatches := self.mismatches():
            raise EngineError(
                f"{self.path} cannot be run here: {'; '.join(mismatches)}. It is {self.record}",
                hint="build it again here from its ONNX file",
            )
        _LOG.info("loading %s: %s", self.path, self.record or "nothing is known of how it was built")
        trt = self._library()
        engine = load_engine(trt, self.path, host_code=bool(self._option("version_compatible")))
        if self._option("weights") == "stripped":
            assert self.record is not None
            give_weights(trt, engine, self.path, self.record, self.weights_from)
        device = torch.device("cuda", torch.cuda.current_device())
        return Session(trt, engine, device, str(self.path))

    def _option(self, name: str) -> Any:
        return None if self.record is None else self.record.options.get(name)


def benchmark(
    engines: Mapping[str, Engine],
    inputs: Inputs | None = None,
    *,
    warmup: int = 50,
    iterations: int = 200,
    cuda_graph: bool = False,
) -> Timings:
    """Time engines beside each other, in turns: INT8, FP16 and FP32 builds of one model, say.

    Args:
        engines: By any names.
        inputs: For all of them, as for :meth:`Engine.run`; None takes random ones of the shapes that the first is
            tuned for.
        warmup: Inferences of each that do not count.
        iterations: Inferences of each that do.
        cuda_graph: As for :meth:`Engine.run`.

    Raises:
        EngineError: There is no engine, or as for :meth:`Engine.run`.
    """
    if not engines:
        raise EngineError("there is no engine to time", hint='give {"int8": engine, ...}')
    sessions = {name: engine._session for name, engine in engines.items()}
    first = next(iter(sessions.values()))
    fed = first.example_inputs() if inputs is None else inputs
    tensors = [fed] if isinstance(fed, Tensor) else list(fed.values() if isinstance(fed, Mapping) else fed)
    sizes = {tensor.shape[0] for tensor in tensors if tensor.ndim}
    runs = {name: lambda s=session: s.run(fed, cuda_graph=cuda_graph) for name, session in sessions.items()}
    batch = sizes.pop() if len(sizes) == 1 else None
    return Timings(measure(runs, warmup=warmup, iterations=iterations, device=first.device, batch=batch))
