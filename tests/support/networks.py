"""Networks with statistics of their own, trained ones, images, and measures: what whole-flow tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision_models import torchvision_model

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(count: int, size: int, *, channels: int = 3, seed: int = 0) -> Tensor:
    """Structured images [count, channels, size, size]: smoothed noise at several scales, about N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, channels, size, size)
    for cells in (2, 4, 8, 16):
        low = torch.randn(count, channels, cells, cells, generator=generator)
        total += F.interpolate(low, size=(size, size), mode="bilinear", align_corners=False)
    return total / total.std() + 0.1 * torch.randn(total.shape, generator=generator)


def warmed(name: str, size: int) -> nn.Module:
    """A torchvision model in eval mode; its BatchNorms have varied weights and warmed statistics."""
    model = torchvision_model(name)
    generator = torch.Generator().manual_seed(3)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.weight.data = torch.exp(0.3 * torch.randn(norm.num_features, generator=generator))
        norm.bias.data = 0.2 * torch.randn(norm.num_features, generator=generator)
    model.train()
    with torch.no_grad():
        for batch in images(16, size, seed=4).split(8):
            model(batch)
    return model.eval()


class CifarBlock(nn.Module):
    """ResNet-20's block: a shortcut without parameters that takes every second pixel and pads channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        y += x
        return F.relu(y)


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10 (He et al. 2015, section 4.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = self._stage(16, 16), self._stage(16, 32), self._stage(32, 64)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        first = CifarBlock(inputs, outputs, 1 if inputs == outputs else 2)
        return nn.Sequential(first, CifarBlock(outputs, outputs, 1), CifarBlock(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, 8)
        return self.linear(x.view(x.size(0), -1))


def cifar(folder: Path) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """Trained ResNet-20, train images, train labels, test images, test labels; images are normalized."""
    data = np.load(folder / "cifar10_small.npz")
    model = ResNet20()
    model.load_state_dict(torch.load(folder / "cifar10_resnet20.pt", weights_only=True))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    pixels = [torch.from_numpy(data[f"{k}_images"]).permute(0, 3, 1, 2) for k in ("train", "test")]
    train, test = ((p.float() / 255 - mean) / std for p in pixels)
    return (
        model.eval(),
        train,
        torch.from_numpy(data["train_labels"]),
        test,
        torch.from_numpy(data["test_labels"]),
    )


def top1(logits: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    return 100 * float((logits.argmax(1) == labels).float().mean())


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise ratio in decibels."""
    noise = (reference - other).double().square().sum()
    return (10 * torch.log10(reference.double().square().sum() / noise)).item()
