"""A module that looks like one of TensorRT's, for what asks no more of it than its name and version."""

from __future__ import annotations

from types import ModuleType


def fake(name: str, version: str) -> ModuleType:
    module = ModuleType(name)
    vars(module)["__version__"] = version
    return module
