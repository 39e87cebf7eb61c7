"""``fxq run``: an ONNX file in ONNX Runtime on the CPU, or an engine on a GPU: outputs, times, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ..errors import FxqError
from .quantize import shape_of
from .terminal import FOUND

if TYPE_CHECKING:
    from torch import Tensor

    from ..comparison import ComparisonRow
    from .runners import Runner

__all__ = ["run"]

GIVEN: Final = "Inputs and outputs"
COMPARED: Final = "Comparison"
TIMED: Final = "Time"
ENGINES: Final = "Engines"


def run(
    path: Annotated[
        Path, typer.Argument(help="An ONNX file of any tool, or an engine (.engine, .plan, .trt).", show_default=False)
    ],
    inputs: Annotated[
        str | None,
        typer.Option(
            help="A .npz or .safetensors file with each input by name, a .npy file for one, or module:name of batches, "
            "of which the first is taken. Random numbers if left out.",
            rich_help_panel=GIVEN,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the outputs to this .npz file.", rich_help_panel=GIVEN)
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Batch size of random inputs, where it is dynamic; if left out, 1, or what an engine is tuned for.",
            rich_help_panel=GIVEN,
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=SHAPE",
            help="Shape of a random input: x=1x3x224x224. Repeatable.",
            rich_help_panel=GIVEN,
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="REFERENCE",
            help="What the outputs should be: the PyTorch model as module:name, another ONNX file or engine. "
            "Of an ONNX file every layer is compared; files and engines are timed in turns.",
            rich_help_panel=COMPARED,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="The reference model's state dict, a .safetensors file.", rich_help_panel=COMPARED),
    ] = None,
    worst: Annotated[
        int | None,
        typer.Option(
            min=1, help="Show so many layers, those at which most is lost; all if left out.", rich_help_panel=COMPARED
        ),
    ] = None,
    min_sqnr: Annotated[
        float | None,
        typer.Option(
            help="Exit with 1 if an output is below this signal-to-noise ratio, in dB.", rich_help_panel=COMPARED
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(min=0, help="Timed runs; 0 for none.", rich_help_panel=TIMED)] = 20,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Runs before them; a tenth as many if left out.", rich_help_panel=TIMED)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="ONNX Runtime's threads inside one operation.", rich_help_panel=TIMED)
    ] = None,
    optimize: Annotated[
        bool,
        typer.Option(
            "--optimize/--no-optimize", help="Let ONNX Runtime fuse and rewrite the file.", rich_help_panel=TIMED
        ),
    ] = True,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Replay a CUDA graph.", rich_help_panel=ENGINES)
    ] = False,
    weights_from: Annotated[
        Path | None,
        typer.Option(help="The ONNX file of an engine that was built without its weights.", rich_help_panel=ENGINES),
    ] = None,
) -> None:
    """Run an ONNX file on the CPU, or an engine on a GPU: print its outputs' shapes and its latency.

    What an engine was built with is said before it runs. An engine holds code: run those only whose origin you trust.

    For example:

    fxq run net.onnx --batch 8 --repeat 100

    fxq run net.onnx --compare net.py:build --inputs samples.npz --min-sqnr 20

    fxq run net.engine --compare net.onnx --cuda-graph
    """
    if min_sqnr is not None and compare is None:
        raise FxqError("there is nothing to compare with", hint="add --compare net.py:build, or --compare float.onnx")
    import torch

    from ..backends.files import check_target
    from .runners import Reference, runner_of

    if output is not None:
        check_target(output, path, inputs, weights_from)
    runner = runner_of(path, threads=threads, optimize=optimize, cuda_graph=cuda_graph, weights_from=weights_from)
    reference = None if compare is None else Reference.of(compare, weights, runner)
    typer.echo(runner.describe())
    torch.manual_seed(0)
    given = _given(inputs, runner) or runner.example_inputs(batch, _shapes(shape or ()))
    results = runner.run(given)
    for name, tensor in results.items():
        typer.echo(f"{name}: {str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}")
    if repeat:
        beside = None if reference is None else reference.runner
        warm = max(1, repeat // 10) if warmup is None else warmup
        typer.echo(runner.timed(given, beside, warmup=warm, iterations=repeat))
    if output is not None:
        _save(output, results)
    if reference is not None:
        found = reference.compare(runner, given, results)
        typer.echo(found.text(worst))
        _require(found.outputs, min_sqnr)


def _require(outputs: Sequence[ComparisonRow], least: float | None) -> None:
    """Exit with :data:`FOUND` if an output is below `least` dB."""
    low = [row for row in outputs if least is not None and row.sqnr < least]
    for row in low:
        typer.secho(f"{row.node}: {row.sqnr:.1f} dB is below {least:g} dB", fg=typer.colors.RED, err=True)
    if low:
        raise typer.Exit(FOUND)


def _given(source: str | None, runner: Runner) -> dict[str, Tensor] | None:
    """The inputs that the user names, by the names of the inputs."""
    if source is None:
        return None
    from .entry_points import FILES, load_batches, read_tensors

    names = runner.input_names
    if source.endswith(FILES):
        batch: Any = read_tensors(Path(source))
        batch = next(iter(batch.values())) if len(batch) == 1 else batch
    else:
        batch = next(iter(load_batches(source)), None)
    if isinstance(batch, Mapping):
        given = dict(batch)
    else:
        values = list(batch) if isinstance(batch, tuple | list) else [] if batch is None else [batch]
        if len(values) < len(names):
            raise FxqError(f"{source} gives {len(values)} inputs, and {runner.name} takes {', '.join(names)}")
        given = dict(zip(names, values, strict=False))
    return {name: _tensor(name, value, source) for name, value in given.items()}


def _tensor(name: str, value: Any, source: str) -> Tensor:
    import torch

    if isinstance(value, torch.Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise FxqError(
            f"{source} gives a {type(value).__name__} for the input {name}", hint="give tensors or numpy arrays"
        ) from None


def _shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``x=1x3`` as ``{"x": (1, 3)}``."""
    pairs = [text.rpartition("=") for text in texts]
    if wrong := [text for text, (name, _, _) in zip(texts, pairs, strict=True) if not name]:
        raise FxqError(f"{wrong[0]!r} is no input and shape", hint="write x=1x3x224x224")
    return {name: shape_of(shape) for name, _, shape in pairs}


def _save(path: Path, results: Mapping[str, Tensor]) -> None:
    from io import BytesIO

    import numpy as np

    from ..backends.files import write_whole

    data = BytesIO()
    arrays: dict[str, Any] = {name: _array(tensor.cpu()) for name, tensor in results.items()}
    np.savez(data, **arrays)
    write_whole(path, data.getvalue())
    typer.echo(f"wrote {path}")


def _array(tensor: Tensor) -> Any:
    """As numpy's; types that it lacks, such as bfloat16, as float32."""
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.float().numpy()
