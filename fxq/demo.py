"""The demo: a residual network on real images, from float to a checked INT8 ONNX and an engine.

``python -m fxq.demo [folder]`` trains a small CIFAR-style ResNet on scikit-learn's handwritten digits,
quantizes it for TensorRT, and shows the graph around one residual addition before and after, what was placed
where, accuracy and sizes, and the latency on this CPU of the same model quantized for ONNX Runtime. Files go to
the folder, ``demo-out`` by default.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.rule import Rule as Line
from rich.table import Table
from torch import Tensor, fx, nn
from tqdm import tqdm

import fxq

from .backends.onnxrt import Session
from .errors import MissingDependencyError
from .optional import require

__all__ = ["Block", "ResNet", "digits", "main", "train"]

EPOCHS: Final = 10
BATCH: Final = 32
LATENCY_BATCH: Final = 64
LATENCY_RUNS: Final = 60
_FIX: Final = (
    "and quantized. The skip input of the add reads the quantizer of the block's own input (R24), so it travels "
    "in INT8; the convolution's output stays float, so that TensorRT makes one kernel of both (R23):"
)
_WHOSE_SPEED: Final = (
    "The file for TensorRT has its speed on a GPU: on a CPU it is not timed, since ONNX Runtime's integer kernels want "
    "uint8 activations, quantized sums and int32 biases, which its own target gives them."
)


class Block(nn.Module):
    """A basic residual block (He et al. 2015) with a downsample convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        skip = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += skip
        out: Tensor = self.relu(y)
        return out


