"""``fxq quantize``: from a model's name and calibration data to a Q/DQ ONNX file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from ..errors import FxqError
from .terminal import give

if TYPE_CHECKING:
    from torch import fx, nn

    from .image_folder import Preprocessing

__all__ = ["ComputeDtype", "Layout", "quantize", "shape_of"]

MODEL: Final = "The model"
DATA: Final = "Calibration data"
IMAGES: Final = "Calibration data: a folder of images"
FILE: Final = "The ONNX file"

_DYNAMIC: Final = re.compile(r"(?P<input>\w+):(?P<dim>\d+)=(?:(?P<low>\d+)\.\.(?P<high>\d+)|(?P<name>[A-Za-z_]\w*))")
T = TypeVar("T")


class ComputeDtype(StrEnum):
    """What is not quantized computes in this."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Layout(StrEnum):
    """The order of an image batch's dimensions."""

    NCHW = "nchw"
    NHWC = "nhwc"


def quantize(
    model: Annotated[
        str,
        typer.Argument(
            help="module:name or path/to/file.py:name of an nn.Module, or of a function or class that gives one.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The ONNX file to write.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(
            help="module:name of an iterable of inputs; a .npy, .npz or .safetensors file; or a folder of images.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE",
            help="Instead of --data: random numbers of this shape, such as 1x3x224x224. Good to measure speed with, "
            "and for nothing else.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples in a batch of a file or a folder.", rich_help_panel=DATA)
    ] = 32,
    max_batches: Annotated[
        int | None,
        typer.Option(min=1, help="Calibrate on so many batches; all if left out.", rich_help_panel=DATA),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="N or HxW",
            help="The images' size as the model takes it, in pixels; needed for a folder.",
            rich_help_panel=IMAGES,
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int, typer.Option(min=1, help="Images to take, evenly from all of the folder.", rich_help_panel=IMAGES)
    ] = 512,
    resize: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Length of the shorter side before the crop, such as 256 for a size of 224; if left out, the image "
            "just covers the size.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    crop: Annotated[
        bool, typer.Option("--crop/--stretch", help="Cut out the centre, or stretch the image.", rich_help_panel=IMAGES)
    ] = True,
    mean: Annotated[
        str,
        typer.Option(help="Of each channel in [0, 1]; one number makes the images grey.", rich_help_panel=IMAGES),
    ] = "0.485,0.456,0.406",
    std: Annotated[str, typer.Option(help="Standard deviations, likewise.", rich_help_panel=IMAGES)] = (
        "0.229,0.224,0.225"
    ),
    layout: Annotated[Layout, typer.Option(help="Order of dimensions.", rich_help_panel=IMAGES)] = Layout.NCHW,
    weights: Annotated[
        Path | None,
        typer.Option(help="The model's state dict, a .safetensors file.", rich_help_panel=MODEL, show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="What to quantize and how, in YAML, where it is not as the target has it.", rich_help_panel=MODEL
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(help="tensorrt, tensorrt-fast, onnxruntime, or a target's YAML file.", rich_help_panel=MODEL)
    ] = "tensorrt",
    device: Annotated[str, typer.Option(help="Where to calibrate: cpu, cuda, cuda:1.", rich_help_panel=MODEL)] = "cpu",
    unquantized: Annotated[
        bool,
        typer.Option(
            "--float",
            help="Write the model as it is, to compare with: same names, shapes and types, no Q/DQ. One batch will do.",
            rich_help_panel=FILE,
        ),
    ] = False,
    compute_dtype: Annotated[
        ComputeDtype,
        typer.Option(
            help="What is not quantized computes in this; the engine's types are the file's.", rich_help_panel=FILE
        ),
    ] = ComputeDtype.FP32,
    keep_io_types: Annotated[
        bool,
        typer.Option(
            "--keep-io-types/--cast-io-types",
            help="Leave float inputs and outputs float32, or give them the compute dtype.",
            rich_help_panel=FILE,
        ),
    ] = True,
    island: Annotated[
        list[str] | None,
        typer.Option(
            help="What stays float32 beside fp16 or bf16: op:softmax, or a glob over module paths. Repeatable.",
            rich_help_panel=FILE,
            show_default=False,
        ),
    ] = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT:DIM=MIN..MAX",
            help="A dimension that is free, within bounds or under a name (x:2=height). Repeatable. "
            "If left out, the batch is free.",
            rich_help_panel=FILE,
            show_default=False,
        ),
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Fix all shapes to those of the first batch.", rich_help_panel=FILE)
    ] = False,
    opset: Annotated[
        int | None, typer.Option(help="ONNX opset; the lowest that will do if left out.", rich_help_panel=FILE)
    ] = None,
    input_name: Annotated[
        list[str] | None,
        typer.Option(help="Names of the inputs, in their order. Repeatable.", rich_help_panel=FILE, show_default=False),
    ] = None,
    output_name: Annotated[
        list[str] | None,
        typer.Option(help="Names of the outputs, likewise.", rich_help_panel=FILE, show_default=False),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write the report on what is quantized, and why, to this file instead of the terminal.",
            rich_help_panel=FILE,
        ),
    ] = None,
) -> None:
    """Quantize a PyTorch model and write it as Q/DQ ONNX.

    For example:

    fxq quantize net.py:build net.onnx --data net.py:loader

    fxq quantize torchvision.models:resnet18 net.onnx --weights net.safetensors --data photos/ --size 224 --resize 256

    fxq quantize net.py:build net.onnx --data samples.npy --compute-dtype fp16 --dynamic x:0=1..16
    """
    import fxq

    from ..recipe import Recipe

    shapes = _dynamic_shapes(dynamic or [], static=static)
    images = None
    _check_written(output, report, weights, recipe)
    if size is not None:
        images = _preprocessing(size, resize, mean, std, layout, crop=crop)
    rules = Recipe.from_yaml(recipe) if recipe is not None else None
    batches = _batches(data, random, batch_size, images, count)
    network = _model(model, weights, device)
    if unquantized:
        quantized = _traced(network, batches, random, device)
    elif batches is None:
        quantized = _on_random_data(network, shape_of(random or ""), device, rules, target)
    else:
        quantized = fxq.quantize(network, batches, recipe=rules, target=target, max_batches=max_batches)
    path = fxq.export(
        quantized,
        output,
        dynamic_shapes=shapes,
        opset=opset,
        input_names=input_name or None,
        output_names=output_name or None,
        compute_dtype=compute_dtype.value,
        keep_io_types=keep_io_types,
        islands=island or (),
    )
    if not unquantized:
        give(str(fxq.report(quantized)), report)
    typer.echo(f"wrote {path}")


