"""The cost of a quantization-aware training step of ResNet-18 over the plain float step.

    python benchmarks/qat_step.py --batch 8                               # CPU
    python benchmarks/qat_step.py --device cuda --batch 64 --precision float,bf16 --compile both

Every variant trains its own copy of the same network on the same random batch: forward, cross-entropy, backward, SGD
with momentum. The variants take turns, one step each, so that all of them see the same load; a variant's figure is
the median over rounds of its time over the float step's time of the same round.

fxq is shown by scale policy (:data:`fxq.qat.POLICIES`). torch.ao is its FX QAT with the default mapping of `x86`;
modelopt its ``INT8_DEFAULT_CFG``; both in a variant of their own where they can be imported. A variant that fails is a
row with its error.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from networks import torchvision_models
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fxq

Step = Callable[[], None]
WARM_UP = 4


def fxq_variant(scales: str) -> Callable[[nn.Module, Tensor], nn.Module]:
    """fxq's graph under one scale policy, calibrated on the batch."""

    def make(model: nn.Module, x: Tensor) -> nn.Module:
        gm = fxq.prepare_qat(model, x[:2], scales=scales)
        fxq.calibrate(gm, [x[:8]], progress=False)
        return gm

    return make


def torch_ao(model: nn.Module, x: Tensor) -> nn.Module:
    """torch.ao's FX graph mode QAT."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    mapping = get_default_qat_qconfig_mapping("x86")
    made: nn.Module = prepare_qat_fx(model.train(), mapping, (x[:2],))
    return made


def modelopt(model: nn.Module, x: Tensor) -> nn.Module:
    """modelopt's quantized modules, calibrated on the batch."""
    import modelopt.torch.quantization as mtq

    made: nn.Module = mtq.quantize(model.eval(), mtq.INT8_DEFAULT_CFG, lambda m: m(x[:8]))
    return made


VARIANTS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "float": lambda model, _: model,
    "fxq": fxq_variant("fixed"),
    "fxq moving-average": fxq_variant("moving-average"),
    "fxq learned": fxq_variant("learned"),
    "torch.ao": torch_ao,
    "modelopt": modelopt,
}


def network() -> nn.Module:
    """ResNet-18 with seeded weights."""
    torch.manual_seed(0)
    made: nn.Module = torchvision_models().resnet18(weights=None)
    return made


def make_step(name: str, x: Tensor, y: Tensor, precision: str, *, compiled: bool) -> Step:
    """One training step of a variant, ready to be called again and again."""
    model = VARIANTS[name](copy.deepcopy(network()).to(x.device), x).to(x.device).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
    forward: Any = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()

    return step


def seconds(step: Step, device: torch.device, repeat: int) -> float:
    """Wall-clock seconds of one step, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def compare(args: argparse.Namespace, precision: str, *, compiled: bool) -> dict[str, Any]:
    """Median ratio to the float step, or the error, per variant."""
    device = torch.device(args.device)
    torch.manual_seed(1)
    x = torch.randn(args.batch, 3, args.size, args.size, device=device)
    y = torch.randint(0, 1000, (args.batch,), device=device)
    steps: dict[str, Step] = {}
    rows: dict[str, Any] = {}
    for name in args.variants.split(","):
        try:
            step = make_step(name, x, y, precision, compiled=compiled)
            for _ in range(WARM_UP):
                step()
            steps[name] = step
        except Exception as error:  # noqa: BLE001 - tools raise what they like, also bare Exception; the table shows it
            rows[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device, args.repeat))
    for name, found in times.items():
        ratios = [own / base for own, base in zip(found, times["float"], strict=True)]
        rows[name] = {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
                      "ms": 1e3 * statistics.median(found)}  # fmt: skip
    return rows


def table(rows: dict[str, Any]) -> str:
    """The rows as markdown."""
    lines = ["| variant | of the float step | least to most | ms |", "|---|---|---|---|"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | failed: {row['error']} | | |")
        else:
            lines.append(f"| {name} | {row['ratio']:.2f} | {row['least']:.2f} to {row['most']:.2f} | {row['ms']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--precision", default="float", help="float, bf16 (autocast), or both with a comma")
    parser.add_argument("--compile", choices=("no", "yes", "both"), default="no")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=1, help="steps of a variant in a row")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--results", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.threads:
        torch.set_num_threads(args.threads)
    found = {}
    for compiled in {"no": [False], "yes": [True], "both": [False, True]}[args.compile]:
        for precision in args.precision.split(","):
            name = f"{args.device}, batch {args.batch}, {precision}, {'compiled' if compiled else 'eager'}"
            found[name] = compare(args, precision, compiled=compiled)
            print(f"\n### {name}\n\n{table(found[name])}", flush=True)
            if args.results:
                part = args.results.with_suffix(".part")
                part.write_text(json.dumps(found, indent=1))
                part.replace(args.results)


if __name__ == "__main__":
    main()
