"""An ONNX model whose nodes run in parts: a few of them, between tensors that are given and tensors that are wanted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import EngineError
from .ort_tensors import onnx_type

if TYPE_CHECKING:
    import onnx

__all__ = ["PartialGraph"]


class PartialGraph:
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
        model.functions.extend(self.model.functions)
        model.graph.name = self.model.graph.name
        model.graph.node.extend(nodes)
        for name, tensor in feeds.items():
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx_type(tensor), list(tensor.shape)))
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
