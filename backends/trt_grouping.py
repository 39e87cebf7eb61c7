"""Which ONNX nodes become one kernel, by the fusions of a library.

The graph is walked once, in order. Constants fold, views vanish, DQ belong to whoever reads them. Every other node
joins the kernel that makes its input, if the fusions allow it and nobody else needs that input, or begins a kernel of
its own. A Q becomes the output type of the kernel in front of it, through operations that only move values (R18, R19).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .onnx_graph import OnnxGraph
from .onnx_nodes import Node, Quant, Reader
from .trt_fusions import (
    KernelLibrary,
    family,
    folds_into_product,
)
from .trt_kernel_graph import KernelGraph, broadcasts, runs_in

__all__ = ["Group", "Grouping"]


@dataclass(eq=False)
class Group:
    """A kernel while it grows.

    Attributes:
        kind: The family of its main operation, or ``quantize``.
        nodes: Its ONNX nodes.
        precision: The low precision of its weighted operation; None for float.
        added: Whether it has taken an addition along.
        activated: Whether it has taken an activation along.
        float_operand: Whether the addition's other operand is float.
        shares: Whether it also writes what one of its reductions reads.
        sums: The kernel whose float sums it reads.
        more_sums: Others of that kind.
    """

    kind: str
    nodes: list[Node] = field(default_factory=list)
    precision: str | None = None
    added: bool = False
    activated: bool = False
    float_operand: bool = False
    shares: bool = False
    sums: Group | None = None
    more_sums: list[Group] = field(default_factory=list)


class Grouping:
    """Walks a graph once and collects its nodes into kernels.

    Args:
        graph: The graph.
        library: Whose fusions.

    Attributes:
        read: The graph as kernels read it.
        groups: The kernels, in the order in which they began; those without nodes were taken in by others.
        makers: The kernel that writes a tensor.
        quantized: The Q whose integers a tensor is stored as.
        both: Tensors that are stored in their own type too.
        vanished: Names of nodes that need no kernel.
    """

    def __init__(self, graph: OnnxGraph, library: KernelLibrary) -> None:
        self.graph, self.library = graph, library
        self.read = KernelGraph(graph)
        self.groups: list[Group] = []
        self.makers: dict[str, Group] = {}
        self.quantized: dict[str, Quant] = {}
        self.both: set[str] = set()
        self._regions: dict[int, str] = {}
        self._into_products: list[Node] = []
        self.vanished: list[str] = []

        self._walk()

    def _walk(self) -> None:
        for node in self.graph.nodes:
            if self.read.needs_no_kernel(node):
                self.vanished.append(node.name)
            elif (quant := self.graph.quant(node)) is not None:
                self._quantize(quant)
            elif folds_into_product(self.graph, node) and not self._behind_weighted(node):
                self._into_products.append(node)
            else:
                self._place(node)
        for node in reversed(self._into_products):
            self._into_product(node)

    def _behind_weighted(self, node: Node) -> bool:
        group = self._host(node, "pointwise")
        return group is not None and (group.kind == "weighted" or group.sums is not None)

    # What a node joins.

    def _place(self, node: Node) -> None:
        kind = family(node)
        if kind == "weighted":
            self._begin_weighted(node)
            return
        group = self._host(node, kind)
        if group is None:
            group = self._begin(kind, node)
        else:
            group.nodes.append(node)
            if kind in {"norm", "reduction"} and group.kind in {"pointwise", "copy"}:
                group.kind = kind
            if self.library.joins_any:
                self._merge_epilogues(node, group)
        self._made(node, group)

    def _merge_epilogues(self, node: Node, group: Group) -> None:
        """Take in the second kernels of the other INT8 operations whose results only this node reads."""
        for name in node.inputs:
            source = self.read.source(name)
            dq = self.graph.quant(self.graph.producers.get(source))
            made = source if dq is None or dq.quantizes else self.read.source(dq.tensor)
            other = self.makers.get(made)
            if other is None or other is group or other.sums is None or group.sums is None:
                continue
            if len(self.read.readers(made)) > 1 or (made != source and len(self.read.readers(source)) > 1):
                continue
            group.nodes[:0] = other.nodes
            group.more_sums += [other.sums, *other.more_sums]
            other.nodes = []
            self.makers.update({name: group for name, held in self.makers.items() if held is other})

    def _begin(self, kind: str, node: Node) -> Group:
        group = Group(kind, [node])
        self.groups.append(group)
        return group

    def _begin_weighted(self, node: Node) -> None:
        group = self._begin("weighted", node)
        group.precision = runs_in(self.graph, node)
        if self.library.float_sums and group.precision is not None:
            epilogue = self._begin("pointwise", node)
            epilogue.sums = group
            group = epilogue
        self._made(node, group)

    def _made(self, node: Node, group: Group) -> None:
        for name in node.outputs:
            if name:
                self.makers[name] = group
                for inner in self.read.region(name):
                    self._regions[inner.index] = name

    def _host(self, node: Node, kind: str) -> Group | None:
        """The kernel that takes a node along; the latest one where several could."""
        found = []
        for name in node.inputs:
            if name and name not in self.graph.fixed:
                source = self.read.source(name)
                group = self.makers.get(source)
                if group is not None and self._takes(group, node, kind, source):
                    found.append(group)
        return max(found, key=self.groups.index, default=None)

    def _takes(self, group: Group, node: Node, kind: str, source: str) -> bool:
        alone = len(self.read.readers(source)) == 1 and source not in self.graph.outputs
        inside = self._regions.get(node.index)
        together = inside is not None and self.makers.get(inside) is group
        if group.kind == "weighted":
            return kind == "pointwise" and (alone or together) and self._weighted_takes(group, node, together)
        if group.kind in {"other", "quantize", "pooling"}:
            return False
        if self.library.joins_any and group.sums is not None and (kind == "reduction" or node.op == "Concat"):
            group.shares = group.shares or not (alone or together)
            return True
        if kind == "norm" and group.kind in {"pointwise", "copy"}:
            return True  # a sum and its normalization are one kernel that writes both
        if not (alone or together):
            return kind == "copy" and group.kind == "copy" and node.op in {"Gather", "Slice", "Split"}
        if kind in {"norm", "reduction"}:
            return group.kind in {"pointwise", "copy"} or together
        return kind == "pointwise" or (kind == "copy" and node.op not in {"Concat", "Resize", "Upsample", "Pad"})

    def _weighted_takes(self, group: Group, node: Node, together: bool) -> bool:
        """One addition of the same shape, then any chain of operations on one activation: an activation (R44)."""
        moving = [name for name in node.inputs if name and name not in self.graph.fixed]
        if together or len(set(moving)) == 1:
            affine = node.op in {"Add", "BatchNormalization", "Div", "Mul", "Sub"} and not together
            group.activated = group.activated or not affine
            return True
        if node.op not in {"Add", "Sum"} or len(moving) != 2 or group.added or group.activated:
            return False
        if broadcasts(self.graph, node):
            return False
        group.added = True
        group.float_operand = not all(self.graph.quantized(name) for name in self._others(group, moving))
        return True

    def _others(self, group: Group, moving: Iterable[str]) -> Iterator[str]:
        return (name for name in moving if self.makers.get(self.read.source(name)) is not group)

    # Q, and what is stored as integers.

    def _quantize(self, quant: Quant) -> None:
        name, passed = self._pushed_back(quant)
        group = self.makers.get(name)
        if group is None or not self._takes_q(group):
            if self._same_integers(quant, name):
                self.vanished.append(quant.node.name)
                self._store(quant, passed)
                if passed:
                    self.makers[quant.output] = self.makers[passed[0]]
                return
            group = self._begin("quantize", quant.node)
        else:
            group.nodes.append(quant.node)
            self._store(quant, [name, *passed])
            if self.read.readers(name) and self._reads_float(name, passed):
                self.both.add(name)
        self.makers[quant.output] = self.makers[passed[0]] if passed else group
        self._store(quant, passed)

    def _reads_float(self, name: str, passed: list[str]) -> bool:
        """Whether anybody but the Q, and what passes its integers on, reads a tensor."""
        through = [self.graph.producers[p].index for p in passed if p in self.graph.producers]
        return any(r.node is None or r.node.index not in through for r in self.read.readers(name))

    def _store(self, quant: Quant, names: Iterable[str]) -> None:
        for name in names:
            self.quantized.setdefault(name, quant)

    def _pushed_back(self, quant: Quant) -> tuple[str, list[str]]:
        """The tensor in front of the operations that a Q passes through backward, and those behind them."""
        name, passed = self.read.source(quant.tensor), []
        node = self.graph.producers.get(name)
        while node is not None and self.graph.moves(Reader(node)) and not self.read.readers(name):
            group = self.makers.get(name)
            if group is None or group.nodes != [node]:  # taken along already: the Q joins there
                break
            passed.append(name)
            name = self.read.source(node.inputs[0])
            node = self.graph.producers.get(name)
        return name, passed

    def _same_integers(self, quant: Quant, name: str) -> bool:
        """Whether a Q only restores what a DQ has just taken apart."""
        dq = self.graph.quant(self.graph.producers.get(name))
        return dq is not None and not dq.quantizes and dq.same(quant)

    def _takes_q(self, group: Group) -> bool:
        if group.kind == "weighted":
            separate = group.float_operand and group.precision is not None
            return not separate or self.library.quantizes_float_skip
        return group.kind in {"pointwise", "norm", "reduction", "copy", "pooling"} and not (
            group.shares and group.kind == "reduction"
        )

    def _into_product(self, node: Node) -> None:
        """Give a constant factor to the product that reads it."""
        reader = next(iter(self.read.readers(node.outputs[0])), None)
        if reader is not None and reader.node is not None:
            for group in self.groups:
                if reader.node in group.nodes and group.kind == "weighted":
                    group.nodes.insert(0, node)
                    return
