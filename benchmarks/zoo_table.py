"""The zoo's page: its rows as markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]

INTRODUCTION = """# The zoo

Written by `benchmarks/zoo.py`; do not edit. Every torchvision network for classification and segmentation, the
video networks, and what is a graph of the detectors (backbone, pyramid and heads), each quantized with fxq's
defaults, nothing left out by hand.

The weights are seeded and random: normalizations are varied and their statistics warmed up on structured noise, and
what torchvision initializes with zeros is drawn. A random network is harder on quantization than a trained one, so
the decibels are for comparing rows, not for judging a trained network.

- **input**: shape of one input, then calibration inputs / judging inputs; networks of more than 100 million
  parameters and long clips get two of each.
- **placed**: convolutions and matrix products quantized, of all. **skips**: residual additions whose skip is
  quantized, of all.
- **SQNR**: 10 log10 of signal over noise against the float network, by ONNX Runtime on the exported file (in
  brackets by PyTorch), over all outputs, each weighted alike.
- **40 dB in**: the same of the *float* network, when its input has noise of 40 dB. What is far below 40 amplifies
  noise: a random network of that kind is chaotic, and no 8 bits can follow it. (The outputs of a random EfficientNet
  differ a hundredfold from one image to the next.)
- **findings**: errors / warnings / advice of `fxq.lint` on the file; the ONNX checker has passed it in full.
- **kernels**: kernels of the built engine that convolve or multiply matrices and read INT8, of all such. **identity**:
  identity skips that kernels read in INT8, of all. The builder is TensorRT-RTX's on a CPU, static batch 2.
- **seconds**: trace and place / calibrate / convert / export / check and lint / build the engine.
"""


def _ratio(part: Any, whole: Any) -> str:
    return f"{part}/{whole}" if whole else "none"


def _decibels(row: Row) -> str:
    ours, simulated = row.get("sqnr_onnxruntime_db"), row.get("sqnr_pytorch_db")
    if ours is None:
        return "-" if simulated is None else f"- ({simulated:.1f})"
    return f"{ours:.1f} ({simulated:.1f})"


def _input(row: Row) -> str:
    settings = row.get("settings")
    if settings is None:
        return "-"
    return f"{'x'.join(map(str, settings['shape']))}, {settings['calibration']}/{settings['judged']}"


def _placed(row: Row) -> str:
    found = row.get("placement")
    return _ratio(found["weighted_int8"], found["weighted"]) if found else "-"


def _skips(row: Row) -> str:
    found = row.get("placement")
    return _ratio(found["skips_int8"], found["residuals"]) if found else "-"


def _findings(row: Row) -> str:
    found = row.get("rules")
    return f"{found['errors']}/{found['warnings']}/{found['advice']}" if found else "-"


def _engine(row: Row, part: str, whole: str) -> str:
    found = row.get("engine") or {}
    return _ratio(found[part], found[whole]) if whole in found else "-"


def _seconds(row: Row) -> str:
    spent = row["seconds"]
    names = ["trace and place", "calibrate", "convert", "export", "check", "engine"]
    spent = {**spent, "check": spent.get("checker", 0) + spent.get("lint", 0)} if "checker" in spent else spent
    return " / ".join(f"{spent[name]:.1f}" if name in spent else "-" for name in names)


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("input, calibration/judged", _input),
    ("placed", _placed),
    ("skips", _skips),
    ("SQNR dB", _decibels),
    ("40 dB in", lambda r: f"{r['sqnr_noisy_input_db']:.0f}" if "sqnr_noisy_input_db" in r else "-"),
    ("findings", _findings),
    ("kernels", lambda r: _engine(r, "weighted_kernels_reading_int8", "weighted_kernels")),
    ("identity", lambda r: _engine(r, "identity_skips_read_in_int8", "identity_skips")),
    ("seconds", _seconds),
)


def failures(rows: list[Row]) -> list[str]:
    """One line for each network that did not go the whole way: the step, and why."""
    lines = []
    for row in rows:
        for step, said in row["steps"].items():
            if said != "ok":
                why = re.sub(r"\S*/site-packages/", "", " ".join(said.split()))
                lines.append(f"- **{row['model']}**, {step}: {why[:400]}")
    return lines


def left_float(rows: list[Row]) -> list[str]:
    """One line for each network with weighted operations that placement left float, or that it does not see."""
    lines = []
    for row in rows:
        found = row.get("placement")
        if found and found["weighted_int8"] < found["weighted"]:
            kinds = sorted({name.rpartition(" ")[2] for name in found["float"]})
            missing = found["weighted"] - found["weighted_int8"]
            lines.append(f"- **{row['model']}**: {missing} of {found['weighted']} ({', '.join(kinds)})")
        kernels = row.get("engine", {}).get("weighted_kernels", 0)
        if found and kernels > found["weighted"]:
            hidden = kernels - row["engine"]["weighted_kernels_reading_int8"]
            lines.append(f"- **{row['model']}**: {hidden} of {kernels} kernels, of products inside what is kept whole")
    return lines


def _table(rows: list[Row]) -> list[str]:
    lines = ["| network | " + " | ".join(name for name, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    return lines + ["| " + " | ".join([row["model"], *(cell(row) for _, cell in COLUMNS)]) + " |" for row in rows]


def code(rows: list[Row]) -> list[str]:
    """Which rows were made by the same source of fxq, said once for the most of them."""
    marks: dict[str, list[str]] = {}
    for row in rows:
        marks.setdefault(row.get("code", "unmarked"), []).append(row["model"])
    most, *others = sorted(marks, key=lambda mark: -len(marks[mark]))
    if not others:
        return [f"All rows are by one source of fxq ({most}).\n"]
    said = "; ".join(f"{mark}: {', '.join(marks[mark])}" for mark in others)
    return [
        f"{len(marks[most])} rows are by one source of fxq ({most}), the others by earlier or later ones: {said}.\n"
    ]


def page(rows: list[Row], missing: Sequence[str]) -> str:
    """The whole page; `missing` are the networks that were not run."""
    through = [row for row in rows if row.get("done") and all(said == "ok" for said in row["steps"].values())]
    lines = [INTRODUCTION, f"{len(through)} of {len(rows)} networks go the whole way, from tracing to an engine.\n"]
    if missing:
        lines += [f"Not run yet ({len(missing)}): {', '.join(missing)}.\n"]
    lines += code(rows) if rows else []
    for family in dict.fromkeys(row["family"] for row in rows):
        lines += [f"## {family.capitalize()}\n", *_table([r for r in rows if r["family"] == family]), ""]
    for title, found in (("What fails", failures(rows)), ("What placement leaves float", left_float(rows))):
        if found:
            lines += [f"## {title}\n", *found, ""]
    return "\n".join(lines).rstrip() + "\n"
