"""What a graph does in low precision, where, by which rule, and what stays float and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO

import torch
from torch import fx

from .graph import Note, annotations, attribute, origin, state
from .ops import kind_name
from .qdq import DEQUANTIZE, QUANTIZE
from .quantizer import Quantizer
from .verify import is_quantizer

__all__ = ["EdgeRow", "OpRow", "Report", "build_report"]

_SMALLEST_WIDTH = 100


@dataclass(frozen=True)
class EdgeRow:
    """One edge that placement decided on.

    Attributes:
        edge: Argument index, or ``output``.
        tensor: The tensor that the edge reads.
        quantized: Whether it reads it through a quantizer.
        spec: The spec as text; "float" without one.
        scale: The scale, or the largest of several; None while unknown.
        channels: How many scales there are.
        rule: Id of the rule that decided.
        reason: Its sentence.
    """

    edge: int | str
    tensor: str
    quantized: bool
    spec: str
    scale: float | None
    channels: int
    rule: str
    reason: str


@dataclass(frozen=True)
class OpRow:
    """One operation that placement decided on.

    Attributes:
        node: Its node.
        kind: Its op kind.
        module_path: The user's module.
        source: The user's ``file:line``.
        weighted: Whether it is a convolution or matrix product.
        precision: ``int8`` (or another dtype) if all edges that the target wants quantized are, else ``float``; for
            an addition, the skip edge's.
        edges: Its edges.
    """

    node: str
    kind: str
    module_path: str
    source: str | None
    weighted: bool
    precision: str
    edges: tuple[EdgeRow, ...]


@dataclass(frozen=True)
class Report:
    """What :func:`fxq.report` returns; print it.

    Attributes:
        rows: Operations in graph order.
        notes: What users should hear: declined rewrites, advice, parts kept whole.
        stage: ``prepared``, ``calibrated`` or ``quantized``.
        warnings: What makes the numbers unfit for use, such as calibration on random data.
    """

    rows: tuple[OpRow, ...]
    notes: tuple[Note, ...]
    stage: str
    warnings: tuple[str, ...] = ()

    @property
    def weighted(self) -> tuple[OpRow, ...]:
        """The convolutions and matrix products."""
        return tuple(row for row in self.rows if row.weighted)

    @property
    def skips(self) -> tuple[OpRow, ...]:
        """The residual additions whose skip edge is quantized."""
        return tuple(row for row in self.rows if row.kind == "add" and row.precision != "float")

    def summary(self) -> str:
        """One line."""
        low = sum(row.precision != "float" for row in self.weighted)
        return (
            f"{self.stage}: {low} of {len(self.weighted)} weighted operations quantized, "
            f"{len(self.skips)} residual skips quantized, {len(self.notes)} notes"
        )

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.summary(), title_justify="left", pad_edge=False)
        for column in ("node", "operation", "precision", "quantized edges", "rules"):
            table.add_column(column, overflow="fold")
        for row in self.rows:
            edges = [f"{e.tensor} {_scale_text(e)}" for e in row.edges if e.quantized]
            rules = " ".join(dict.fromkeys(e.rule for e in row.edges))
            table.add_row(row.node, row.kind, row.precision, "\n".join(edges) or "-", rules)
        out = Console(file=StringIO(), width=max(_SMALLEST_WIDTH, Console().width), no_color=True)
        for warning in self.warnings:
            out.print(f"WARNING: {warning}", markup=False)
        out.print(table)
        for note in self.notes:
            place = f" ({note.module_path})" if note.module_path else ""
            out.print(
                f"{note.kind}: {note.node}{place}: {note.text} [{note.rule}]", markup=False, soft_wrap=True
            )
        text = out.file.getvalue()  # type: ignore[attr-defined]
        return str(text).rstrip()


def build_report(gm: fx.GraphModule) -> Report:
    """The report on a graph from fxq.

    Args:
        gm: A traced, prepared or converted graph.
    """
    held = state(gm)
    rows = tuple(_rows(gm))
    stage = "traced"
    if "quantized" in held.properties:
        stage = "quantized"
    elif "observed" in held.properties:
        stage = "calibrated" if "calibration" in held.provenance else "prepared"
    warnings = []
    if held.provenance.get("calibration", {}).get("performance_only"):
        warnings.append("calibrated on random data: good for measuring speed, useless for accuracy")
    return Report(rows, held.notes, stage, tuple(warnings))


def _rows(gm: fx.GraphModule) -> Iterator[OpRow]:
    placed = state(gm).target.ops
    for node in gm.graph.nodes:
        kind = kind_name(node)
        edges = tuple(_edges(gm, node))
        if not edges and kind not in placed:
            continue
        where = origin(node)
        wanted = [e for e in edges if e.edge != "output"]
        lows = {e.spec.split()[0] for e in wanted if e.quantized}
        whole = bool(wanted) and all(e.quantized for e in wanted)
        yield OpRow(
            node.name, kind, where.module_path, where.source, kind in placed,
            "/".join(sorted(lows)) if whole else "float", edges,
        )  # fmt: skip


def _edges(gm: fx.GraphModule, node: fx.Node) -> Iterator[EdgeRow]:
    for edge, annotation in annotations(node).items():
        read = node.args[edge] if isinstance(edge, int) else next(iter(node.users), None)
        if not isinstance(read, fx.Node):
            continue
        tensor, scale = _behind(gm, read)
        spec = str(annotation.spec) if annotation.spec is not None else "float"
        numbers = scale.numel() if scale is not None else 0
        largest = float(scale.max()) if scale is not None and numbers else None
        yield EdgeRow(
            edge, tensor, scale is not None, spec, largest, numbers, annotation.rule, annotation.reason
        )  # fmt: skip


def _behind(gm: fx.GraphModule, read: fx.Node) -> tuple[str, torch.Tensor | None]:
    """The name of the tensor behind a quantizer, and its scale; (name, None) for a float tensor."""
    if is_quantizer(read):
        module = attribute(gm, str(read.target))
        return (module.tensor, module.scale) if isinstance(module, Quantizer) else (read.name, None)
    if read.target is DEQUANTIZE:
        source, scale = read.args[0], attribute(gm, str(read.args[1].target))  # type: ignore[union-attr]
        if isinstance(source, fx.Node) and source.target is QUANTIZE:
            source = source.args[0]
        return str(source), scale
    return read.name, None


def _scale_text(edge: EdgeRow) -> str:
    if edge.scale is None:
        return "(not calibrated)"
    return (
        f"scale {edge.scale:.3g}" if edge.channels == 1 else f"{edge.channels} scales up to {edge.scale:.3g}"
    )
