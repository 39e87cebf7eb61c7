"""The zoo page's second table: quantizers side by side on a few networks, from compare.py's results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]

INTRODUCTION = """## Beside other quantizers

The same float network and calibration images for all, one ONNX Runtime and one builder (static batch 8, 224 pixels),
by `benchmarks/compare.py`. **INT8 kernels**: kernels that convolve or multiply matrices and read INT8, of all such.
**MB moved**: activations that all kernels read and write, 10^6 bytes, depthwise convolutions included, which this
builder pads in INT8. **SQNR**: by ONNX Runtime over all images, and the median over single
images: where they part, a few images of great energy decide the first.
"""


def _megabytes(value: Any) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"


def _cells(row: Row) -> list[str]:
    if not row.get("ok"):
        return [f"failed: {' '.join(str(row.get('error', '?')).split())[:120]}".replace("|", "/"), "", "", ""]
    engine, runtime = row.get("engine", {}), row.get("onnxruntime", {})
    if not engine.get("ok"):
        kernels = "refused"
    else:
        kernels = f"{engine['weighted_kernels_reading_int8']}/{engine['weighted_kernels']}"
    median = runtime.get("sqnr_median_db")
    return [
        kernels,
        _megabytes(engine.get("activation_bytes_total")),
        f"{runtime['sqnr_db']:.1f}" if "sqnr_db" in runtime else "-",
        "-" if median is None else f"{median:.1f}",
    ]


def section(results: Mapping[str, Mapping[str, Row]]) -> str:
    """The markdown of all networks in `results`."""
    head = ["network", "quantizer", "INT8 kernels", "MB moved", "SQNR dB", "median"]
    lines = [INTRODUCTION, "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for task, rows in results.items():
        lines += ["| " + " | ".join([task, peer, *_cells(row)]) + " |" for peer, row in rows.items()]
    return "\n".join(lines)
