"""An engine report as text for a terminal and as one page of HTML."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, Final

from ..findings import Findings
from ..tables import readable
from .trt_kernels import LayerInfo
from .trt_prediction import Prediction, tensor_text

__all__ = ["KernelRow", "html_page", "report_text"]

_STYLE: Final = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem;color:#1c2733}
pre{white-space:pre-wrap} table{border-collapse:collapse;width:100%} th,td{text-align:left;vertical-align:top;
padding:.3rem .6rem;border-bottom:1px solid #d7dee6} th{background:#f2f5f8;position:sticky;top:0}
td{overflow-wrap:anywhere} .int8{background:#e3f4e6} .wide{background:#fdf0e1}
.error{color:#a61b1b} .warning{color:#8a5200} .advice{color:#35608c} code{font-size:12px} small{color:#5b6b7b}
"""


@dataclass(frozen=True)
class KernelRow:
    """One kernel of the engine and where it came from.

    Attributes:
        kernel: The kernel.
        predicted: Names of the predicted kernels that its nodes were to be in.
        fx_nodes: Nodes of fxq's graph.
        module_paths: The user's modules.
        sources: The user's ``file:line``.
    """

    kernel: LayerInfo
    predicted: tuple[str, ...] = ()
    fx_nodes: tuple[str, ...] = ()
    module_paths: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            **dataclasses.asdict(self),
            "weighted": self.kernel.weighted,
            "reads_int8": self.kernel.reads_int8,
            "activation_bytes": self.kernel.activation_bytes,
        }


def report_text(summary: str, rows: Sequence[KernelRow], findings: Findings, width: int) -> str:
    """Summary, kernels and differences."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    out = StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False, markup=False, emoji=False)
    console.print(summary, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("kernel", "reads", "writes", "ONNX nodes", "module", "source"):
        table.add_column(name, overflow="fold")
    for row in rows:
        kernel = row.kernel
        table.add_row(
            kernel.kind,
            "\n".join(map(tensor_text, kernel.inputs)),
            "\n".join(map(tensor_text, kernel.outputs)),
            " + ".join(kernel.onnx_nodes) or kernel.name,
            ", ".join(row.module_paths),
            ", ".join(row.sources),
        )
    console.print(table)
    console.print(f"differences: {findings}", soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def html_page(name: str, summary: str, rows: Sequence[KernelRow], findings: Findings, prediction: Prediction) -> str:
    """One self-contained page."""
    title = html.escape(name)
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head><body>',
            f"<h1>{title}</h1><pre>{html.escape(summary)}</pre>",
            f"<h2>Differences ({len(findings)})</h2>",
            _table(("rule", "where", "what", "why", "fix"), _finding_rows(findings)),
            f"<h2>Kernels ({len(rows)})</h2>",
            _table(("kernel", "reads", "writes", "ONNX nodes", "module and source"), map(_kernel_row, rows)),
            f"<h2>Predicted kernels ({len(prediction.kernels)})</h2>",
            _table(("kernel", "precision", "activations", "ONNX nodes"), _predicted_rows(prediction)),
            "</body></html>\n",
        ]
    )


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cells(*texts: str, css: str = "") -> str:
    cells = "".join(f"<td>{html.escape(text).replace(chr(10), '<br>')}</td>" for text in texts)
    return f'<tr class="{css}">{cells}</tr>'


def _finding_rows(findings: Findings) -> Iterable[str]:
    for finding in findings:
        where = "\n".join(part for part in (finding.node, finding.module_path, finding.source) if part)
        text = (finding.rule, where or "the engine", finding.message, finding.why, finding.fix)
        yield _cells(*text, css=finding.severity)


def _kernel_row(row: KernelRow) -> str:
    kernel = row.kernel
    css = ("int8" if kernel.reads_int8 else "wide") if kernel.weighted else ""
    return _cells(
        f"{kernel.kind}\n{kernel.name}",
        "\n".join(map(tensor_text, kernel.inputs)),
        "\n".join(map(tensor_text, kernel.outputs)),
        "\n".join(kernel.onnx_nodes),
        "\n".join((*row.module_paths, *row.sources)),
        css=css,
    )


def _predicted_rows(prediction: Prediction) -> Iterable[str]:
    for kernel in prediction.kernels:
        size = kernel.activation_bytes
        css = ("int8" if kernel.precision == "int8" else "wide") if kernel.weighted else ""
        moved = "?" if size is None else readable(size)
        yield _cells(kernel.kind, kernel.precision, moved, " + ".join(kernel.onnx_nodes), css=css)
