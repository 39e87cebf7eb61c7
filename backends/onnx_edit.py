"""Small edits of an ONNX model: tensors rerouted, nodes dropped or moved, values stored.

Only what an edit names changes, and what becomes useless by it goes; the rest stays as its tool wrote it: names,
metadata, and what was useless before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy.typing as npt

from .onnx_nodes import Node, names_read

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxEdit"]

FIRST_FREE: Final = 4
"""The IR version from which on a stored tensor need not stand among the graph's inputs too."""


class OnnxEdit:
    """Collects edits of a model's main graph and carries them out together.

    Nodes are named by their place in the file when the first edit was made, tensors by name.

    Args:
        model: A model without functions of its own (:func:`fxq.backends.onnx_values.read_model` inlines them).
            It is changed in place.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._typed_as_inputs = model.ir_version < FIRST_FREE
        self._reroutes: dict[str, str] = {}
        self._dropped: set[int] = set()
        self._moved: dict[int, int] = {}
        self._retyped: set[str] = set()
        self._read_before = _read(self._graph)
        self._names = _taken(self._graph)

    def free_name(self, name: str) -> str:
        """`name`, or `name` with a number if the graph has it already; it counts as taken from then on."""
        found, number = name, 1
        while found in self._names:
            found, number = f"{name}_{number}", number + 1
        self._names.add(found)
        return found

    def reroute(self, old: str, new: str) -> None:
        """Let all readers of `old` read `new`; they are nodes of the main graph, and `old` is no output."""
        self._reroutes[old] = new

    def read(self, node: Node, index: int, name: str) -> None:
        """Let one input of a node read another tensor."""
        self._graph.node[node.index].input[index] = name

    def write(self, node: Node, name: str) -> None:
        """Give the first output of a node another name; nothing is done for those who read the old one."""
        self._graph.node[node.index].output[0] = name

    def set_integer(self, node: Node, attribute: str, value: int) -> None:
        """Change an attribute of a node, where it has it."""
        for held in self._graph.node[node.index].attribute:
            if held.name == attribute:
                held.i = value

    def drop(self, node: Node) -> None:
        """Take a node away."""
        self._dropped.add(node.index)

    def move(self, node: Node, before: Node) -> None:
        """Put a node right in front of another one."""
        self._moved[node.index] = before.index

    def store(self, name: str, array: npt.NDArray[Any]) -> None:
        """Add an initializer; a node that made this tensor is dropped."""
        import onnx

        self._dropped.update(i for i, node in enumerate(self._graph.node) if name in node.output)
        tensor = onnx.numpy_helper.from_array(array, name)
        self._graph.initializer.append(tensor)
        if self._typed_as_inputs:
            self._graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))

    def forget_type(self, name: str) -> None:
        """Take away what the file says of a tensor's type."""
        self._retyped.add(name)

    def finish(self) -> None:
        """Carry the edits out."""
        for node in self._graph.node if self._reroutes else ():
            for index, name in enumerate(node.input):
                if name in self._reroutes:
                    node.input[index] = self._target(name)
        order = sorted(range(len(self._graph.node)), key=lambda i: (self._moved.get(i, i), i not in self._moved))
        if self._moved:
            nodes = [self._graph.node[i] for i in order]
            del self._graph.node[:]
            self._graph.node.extend(nodes)
        _drop(self._graph.node, [i not in self._dropped for i in order])
        self._prune()

    def _target(self, name: str) -> str:
        while name in self._reroutes:
            name = self._reroutes[name]
        return name

    def _prune(self) -> None:
        """Drop what nobody reads any more, although somebody did."""
        graph = self._graph
        while unread := self._read_before - _read(graph):
            count = len(graph.node)
            _drop(graph.node, [not node.output or not unread.issuperset(_outputs(node)) for node in graph.node])
            if len(graph.node) == count:
                break
        stored = {tensor.name for tensor in graph.initializer}
        _drop(graph.initializer, [tensor.name not in unread for tensor in graph.initializer])
        _drop(graph.input, [value.name not in stored & unread for value in graph.input])  # it only told a type
        there = _made(graph) - self._retyped
        _drop(graph.value_info, [value.name in there for value in graph.value_info])
        gone = self._names - _taken(graph)
        _drop(graph.quantization_annotation, [a.tensor_name not in gone for a in graph.quantization_annotation])


def _outputs(node: onnx.NodeProto) -> list[str]:
    return [name for name in node.output if name]


def _taken(graph: onnx.GraphProto) -> set[str]:
    """The names that no new tensor may have: ONNX lets no graph inside a node make a tensor of the same name."""
    inner = (name for node in graph.node for sub in _graphs_in(node) for name in _taken(sub))
    return {*inner, *_made(graph), *(i.name for i in graph.input)}


def _made(graph: onnx.GraphProto) -> set[str]:
    """The tensors that nodes make or that are stored."""
    return {name for node in graph.node for name in _outputs(node)} | {t.name for t in graph.initializer}


def _read(graph: onnx.GraphProto) -> set[str]:
    """The tensors that somebody reads: a node, a graph inside it, or the graph's outputs."""
    inner = (name for node in graph.node for sub in _graphs_in(node) for name in names_read(sub))
    return {*inner, *(name for node in graph.node for name in node.input), *(o.name for o in graph.output)}


def _graphs_in(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _drop(field: Any, kept: Sequence[bool]) -> None:
    """Delete elements of a repeated field in place, so that the others are not copied."""
    for index in reversed(range(len(kept))):
        if not kept[index]:
            del field[index]
