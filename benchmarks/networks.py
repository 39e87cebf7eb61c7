"""The networks that the benchmarks quantize: built here or by torchvision, always the same weights."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

_LIBRARIES: list[torch.library.Library] = []  # a library's operators live as long as the object does


class LeNet(nn.Module):
    """Two 5x5 convolutions (6 and 16 channels) and linear layers of 120, 84 and 10, for 28x28 images.

    The input is (N, 1, 28, 28) float32, the output (N, 10) logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)
        self.relu1, self.relu2, self.relu3, self.relu4 = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.pool1, self.pool2 = nn.MaxPool2d(2), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = torch.flatten(x, 1)
        return self.fc3(self.relu4(self.fc2(self.relu3(self.fc1(x)))))


class CifarBlock(nn.Module):
    """A basic block whose shortcut skips rows and adds zero channels where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class CifarResNet20(nn.Module):
    """ResNet-20 for 32x32 images (He et al. 2015, section 4.2, option A shortcuts).

    The input is (N, 3, 32, 32) float32, the output (N, 10) logits. Its parameters are named as in
    akamaster/pytorch_resnet_cifar10.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        first = CifarBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(CifarBlock(outputs, outputs, 1) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(x)


def torchvision_models() -> ModuleType:
    """`torchvision.models`, also where torchvision's compiled operators do not fit the installed torch.

    A torchvision wheel built for CUDA does not load its operators beside a CPU torch, and its import then
    stops at the first one it wants to describe. No network here calls them, so declaring them is enough.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
        import torchvision
    return torchvision.models


def seeded(build: Callable[[], nn.Module], warm_up: list[Tensor]) -> nn.Module:
    """A network with seeded random weights that behaves like a trained one where quantization is concerned.

    The weights and biases of normalizations are varied (equal ones would make every channel alike), BatchNorm's
    running statistics are taken from `warm_up`, a list of input batches, and what torchvision begins at zero or
    nearly so, to be learnt (classifiers of vision transformers, ConvNeXt's layer scales), is drawn. Returned in
    eval mode.
    """
    torch.manual_seed(0)
    model = build()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    generator = torch.Generator().manual_seed(3)
    for norm in norms:
        norm.momentum = None  # the cumulative average over all batches
        _vary(norm, generator)
    _draw_unlearnt(model, generator)
    model.eval()  # dropout and stochastic depth, too, are as at inference
    for norm in norms:
        norm.train()
    if norms:
        with torch.no_grad():
            for batch in warm_up:
                model(batch)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def _vary(norm: nn.Module, generator: torch.Generator) -> None:
    norm.weight.data = torch.exp(0.3 * torch.randn(norm.weight.shape, generator=generator))
    norm.bias.data = 0.2 * torch.randn(norm.bias.shape, generator=generator)


def _draw_unlearnt(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.weight is not None:
            _vary(module, generator)
        elif isinstance(module, nn.Linear) and not bool(module.weight.any()):
            module.weight.data.normal_(0, module.in_features**-0.5, generator=generator)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] == "layer_scale":
            parameter.data = 0.3 * torch.exp(0.3 * torch.randn(parameter.shape, generator=generator))


def export_float(model: nn.Module, path: Path, image_shape: tuple[int, int, int], opset: int = 17) -> None:
    """Write `model` as ONNX through TorchScript: input `input`, output `output`, dynamic batch.

    The TorchScript exporter folds BatchNorm and is what the ONNX peers are documented with.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it is deprecated, and about constants it leaves alone
        torch.onnx.export(
            model,
            (torch.zeros(2, *image_shape),),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "n"}, "output": {0: "n"}},
        )
