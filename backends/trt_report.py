"""An engine against its prediction: each kernel back to the user's line, and each difference with its reason."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from ..errors import EngineError
from ..findings import Findings
from ..tables import readable
from .files import write_whole
from .onnx_graph import OnnxGraph
from .onnx_lint import lint_onnx
from .onnx_nodes import Node
from .trt_agreement import Agreement, compare_kernels
from .trt_differences import Built, differences, float_sums
from .trt_engine import Engine
from .trt_kernels import LayerInfo, kernels_from_file
from .trt_predict import predict_kernels
from .trt_prediction import Prediction
from .trt_report_views import KernelRow, html_page, report_text

__all__ = ["EngineReport", "report_engine"]

_RTX_KINDS = frozenset({"correlation", "gett"})
"""Layer types that only TensorRT-RTX's plans have."""


@dataclass(frozen=True)
class EngineReport:
    """What :func:`fxq.engine_report` returns; print it.

    Attributes:
        name: The engine or the file that listed its kernels.
        builder: ``tensorrt`` or ``tensorrt-rtx``, told by the kernels.
        rows: The engine's kernels in their order.
        prediction: The kernels that the documented fusions give.
        agreement: How far the two agree.
        findings: Where they differ, with rule and fix.
        sum_bytes: Bytes that INT8 kernels write in float for a second kernel of the same operation; TensorRT
            documents one kernel, TensorRT-RTX's builder makes two.
    """

    name: str
    builder: str
    rows: tuple[KernelRow, ...]
    prediction: Prediction
    agreement: Agreement
    findings: Findings
    sum_bytes: int = 0

    @property
    def activation_bytes(self) -> int | None:
        """Bytes of activations that one inference reads and writes; None where a size is not known."""
        sizes = [row.kernel.activation_bytes for row in self.rows]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def summary(self) -> str:
        """A few lines."""
        weighted = [row.kernel for row in self.rows if row.kernel.weighted]
        low = sum(kernel.reads_int8 for kernel in weighted)
        moved = self.activation_bytes
        lines = [
            f"{self.name}, built by {'TensorRT-RTX' if self.builder == 'tensorrt-rtx' else 'TensorRT'}",
            f"weighted kernels reading INT8: {low} of {len(weighted)}",
            f"against the documented fusions: {self.agreement}",
            f"activations moved: {'depend on the batch' if moved is None else readable(moved)}",
        ]
        if self.sum_bytes:
            lines.append(
                f"{readable(self.sum_bytes)} of that are float sums of INT8 operations, written by one kernel and read "
                f"by the next: this builder splits what TensorRT documents as one kernel"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "name": self.name,
            "builder": self.builder,
            "activation_bytes": self.activation_bytes,
            "sum_bytes": self.sum_bytes,
            "agreement": {
                "kernels_predicted": self.agreement.kernels[0],
                "kernels_built": self.agreement.kernels[1],
                "precision_share": self.agreement.precision_share,
                "fusion_share": self.agreement.fusion_share,
            },
            "kernels": [row.to_dict() for row in self.rows],
            "predicted": self.prediction.to_dict()["kernels"],
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    def text(self, width: int = 120) -> str:
        """The report for people.

        Args:
            width: Columns.
        """
        return report_text(self.summary(), self.rows, self.findings, width)

    def html(self) -> str:
        """The report as one page of HTML that refers to nothing outside itself."""
        return html_page(self.name, self.summary(), self.rows, self.findings, self.prediction)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write :meth:`html` to a file, whole or not at all.

        Args:
            path: An existing file is replaced.

        Returns:
            The path.
        """
        write_whole(path, self.html().encode())
        return Path(path)

    def __str__(self) -> str:
        return self.text()


def report_engine(engine: Engine | str | PathLike[str], onnx_path: str | PathLike[str]) -> EngineReport:
    """Compare an engine with what its ONNX file should have become.

    Args:
        engine: What :func:`fxq.build` returned; or a file with the inspector's JSON (TensorRT 10 or 11, detailed
            profiling verbosity) or a builder's VERBOSE log that lists kernels.
        onnx_path: The ONNX file that it was built from.

    Raises:
        EngineError: The kernels are not known.
        FxqError: There is no such ONNX file.
    """
    if isinstance(engine, Engine):
        name, found = engine.path.name, engine.kernels
        if found is None:
            raise EngineError(
                f"the kernels of {engine.path} are not known: its builder lists none, and no GPU here can load it",
                hint="save the inspector's JSON where the engine runs, and give that file",
            )
    else:
        name, found = Path(fspath(engine)).name, kernels_from_file(Path(fspath(engine)))
    graph = OnnxGraph(onnx_path)
    prediction = predict_kernels(onnx_path)
    nodes = [_nodes_of(graph, kernel) for kernel in found]
    kernels = tuple(
        dataclasses.replace(kernel, onnx_nodes=tuple(node.name for node in held))
        for kernel, held in zip(found, nodes, strict=True)
    )
    built = Built(graph, kernels, nodes, prediction, lint_onnx(onnx_path))
    return EngineReport(
        name=name,
        builder="tensorrt-rtx" if any(kernel.kind in _RTX_KINDS for kernel in kernels) else "tensorrt",
        rows=tuple(_row(kernel, held, prediction) for kernel, held in zip(kernels, nodes, strict=True)),
        prediction=prediction,
        agreement=compare_kernels(graph, prediction.kernels, kernels),
        findings=differences(built),
        sum_bytes=float_sums(built),
    )


def _row(kernel: LayerInfo, nodes: Sequence[Node], prediction: Prediction) -> KernelRow:
    meant = [k.name for node in nodes if (k := prediction.kernel_of(node.name)) is not None]
    return KernelRow(
        kernel=kernel,
        predicted=tuple(dict.fromkeys(meant)),
        fx_nodes=_once(node.fx_node for node in nodes),
        module_paths=_once(node.module_path for node in nodes),
        sources=_once(node.source for node in nodes),
    )


def _once(values: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value))


def _nodes_of(graph: OnnxGraph, kernel: LayerInfo) -> tuple[Node, ...]:
    """The ONNX nodes of a kernel: those its metadata name, else those that its name is made of."""
    known = {node.name: node for node in graph.nodes}
    if kernel.onnx_nodes:
        return tuple(known[name] for name in kernel.onnx_nodes if name in known)
    name = re.sub(r"^Reformatting CopyNode for (Input|Output) Tensor \d+ to ", "", kernel.name)
    parts = re.split(r" \+ |PWN\(|, |\)|\.\.\.|\{ForeignNode\[|\]\}", name)
    return tuple(dict.fromkeys(known[part.strip()] for part in parts if part.strip() in known))
