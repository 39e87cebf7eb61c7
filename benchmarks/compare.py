"""Quantizers side by side on LeNet, ResNet-18, ResNet-50 and MobileNetV2 with seeded weights and images.

    python benchmarks/compare.py --peers fxq,modelopt_torch_max --tasks resnet18 --tensorrt DIR

Every quantizer gets the same float network and the same calibration batches, in a process of its own; every
file is judged by the same ONNX Runtime, the same structural report and the same engine builder.
"""

from __future__ import annotations

import runner
from runner import Result, at, show
from tasks import TASKS

PEERS = "fp32,fxq,modelopt_torch_max,modelopt_onnx_max,modelopt_onnx_entropy,ort_trt_minmax,torch_fx_histogram"
TASK_NAMES = "lenet,resnet18,resnet50,mobilenet_v2"


def sqnr(result: Result) -> str:
    """PyTorch / ONNX Runtime / ONNX Runtime with Q and DQ computed in float."""
    keys = (("pytorch", "sqnr_db"), ("onnxruntime", "sqnr_db"), ("onnxruntime", "simulated", "sqnr_db"))
    return " / ".join(show(at(result, *key), ".2f") for key in keys)


def megabytes(result: Result) -> str:
    """All activation bytes, of these INT8, 10^6."""
    traffic = at(result, "engine", "activation_bytes")
    if traffic is None:
        return "-"
    return f"{at(result, 'engine', 'activation_bytes_total') / 1e6:.1f} ({traffic.get('Int8', 0) / 1e6:.1f})"


def share(result: Result, part: str, whole: str) -> str:
    """`part` over `whole` of the engine's counts."""
    if not at(result, "engine", "ok"):
        errors = at(result, "engine", "errors") or [at(result, "engine", "error") or "not built"]
        return f"refused: {' '.join(str(errors[-1]).split())[-90:]}".replace("|", "/") if part != whole else "-"
    if part == whole:
        return str(at(result, "engine", part))
    return f"{at(result, 'engine', part)} of {at(result, 'engine', whole)}"


def adds(result: Result) -> str:
    """Residual additions with both inputs, one and none quantized."""
    return "/".join(str(at(result, "structure", f"adds_{count}_quantized")) for count in ("both", "one", "none"))


def findings(result: Result) -> str:
    """Errors, warnings and advice of fxq's rule check."""
    counts = [at(result, "rules", severity) for severity in ("errors", "warnings", "advice")]
    return "-" if None in counts else "/".join(str(count) for count in counts)


def stages(result: Result) -> str:
    """Each stage as a multiple of the float forward over the calibration batches."""
    forward = result["forward_s"]
    return ", ".join(f"{name} {s / forward:.2f}" for name, s in result["stages_s"].items() if name != "import")


def total(result: Result) -> str:
    """All stages but the import, seconds, and as a multiple of the float forward."""
    seconds = sum(s for name, s in result["stages_s"].items() if name != "import")
    return f"{seconds:.1f} s = {seconds / result['forward_s']:.2f}"


COLUMNS: list[runner.Column] = [
    ("SQNR dB: PyTorch / ORT / ORT in float", sqnr),
    (
        "weighted kernels reading INT8",
        lambda r: share(r, "weighted_kernels_reading_int8", "weighted_kernels"),
    ),
    ("identity skips read in INT8", lambda r: share(r, "identity_skips_read_in_int8", "identity_skips")),
    ("activation MB (INT8)", megabytes),
    ("kernels", lambda r: share(r, "kernels", "kernels")),
    ("Q/DQ", lambda r: f"{at(r, 'structure', 'quantize')}/{at(r, 'structure', 'dequantize')}"),
    ("Adds both/one/none", adds),
    ("rule findings: errors/warnings/advice", findings),
    ("ORT latency, of float", lambda r: show(at(r, "onnxruntime", "latency_ratio"))),
    ("stages, of a float forward", stages),
    ("total", total),
    ("peak MiB", lambda r: f"{r['peak_mib']:.0f} (+{r['peak_mib'] - r['peak_before_mib']:.0f})"),
]


def main() -> None:
    parser = runner.options(__doc__, PEERS, engine=True)
    parser.add_argument("--tasks", default=TASK_NAMES, help=f"comma-separated, of {', '.join(TASKS)}")
    args = runner.parse(parser)
    tasks = [name for name in args.tasks.split(",") if name]
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        parser.error(f"--tasks: unknown {', '.join(unknown)}; there are {', '.join(TASKS)}")
    runner.finish(runner.run_all(args, tasks), tasks, args, COLUMNS)


if __name__ == "__main__":
    main()
