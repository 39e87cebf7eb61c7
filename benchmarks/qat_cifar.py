"""ResNet-20 on CIFAR-10 images with 4-bit weights and activations, and with INT8: PTQ against QAT.

    FXQ_DATA=DIR python benchmarks/qat_cifar.py

A trained ResNet-20, and 2,000 train and 2,000 test images of CIFAR-10 (from JPEG files, on which the network has 81.5%
where the published lossless images give 91.7%): training sees the first, top-1 is over the second, with a standard
error of about 0.9 points. 4 bits are simulation:
signed int4 weights per channel, uint4 behind ReLU, int4 elsewhere; the first convolution and the classifier stay INT8,
as in the LSQ and PACT papers. Every QAT run starts at the PTQ scales (MSE) and trains 6 epochs with SGD (momentum 0.9,
learning rate 0.01 falling along a cosine, learned scales a thousandth of it, weight decay 1e-4), with shifts and flips.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from pathlib import Path
from typing import Any

import images
import qat_training as qat
import tasks
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxq

TASK = tasks.CifarTask("cifar_resnet20")


def four_bits() -> fxq.Recipe:
    """4-bit weights and activations, unsigned behind ReLU, but in the first and the last layer."""

    def behind_relu(node: fx.Node) -> bool:
        return any(isinstance(a, fx.Node) and "relu" in str(a.target) for a in node.args[:2])

    def inner(node: fx.Node) -> bool:
        return fxq.graph.origin(node).module_path.startswith("layer")

    low = fxq.EdgeSpecs(input=fxq.QSpec("int4"), weight=fxq.QSpec("int4"))
    unsigned = fxq.EdgeSpecs(input=fxq.QSpec("uint4", symmetric=True))

    def layers(node: fx.Node) -> bool:
        return inner(node) and "conv" in str(node.target)

    def skips(node: fx.Node) -> bool:
        return inner(node) and "add" in str(node.target)

    return fxq.Recipe(
        [
            fxq.Rule(layers, low, "4 bits"),
            fxq.Rule(lambda node: layers(node) and behind_relu(node), unsigned, "ReLU gives no negative values"),
            fxq.Rule(skips, fxq.QSpec("uint4", symmetric=True), "skips are ReLU outputs"),
        ]
    )


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels and flipped or not."""
    rows, columns = (torch.randint(0, 9, (len(x),), generator=generator) for _ in range(2))
    flips = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flips[:, None, None, None], x.flip(3), x)
    padded = F.pad(x, (4, 4, 4, 4))
    return torch.stack([p[:, r : r + 32, c : c + 32] for p, r, c in zip(padded, rows, columns, strict=True)])


def tuned(model: nn.Module, seed: int, args: argparse.Namespace, **options: Any) -> float:
    """Top-1 after training from the PTQ scales, of the converted graph; without options, after float training."""
    torch.manual_seed(seed)
    train, test = images.cifar10("train"), images.cifar10("test")
    gm = fxq.prepare_qat(model, train.images[:2], **options) if options else copy.deepcopy(model)
    if options:
        fxq.calibrate(gm, TASK.calibration().split(64), progress=False)
    groups = fxq.qat.parameter_groups(gm, lr=args.lr, scale_lr=args.scale_lr, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    batches = -(-len(train.labels) // args.batch)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * batches)
    last = args.epochs - 2
    plan = fxq.qat.schedule(gm, observe_until=last, freeze_bn_at=last) if options else None
    qat.train(
        gm, train.images, train.labels, optimizer=optimizer, epochs=args.epochs, batch=args.batch, seed=seed,
        scheduler=cosine, before_epoch=plan, augment=shifted,
    )  # fmt: skip
    final = fxq.convert(gm.eval()) if options else gm
    return qat.top1(final, test.images, test.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--scale-lr", type=float, default=1e-5)
    parser.add_argument("--scales", default="fixed,moving-average,learned,pact")
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    model, test = TASK.build(), images.cifar10("test")
    rows: dict[str, list[float]] = {"float": [qat.top1(model, test.images, test.labels)]}
    print(f"float {rows['float']}", flush=True)
    recipes = {bits: four_bits() if bits == "4" else None for bits in args.bits.split(",")}
    for bits, recipe in recipes.items():
        prepared = fxq.prepare(model, TASK.calibration()[:2], recipe=recipe)
        fxq.calibrate(prepared, TASK.calibration().split(64), progress=False)
        rows[f"{bits} bits, PTQ"] = [qat.top1(fxq.convert(prepared), test.images, test.labels)]
        print(f"{bits} bits, PTQ {rows[f'{bits} bits, PTQ']}", flush=True)
    for seed in map(int, args.seeds.split(",")):
        rows.setdefault("float, trained on", []).append(tuned(model, seed, args))
        for bits, recipe in recipes.items():
            for policy in args.scales.split(",") if bits == "4" else ["fixed"]:
                value = tuned(model, seed, args, recipe=recipe, scales=policy)
                rows.setdefault(f"{bits} bits, QAT {policy}", []).append(value)
                print(f"seed {seed}, {bits} bits, QAT {policy}: {value:.2f}", flush=True)
        if args.results:
            part = args.results.with_suffix(".part")
            part.write_text(json.dumps(rows, indent=1))
            part.replace(args.results)
    print("\n" + qat.means(rows, "ResNet-20 on CIFAR-10"))


if __name__ == "__main__":
    main()
