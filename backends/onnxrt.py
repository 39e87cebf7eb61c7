"""ONNX Runtime on the CPU: runs a file with torch tensors, whole, value by value, or one value from given
ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

import torch
from torch import Tensor

from ..errors import EngineError

if TYPE_CHECKING:
    import onnx

__all__ = ["Session"]

_RAW: Final[Mapping[torch.dtype, tuple[str, torch.dtype]]] = {
    torch.bfloat16: ("BFLOAT16", torch.int16),
    torch.float8_e4m3fn: ("FLOAT8E4M3FN", torch.uint8),
    torch.float8_e5m2: ("FLOAT8E5M2", torch.uint8),
}
"""Types that numpy lacks: ONNX's name, and the integers that carry their bits."""

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
        self._graph: _Graph | None = None

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

    def random_inputs(self, batch: int = 1) -> dict[str, Tensor]:
        """Inputs of the model's shapes and types: normal numbers, zeros for integers.

        Args:
            batch: The size of a first dimension that is dynamic.

        Raises:
            EngineError: Another dimension is dynamic, or the model takes a type that torch has not.
        """
        found = {}
        for value in self._session.get_inputs():
            shape = [
                batch if index == 0 and not isinstance(size, int) else size for index, size in enumerate(value.shape)
            ]
            dtype = _TORCH_DTYPES.get(value.type)
            if dtype is None or not all(isinstance(size, int) for size in shape):
                raise EngineError(
                    f"input {value.name} of {self.path.name} is {value.type} {value.shape}: no random input fits",
                    hint="give inputs of your own",
                )
            found[value.name] = (
                torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
            )
        return found

    def run_all(
        self, inputs: Mapping[str, Tensor] | Sequence[Tensor], *, nodes_per_step: int = 16
    ) -> Iterator[tuple[str, Tensor]]:
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
    def value_names(self) -> tuple[str, ...]:
        """Names of all tensors that nodes compute, in graph order."""
        return tuple(name for node in self._parts().nodes for name in node.output if name)

    @property
    def model(self) -> onnx.ModelProto:
        """The file's content."""
        return self._parts().model

    def _parts(self) -> _Graph:
        if self._graph is None:
            self._graph = _Graph(self.path)
        return self._graph

    def _feeds(self, inputs: Mapping[str, Tensor] | Sequence[Tensor]) -> dict[str, Tensor]:
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


class _Graph:
    """An ONNX model whose nodes can be run in parts."""

    def __init__(self, path: Path) -> None:
        import onnx

        self.model = onnx.load(os.fspath(path))
        self.nodes: list[onnx.NodeProto] = list(self.model.graph.node)
        self.constants = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}

    def reads(self, nodes: Iterable[onnx.NodeProto]) -> set[str]:
        """What the nodes take from outside themselves and their subgraphs, constants included."""
        return {name for node in nodes for name in _reads(node)}

    def order(self, names: Iterable[str]) -> list[str]:
        """`names` sorted by where they are made, inputs first."""
        return sorted(names, key=lambda name: (self._producer.get(name, -1), name))

    def between(self, names: Sequence[str], given: Mapping[str, Tensor]) -> list[onnx.NodeProto]:
        """The nodes that make `names` out of `given`, in graph order."""
        found: set[int] = set()
        work = list(names)
        while work:
            name = work.pop()
            if name in given or name in self.constants:
                continue
            if name not in self._producer:
                raise EngineError(
                    f"tensor {name!r} is neither given nor made by a node", hint="give the model's inputs"
                )
            index = self._producer[name]
            if index not in found:
                found.add(index)
                work += _reads(self.nodes[index])
        return [self.nodes[i] for i in sorted(found)]

    def part(self, nodes: Sequence[onnx.NodeProto], feeds: Mapping[str, Tensor], outputs: Sequence[str]) -> bytes:
        """A model of `nodes` alone."""
        import onnx

        model = onnx.ModelProto()
        model.ir_version = self.model.ir_version
        model.opset_import.extend(self.model.opset_import)
        model.graph.name = self.model.graph.name
        model.graph.node.extend(nodes)
        for name, tensor in feeds.items():
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, _onnx_type(tensor), list(tensor.shape)))
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
        reads = self.reads(nodes)
        model.graph.initializer.extend(tensor for name, tensor in self.constants.items() if name in reads)
        data: bytes = model.SerializeToString()
        return data


def _reads(node: onnx.NodeProto) -> set[str]:
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        if attribute.HasField("g"):
            inner = {name for child in attribute.g.node for name in _reads(child)}
            inner |= {value.name for value in attribute.g.output}
            own = {name for child in attribute.g.node for name in child.output}
            own |= {value.name for value in [*attribute.g.input, *attribute.g.initializer]}
            names |= inner - own
    return names


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
        raise EngineError(f"ONNX Runtime cannot load the model: {error}") from error


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
        values = session.run_with_ort_values(list(names), {name: _to_ort(t) for name, t in feeds.items()})
    except _failures() as error:
        raise EngineError(f"ONNX Runtime stopped: {error}", hint="compare the inputs' shapes and types") from error
    return [_from_ort(value) for value in values]


def _failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its exceptions have no common root of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, TypeError)


def _onnx_type(tensor: Tensor) -> int:
    import onnx

    if tensor.dtype in _RAW:
        return int(getattr(onnx.TensorProto, _RAW[tensor.dtype][0]))
    return int(onnx.helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=tensor.dtype).numpy().dtype))


def _to_ort(tensor: Tensor) -> Any:
    import onnxruntime as ort

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _RAW:
        bits = tensor.view(_RAW[tensor.dtype][1]).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _onnx_type(tensor))
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _from_ort(value: Any) -> Tensor:
    array = value.numpy()
    raw = {f"tensor({name.lower()})": dtype for dtype, (name, _) in _RAW.items()}
    dtype = raw.get(value.data_type())
    # The array may lie in memory that belongs to the runtime.
    tensor = torch.from_numpy(array.copy())
    return tensor if dtype is None else tensor.view(dtype)
