"""The command line: ``fxq quantize | lint | build | report | run``, also as ``python -m fxq``.

Exit codes: 0 all is well, 1 something was found (errors of the linter, differences of an engine, outputs that are too
far apart), 2 the command could not be carried out. What goes wrong is said in a sentence or two with the next step;
``fxq --debug`` shows where.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import FxqError
from .build import Library, build
from .lint import lint
from .quantize import quantize
from .run import run
from .terminal import FOUND, OnnxFile, Output, debug, give, reported

__all__ = ["app", "main"]

app = typer.Typer(
    name="fxq",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class ReportFormat(StrEnum):
    """How a report is printed."""

    TEXT = "text"
    JSON = "json"
    HTML = "html"


def _version(wanted: bool) -> None:
    import fxq

    if wanted:
        typer.echo(f"fxq {fxq.__version__}")
        raise typer.Exit


@app.callback()
def options(
    show_traceback: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Quantize PyTorch models for TensorRT, and see what became of them.

    Exit codes: 0 all is well, 1 something was found, 2 the command could not be carried out.
    """
    debug.set(show_traceback)


def report(
    path: OnnxFile,
    engine: Annotated[
        Path | None,
        typer.Option(
            help="An engine that fxq built, an inspector's JSON, or a builder's log; the prediction if left out."
        ),
    ] = None,
    library: Annotated[
        Library, typer.Option(help="Whose fusions to predict; an engine says itself who built it.")
    ] = Library.TENSORRT,
    form: Annotated[ReportFormat, typer.Option("--format", help="How to print it.")] = ReportFormat.TEXT,
    output: Output = None,
) -> None:
    """List the kernels that a file should become, or where an engine differs from that; exits with 1 on warnings.

    For example:

    fxq report net.onnx

    fxq report net.onnx --engine net.engine --format html -o report.html
    """
    import fxq

    from .runners import is_engine

    if engine is None:
        if form is ReportFormat.HTML:
            raise FxqError("a prediction has no HTML", hint="add --engine, or use --format text or json")
        prediction = fxq.predict(path, library=library.value)
        give(json.dumps(prediction.to_dict(), indent=1) if form is ReportFormat.JSON else str(prediction), output, path)
        return
    found = fxq.engine_report(fxq.load_engine(engine) if is_engine(engine) else engine, path)
    if form is ReportFormat.JSON:
        text = json.dumps(found.to_dict(), indent=1)
    else:
        text = found.html() if form is ReportFormat.HTML else found.text()
    give(text, output, path, engine)
    if found.findings.warnings or found.findings.errors:
        raise typer.Exit(FOUND)


for command in (quantize, lint, build, report, run):
    app.command()(reported(command))


def main() -> None:
    """Run the command line."""
    app()