def _check_written(output: Path, report: Path | None, *sources: str | Path | None) -> None:
    """See before the work that its results have a place."""
    from ..backends.files import check_target

    check_target(output, *sources)
    if not output.parent.is_dir():
        raise FxqError(f"there is no folder {output.parent}", hint="make it first")
    if report is not None:
        check_target(report, *sources)
        if report.resolve() == output.resolve():
            raise FxqError(f"{report} is to hold both the network and the report", hint="name two files")


def _batches(data: str | None, random: str | None, size: int, images: Preprocessing | None, count: int) -> Any:
    """The calibration data; None where they are to be random."""
    from .entry_points import load_batches

    if (data is None) == (random is None):
        raise FxqError(
            "there is no calibration data" if data is None else "there are --data and --random",
            hint="add --data module:name, --data samples.npy or --data images/ --size 224; or, to measure speed, "
            "--random 1x3x224x224",
        )
    return None if data is None else load_batches(data, size, images, count)


def _model(entry: str, weights: Path | None, device: str) -> nn.Module:
    from .entry_points import load_model

    model = load_model(entry, weights)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # how torch says that there is no such device
        reason = str(error).partition("\n")[0]
        raise FxqError(
            f"the model cannot go to {device}: {reason}", hint="use --device cpu, or cuda:0 and the like"
        ) from error


def _traced(model: nn.Module, batches: Any, random: str | None, device: str) -> fx.GraphModule:
    """The float graph, by the first batch."""
    import torch

    import fxq

    from ..batches import each_batch, model_inputs, moved

    example = torch.randn(shape_of(random)) if random is not None else next(iter(each_batch(batches)), None)
    if example is None:
        raise FxqError("there is no batch to trace the model with", hint="give one, or --random 1x3x224x224")
    args, kwargs = moved(model_inputs(model, example), torch.device(device))
    return fxq.trace(model, args, example_kwargs=kwargs)


def _on_random_data(model: nn.Module, shape: Sequence[int], device: str, rules: Any, target: str) -> fx.GraphModule:
    import torch

    import fxq

    prepared = fxq.prepare(model, torch.randn(tuple(shape), device=device), recipe=rules, target=target)
    fxq.calibrate(prepared, None, performance_only=True)
    return fxq.convert(prepared)


def _preprocessing(size: str, resize: int | None, mean: str, std: str, layout: Layout, *, crop: bool) -> Preprocessing:
    from .image_folder import Preprocessing

    pixels = shape_of(size)
    if len(pixels) > 2:
        raise FxqError(f"{size!r} is no size of an image", hint="write 224, or height and width as 224x320")
    return Preprocessing(
        (pixels[0], pixels[-1]), resize, crop, _numbers(mean, float, ","), _numbers(std, float, ","), layout.value
    )


def shape_of(text: str) -> tuple[int, ...]:
    """``1x3x224x224`` as numbers.

    Raises:
        FxqError: It is none, or a size is less than 1.
    """
    found = _numbers(text, int, "x")
    if min(found) < 1:
        raise FxqError(f"{text!r} is no shape", hint="write sizes of 1 or more, as in 1x3x224x224")
    return found


def _numbers(text: str, kind: Callable[[str], T], separator: str) -> tuple[T, ...]:
    try:
        return tuple(kind(part) for part in text.split(separator))
    except ValueError:
        example = "1x3x224x224" if separator == "x" else "0.485,0.456,0.406"
        raise FxqError(f"{text!r} is no list of numbers", hint=f"write it as {example}") from None


def _dynamic_shapes(texts: Sequence[str], *, static: bool) -> Any:
    """What :func:`fxq.export` takes: ``x:0=1..16`` as ``{"x": {0: (1, 16)}}``."""
    if static and texts:
        raise FxqError("there are --static and --dynamic", hint="leave one out")
    found: dict[str, dict[int, str | tuple[int, int]]] = {}
    for text in texts:
        match = _DYNAMIC.fullmatch(text)
        if match is None:
            raise FxqError(f"{text!r} is no dynamic dimension", hint="write input:dimension=min..max, as in x:0=1..16")
        size = match["name"] or (int(match["low"]), int(match["high"]))
        found.setdefault(match["input"], {})[int(match["dim"])] = size
    return None if static else found or "batch"
