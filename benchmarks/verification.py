"""What verifying the graph after every pass adds to fxq.prepare and fxq.convert.

    python benchmarks/verification.py --repeat 3

ResNet-50, and a chain of residual blocks that grows from 5,000 nodes to 26,000; medians over runs of both pipelines.
"""

from __future__ import annotations

import argparse
import statistics

import networks
import torch
from torch import Tensor, fx, nn

import fxq
from fxq.manager import PassManager
from fxq.passes import CONVERT, PREPARE

BLOCKS = 1650


class Chain(nn.Module):
    """Convolution, ReLU and skip, over and over."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(x.relu())
        return x


def seconds(traced: fx.GraphModule, image: Tensor) -> tuple[float, float, int]:
    """Seconds in passes and in verification, and the nodes of the converted graph."""
    manager = PassManager()
    prepared = manager.run(PREPARE, traced)
    log = list(manager.log)
    fxq.calibrate(prepared, [image], progress=False, bias_correction=False)
    converted = manager.run(CONVERT, prepared)
    log += manager.log
    return sum(run.seconds for run in log), sum(run.verify_seconds for run in log), len(converted.graph.nodes)


def row(name: str, model: nn.Module, image: Tensor, repeat: int) -> str:
    """One line of the table."""
    traced = fxq.trace(model.eval(), image)
    runs = [seconds(traced, image) for _ in range(repeat)]
    passes, verification = (statistics.median(run[i] for run in runs) for i in (0, 1))
    cells = [name, f"{len(traced.graph.nodes)} to {runs[0][2]}", f"{passes:.2f}", f"{verification:.3f}"]
    return "| " + " | ".join([*cells, f"{verification / passes:.0%}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("| graph | nodes | passes, s | verification, s | of the passes |\n|---|---|---|---|---|")
    resnet = networks.torchvision_models().resnet50(weights=None)
    print(row("ResNet-50", resnet, torch.randn(2, 3, 64, 64), args.repeat), flush=True)
    print(row("chain of blocks", Chain(BLOCKS), torch.randn(2, 4, 8, 8), args.repeat))


if __name__ == "__main__":
    main()
