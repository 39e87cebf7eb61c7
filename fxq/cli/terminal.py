"""How commands talk to a terminal: what they print or write, their exit codes, and errors without tracebacks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from ..errors import FxqError

__all__ = ["FAILED", "FOUND", "OnnxFile", "Output", "debug", "give", "reported"]

FOUND: Final = 1
"""Exit code: something was found, such as errors of the linter or differences of an engine."""
FAILED: Final = 2
"""Exit code: the command could not be carried out, or was not understood."""

OnnxFile = Annotated[Path, typer.Argument(help="An ONNX file, from any tool.", show_default=False)]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file instead of the terminal.")]

F = TypeVar("F", bound=Callable[..., Any])

debug: ContextVar[bool] = ContextVar("debug", default=False)
"""Whether errors are raised with their traceback."""


def reported(function: F) -> F:
    """A command that says fxq's errors in red on stderr and exits with :data:`FAILED`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not debug.get():
            # torch logs the traceback of what fxq reports as an error of the model.
            logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
        try:
            return function(*args, **kwargs)
        except (FxqError, OSError) as error:
            if debug.get():
                raise
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(FAILED) from None

    return run  # type: ignore[return-value] # the same signature, through functools.wraps


def give(text: str, output: Path | None, *sources: Path | None) -> None:
    """Print a text, or write it to a file, whole or not at all; never over one of the files that it speaks of."""
    if output is None:
        typer.echo(text)
        return
    from ..backends.files import check_target, write_whole

    check_target(output, *sources)
    write_whole(output, f"{text}\n".encode())
    typer.echo(f"wrote {output}", err=True)
