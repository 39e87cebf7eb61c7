"""The trained ResNet-20 on 2,000 CIFAR-10 test images, calibrated on the first 512 train images.

    FXQ_DATA=DIR python benchmarks/cifar.py --peers fxq,modelopt_torch_max

Top-1 hardly separates quantizers here; the number of predictions that differ from the float network's does.
--judged-on train takes the 1,488 train images that calibration does not see: for choosing a method without a
look at the test images.
"""

from __future__ import annotations

import compare
import runner
from runner import Result, at, show

PEERS = (
    "fp32,fxq,modelopt_torch_max,modelopt_torch_mse,modelopt_torch_entropy,modelopt_torch_percentile,"
    "modelopt_onnx_max,modelopt_onnx_entropy"
)


def top1(result: Result, where: str) -> str:
    """Top-1, percent."""
    return show(at(result, where, "top1"))


def changed(result: Result) -> str:
    """Predictions that differ from float: in PyTorch / in ONNX Runtime / with Q and DQ in float."""
    keys = (("pytorch", "changed"), ("onnxruntime", "changed"), ("onnxruntime", "simulated", "changed"))
    counts = (at(result, *key) for key in keys)
    return " / ".join("-" if count is None else str(count) for count in counts)


COLUMNS: list[runner.Column] = [
    ("top-1 float", lambda r: show(at(r, "onnxruntime", "top1_float"))),
    ("PyTorch", lambda r: top1(r, "pytorch")),
    ("ORT", lambda r: top1(r, "onnxruntime")),
    ("SQNR dB: PyTorch / ORT / ORT in float", compare.sqnr),
    ("changed: PyTorch / ORT / ORT in float", changed),
    ("images", lambda r: str(at(r, "onnxruntime", "images"))),
    ("Adds both/one/none", compare.adds),
    ("total", compare.total),
]


def main() -> None:
    parser = runner.options(__doc__, PEERS, engine=False)
    parser.add_argument("--judged-on", choices=("test", "train"), default="test")
    args = runner.parse(parser)
    tasks = ["cifar_resnet20" if args.judged_on == "test" else "cifar_resnet20_train"]
    runner.finish(runner.run_all(args, tasks), tasks, args, COLUMNS)


if __name__ == "__main__":
    main()
