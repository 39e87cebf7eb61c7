"""ONNX Runtime on the CPU: runs a file with torch tensors, whole, value by value, or one value from given
ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, overload

import torch
from torch import Tensor

from ..errors import EngineError
from .latency import Latency, Timings, measure
from .onnx_parts import PartialGraph
from .ort_tensors import from_ort, to_ort
from .trt_profiles import recorded_profiles

if TYPE_CHECKING:
    import onnx

__all__ = ["Inputs", "Session", "benchmark"]

Inputs: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""One tensor, several in the file's order, or all by name."""

_TORCH_DTYPES: Final = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


class Session:
    """An ONNX file that runs on the CPU.

    Example:
        >>> logits = Session("model.onnx").run(images)[0]  # doctest: +SKIP

    Args:
        path: The file; weights beside it are found.
        optimize: Whether ONNX Runtime may fuse and rewrite (default). False runs every node as it stands in
            the file, each Q and DQ included, which is what a comparison with PyTorch needs. Of a float16 Q/DQ file
            biases are never made integers: their scales, products of two, are too small for float16.
        threads: Threads inside one operation; default is one for each core.

    Raises:
        EngineError: There is no such file, or ONNX Runtime cannot run it.
    """

    def __init__(self, path: str | Path, *, optimize: bool = True, threads: int | None = None) -> None:
        self.path = Path(path)
        self.optimize, self.threads = optimize, threads
        if not self.path.is_file():
            raise EngineError(f"there is no file {self.path}", hint="write it with fxq.export")
        self._session = _make_session(os.fspath(self.path), optimize=optimize, threads=threads)
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())
        self._graph: PartialGraph | None = None

    @overload
    def run(self, inputs: Mapping[str, Tensor], /) -> dict[str, Tensor]: ...

    @overload
    def run(self, *inputs: Tensor) -> list[Tensor]: ...

    def run(self, *inputs: Any) -> Any:
        """Run the whole model.

        Args:
            inputs: Tensors in the order of :attr:`input_names`, or one dict of them by name.

        Returns:
            CPU tensors: a list in the order of :attr:`output_names`, or a dict if a dict was given.

        Raises:
            EngineError: Inputs are missing, unknown, or of a shape or type that the model does not take.
        """
        by_name = len(inputs) == 1 and isinstance(inputs[0], Mapping)
        feeds = self._feeds(inputs[0] if by_name else inputs)
        results = _run(self._session, self.output_names, feeds)
        return dict(zip(self.output_names, results, strict=True)) if by_name else results

    def random_inputs(self, batch: int = 1, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, Tensor]:
        """Inputs of the model's shapes and types: normal numbers, zeros for integers.

        Args:
            batch: The size of a first dimension that is dynamic.
            shapes: Whole shapes of some inputs, by name. Other dynamic dimensions take the size that the file is
                tuned for, where fxq exported it with one.

        Raises:
            EngineError: There is no such input; a dimension is dynamic and nobody says how large it is; or the model
                takes a type that torch has not.
        """
        wanted = dict(shapes or {})
        if unknown := sorted(set(wanted) - set(self.input_names)):
            raise EngineError(f"{self.path.name} has no input {', '.join(unknown)}, but {', '.join(self.input_names)}")
        tuned = recorded_profiles(self._session.get_modelmeta().custom_metadata_map)
        found = {}
        for value in self._session.get_inputs():
            shape = wanted.get(value.name) or _sized(value.shape, batch, tuned.get(value.name))
            dtype = _TORCH_DTYPES.get(value.type)
            if dtype is None or shape is None:
                raise EngineError(
                    f"input {value.name} of {self.path.name} is {value.type} {value.shape}: no random input fits",
                    hint="give its shape, or inputs of your own",
                )
            made = torch.randn if dtype.is_floating_point else torch.zeros
            found[value.name] = made(tuple(shape), dtype=dtype)
        return found

    def benchmark(
        self,
        inputs: Inputs | None = None,
        *,
        batch: int = 1,
        warmup: int = 10,
        iterations: int = 100,
    ) -> Latency:
        """Time single inferences by the clock.

        Args:
            inputs: As for :meth:`run`; None takes :meth:`random_inputs`. They are converted once, before the timing.
            batch: Of random inputs.
            warmup: Inferences that do not count.
            iterations: Inferences that do.

        Raises:
            EngineError: As for :meth:`run`, or there is nothing to time.
        """
        return benchmark({"": self}, inputs, batch=batch, warmup=warmup, iterations=iterations).latencies[""]

    def run_all(self, inputs: Inputs, *, nodes_per_step: int = 16) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that the model computes, in graph order.

        The graph runs in steps of a few nodes, each node once. Only what later steps still read is kept, so
        memory holds one step's tensors whatever the depth of the model, provided the caller does not collect
        them.

        Args:
            inputs: As for :meth:`run`.
            nodes_per_step: How many nodes run at a time; ONNX Runtime can fuse only within a step.

        Yields:
            Name and value; constants are not among them.
        """
        graph, live = self._parts(), self._feeds(inputs)
        steps = [graph.nodes[i : i + nodes_per_step] for i in range(0, len(graph.nodes), nodes_per_step)]
        needed_later = _suffix_unions([graph.reads(step) for step in steps])
        for step, later in zip(steps, needed_later, strict=True):
            names = [name for node in step for name in node.output if name]
            values = dict(zip(names, self._run_part(step, names, live), strict=True))
            live = {name: value for name, value in (live | values).items() if name in later}
            yield from values.items()

    def compute(self, names: Sequence[str], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Some tensors of the model, computed from others.

        Only the nodes between the two run. This is how one node is compared with PyTorch on PyTorch's own
        tensors.

        Args:
            names: What to compute.
            given: Tensors by name; those that are not needed do no harm.

        Raises:
            EngineError: The model has no such tensor, or `given` does not suffice.
        """
        graph = self._parts()
        nodes = graph.between(names, given)
        return dict(zip(names, self._run_part(nodes, names, given), strict=True))

    @property
    def input_dtypes(self) -> dict[str, torch.dtype]:
        """The type of each input that torch has too."""
        types = {value.name: _TORCH_DTYPES.get(value.type) for value in self._session.get_inputs()}
        return {name: dtype for name, dtype in types.items() if dtype is not None}

    @property
    def value_names(self) -> tuple[str, ...]:
        """Names of all tensors that nodes compute, in graph order."""
        return tuple(name for node in self._parts().nodes for name in node.output if name)

    @property
    def model(self) -> onnx.ModelProto:
        """The file's content."""
        return self._parts().model

    def _repeated(self, inputs: Inputs) -> Callable[[], Any]:
        """A call that runs the model on inputs that are converted once, and leaves its results where they are."""
        feeds = self._feeds(inputs)
        _run(self._session, self.output_names, feeds)  # what does not fit is said here
        held, names = {name: to_ort(tensor) for name, tensor in feeds.items()}, list(self.output_names)
        return lambda: self._session.run_with_ort_values(names, held)

    def _parts(self) -> PartialGraph:
        if self._graph is None:
            self._graph = PartialGraph(self.path)
        return self._graph

    def _feeds(self, inputs: Inputs) -> dict[str, Tensor]:
        if isinstance(inputs, Tensor):
            inputs = [inputs]
        if isinstance(inputs, Mapping):
            feeds = dict(inputs)
        elif len(inputs) == len(self.input_names):
            feeds = dict(zip(self.input_names, inputs, strict=True))
        else:
            raise EngineError(f"{len(inputs)} inputs given, {self.path.name} takes {', '.join(self.input_names)}")
        if set(feeds) != set(self.input_names):
            raise EngineError(f"inputs {sorted(feeds)} given, {self.path.name} takes {', '.join(self.input_names)}")
        return feeds

    def _run_part(self, nodes: Sequence[onnx.NodeProto], names: Sequence[str], given: Mapping[str, Tensor]) -> Any:
        graph = self._parts()
        made = {name for node in nodes for name in node.output}
        wanted = [name for name in names if name in made]
        reads = graph.reads(nodes) - made - set(graph.constants)
        feeds = {name: given[name] for name in graph.order(reads)}
        if not wanted:
            return [given[name] for name in names]
        part = graph.part(nodes, feeds, wanted)
        session = _make_session(part, optimize=self.optimize, threads=self.threads)
        results = dict(zip(wanted, _run(session, wanted, feeds), strict=True))
        return [results.get(name, given.get(name)) for name in names]


