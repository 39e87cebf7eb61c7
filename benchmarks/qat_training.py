"""What the QAT benchmarks share: a training loop, top-1, average bits, and tables of means over seeds."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fxq.fake_quantizers import FakeQuantizer
from fxq.graph import tensor_info
from fxq.quantizer import quantized_nodes, quantizers

Augment = Callable[[Tensor, torch.Generator], Tensor]


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Percent of `images` that the model, in eval mode, classifies as labelled."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(batch), labels.split(batch), strict=True)
    )
    return 100 * right / len(labels)


def train(  # noqa: PLR0913 - hyperparameters, all passed by name; an object for them would be made for one call
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch: int,
    seed: int,
    scheduler: Any = None,
    before_epoch: Callable[[int], None] | None = None,
    augment: Augment | None = None,
) -> None:
    """Cross-entropy training; the order of the images, and what augmentation draws, follow from the seed."""
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        if before_epoch is not None:
            before_epoch(epoch)
        for index in torch.randperm(len(labels), generator=order).split(batch):
            x = images[index] if augment is None else augment(images[index], order)
            loss = F.cross_entropy(model(x), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()


def average_bits(gm: fx.GraphModule) -> float:
    """Bits of an average weight and activation element of the layers with weights, 32 where they are float.

    A layer counts its weight and its input, each as one tensor.
    """
    bits: list[int] = []
    quantized = {node: quantizers(gm)[name] for name, node in quantized_nodes(gm).items()}
    by_call = {id(q): q for q in quantized.values()}
    for node in gm.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "__name__", "") not in ("conv2d", "linear"):
            continue
        for source in node.args[:2]:
            found = None
            if isinstance(source, fx.Node) and source.op == "call_module":
                module = gm.get_submodule(str(source.target))
                found = by_call.get(id(module))
            assert tensor_info(source) is not None
            bits.append(32 if found is None else found.spec.qdtype.storage.itemsize * 8)
    return statistics.mean(bits)


def scale_count(gm: nn.Module) -> int:
    """How many fake quantizers a graph has."""
    return sum(isinstance(m, FakeQuantizer) for m in gm.modules())


def means(rows: Mapping[str, Sequence[float]], title: str) -> str:
    """A markdown table of means over seeds, with each seed's figure."""
    lines = [f"| {title} | top-1 % | seeds |", "|---|---|---|"]
    for name, values in rows.items():
        lines.append(f"| {name} | {statistics.mean(values):.2f} | {', '.join(f'{v:.2f}' for v in values)} |")
    return "\n".join(lines)