class ResNet(nn.Module):
    """Three stages of two blocks, 32, 64 and 128 channels, for small images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(32, 32), Block(32, 32))
        self.layer2 = nn.Sequential(Block(32, 64, 2), Block(64, 64))
        self.layer3 = nn.Sequential(Block(64, 128, 2), Block(128, 128))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, 1, h, w] to logits [n, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return out


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 digits as train images, train labels, test images, test labels.

    Images are float32 [n, 1, 16, 16] in [-1, 1], doubled from 8x8; every fourth is a test image.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    load_digits = require("sklearn.datasets", package="scikit-learn", purpose="the demo's images").load_digits
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, scale_factor=2.0, mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target)
    test = torch.arange(len(labels)) % 4 == 0
    return images[~test], labels[~test], images[test], labels[test]


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int = EPOCHS, progress: bool = True) -> None:
    """Train with SGD and a one-cycle schedule; `model` is changed and left in eval mode.

    Args:
        model: Images to logits.
        images: [n, 1, h, w].
        labels: [n].
        epochs: Passes over the images.
        progress: Show a bar if stderr is a terminal.
    """
    steps = -(-len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * steps)
    model.train()
    bar = tqdm(total=epochs * steps, desc="train", unit="step", disable=None if progress else True)
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(images)), BATCH):
            loss = F.cross_entropy(model(_shifted(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()
    model.eval()


def _shifted(images: Tensor) -> Tensor:
    """The images moved by up to two pixels, all of a batch alike."""
    dy, dx = (int(v) for v in torch.randint(-2, 3, (2,)))
    return torch.roll(images, (dy, dx), (2, 3))


def main(folder: str | Path = "demo-out") -> None:
    """Run the demo and print what it finds; files are written to `folder`."""
    console = Console(width=max(Console().width, 110), highlight=False)
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    x_train, y_train, x_test, y_test = digits()

    console.print(Line("[bold]1. A float ResNet, trained on real handwritten digits"))
    model = ResNet()
    start = time.perf_counter()
    train(model, x_train, y_train)
    console.print(f"{len(x_train)} images, {EPOCHS} epochs, {time.perf_counter() - start:.0f} s")

    console.print(Line("[bold]2. Quantized: trace, normalize, fuse, place, calibrate, convert"))
    prepared = fxq.prepare(model, x_train[:2])
    fxq.calibrate(prepared, torch.split(x_train[:512], BATCH))
    quantized = fxq.convert(prepared)
    traced = fxq.trace(model, x_train[:2])
    _show_residual(console, traced, quantized)
    console.print(fxq.report(quantized).text(console.width), markup=False, soft_wrap=True)

    console.print(Line("[bold]3. Exported to ONNX, checked by the rules"))
    float_path = fxq.export(traced, out / "float.onnx")
    int8_path = fxq.export(quantized, out / "int8.onnx")
    console.print(f"fxq.lint: {fxq.lint(int8_path)}", markup=False)
    console.print('And once more for ONNX Runtime on this CPU: the same calls with target="onnxruntime".')
    batches = torch.split(x_train[:512], BATCH)
    cpu_path = fxq.export(fxq.quantize(model, batches, target="onnxruntime", progress=False), out / "int8_cpu.onnx")
    console.print(f"fxq.lint: {fxq.lint(cpu_path)}", markup=False)
    _show_results(console, model, quantized, (float_path, int8_path, cpu_path), x_test, y_test)

    console.print(Line("[bold]4. A TensorRT engine"))
    _show_engine(console, quantized, out)


def _show_residual(console: Console, traced: fx.GraphModule, quantized: fx.GraphModule) -> None:
    """The graph around the first residual addition, as traced and as converted."""
    console.print("The graph around one residual addition, as the model was written:")
    console.print(fxq.format_graph(traced, lambda n: n.name.startswith("layer1_0")), markup=False, style="dim")
    console.print(f"\n{_FIX}")
    shown = ["relu", "relu_quantize", "relu_dequantize", "layer1_0_relu_dequantize", "layer1_0_bn2", "layer1_0_add"]
    console.print(fxq.format_graph(quantized, lambda n: n.name in shown), markup=False, style="dim", soft_wrap=True)


def _show_results(
    console: Console,
    model: nn.Module,
    quantized: fx.GraphModule,
    paths: tuple[Path, Path, Path],
    images: Tensor,
    labels: Tensor,
) -> None:
    """Accuracy of the float file, TensorRT's and ONNX Runtime's, and the latency of the first and the last."""
    float_path, int8_path, cpu_path = paths
    with torch.inference_mode():
        reference, simulated = model(images), quantized(images)
    sessions = [Session(path, threads=2) for path in (float_path, cpu_path)]
    exported, on_cpu = Session(int8_path).run(images)[0], sessions[1].run(images)[0]
    batch = images[:LATENCY_BATCH]
    seconds = interleaved([lambda s=s: s.run(batch) for s in sessions], LATENCY_RUNS)  # type: ignore[misc]
    table = Table(title=f"{len(images)} test images")
    for column in ("", "top-1", "predictions changed", "SQNR", "file", f"CPU latency, batch {LATENCY_BATCH}"):
        table.add_column(column, justify="left" if not column else "right")
    for name, logits, path, latency in (
        ("float", reference, float_path, seconds[0]),
        ("INT8 for TensorRT, in PyTorch", simulated, None, None),
        ("INT8 for TensorRT, its file", exported, int8_path, None),
        ("INT8 for ONNX Runtime", on_cpu, cpu_path, seconds[1]),
    ):
        same = logits is reference
        table.add_row(
            name,
            f"{100 * (logits.argmax(1) == labels).float().mean():.2f}%",
            "" if same else str(int((logits.argmax(1) != reference.argmax(1)).sum())),
            "" if same else f"{sqnr_db(reference, logits):.1f} dB",
            f"{path.stat().st_size / 1024:.0f} KiB" if path else "",
            f"{latency * 1e3:.1f} ms" if latency else "",
        )
    console.print(table)
    ratio = seconds[1] / seconds[0]
    console.print(f"On this CPU, INT8 for ONNX Runtime takes {ratio:.2f} times as long as float. {_WHOSE_SPEED}")


def _show_engine(console: Console, quantized: fx.GraphModule, out: Path) -> None:
    """Build an engine of static batch, so that the bytes moved can be told."""
    try:
        require("tensorrt", extra="trt", purpose="building an engine")
    except MissingDependencyError as error:
        console.print(f"{error}", markup=False)
        return
    path = fxq.export(quantized, out / "int8_static.onnx", dynamic_shapes=None)
    console.print(fxq.build(path, out / "int8.engine").summary(), markup=False)


def interleaved(runs: list[Callable[[], object]], times: int) -> list[float]:
    """Median seconds of each of `runs`, called in turn, so that a noisy machine troubles all alike."""
    taken: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(times):
        for run, seconds in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise ratio of `other` against `reference`, in decibels."""
    noise = (reference - other).double().square().sum()
    return (10 * torch.log10(reference.double().square().sum() / noise)).item()


if __name__ == "__main__":
    main(*sys.argv[1:2])
