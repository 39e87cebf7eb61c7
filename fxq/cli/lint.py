"""``fxq lint``: TensorRT's rules on an ONNX file, and the file mended."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import FxqError
from .terminal import FOUND, OnnxFile, give

if TYPE_CHECKING:
    from ..findings import Findings

__all__ = ["lint"]


class LintFormat(StrEnum):
    """How findings are printed."""

    TEXT = "text"
    JSON = "json"
    SARIF = "sarif"


def lint(
    path: OnnxFile,
    form: Annotated[LintFormat, typer.Option("--format", help="How to print the findings.")] = LintFormat.TEXT,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the findings here; with --fix, the fixed model.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 on warnings too.")] = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="Write NAME.fixed.onnx, mended where no number changes by it.")
    ] = False,
    fix_rounding: Annotated[
        bool, typer.Option("--fix-rounding", help="As --fix, and also mended where a rounding goes or comes.")
    ] = False,
    in_place: Annotated[bool, typer.Option("--in-place", help="With --fix: replace the file itself.")] = False,
    target: Annotated[
        str | None, typer.Option(help="Whose rules; by default those of the file's own target, or TensorRT's.")
    ] = None,
) -> None:
    """Check an ONNX file against its backend's rules; exits with 1 on errors, with --fix on those that are left.

    Example: fxq lint net.onnx --format sarif -o net.sarif

    Example: fxq lint net.onnx --fix -o fixed.onnx
    """
    import fxq

    if target is not None and (fix or fix_rounding):
        raise FxqError("--fix goes by TensorRT's rules alone", hint="leave --target out")
    if fix or fix_rounding:
        found = _mend(path, output, form, in_place=in_place, rounding=fix_rounding)
    elif in_place:
        raise FxqError("--in-place says where a fixed file goes, and nothing is to be fixed", hint="add --fix")
    else:
        found = fxq.lint(path, target=target)
        give(_in_form(found, path, form), output, path)
    if found.errors or (strict and found.warnings):
        raise typer.Exit(FOUND)


def _mend(path: Path, output: Path | None, form: LintFormat, *, in_place: bool, rounding: bool) -> Findings:
    """Fix a file, say what was done, and give what is left."""
    import fxq

    fixed = fxq.fix(path, output, in_place=in_place, rounding=rounding)
    if form is LintFormat.TEXT:
        text = str(fixed)
    elif form is LintFormat.JSON:
        text = json.dumps(fixed.to_dict(), indent=1)
    else:
        text = _in_form(fixed.left, fixed.path or path, form)
    typer.echo(text)
    typer.echo(f"wrote {fixed.path}" if fixed.path is not None else f"{path} is as it was", err=True)
    return fixed.left


def _in_form(found: Findings, path: Path, form: LintFormat) -> str:
    from ..sarif import findings_as_sarif

    if form is LintFormat.TEXT:
        return str(found)
    return json.dumps(found.to_dict() if form is LintFormat.JSON else findings_as_sarif(found, path), indent=1)
