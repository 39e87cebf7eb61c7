"""Which kernels TensorRT should make of an ONNX file, by its documented fusions; needs neither TensorRT nor a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import TYPE_CHECKING, Final

from ..errors import FxqError
from .onnx_graph import OnnxGraph
from .onnx_names import not_for_tensorrt
from .onnx_nodes import Node, Quant, Reader
from .onnx_values import type_name
from .trt_fusions import family, fused_library, is_view
from .trt_grouping import Group, Grouping
from .trt_kernel_graph import DTYPES
from .trt_kernels import TensorInfo
from .trt_prediction import PredictedKernel, Prediction

if TYPE_CHECKING:
    import onnx

__all__ = ["predict_kernels"]

_KINDS: Final = {
    "pointwise": "PointWise",
    "norm": "Normalization",
    "reduction": "Reduce",
    "pooling": "Pooling",
    "copy": "Copy",
    "quantize": "Quantize",
    "other": "Other",
}
_SUMS: Final = ".sums"
"""What is appended to a tensor's name for the float sums of an INT8 kernel."""


def predict_kernels(model: str | PathLike[str] | bytes | onnx.ModelProto, *, library: str = "tensorrt") -> Prediction:
    """Predict the kernels of an ONNX file.

    Args:
        model: A file, a serialized model or a ModelProto, from any tool. It is not changed; weights are not read.
        library: ``tensorrt`` (default): the fusions that NVIDIA documents. ``tensorrt-rtx``: as its builder, which
            works without a GPU, does it: the sums of an INT8 kernel are written in float for a second one.

    Returns:
        The kernels with their precision, tensors and bytes.

    Raises:
        FxqError: There is no such file or library, the file holds no ONNX model, or it was quantized by another
            backend's rules.
    """
    graph = OnnxGraph(model)
    refused = not_for_tensorrt(str(model) if isinstance(model, str | PathLike) else "the model", graph.metadata)
    if refused is not None and graph.quants:
        raise FxqError(refused[0], hint=refused[1])
    grouping = Grouping(graph, fused_library(library))
    described = _Kernels(grouping)
    kernels = tuple(described.kernel(group) for group in grouping.groups if group.nodes)
    return Prediction(kernels, library, tuple(grouping.vanished))


