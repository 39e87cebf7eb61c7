"""Where a built engine differs from what was meant, with the rule that was broken and the fix.

Each difference is a :class:`fxq.findings.Finding`, at the ONNX node it belongs to. If the linter found a breach at that
node, the difference is its consequence, and carries its rule and its fix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..findings import Finding, Findings, Severity
from ..tables import readable
from .onnx_graph import OnnxGraph
from .onnx_nodes import Node, Quant
from .trt_fusions import family
from .trt_kernels import LayerInfo, TensorInfo
from .trt_prediction import Prediction

__all__ = ["Built", "differences", "float_sums"]

_FLOATS = frozenset({"float32", "float16", "bfloat16"})
_SMALL = 1024
"""Tensors of fewer bytes are not worth a line: scalars, statistics."""
_NORMS = frozenset(
    f"{kind}Normalization" for kind in ("Layer", "Instance", "Group", "RMS", "MeanVariance", "Batch", "Lp")
) | {"Softmax", "LogSoftmax"}
"""What computes in floating point whatever is around it (R38), and so reads a float tensor."""


@dataclass(frozen=True)
class Built:
    """An engine's kernels beside the file they came from.

    Attributes:
        graph: The ONNX file.
        kernels: The engine's kernels.
        nodes: For each kernel the ONNX nodes that it came from.
        prediction: What was meant.
        lint: What the linter says of the file.
    """

    graph: OnnxGraph
    kernels: Sequence[LayerInfo]
    nodes: Sequence[tuple[Node, ...]]
    prediction: Prediction
    lint: Findings

    def producers(self) -> Mapping[str, int]:
        """The kernel that writes a tensor, by TensorRT's name of it."""
        return {tensor.name: index for index, kernel in enumerate(self.kernels) for tensor in kernel.outputs}


def differences(built: Built) -> Findings:
    """All differences, worst first within a kind: precision, float tensors, lone Q/DQ, requantizations, reformats."""
    found = [*_precision(built), *_float_between(built), *_alone(built), *_requantized(built), *_reformats(built)]
    return Findings(tuple(found))


def float_sums(built: Built) -> int:
    """Bytes that INT8 kernels write in float for a kernel behind them that still belongs to the same ONNX node."""
    return sum(tensor.nbytes or 0 for _, tensor, _ in _sums(built))


def _finding(
    built: Built,
    node: Node,
    rule: str,
    message: str,
    *,
    blame: Sequence[Node] = (),
    severity: Severity = "warning",
    fix: str = "",
) -> Finding:
    """A difference at `node`; the linter's rule and fix where it found a breach at one of `blame`."""
    names = {n.name for n in (node, *blame)}
    cause = next((f for f in built.lint if f.node in names and f.severity != "advice"), None)
    if cause is not None:
        message = f"{message}; {cause.rule} at {cause.node}: {cause.message}"
        rule, fix, severity = cause.rule, cause.fix, "warning"
    return node.finding(rule, severity, message, fix=fix)


def _precision(built: Built) -> Iterator[Finding]:
    """Convolutions and matrix products that do not read 8 bits.

    Of a transposed convolution it is no fault of the file's (R43).
    """
    for kernel, nodes in zip(built.kernels, built.nodes, strict=True):
        main = next((n for n in nodes if family(n) == "weighted"), None)
        if main is None or not kernel.weighted or kernel.reads_int8 or _reads_fp8(kernel):
            continue
        meant = built.prediction.kernel_of(main.name)
        read = ", ".join(sorted({tensor.dtype for tensor in kernel.inputs}))
        if main.op == "ConvTranspose":
            if _partly_quantized(built, main):
                yield _transposed(built, main, f"{kernel.kind} {kernel.name} reads {read}")
        elif meant is not None and meant.precision in {"int8", "float8"}:
            message = f"meant for {meant.precision}, and {kernel.kind} {kernel.name} reads {read}"
            yield _finding(built, main, "R20", message, blame=_before(built, main))
        elif _partly_quantized(built, main):
            message = f"quantized, and {kernel.kind} {kernel.name} reads {read}"
            yield _finding(built, main, "R20", message, blame=_before(built, main))


