"""What TensorRT makes one kernel of, as data: which operations join which kernel (R18 to R27, R44).

The fusions are those of NVIDIA's fusion catalog and of its page on explicit quantization. Where the library that
builds ahead of time without a GPU differs from them, :class:`KernelLibrary` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ..errors import FxqError
from .onnx_graph import WEIGHTED, OnnxGraph
from .onnx_nodes import Node

__all__ = [
    "LIBRARIES",
    "KernelLibrary",
    "closed_region",
    "family",
    "folds_into_product",
    "fused_library",
    "host_values",
    "is_view",
]

_ARITHMETIC: Final = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Mod", "And", "Or", "Xor", "Not")
_COMPARISONS: Final = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Where", "IsNaN", "IsInf")
_UNARY: Final = (
    "Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Log", "Neg", "Reciprocal", "Round", "Sign", "Sin", "Sqrt", "Cast",
)  # fmt: skip
_ACTIVATIONS: Final = (
    "BatchNormalization", "Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu",
    "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_NORMS: Final = (
    "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization", "LogSoftmax",
    "MeanVarianceNormalization", "RMSNormalization", "Softmax",
)  # fmt: skip
_REDUCTIONS: Final = (
    "GlobalAveragePool", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
_POOLS: Final = ("AveragePool", "GlobalMaxPool", "MaxPool")
_COPIES: Final = (
    "Concat", "DepthToSpace", "Expand", "Gather", "GatherElements", "GatherND", "Pad", "Resize", "Slice",
    "SpaceToDepth", "Split", "Tile", "Transpose", "Upsample",
)  # fmt: skip

FAMILIES: Final[Mapping[str, str]] = {
    **dict.fromkeys((*_ARITHMETIC, *_COMPARISONS, *_UNARY, *_ACTIVATIONS), "pointwise"),
    **dict.fromkeys(_NORMS, "norm"),
    **dict.fromkeys(_REDUCTIONS, "reduction"),
    **dict.fromkeys(_POOLS, "pooling"),
    **dict.fromkeys(_COPIES, "copy"),
    **dict.fromkeys(WEIGHTED, "weighted"),
}
VIEWS: Final = frozenset({"Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operations that move no data: they only give it another shape."""


@dataclass(frozen=True)
class KernelLibrary:
    """How one library's kernels differ from another's.

    Attributes:
        name: What users call it.
        float_sums: Whether an INT8 convolution or matrix product writes its sums in float, for a second kernel that
            scales, adds, activates and quantizes them. TensorRT documents one kernel for all of that (R44).
        joins_any: Whether that second kernel, and any other without weights, takes along every elementwise operation
            and reduction behind it; documented are one addition without broadcast and one activation.
        quantizes_float_skip: Whether a Q behind an addition whose other operand is float joins the kernel; by the
            documentation the kernel then writes float, and the Q is one of its own (R23).
    """

    name: str
    float_sums: bool = False
    joins_any: bool = False
    quantizes_float_skip: bool = False


LIBRARIES: Final[Mapping[str, KernelLibrary]] = {
    "tensorrt": KernelLibrary("tensorrt"),
    "tensorrt-rtx": KernelLibrary("tensorrt-rtx", float_sums=True, joins_any=True, quantizes_float_skip=True),
}
"""``tensorrt`` as documented; ``tensorrt-rtx`` as seen in the plans of its builder, version 1.7."""


def fused_library(name: str) -> KernelLibrary:
    """The library of that name.

    Raises:
        FxqError: There is none.
    """
    if name not in LIBRARIES:
        raise FxqError(f"no kernel library is called {name!r}", hint=f"use one of {', '.join(LIBRARIES)}")
    return LIBRARIES[name]


def family(node: Node) -> str:
    """``weighted``, ``pointwise``, ``norm``, ``reduction``, ``pooling``, ``copy``, or ``other``."""
    return FAMILIES.get(node.op, "other") if not node.domain else "other"


def host_values(graph: OnnxGraph) -> frozenset[str]:
    """Tensors that are computed from shapes alone, which needs no kernel."""
    found: set[str] = set()
    for node in graph.nodes:
        moving = [name for name in node.inputs if name and name not in graph.fixed]
        if node.op in {"Shape", "Size"} or (moving and found.issuperset(moving)):
            found.update(node.outputs)
    return frozenset(found)


def is_view(graph: OnnxGraph, node: Node) -> bool:
    """Whether a node needs no kernel because its reader can take the data as they lie.

    Reshapes are, and transposes whose readers are matrix products, perhaps behind a constant factor.
    """
    if node.op in VIEWS:
        return True
    return node.op == "Transpose" and all(_is_product(graph, name) for name in node.outputs)


def folds_into_product(graph: OnnxGraph, node: Node) -> bool:
    """Whether a node multiplies by one number on the way into a matrix product, which then takes it along."""
    factors = [name for name in node.inputs if name in graph.fixed]
    if node.op not in {"Mul", "Div"} or len(factors) != 1:
        return False
    value = graph.shape(factors[0])
    return value is not None and all(size == 1 for size in value) and _is_product(graph, node.outputs[0])


def _is_product(graph: OnnxGraph, name: str) -> bool:
    """Whether only matrix products of activations read a tensor, perhaps through views and constant factors."""
    readers = graph.readers(name)
    return bool(readers) and all(
        r.node is not None
        and (
            r.node.op in {"MatMul", "Gemm"}
            or (r.node.op in VIEWS | {"Transpose"} and _is_product(graph, r.node.outputs[0]))
            or folds_into_product(graph, r.node)
        )
        for r in readers
    )


def closed_region(graph: OnnxGraph, entry: str, allowed: frozenset[str] = frozenset({"pointwise"})) -> list[Node]:
    """The smallest set of operations that read one activation and whose results meet again in one tensor.

    ``x * sigmoid(x)`` is one, a GELU or a LayerNormalization written out in single steps is another. Constants
    may come in from anywhere.

    Args:
        graph: The graph.
        entry: The activation.
        allowed: Families of the operations that may be part of it.

    Returns:
        The nodes in the graph's order; empty if the paths do not meet, or pass something else on the way.
    """
    inside: list[Node] = []
    live, known = {entry}, {entry}
    pending = {r.node.index: r.node for r in graph.readers(entry) if r.node is not None}
    if any(r.node is None for r in graph.readers(entry)):
        return []
    while pending:
        node = pending.pop(min(pending))
        free = [name for name in node.inputs if name and name not in graph.fixed]
        if not (family(node) in allowed or node.op in VIEWS) or not known.issuperset(free):
            return []
        inside.append(node)
        known.update(node.outputs)
        live.update(node.outputs)
        taken = {n.index for n in inside}
        live = {name for name in live if any(r.node is None or r.node.index not in taken for r in graph.readers(name))}
        if live == set(node.outputs) and not pending:
            return inside
        for name in node.outputs:
            if any(r.node is None for r in graph.readers(name)):
                return []
            pending.update({r.node.index: r.node for r in graph.readers(name) if r.node is not None})
    return []
