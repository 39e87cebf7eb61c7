"""The command line: ``fxq quantize | lint | build | report | run``, also as ``python -m fxq``.

Exit codes: 0 all is well, 1 something was found (errors of the linter, differences of an engine), 2 the command could
not be carried out. What goes wrong is said in a sentence or two with the next step; ``fxq --debug`` shows where.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from contextvars import ContextVar
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from .errors import FxqError

__all__ = ["app", "main"]

FOUND: Final = 1
FAILED: Final = 2

app = typer.Typer(
    name="fxq",
    help="Quantize PyTorch models for TensorRT, and see what became of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_debug: ContextVar[bool] = ContextVar("debug", default=False)
F = TypeVar("F", bound=Callable[..., Any])


class LintFormat(StrEnum):
    """How findings are printed."""

    TEXT = "text"
    JSON = "json"
    SARIF = "sarif"


class ReportFormat(StrEnum):
    """How a report is printed."""

    TEXT = "text"
    JSON = "json"
    HTML = "html"


OnnxFile = Annotated[Path, typer.Argument(help="An ONNX file, from any tool.", show_default=False)]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file instead of the terminal.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Quantize PyTorch models for TensorRT, and see what became of them."""
    _debug.set(debug)


def _reported(function: F) -> F:
    """Say fxq's errors in red on stderr and exit with 2."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (FxqError, OSError) as error:
            if _debug.get():
                raise
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(FAILED) from None

    return run  # type: ignore[return-value] # the same signature, through functools.wraps


def _give(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text)
        return
    from .backends.files import write_whole

    write_whole(output, f"{text}\n".encode())
    typer.echo(f"wrote {output}", err=True)


@app.command()
@_reported
def quantize(
    model: Annotated[
        str, typer.Argument(help="The model: module:name or file.py:name, an nn.Module or what gives one.")
    ],
    output: Annotated[Path, typer.Argument(help="The ONNX file to write.")],
    data: Annotated[
        str | None, typer.Option(help="Calibration data: module:name of an iterable of inputs, or a .npy or .npz file.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe in YAML.")] = None,
    target: Annotated[str, typer.Option(help="A target's name, or its YAML file.")] = "tensorrt",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch of a .npy or .npz file.")] = 32,
    max_batches: Annotated[int | None, typer.Option(min=1, help="Calibrate on so many batches.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; the lowest that will do if left out.")] = None,
    static: Annotated[bool, typer.Option("--static", help="Fix the batch to that of the data.")] = False,
) -> None:
    """Quantize a model and write it as Q/DQ ONNX.

    Example: fxq quantize net.py:build net.onnx --data net.py:loader
    """
    import fxq

    from .entry_points import load_batches, load_model
    from .recipe import Recipe

    if data is None:
        raise FxqError("there is no calibration data", hint="add --data module:name, or --data samples.npy")
    rules = Recipe.from_yaml(recipe) if recipe is not None else None
    quantized = fxq.quantize(
        load_model(model), load_batches(data, batch_size), recipe=rules, target=target, max_batches=max_batches
    )
    typer.echo(str(fxq.report(quantized)))
    path = fxq.export(quantized, output, dynamic_shapes=None if static else "batch", opset=opset)
    typer.echo(f"wrote {path}")


@app.command()
@_reported
def lint(
    path: OnnxFile,
    form: Annotated[LintFormat, typer.Option("--format", help="How to print the findings.")] = LintFormat.TEXT,
    output: Output = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 on warnings too.")] = False,
) -> None:
    """Check an ONNX file against TensorRT's rules; exits with 1 if it finds errors.

    Example: fxq lint net.onnx --format sarif -o net.sarif
    """
    import fxq

    from .sarif import findings_as_sarif

    found = fxq.lint(path)
    if form is LintFormat.TEXT:
        text = str(found)
    else:
        data = found.to_dict() if form is LintFormat.JSON else findings_as_sarif(found, path)
        text = json.dumps(data, indent=1)
    _give(text, output)
    if found.errors or (strict and found.warnings):
        raise typer.Exit(FOUND)


@app.command()
@_reported
def build(
    path: OnnxFile,
    engine: Annotated[Path, typer.Argument(help="The engine file to write.")],
    profile: Annotated[
        list[str] | None,
        typer.Option(help="Shapes of a dynamic input, as NAME=1x3x224x224,8x3x224x224,32x3x224x224 (min, opt, max)."),
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="A file of kernel timings, read and brought up to date.")
    ] = None,
    workspace: Annotated[int | None, typer.Option(min=0, help="Most scratch memory of a kernel, in MiB.")] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="0 to 5; higher searches longer.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="A file for the builder's whole log.")] = None,
) -> None:
    """Build a strongly typed TensorRT engine, and say what its kernels are.

    Example: fxq build net.onnx net.engine --timing-cache timings.cache
    """
    import fxq

    built = fxq.build(
        path,
        engine,
        profiles=_profiles(profile or []),
        timing_cache=timing_cache,
        workspace_bytes=None if workspace is None else workspace << 20,
        optimization_level=optimization_level,
        verbose_log=log,
    )
    typer.echo(built.summary())


def _profiles(texts: list[str]) -> dict[str, tuple[tuple[int, ...], ...]] | None:
    """``x=1x3,8x3,32x3`` as ``{"x": ((1, 3), (8, 3), (32, 3))}``."""
    found = {}
    for text in texts:
        name, _, shapes = text.partition("=")
        try:
            found[name] = tuple(tuple(int(size) for size in shape.split("x")) for shape in shapes.split(","))
        except ValueError:
            found[name] = ()
        if not name or len(found[name]) != 3:
            raise FxqError(f"{text!r} is no profile", hint="write NAME=1x3x224x224,8x3x224x224,32x3x224x224")
    return found or None


@app.command()
@_reported
def report(
    path: OnnxFile,
    engine: Annotated[
        Path | None,
        typer.Option(help="The inspector's JSON of the engine, or a builder's log; without it, the prediction."),
    ] = None,
    form: Annotated[ReportFormat, typer.Option("--format", help="How to print it.")] = ReportFormat.TEXT,
    output: Output = None,
) -> None:
    """List the kernels that a file should become, or where an engine differs from that; exits with 1 on warnings.

    Example: fxq report net.onnx --engine inspector.json --format html -o report.html
    """
    import fxq

    if engine is None:
        if form is ReportFormat.HTML:
            raise FxqError("a prediction has no HTML", hint="add --engine, or use --format text or json")
        prediction = fxq.predict(path)
        _give(json.dumps(prediction.to_dict(), indent=1) if form is ReportFormat.JSON else str(prediction), output)
        return
    found = fxq.engine_report(engine, path)
    if form is ReportFormat.JSON:
        text = json.dumps(found.to_dict(), indent=1)
    else:
        text = found.html() if form is ReportFormat.HTML else found.text()
    _give(text, output)
    if found.findings.warnings or found.findings.errors:
        raise typer.Exit(FOUND)


@app.command()
@_reported
def run(
    path: OnnxFile,
    inputs: Annotated[
        Path | None, typer.Option(help="A .npz file with each input by name, or a .npy file for one.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the outputs to this .npz file.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of random inputs, where it is dynamic.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs, after a tenth as many to warm up.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads inside one operation.")] = None,
) -> None:
    """Run an ONNX file in ONNX Runtime on the CPU, on given or random inputs, and time it.

    Example: fxq run net.onnx --batch 8 --repeat 100
    """
    import torch

    from .backends.onnxrt import Session
    from .entry_points import read_tensors

    session = Session(path, threads=threads)
    if inputs is None:
        torch.manual_seed(0)
        feeds = session.random_inputs(batch)
    else:
        feeds = read_tensors(inputs)
        feeds = {session.input_names[0]: feeds[""]} if set(feeds) == {""} else feeds
    results = session.run(feeds)
    for _ in range(repeat // 10):
        session.run(feeds)
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        session.run(feeds)
        times.append(1000 * (time.perf_counter() - start))
    for name, tensor in results.items():
        typer.echo(f"{name}: {str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}")
    times.sort()
    tail = times[min(len(times) - 1, int(0.95 * len(times)))]
    typer.echo(f"latency: median {statistics.median(times):.2f} ms, 95% {tail:.2f} ms, {repeat} runs")
    if output is not None:
        _save(output, results)


def _save(path: Path, results: dict[str, Any]) -> None:
    from io import BytesIO

    import numpy as np

    from .backends.files import write_whole

    data = BytesIO()
    np.savez(data, **{name: tensor.numpy() for name, tensor in results.items()})
    write_whole(path, data.getvalue())
    typer.echo(f"wrote {path}")


def main() -> None:
    """Run the command line."""
    app()
