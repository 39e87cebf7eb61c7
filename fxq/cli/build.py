"""``fxq build``: from an ONNX file to an engine."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ..errors import FxqError
from .quantize import shape_of
from .terminal import OnnxFile

if TYPE_CHECKING:
    from ..backends.trt_profiles import Profiles

__all__ = ["Hardware", "Library", "Weights", "build"]

PORTABLE: Final = "Where the engine runs"
SPEED: Final = "Search and caches"


class Library(StrEnum):
    """Which of NVIDIA's libraries builds."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class Hardware(StrEnum):
    """Which other GPUs an engine is to run on."""

    SAME_CAPABILITY = "same-capability"
    AMPERE_PLUS = "ampere-plus"


class Weights(StrEnum):
    """How an engine holds its weights."""

    EMBEDDED = "embedded"
    STRIPPED = "stripped"
    REFITTABLE = "refittable"


def build(
    path: OnnxFile,
    engine: Annotated[Path, typer.Argument(help="The engine file to write.", show_default=False)],
    profile: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=MIN,OPT,MAX",
            help="Smallest, most frequent and largest shape of a dynamic input, such as "
            "x=1x3x224x224,8x3x224x224,32x3x224x224. Repeatable. "
            "If left out: what the file says, else batches of 1, 8 and 32.",
            show_default=False,
        ),
    ] = None,
    library: Annotated[
        Library | None, typer.Option(help="The library; the first that is installed if left out.")
    ] = None,
    weights: Annotated[
        Weights,
        typer.Option(
            help="In the engine; left out of it, to be put back from the ONNX file when it runs; or exchangeable, "
            "which a file with Q/DQ does not allow."
        ),
    ] = Weights.EMBEDDED,
    progress: Annotated[bool, typer.Option("--progress", help="Show bars of the builder's phases.")] = False,
    log: Annotated[
        Path | None, typer.Option(help="A file for the builder's whole log, which fxq report reads.")
    ] = None,
    hardware: Annotated[
        Hardware | None,
        typer.Option(help="Let other GPUs run the engine; only this one if left out.", rich_help_panel=PORTABLE),
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="Let later versions of the same major version run the engine.",
            rich_help_panel=PORTABLE,
        ),
    ] = False,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            help="TensorRT-RTX: build for this GPU, such as 8.9. Repeatable.",
            rich_help_panel=PORTABLE,
            show_default=False,
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="A folder of built engines: the same build twice is a file read.", rich_help_panel=SPEED),
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="A file of kernel timings, read and brought up to date.", rich_help_panel=SPEED)
    ] = None,
    workspace: Annotated[
        int | None,
        typer.Option(min=0, help="Most scratch memory of a kernel, in MiB; all if left out.", rich_help_panel=SPEED),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(min=0, max=5, help="0 to 5; higher searches longer. 3 if left out.", rich_help_panel=SPEED),
    ] = None,
) -> None:
    """Build a strongly typed TensorRT engine, and say what its kernels are.

    The types are those of the file (fxq quantize --compute-dtype). Beside the engine goes a record of how it was built.

    For example:

    fxq build net.onnx net.engine

    fxq build net.onnx net.engine --profile x=1x3x224x224,8x3x224x224,32x3x224x224 --timing-cache timings.cache
    """
    import fxq

    built = fxq.build(
        path,
        engine,
        library=None if library is None else library.value.replace("-", "_"),
        profiles=profiles_of(profile or ()),
        weights=weights.value,
        progress=progress,
        verbose_log=log,
        hardware=None if hardware is None else hardware.value,
        version_compatible=version_compatible,
        compute_capabilities=tuple(compute_capability or ()),
        cache=cache,
        timing_cache=timing_cache,
        workspace_bytes=None if workspace is None else workspace << 20,
        optimization_level=optimization_level,
    )
    typer.echo(built.summary())


def profiles_of(texts: Sequence[str]) -> Profiles | None:
    """``x=1x3,8x3,32x3`` as ``{"x": ((1, 3), (8, 3), (32, 3))}``; None for no text.

    Raises:
        FxqError: A text does not have that form, or an input has two.
    """
    found = {}
    for text in texts:
        name, _, shapes = text.rpartition("=")
        parts = shapes.split(",")
        if not name or len(parts) != 3 or name in found:
            raise FxqError(
                f"{text!r} is no profile" if name not in found else f"there are two profiles for {name}",
                hint="write INPUT=MIN,OPT,MAX, as in x=1x3x224x224,8x3x224x224,32x3x224x224",
            )
        found[name] = (shape_of(parts[0]), shape_of(parts[1]), shape_of(parts[2]))
    return found or None
