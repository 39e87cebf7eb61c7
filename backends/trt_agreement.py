"""How far a prediction and a built engine agree, kernel by kernel and fusion by fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .onnx_graph import OnnxGraph
from .onnx_nodes import Node
from .trt_fusions import family, is_view
from .trt_kernels import LayerInfo

__all__ = ["Agreement", "compare_kernels"]


@dataclass(frozen=True)
class Agreement:
    """What two lists of kernels of one ONNX file have in common.

    Attributes:
        kernels: How many kernels were predicted, and how many built.
        weighted: Weighted ONNX nodes that both lists have.
        same_precision: Those of them that read 8 bits in both, or in neither.
        fusions: Pairs of neighbouring ONNX nodes, Q counted and views passed over, that both lists have.
        same_fusion: Those of them that are in one kernel in both, or in neither.
        precision_differs: Weighted nodes whose precision differs.
        fusion_differs: Pairs ``(producer, reader)`` that only one of the lists has in one kernel.
        apart: Which pairs of :attr:`fusion_differs` are apart in the built engine.
    """

    kernels: tuple[int, int]
    weighted: int
    same_precision: int
    fusions: int
    same_fusion: int
    precision_differs: tuple[str, ...] = ()
    fusion_differs: tuple[tuple[str, str], ...] = ()
    apart: frozenset[tuple[str, str]] = field(default_factory=frozenset)

    @property
    def precision_share(self) -> float:
        """Share of weighted nodes with the predicted precision, in [0, 1]; 1 if there are none."""
        return self.same_precision / self.weighted if self.weighted else 1.0

    @property
    def fusion_share(self) -> float:
        """Share of neighbouring pairs that are fused, or not, as predicted, in [0, 1]; 1 if there are none."""
        return self.same_fusion / self.fusions if self.fusions else 1.0

    def __str__(self) -> str:
        return (
            f"{self.kernels[0]} kernels predicted, {self.kernels[1]} built; precision of {self.same_precision} of "
            f"{self.weighted} weighted nodes and {self.same_fusion} of {self.fusions} fusions as predicted"
        )


def compare_kernels(graph: OnnxGraph, predicted: Sequence[LayerInfo], built: Sequence[LayerInfo]) -> Agreement:
    """Compare two lists of kernels.

    Args:
        graph: The ONNX file that both came from.
        predicted: What was expected.
        built: What the engine has; its kernels name their ONNX nodes.
    """
    first, second = _kernels_by_node(predicted), _kernels_by_node(built)
    weighted = [n.name for n in graph.nodes if family(n) == "weighted" and n.name in first and n.name in second]
    odd = tuple(name for name in weighted if _reads_8_bits(first[name]) != _reads_8_bits(second[name]))
    pairs = [(a, b) for a, b in _neighbours(graph) if {a, b} <= first.keys() and {a, b} <= second.keys()]
    expected = {pair for pair in pairs if _together(first, *pair)}
    found = {pair for pair in pairs if _together(second, *pair)}
    differ = tuple(pair for pair in pairs if (pair in expected) != (pair in found))
    return Agreement(
        kernels=(len(predicted), len(built)),
        weighted=len(weighted),
        same_precision=len(weighted) - len(odd),
        fusions=len(pairs),
        same_fusion=len(pairs) - len(differ),
        precision_differs=odd,
        fusion_differs=differ,
        apart=frozenset(expected - found),
    )


def _kernels_by_node(kernels: Sequence[LayerInfo]) -> dict[str, list[LayerInfo]]:
    found: dict[str, list[LayerInfo]] = {}
    for kernel in kernels:
        for name in kernel.onnx_nodes:
            found.setdefault(name, []).append(kernel)
    return found


def _reads_8_bits(kernels: Sequence[LayerInfo]) -> bool:
    return any(kernel.weighted and kernel.reads_int8 for kernel in kernels)


def _together(kernels: Mapping[str, Sequence[LayerInfo]], first: str, second: str) -> bool:
    return any(kernel is other for kernel in kernels[first] for other in kernels[second])


def _neighbours(graph: OnnxGraph) -> list[tuple[str, str]]:
    """Nodes and those that read them, behind views and DQ."""
    found = []
    for node in graph.nodes:
        if _counts(graph, node):
            for name in node.outputs:
                found += [(node.name, reader.name) for reader in _readers(graph, name)]
    return list(dict.fromkeys(found))


def _counts(graph: OnnxGraph, node: Node) -> bool:
    quant = graph.quant(node)
    return not graph.fixed.issuperset(node.outputs) and not is_view(graph, node) and (quant is None or quant.quantizes)


def _readers(graph: OnnxGraph, name: str) -> list[Node]:
    found = []
    for reader in graph.readers(name):
        if reader.node is None:
            continue
        if _counts(graph, reader.node):
            found.append(reader.node)
        else:
            found += [node for output in reader.node.outputs for node in _readers(graph, output)]
    return found