def _transposed(built: Built, node: Node, what: str) -> Finding:
    """A quantized transposed convolution in float: libraries and versions differ in which of them have INT8 kernels."""
    dq = built.graph.dequantizer(node.inputs[1])
    scales = (
        "its weight float"
        if dq is None
        else f"a weight with one scale per {'tensor' if dq.axis is None else 'channel'}"
    )
    message = f"quantized, with {scales}, and {what}: this builder chose no INT8 kernel for a transposed convolution"
    fix = "None is needed: it computes as in float. A recipe rule that leaves it float saves its Q/DQ."
    return node.finding("R43", "advice", message, fix=fix)


def _reads_fp8(kernel: LayerInfo) -> bool:
    return bool(kernel.inputs) and kernel.inputs[0].dtype == "float8"


def _partly_quantized(built: Built, node: Node) -> bool:
    return any(dq is not None for name in node.inputs[:2] for dq in built.graph.dequantizers(name))


def _before(built: Built, node: Node) -> list[Node]:
    """The nodes that make what a node reads, and those behind their Q/DQ."""
    found = []
    for name in node.inputs:
        producer = built.graph.producers.get(built.graph.origin(name))
        while producer is not None:
            found.append(producer)
            if built.graph.quant(producer) is None:
                break
            producer = built.graph.producers.get(producer.inputs[0])
    return found


def _float_between(built: Built) -> Iterator[Finding]:
    """Float tensors that a kernel beside INT8 writes for another that writes INT8."""
    sums = {tensor.name for _, tensor, _ in _sums(built)}
    behind_sums = {reader for _, _, reader in _sums(built)}
    producers = built.producers()
    for index, kernel in enumerate(built.kernels):
        quantizes = any(t.dtype == "int8" for t in kernel.outputs) and not kernel.weighted
        for tensor in kernel.inputs:
            first = producers.get(tensor.name)
            if first is None or tensor.name in sums or not _large_float(tensor) or not quantizes:
                continue
            before = built.kernels[first]
            node = _last(built.nodes[index]) or _last(built.nodes[first])
            low = any(t.dtype == "int8" for t in (*before.inputs, *before.outputs)) or first in behind_sums
            if node is None or not low or any(n.op in _NORMS for n in built.nodes[index]):
                continue
            message = f"{tensor.dtype} {tensor.name} of {_size(tensor)} lies between {before.name} and {kernel.name}"
            together = (*built.nodes[first], *built.nodes[index])
            message += ", which compute, read or write INT8"
            yield _finding(built, node, "R39", message, blame=together, severity="advice")


def _last(nodes: Sequence[Node]) -> Node | None:
    return nodes[-1] if nodes else None


def _large_float(tensor: TensorInfo) -> bool:
    """Whether a float tensor moves bytes worth a line; of a dynamic batch one row counts."""
    if tensor.dtype not in _FLOATS:
        return False
    size = _row(tensor).nbytes
    return size is None or size > _SMALL


def _row(tensor: TensorInfo) -> TensorInfo:
    """One row of a tensor whose first dimension depends on the profile; any other as it is."""
    dynamic = bool(tensor.shape) and tensor.shape[0] < 0
    return replace(tensor, shape=tensor.shape[1:]) if dynamic else tensor


def _size(tensor: TensorInfo) -> str:
    """Bytes for people; the shape where they depend on the optimization profile."""
    if tensor.nbytes is not None:
        return readable(tensor.nbytes)
    return f"[{', '.join('?' if dim < 0 else str(dim) for dim in tensor.shape)}]"


def _sums(built: Built) -> list[tuple[int, TensorInfo, int]]:
    """Writer, tensor and reader where an INT8 operation is spread over two kernels."""
    found, producers = [], built.producers()
    for index, kernel in enumerate(built.kernels):
        here = {n.name for n in built.nodes[index]} if kernel.kind.lower() != "reformat" else set()
        for tensor in kernel.inputs:
            first = producers.get(tensor.name)
            if first is None or tensor.dtype not in _FLOATS or not built.kernels[first].reads_int8:
                continue
            if any(family(n) == "weighted" and n.name in here for n in built.nodes[first]):
                found.append((first, tensor, index))
    return found


