"""A task: one float network, the images that calibrate it and the images that judge it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import images
import networks
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class Task(ABC):
    """What every quantizer of one comparison gets.

    Attributes:
        name: The task's name on the command line and in the results.
        image_shape: (C, H, W) of one image.
        batch: Images in a batch, of calibration and of judging alike.
    """

    name: str
    image_shape: tuple[int, int, int]
    batch: int

    @abstractmethod
    def build(self) -> nn.Module:
        """The float network in eval mode; may take long."""

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """The network without its weights."""

    @abstractmethod
    def calibration(self) -> Tensor:
        """The calibration images, (N, C, H, W) float32."""

    @abstractmethod
    def evaluation(self) -> tuple[Tensor, Tensor | None]:
        """The images that judge, (N, C, H, W) float32, and their labels where they have any."""

    def model(self, folder: Path) -> nn.Module:
        """The float network, its weights kept as `fp32.pt` in `folder`: built once, the same everywhere."""
        cache = folder / "fp32.pt"
        if not cache.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = cache.with_suffix(".part")
            torch.save(self.build().state_dict(), part)
            part.replace(cache)
        model = self.skeleton()
        model.load_state_dict(torch.load(cache, weights_only=True))
        return model.eval()


@dataclass(frozen=True)
class SyntheticTask(Task):
    """A seeded network on synthetic images: 16 batches calibrate unless it says otherwise, 4 judge. Needs no data
    folder.
    """

    batch: int = 8
    calibration_batches: int = 16

    def skeleton(self) -> nn.Module:
        if self.name == "lenet":
            return networks.LeNet()
        model: nn.Module = getattr(networks.torchvision_models(), self.name)(weights=None)
        return model

    def build(self) -> nn.Module:
        warm_up = images.synthetic(6 * self.batch, self.image_shape, seed=4).split(self.batch)
        return networks.seeded(self.skeleton, list(warm_up))

    def calibration(self) -> Tensor:
        return images.synthetic(self.calibration_batches * self.batch, self.image_shape, seed=1)

    def evaluation(self) -> tuple[Tensor, None]:
        return images.synthetic(4 * self.batch, self.image_shape, seed=2), None


@dataclass(frozen=True)
class CifarTask(Task):
    """The trained ResNet-20, calibrated on the first 512 train images.

    `judged_on` "test" takes the 2,000 test images; "train" takes the 1,488 train images that calibration does
    not see, for choices (a calibration method, say) that must not look at the test images.
    """

    image_shape: tuple[int, int, int] = (3, 32, 32)
    batch: int = 32
    judged_on: str = "test"
    calibration_images: int = 512

    def skeleton(self) -> nn.Module:
        return networks.CifarResNet20()

    def build(self) -> nn.Module:
        model = networks.CifarResNet20()
        weights = torch.load(images.data_file("cifar10_resnet20.pt"), weights_only=True)
        model.load_state_dict(weights, strict=True)
        return model.eval()

    def calibration(self) -> Tensor:
        return images.cifar10("train").images[: self.calibration_images]

    def evaluation(self) -> tuple[Tensor, Tensor]:
        split = images.cifar10(self.judged_on)
        start = self.calibration_images if self.judged_on == "train" else 0
        return split.images[start:], split.labels[start:]


@dataclass(frozen=True)
class CifarResNet18Task(CifarTask):
    """torchvision's ResNet-18 at 32 pixels, trained here on the 2,000 CIFAR-10 train images with fixed seeds.

    So few images make no good classifier; they give trained weights and real activations, which quantization is
    about.
    """

    epochs: int = 12

    def skeleton(self) -> nn.Module:
        model: nn.Module = networks.torchvision_models().resnet18(weights=None, num_classes=10)
        return model

    def build(self) -> nn.Module:
        """Trained with SGD (learning rate 0.01, momentum 0.9, batches of 64), images flipped at random."""
        split = images.cifar10("train")
        return _trained(self.name, self.skeleton, split, self.epochs, learning_rate=0.01, flip=True)


@dataclass(frozen=True)
class MnistTask(Task):
    """LeNet trained on MNIST with fixed seeds, calibrated on the first 512 train images."""

    image_shape: tuple[int, int, int] = (1, 28, 28)
    batch: int = 64
    epochs: int = 3
    calibration_images: int = 512

    def skeleton(self) -> nn.Module:
        return networks.LeNet()

    def build(self) -> nn.Module:
        """Trained with SGD (learning rate 0.01, momentum 0.9, batches of 64)."""
        return _trained(self.name, self.skeleton, images.mnist("train"), self.epochs, learning_rate=0.01)

    def calibration(self) -> Tensor:
        return images.mnist("train").images[: self.calibration_images]

    def evaluation(self) -> tuple[Tensor, Tensor]:
        split = images.mnist("test")
        return split.images, split.labels


def _trained(
    name: str,
    build: Callable[[], nn.Module],
    split: images.Split,
    epochs: int,
    *,
    learning_rate: float,
    flip: bool = False,
) -> nn.Module:
    """A network trained with fixed seeds, in eval mode.

    In one thread, because the order of sums, and with it the trained weights, depends on their number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        model = build().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
        order = torch.Generator().manual_seed(0)
        for epoch in range(epochs):
            total = torch.zeros(())
            for index in torch.randperm(len(split.labels), generator=order).split(64):
                x = split.images[index]
                if flip and bool(torch.rand((), generator=order) < 0.5):
                    x = x.flip(-1)
                loss = F.cross_entropy(model(x), split.labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(index)
            print(f"{name}: epoch {epoch + 1} of {epochs}, loss {total / len(split.labels):.4f}")
        return model.eval()
    finally:
        torch.set_num_threads(threads)


_ALL: tuple[Task, ...] = (
    SyntheticTask("lenet", (1, 28, 28)),
    SyntheticTask("resnet18", (3, 224, 224)),
    SyntheticTask("resnet50", (3, 224, 224)),
    SyntheticTask("mobilenet_v2", (3, 224, 224)),
    *(
        SyntheticTask(name, (3, 224, 224), calibration_batches=4)
        for name in ("mobilenet_v3_large", "efficientnet_b0", "densenet121", "convnext_tiny", "vit_b_16", "swin_t")
    ),
    CifarTask("cifar_resnet20"),
    CifarTask("cifar_resnet20_train", judged_on="train"),
    CifarResNet18Task("cifar_resnet18"),
    MnistTask("mnist_lenet"),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