def benchmark(
    sessions: Mapping[str, Session],
    inputs: Inputs | None = None,
    *,
    batch: int = 1,
    warmup: int = 10,
    iterations: int = 100,
) -> Timings:
    """Time files beside each other, in turns: a quantized and a float one, say.

    Args:
        sessions: By any names.
        inputs: For all of them, as for :meth:`Session.run`; None takes random ones of the first.
        batch: Of random inputs.
        warmup: Inferences of each that do not count.
        iterations: Inferences of each that do.

    Raises:
        EngineError: There is no session, or as for :meth:`Session.run`.
    """
    if not sessions:
        raise EngineError("there is no file to time", hint='give {"int8": Session("model.onnx"), ...}')
    first = next(iter(sessions.values()))
    given = first.random_inputs(batch) if inputs is None else inputs
    tensors = [given] if isinstance(given, Tensor) else list(given.values() if isinstance(given, Mapping) else given)
    sizes = {len(tensor) for tensor in tensors if tensor.ndim}
    runs = {name: session._repeated(given) for name, session in sessions.items()}
    samples = sizes.pop() if len(sizes) == 1 else None
    cpu = torch.device("cpu")
    return Timings(measure(runs, warmup=warmup, iterations=iterations, device=cpu, batch=samples))


def _sized(shape: Sequence[int | str | None], batch: int, profile: Sequence[Sequence[int]] | None) -> list[int] | None:
    """A shape without dynamic dimensions; None where one stays."""
    tuned = profile[1] if profile is not None else [None] * len(shape)
    found = [
        size if isinstance(size, int) else batch if index == 0 else known
        for index, (size, known) in enumerate(zip(shape, tuned, strict=True))
    ]
    sizes = [size for size in found if size is not None]
    return sizes if len(sizes) == len(found) else None


