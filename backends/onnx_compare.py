"""Node by node, does an ONNX file compute what the FX graph computes?

Each node of the graph runs in PyTorch; the ONNX nodes made from it run in ONNX Runtime, unoptimized, on
PyTorch's own tensors. So a difference belongs to the node at which it shows, and rounding does not add up
along the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import EngineError
from ..graph import origin
from ..sqnr import decibels
from .onnx_inputs import placeholder_values
from .onnx_names import NODE, properties
from .onnxrt import Session

__all__ = ["NodeDifference", "compare_nodes", "value_names"]


@dataclass(frozen=True)
class NodeDifference:
    """How far one node's tensor in ONNX Runtime is from PyTorch's.

    Attributes:
        node: Name of the FX node.
        dtype: The tensor's type in PyTorch.
        share: Share of elements that differ at all, in [0, 1].
        largest: Largest absolute difference; for a quantizer's integers, in steps.
        sqnr: Signal to difference in dB; infinite where nothing differs.
        module_path: Where the node came from.
        source: The user's ``file:line``.
    """

    node: str
    dtype: torch.dtype
    share: float
    largest: float
    sqnr: float
    module_path: str = ""
    source: str | None = None


def compare_nodes(
    path: str | Path, gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> tuple[NodeDifference, ...]:
    """Compare an exported file with the graph that it was made from.

    Args:
        path: What :func:`fxq.backends.onnx_export.export_onnx` wrote.
        gm: The graph it was given; on any device, not changed.
        args: Positional inputs.
        kwargs: Inputs by name.

    Returns:
        One row for each node whose tensor the file has, in graph order; what was optimized away has none.

    Raises:
        EngineError: ONNX Runtime cannot run the file.
    """
    comparer = _Comparer(gm, Session(path, optimize=False))
    with torch.no_grad():
        comparer.run(*placeholder_values(gm, args, kwargs or {}), enable_io_processing=False)
    return tuple(comparer.rows)


class _Comparer(fx.Interpreter):
    """Runs the graph, and beside each node what it became in ONNX."""

    def __init__(self, gm: fx.GraphModule, session: Session) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.session = session
        self.values = value_names(session)
        self.inputs: dict[str, Tensor] = {}
        self.rows: list[NodeDifference] = []
        # For live nodes that the file lacks: the tensors that they were computed from.
        self.behind: dict[fx.Node, dict[str, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "placeholder":
            self._feed_input(result)
        elif n.op in ("call_function", "call_module", "call_method"):
            found = list(self._tensors(n, result))
            self.rows += [self._compare(n, name, tensor) for name, tensor in found]
            if not found:
                self.behind[n] = self._given(n.all_input_nodes)
        return result

    def _feed_input(self, value: Any) -> None:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                self.inputs[self.session.input_names[len(self.inputs)]] = leaf

    def _tensors(self, node: fx.Node, result: Any) -> Iterator[tuple[str, Tensor]]:
        """A node's tensors that the file has, with their ONNX names."""
        if isinstance(result, Tensor):
            named = {node.name: result}
        else:
            items = result if isinstance(result, tuple | list) else ()
            named = {f"{node.name}__{index}": item for index, item in enumerate(items)}
        for wanted, tensor in named.items():
            if wanted in self.values and isinstance(tensor, Tensor):
                yield self.values[wanted], tensor

    def _given(self, nodes: Iterable[fx.Node]) -> dict[str, Tensor]:
        """PyTorch's tensors for `nodes`; for one that the file lacks, those it was computed from."""
        given: dict[str, Tensor] = {}
        for node in nodes:
            if node in self.env:
                given |= self.behind.get(node, {}) | dict(self._tensors(node, self.env[node]))
        return given

    def _compare(self, node: fx.Node, name: str, tensor: Tensor) -> NodeDifference:
        self.behind = {other: held for other, held in self.behind.items() if other in self.env}
        given = self.inputs | self._given(self.env)
        given.pop(name, None)
        return _difference(node, tensor.cpu(), self.session.compute([name], given)[name])


def value_names(session: Session) -> dict[str, str]:
    """ONNX tensor names by FX value; they differ only where the value is an output of the model."""
    names = {name: name for name in session.value_names}
    for node in session.model.graph.node:
        label = properties(node).get(NODE)
        for index, name in enumerate(node.output):
            if label is not None and name in session.output_names:
                names[label if len(node.output) == 1 else f"{label}__{index}"] = name
    return names


def _difference(node: fx.Node, ours: Tensor, theirs: Tensor) -> NodeDifference:
    if ours.shape != theirs.shape:
        raise EngineError(
            f"{node.name} has shape {tuple(theirs.shape)} in ONNX Runtime and {tuple(ours.shape)} in PyTorch",
            node=node.name,
            hint="compare a file with the graph that it was exported from",
        )
    one, other = ours.double(), theirs.double()
    off = (one - other).abs()
    noise, signal = float(off.square().sum()), float(one.square().sum())
    where = origin(node)
    return NodeDifference(
        node=node.name,
        dtype=ours.dtype,
        share=float((off > 0).double().mean()) if off.numel() else 0.0,
        largest=float(off.max()) if off.numel() else 0.0,
        sqnr=decibels(signal, noise),
        module_path=where.module_path,
        source=where.source,
    )