class _Kernels:
    """The kernels that groups of nodes are: what they read and write, and in which types."""

    def __init__(self, grouping: Grouping) -> None:
        self.of = grouping
        self.graph = grouping.graph

    def kernel(self, group: Group) -> PredictedKernel:
        main = group.nodes[0]
        if group.kind == "weighted":
            main = next(node for node in group.nodes if family(node) == "weighted")
        inputs, constants = self._reads(group)
        outputs = self._writes(group)
        kind = main.op if group.kind == "weighted" else _KINDS[group.kind]
        dtype = next((t.dtype for t in outputs if t.dtype.startswith(("float", "bfloat"))), "float32")
        if group.sums is not None:
            inputs[:0] = [self._sums(sums.nodes[0]) for sums in (group.sums, *group.more_sums)]
        return PredictedKernel(
            name=" + ".join(node.name for node in group.nodes),
            kind=kind,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            constants=tuple(constants),
            onnx_nodes=tuple(dict.fromkeys(node.name for node in group.nodes)),
            precision=group.precision or (self._float_type(main) if group.kind == "weighted" else dtype),
            module_path=main.module_path,
            source=main.source,
        )

    def _reads(self, group: Group) -> tuple[list[TensorInfo], list[TensorInfo]]:
        inputs: dict[str, TensorInfo] = {}
        constants: dict[str, TensorInfo] = {}
        made = {name for node in group.nodes for name in node.outputs}
        for node in group.nodes:
            if group.sums is not None and family(node) == "weighted":
                continue
            for name in node.inputs:
                if not name or name in self.of.read.host:
                    continue
                if name in self.graph.fixed:
                    constant = self._constant(name)
                    constants[constant.name] = constant
                elif (source := self.of.read.source(name)) not in made:
                    inputs.update({t.name: t for t in self._stored(source, node)})
        return list(inputs.values()), [] if group.sums is not None else list(constants.values())

    def _stored(self, name: str, reader: Node) -> Iterator[TensorInfo]:
        """The tensors in memory that are read where the graph reads `name`."""
        node = self.graph.producers.get(name)
        quant = self.graph.quant(node)
        if node is not None and node.name in self.of.vanished and node.op == "Concat":
            for part in node.inputs:
                yield from self._stored(self.of.read.source(part), reader)
        elif quant is not None and not quant.quantizes:
            maker = self.graph.quant(self.graph.producers.get(quant.tensor))
            if maker is not None and maker.quantizes and maker.output not in self.of.makers:  # it changed nothing
                yield from self._stored(self.of.read.source(maker.tensor), reader)
            else:
                yield self._info(self.of.read.source(quant.tensor), quant.dtype, quant.output)
        elif name in self.of.quantized and name not in self.of.both and self.graph.quant(reader) is None:
            yield self._info(name, self.of.quantized[name].dtype, name)
        elif quant is None and self._moved_integers(node, name):
            yield self._info(name, "int8", name)
        else:
            yield self._info(name, self.graph.dtype(name), name)

    def _moved_integers(self, node: Node | None, name: str) -> bool:
        """Whether a copy or pool passes on the integers of a DQ, for readers that all want them."""
        if node is None or not self.graph.moves(Reader(node)):
            return False
        dq = self.graph.dequantizer(name)
        final = list(self.graph.final_readers(name))
        wanted = all(r.node is not None and family(r.node) == "weighted" for r in final)
        return dq is not None and dq.dtype == "int8" and bool(final) and wanted

    def _writes(self, group: Group) -> list[TensorInfo]:
        if self.of.library.float_sums and group.kind == "weighted" and group.precision is not None:
            return [self._sums(group.nodes[0])]
        outputs: dict[str, TensorInfo] = {}
        for node in group.nodes:
            for name in node.outputs:
                if name and self.of.makers.get(name) is group:
                    outputs.update({t.name: t for t in self._written(group, node, name)})
        return list(outputs.values())

    def _written(self, group: Group, node: Node, name: str) -> Iterator[TensorInfo]:
        """How one tensor of a kernel is stored: in its own type, as the integers of a Q, as both, or not at all."""
        inside = {n.index for n in group.nodes}
        if (quant := self.graph.quant(node)) is not None:
            yield self._info(name, quant.dtype, quant.tensor)
            return
        apart = False
        for q in self._quantizers(name):
            if self.of.makers.get(q.output) is not group:
                apart = apart or (q.node.name not in self.of.vanished and name not in self.of.quantized)
            elif q.node.index not in inside:
                yield self._info(q.output, q.dtype, q.tensor)
        if apart or any(r.node is None or r.node.index not in inside for r in self.of.read.readers(name)):
            if name in self.of.quantized and name not in self.of.both:
                if not any(self.of.makers.get(q.output) is group for q in self._quantizers(name)):
                    yield self._info(name, self.of.quantized[name].dtype, name)
            else:
                dtype = "int8" if self._moved_integers(node, name) else self.graph.dtype(name)
                yield self._info(name, dtype, name)

    def _quantizers(self, name: str) -> Iterator[Quant]:
        """The Q that read a tensor, behind views."""
        for reader in self.graph.readers(name):
            quant = self.graph.quant(reader.node)
            if quant is not None and quant.quantizes:
                yield quant
            elif reader.node is not None and is_view(self.graph, reader.node) and reader.index == 0:
                yield from self._quantizers(reader.node.outputs[0])

    def _sums(self, node: Node) -> TensorInfo:
        name = node.outputs[0]
        return self._info(f"{name}{_SUMS}", self.graph.dtype(name) or "float", name)

    def _info(self, name: str, dtype: str, like: str) -> TensorInfo:
        """A tensor of the shape that another name of it has."""
        shape = self.graph.shape(name) or self.graph.shape(like)
        dims = tuple(-1 if size is None else size for size in shape or ())
        return TensorInfo(name, dims if shape is not None else (-1,), DTYPES.get(dtype, dtype or "unknown"))

    def _constant(self, name: str) -> TensorInfo:
        """A constant as it is stored: a weight behind DQ as integers."""
        dq = self.graph.dequantizer(name)
        if dq is not None:
            return self._info(name, dq.dtype, dq.tensor)
        return self._info(name, self.graph.dtype(name), name)

    def _float_type(self, node: Node) -> str:
        found = self.graph.dtype(node.outputs[0])
        return DTYPES.get(found, found) or type_name(1)
