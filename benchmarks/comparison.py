"""The page of engines side by side: what compare.py and compute_types.py found, as the tables of docs/comparison.md.

    python benchmarks/comparison.py --collect results.json types.json --write
    python benchmarks/comparison.py --check

--collect takes over what these runs stored, network by network, into comparison.json beside this file; --write puts
the tables that it gives into the page; --check measures nothing, and says whether the page is what it gives.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pages import written

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "comparison.json"
PAGE: Final = HERE.parent / "docs" / "comparison.md"
BEGIN: Final = "<!-- comparison: written by benchmarks/comparison.py -->"
END: Final = "<!-- comparison: end -->"
OWN: Final = "fxq"
NAMES: Final = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "mobilenet_v3_large": "MobileNetV3-L",
    "efficientnet_b0": "EfficientNet-B0",
    "densenet121": "DenseNet-121",
    "convnext_tiny": "ConvNeXt-T",
    "vit_b_16": "ViT-B/16",
    "swin_t": "Swin-T",
}
QUANTIZERS: Final = {
    "fp32": "none (fp32)",
    "fxq": "fxq",
    "fxq_max": 'fxq, method "max"',
    "modelopt_torch_max": "modelopt, PyTorch",
    "modelopt_onnx_max": "modelopt, ONNX",
    "ort_trt_minmax": "ONNX Runtime",
}
ENGINE: Final = (
    "weighted_kernels",
    "weighted_kernels_reading_int8",
    "activation_bytes_total",
    "activation_bytes_depthwise",
)
TYPES: Final = ("fp32", "fp16", "bf16")
Row = Mapping[str, Any]


def collected(files: Iterable[Path], before: Mapping[str, Any]) -> dict[str, Any]:
    """`before` with what the files add: runs of compare.py under ``engines``, of compute_types.py under ``types``."""
    found: dict[str, Any] = {"engines": dict(before.get("engines", {})), "types": dict(before.get("types", {}))}
    for file in files:
        for network, rows in json.loads(file.read_text()).items():
            if "fp16" in rows:
                found["types"].setdefault(network, {}).update(rows)
                continue
            kept = {peer: _short(row) for peer, row in rows.items() if peer in QUANTIZERS}
            found["engines"].setdefault(network, {}).update(kept)
    return found


def _short(row: Row) -> dict[str, Any]:
    """What the page shows of one quantizer's run."""
    if not row.get("ok"):
        return {"error": " ".join(str(row.get("error", "?")).split())[:160]}
    engine, runtime = row["engine"], row["onnxruntime"]
    if not engine.get("ok"):
        return {"error": " ".join(map(str, engine.get("errors", ["not built"])))[:160]}
    short = {key: engine[key] for key in ENGINE}
    return {**short, "sqnr_db": runtime["sqnr_db"], "sqnr_median_db": runtime["sqnr_median_db"]}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    head = list(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def megabytes(value: float) -> str:
    return f"{value / 1e6:.1f}"


def engines(results: Mapping[str, Mapping[str, Row]]) -> Iterator[list[str]]:
    """One line a network and quantizer."""
    for network in NAMES:
        rows = results.get(network, {})
        for peer, shown in QUANTIZERS.items():
            if peer not in rows:
                continue
            row = rows[peer]
            if "error" in row:
                yield [NAMES[network], shown, f"failed: {row['error']}".replace("|", "/"), *[""] * 5]
                continue
            total, beside = row["activation_bytes_total"], row["activation_bytes_depthwise"]
            yield [
                NAMES[network],
                shown,
                f"{row['weighted_kernels_reading_int8']}/{row['weighted_kernels']}",
                megabytes(total),
                megabytes(beside) if beside else "",
                megabytes(total - beside),
                f"{row['sqnr_db']:.1f}",
                f"{row['sqnr_median_db']:.1f}",
            ]


def share(row: Row) -> float:
    """The share of weighted kernels that read INT8."""
    return float(row["weighted_kernels_reading_int8"]) / float(row["weighted_kernels"])


def verdicts(results: Mapping[str, Mapping[str, Row]]) -> Iterator[list[str]]:
    """fxq against the least bytes and the best signal to noise of any other quantizer with no larger INT8 share."""
    for network in NAMES:
        rows = {peer: row for peer, row in results.get(network, {}).items() if "error" not in row}
        own = rows.get(OWN)
        others = [r for p, r in rows.items() if not p.startswith(("fp32", OWN)) and own and share(r) <= share(own)]
        if own is None or not others:
            continue
        least = min(r["activation_bytes_total"] for r in others)
        best, middle = (max(r[key] for r in others) for key in ("sqnr_db", "sqnr_median_db"))
        yield [
            NAMES[network],
            f"{own['activation_bytes_total'] / least - 1:+.1%}",
            f"{own['sqnr_db'] - best:+.1f}",
            f"{own['sqnr_median_db'] - middle:+.1f}",
        ]


def types(results: Mapping[str, Mapping[str, Row]]) -> Iterator[list[str]]:
    """One line a network and compute type."""
    for network in NAMES:
        rows = results.get(network, {})
        for name, row in ((name, rows[name]) for name in TYPES if name in rows):
            causes, meant = row["causes"], row["predicted"]
            findings = ", ".join(f"{count} {kind}" for kind, count in sorted(row["findings"].items()))
            yield [
                NAMES[network],
                name,
                *(str(meant[library]["kernels"]) for library in ("tensorrt", "tensorrt-rtx")),
                str(row["kernels"]),
                f"{row['int8']}/{row['weighted']}",
                f"{meant['tensorrt-rtx']['fusions']:.1%}",
                megabytes(row["activation_bytes"]),
                *(megabytes(causes[key]) for key in ("sums", "int8", "float", "pools", "io")),
                str(len(causes["float32_left"])) if name != "fp32" else "",
                findings or "none",
            ]


def tables(results: Mapping[str, Any]) -> str:
    """What stands between the page's markers."""
    head = ("network", "quantizer", "INT8 kernels", "MB moved", "at depthwise", "elsewhere", "SQNR dB", "median dB")
    kernels = ("network", "type", "predicted", "predicted, RTX", "built", "INT8", "fusions alike", "MB moved")
    bytes_ = ("sums", "INT8", "float", "pools", "edges", "float32 left", "findings")
    return "\n\n".join(
        [
            table(head, engines(results["engines"])),
            "fxq against the best of the others, each figure by itself:",
            table(("network", "MB moved", "SQNR dB", "median dB"), verdicts(results["engines"])),
            "fxq's files by the type of what is not quantized:",
            table((*kernels, *bytes_), types(results["types"])),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, nargs="+", default=[], help="results of compare.py, compute_types.py")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    parser.add_argument("--check", action="store_true", help="only compare the page with the results")
    args = parser.parse_args()
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    if args.collect:
        results = collected(args.collect, results)
        args.results.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    text = tables(results)
    page = args.page.read_text()
    if args.check and page != written(page, text, BEGIN, END):
        sys.exit(f"{args.page} does not show {args.results}: run comparison.py --write")
    if args.write:
        args.page.write_text(written(page, text, BEGIN, END))
    if not (args.write or args.check):
        print(text)


if __name__ == "__main__":
    main()
