"""The images: CIFAR-10 and MNIST from the data folder, and seeded synthetic ones that need no folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DATA_VARIABLE = "FXQ_DATA"


class MissingDataError(RuntimeError):
    """The data folder, or a file in it, is not there."""


def data_file(name: str) -> Path:
    """The path of `name` in the folder that FXQ_DATA names; MissingDataError says what is wrong."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise MissingDataError(f"set {DATA_VARIABLE}, or pass --data, to the folder that holds {name}")
    path = Path(folder) / name
    if not path.is_file():
        raise MissingDataError(f"no {name} in {folder} ({DATA_VARIABLE})")
    return path


@dataclass(frozen=True)
class Split:
    """Images ready for a network, (N, C, H, W) float32, and their labels, (N,) int64."""

    images: Tensor
    labels: Tensor


def cifar10(split: str) -> Split:
    """The 2,000 `train` or `test` images of cifar10_small.npz, normalized as the ResNet-20 was trained."""
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    with np.load(data_file("cifar10_small.npz")) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    scaled = (torch.from_numpy(images).float() / 255 - mean) / std
    return Split(scaled.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def mnist(split: str) -> Split:
    """The 60,000 `train` or 10,000 `test` images of mnist.npz, with mean 0 and standard deviation 1."""
    with np.load(data_file("mnist.npz")) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    scaled = (torch.from_numpy(images).float() / 255 - 0.1307) / 0.3081
    return Split(scaled.unsqueeze(1), torch.from_numpy(labels))


def synthetic(count: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """`count` structured images, (count, C, H, W): smoothed noise at several sizes with random contrast.

    White noise alone would average out in the first layers and leave activations without the long tails
    that calibration has to deal with. The values are about N(0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = shape
    images = torch.zeros(count, *shape)
    for cells in (2, 4, 8, 16, 32):
        low = torch.randn(count, channels, min(cells, height), min(cells, width), generator=generator)
        amplitude = torch.rand(count, 1, 1, 1, generator=generator) + 0.2
        images += amplitude * F.interpolate(low, (height, width), mode="bilinear", align_corners=False)
    images += 0.1 * torch.randn(count, *shape, generator=generator)
    contrast = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    images = images / images.std() * contrast
    return images + 0.3 * torch.randn(count, channels, 1, 1, generator=generator)