def _suffix_unions(sets: Sequence[set[str]]) -> list[set[str]]:
    """For each place, the union of the sets after it."""
    unions: list[set[str]] = [set()]
    for found in reversed(sets[1:]):
        unions.append(unions[-1] | found)
    return unions[::-1]


def _make_session(model: str | bytes, *, optimize: bool, threads: int | None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of every initializer that it leaves out
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    without = ["WeightBiasQuantization"] if optimize and _has_float16_scales(model) else []
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=without)
    except _failures() as error:
        raise EngineError(
            f"ONNX Runtime cannot load the model: {error}",
            hint="name a whole ONNX file, of types and operators that ONNX Runtime has on the CPU",
        ) from error


def _has_float16_scales(model: str | bytes) -> bool:
    """Whether a DequantizeLinear of the model has a float16 scale; False for what is no model."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        loaded = (
            onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model, load_external_data=False)
        )
    except DecodeError:
        return False  # ONNX Runtime says what is wrong with it
    scales = {node.input[1] for node in loaded.graph.node if node.op_type == "DequantizeLinear"}
    return any(t.data_type == onnx.TensorProto.FLOAT16 and t.name in scales for t in loaded.graph.initializer)


def _run(session: Any, names: Sequence[str], feeds: Mapping[str, Tensor]) -> list[Tensor]:
    try:
        values = session.run_with_ort_values(list(names), {name: to_ort(t) for name, t in feeds.items()})
    except _failures() as error:
        raise EngineError(f"ONNX Runtime stopped: {error}", hint="compare the inputs' shapes and types") from error
    return [from_ort(value) for value in values]


def _failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its exceptions have no common root of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, TypeError)
