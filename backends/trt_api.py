"""The one door to TensorRT's Python modules: which library, which version, and what this one has.

TensorRT 10.12 to 11.x (``tensorrt``) and TensorRT-RTX (``tensorrt_rtx``) share one API but for what one of them
dropped or added. Whatever differs is asked for here, by presence and not by version; nothing that 11 removed is
touched (R2).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, Literal

from ..errors import BuildError, MissingDependencyError
from ..optional import require

__all__ = [
    "Library",
    "Platform",
    "fxq_version",
    "load_library",
    "network_flags",
    "require_flag",
    "this_platform",
]

Library = Literal["tensorrt", "tensorrt_rtx"]

_OLDEST: Final = {"tensorrt": (10, 12), "tensorrt_rtx": (1, 0)}
_INSTALL: Final = {"tensorrt": "pip install --upgrade 'fxq[trt]'", "tensorrt_rtx": "pip install --upgrade tensorrt-rtx"}


def load_library(library: Library | None, *, purpose: str) -> ModuleType:
    """Import TensorRT.

    Args:
        library: Which of the two; None takes ``tensorrt`` and, where that is not installed, ``tensorrt_rtx``.
        purpose: What it is needed for, for the message.

    Raises:
        BuildError: There is no such library.
        MissingDependencyError: It is not installed, does not load, or is older than what fxq works with (10.12, of
            TensorRT-RTX 1.0).
    """
    if library is not None and library not in _OLDEST:
        raise BuildError(f"no library is called {library!r}", hint=f"use one of {', '.join(_OLDEST)}, or None")
    name: str = library or _first_installed()
    module = require(name, extra="trt" if name == "tensorrt" else None, package=name, purpose=purpose)
    oldest = _OLDEST[name]
    if tuple(int(part) for part in module.__version__.split(".")[:2]) < oldest:
        raise MissingDependencyError(
            f"{purpose} needs {name} {oldest[0]}.{oldest[1]} or newer; {module.__version__} is installed",
            hint=_INSTALL[name],
        )
    return module


def _first_installed() -> str:
    """``tensorrt``, or ``tensorrt_rtx`` where only that is installed."""
    try:
        found = importlib.util.find_spec("tensorrt") is None and importlib.util.find_spec("tensorrt_rtx") is not None
    except ValueError:  # a module without a spec: it is loaded, or its loading is blocked
        found = False
    return "tensorrt_rtx" if found else "tensorrt"


def network_flags(trt: ModuleType) -> int:
    """Flags of a strongly typed network.

    10.x needs the flag; 11 takes it and is strongly typed with or without; a later one may drop it (R1).
    """
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def require_flag(trt: ModuleType, owner: str, name: str, *, option: str) -> Any:
    """A member of one of TensorRT's enumerations.

    Args:
        trt: The module.
        owner: The enumeration, for example ``BuilderFlag``.
        name: Its member.
        option: What the user asked for, for the message.

    Raises:
        BuildError: This library does not have it.
    """
    found = getattr(getattr(trt, owner, None), name, None)
    if found is None:
        raise BuildError(
            f"{trt.__name__} {trt.__version__} has no {option} ({owner}.{name})",
            hint="leave the option out, or build with a library that has it",
        )
    return found


@dataclass(frozen=True)
class Platform:
    """Where an engine is built or run.

    Attributes:
        system: ``"linux x86_64"`` and the like.
        device: The GPU's name, or None without one.
        capability: Its compute capability, ``"8.9"``, or None.
    """

    system: str
    device: str | None = None
    capability: str | None = None


def this_platform() -> Platform:
    """This machine and torch's current CUDA device."""
    import torch

    system = f"{platform.system()} {platform.machine()}".lower()
    if not torch.cuda.is_available():
        return Platform(system)
    major, minor = torch.cuda.get_device_capability()
    return Platform(system, torch.cuda.get_device_name(), f"{major}.{minor}")


def fxq_version() -> str:
    """fxq's version; ``"checkout"`` where it is run without being installed."""
    try:
        return importlib.metadata.version("fxq")
    except importlib.metadata.PackageNotFoundError:
        return "checkout"