def _alone(built: Built) -> Iterator[Finding]:
    """Kernels that do nothing but quantize or dequantize, except at the network's inputs."""
    for kernel, nodes in zip(built.kernels, built.nodes, strict=True):
        quants = [quant for n in nodes if (quant := built.graph.quant(n)) is not None]
        if not quants or len(quants) != len(nodes):
            continue
        first = quants[0]
        if first.tensor in built.graph.fixed or built.graph.origin(first.tensor) in built.graph.inputs:
            continue
        if {t.dtype for t in kernel.inputs} == {"int8"} and {t.dtype for t in kernel.outputs} == {"int8"}:
            continue
        word = "quantize" if first.quantizes else "dequantize"
        message = f"kernel {kernel.name} does nothing but {word}"
        blame = _kernel_before(built, first.tensor)
        reader = _low_reader(built, first) if first.quantizes else None
        if reader is None:
            yield _finding(built, first.node, "R31", message, blame=blame)
        else:
            message += f", for {reader.name}"
            fix = f"What comes before it could not take it along: leave {reader.name} float if that measures faster."
            yield _finding(built, first.node, "R31", message, blame=blame, severity="advice", fix=fix)


def _low_reader(built: Built, q: Quant) -> Node | None:
    """The weighted operation that reads what a Q quantizes, in 8 bits; None if none does."""
    dequantizers = [reader.node for reader in built.graph.readers(q.node.outputs[0]) if reader.node is not None]
    readers = (r.node for dq in dequantizers for r in built.graph.final_readers(dq.outputs[0]))
    return next((node for node in readers if node is not None and family(node) == "weighted"), None)


def _kernel_before(built: Built, tensor: str) -> Sequence[Node]:
    """The nodes of the predicted kernel that makes a tensor."""
    producer = built.graph.producers.get(built.graph.origin(tensor))
    kernel = built.prediction.kernel_of(producer.name) if producer is not None else None
    names = () if kernel is None else kernel.onnx_nodes
    return [node for node in built.graph.nodes if node.name in names]


def _requantized(built: Built) -> Iterator[Finding]:
    """Kernels that read INT8, compute nothing, and write INT8."""
    for kernel, nodes in zip(built.kernels, built.nodes, strict=True):
        quants = [n for n in nodes if built.graph.quant(n) is not None]
        busy = [n for n in nodes if built.graph.quant(n) is None and n.op != "Concat" and not _moves(n)]
        dtypes = {t.dtype for t in (*kernel.inputs, *kernel.outputs)}
        if quants and not busy and not kernel.weighted and dtypes == {"int8"} and _rounds(kernel):
            yield _finding(built, quants[-1], "R19", f"kernel {kernel.name} only changes the scale", blame=nodes)


def _moves(node: Node) -> bool:
    return family(node) in {"copy", "pooling"}


def _rounds(kernel: LayerInfo) -> bool:
    """Whether a kernel with INT8 on both sides rounds again; the names of Myelin's kernels list their steps."""
    return "Roun" in kernel.name or not kernel.name.startswith("__myl")


def _reformats(built: Built) -> Iterator[Finding]:
    """Kernels that only change the format of a tensor in memory."""
    outer = built.graph.inputs | built.graph.outputs
    for kernel, nodes in zip(built.kernels, built.nodes, strict=True):
        moves = kernel.kind.lower() == "reformat" or (not nodes and "Move" in kernel.name)
        if not moves:
            continue
        names = {t.name for t in (*kernel.inputs, *kernel.outputs)}
        dtypes = " to ".join(dict.fromkeys(t.dtype for t in (*kernel.inputs, *kernel.outputs)))
        where = "at the network's edge" if names & outer else "inside the network"
        message = f"{kernel.name} rewrites {dtypes} {where}"
        node = nodes[0] if nodes else None
        severity = "advice" if names & outer else "warning"
        yield Finding(
            "R29" if severity == "warning" else "R18",
            "warning" if severity == "warning" else "advice",
            node.name if node is not None else None,
            message,
            fix="One format is left: feed the engine the type and format that its first kernel reads."
            if severity == "advice"
            else "Give the kernels on both sides one type, so that they can share a format.",
            module_path=node.module_path if node is not None else None,
            source=node.source if node is not None else None,
        )
