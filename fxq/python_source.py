"""Values of graphs, targets and passes as Python expressions, with what those need to run: imports, tensors, files."""

from __future__ import annotations

import builtins
import dataclasses
import enum
import importlib.util
import math
import re
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.fx.graph import _get_qualified_name  # type: ignore[attr-defined]

from .errors import FxqError, PassError
from .graph import Origin
from .target import Target

__all__ = ["PythonSource"]

_PLAIN: Final = (bool, int, float, str, bytes)
_IMMUTABLE: Final = (type(fx.Graph().create_node("call_function", len, ((),)).args[0]),)


class PythonSource:
    """Turns values into Python expressions, and keeps what these need.

    In an expression ``n`` holds nodes by name and ``T`` tensors by key; ``torch`` is imported.

    Attributes:
        imports: Import statements.
        tensors: What ``T`` has to hold, on the CPU.
        files: Name and text of files that have to lie beside the source.
    """

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.tensors: dict[str, Tensor] = {}
        self.files: dict[str, str] = {}

    def tensor(self, key: str, value: Tensor) -> str:
        """The expression for a tensor, kept in the file of tensors."""
        while key in self.tensors:
            key += "_"
        self.tensors[key] = value.detach().cpu().contiguous().clone()
        return f"T[{key!r}]"

    def source(self, value: Any) -> str:
        """The expression for any value that a graph may hold.

        Raises:
            PassError: It has none.
        """
        if isinstance(value, fx.Node):
            return f"n[{value.name!r}]"
        if isinstance(value, Tensor):
            return self.tensor("value", value)
        if isinstance(value, float) and not math.isfinite(value):
            return f"float({str(value)!r})"
        if value is None or (isinstance(value, _PLAIN) and not isinstance(value, enum.Enum)):
            return repr(value)
        if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
            return str(value)
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        if isinstance(value, enum.Enum):
            return f"{self.name(type(value))}.{value.name}"
        if isinstance(value, type) or callable(value):
            return self.name(value)
        return self._container(value)

    def _container(self, value: Any) -> str:
        if isinstance(value, slice):
            return f"slice({', '.join(self.source(getattr(value, k)) for k in ('start', 'stop', 'step'))})"
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{self.source(k)}: {self.source(v)}" for k, v in value.items()) + "}"
        if isinstance(value, frozenset | set):
            return f"{type(value).__name__}([{', '.join(sorted(map(self.source, value)))}])"
        if isinstance(value, list):
            return f"[{', '.join(map(self.source, value))}]"
        if isinstance(value, tuple) and type(value) in (tuple, torch.Size, *_IMMUTABLE):
            return f"({''.join(f'{self.source(v)}, ' for v in value)})"
        if isinstance(value, Origin):
            kinds = tuple(kind for kind in value.module_types if self._has_name(kind))
            value = dataclasses.replace(value, module_types=kinds)
        if isinstance(value, Target) and self._is_shipped(value):
            return f"{self.name(Target)}.load({value.name!r})"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [f for f in dataclasses.fields(value) if f.init]
            inner = ", ".join(f"{f.name}={self.source(getattr(value, f.name))}" for f in fields)
            return f"{self.name(type(value))}({inner})"
        raise PassError(f"{value!r} cannot be written as text")

    @staticmethod
    def _is_shipped(target: Target) -> bool:
        try:
            return Target.load(target.name) == target
        except FxqError:
            return False

    def _has_name(self, kind: type) -> bool:
        """Whether a type can be imported; a traced model's own classes need not come along."""
        known = sys.modules.get(kind.__module__)
        return kind.__module__.startswith("torch.") and getattr(known, kind.__qualname__, None) is kind

    def name(self, value: Any) -> str:
        """The expression for a function or class, by the module that has it.

        Raises:
            PassError: It has no name that can be imported.
        """
        path = _qualified(value)
        parts = path.split(".")
        if getattr(builtins, path, None) is value:
            return path
        if _resolved(sys.modules[__name__], path.split(".")) is value and parts[0] == "torch":
            return path
        for end in range(len(parts) - 1, 0, -1):
            module = sys.modules.get(".".join(parts[:end]))
            if module is not None and _resolved(module, parts[end:]) is value:
                return ".".join([self.imported(module), *parts[end:]])
        raise PassError(f"{path} has no name at the top of a module, so it cannot be written as text")

    def imported(self, module: ModuleType) -> str:
        """The name under which the script has a module; a copy of the user's own files goes along."""
        name = module.__name__
        file = getattr(module, "__file__", None)
        if _is_installed(name, file):
            self.imports.add(f"import {name}")
            return name
        if file is None or not Path(file).is_file():
            raise PassError(f"{name} is in no file; put the pass into one")
        if getattr(module, "__package__", None) and importlib.util.find_spec(name) is not None:
            root = Path(file).parents[name.count(".") + (Path(file).name == "__init__.py")]
            self.imports.add(f"import sys; sys.path.insert(0, {str(root)!r}); import {name}")
            return name
        stem = "copy_of_" + re.sub(r"\W", "_", Path(file).stem)
        self.files[f"{stem}.py"] = Path(file).read_text(encoding="utf-8")
        self.imports.add(f"import {stem}")
        return stem


def _qualified(value: Any) -> str:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    try:
        return str(_get_qualified_name(value))
    except (RuntimeError, AttributeError):
        return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', repr(value))}"


def _resolved(module: ModuleType, parts: list[str]) -> Any:
    found: Any = module
    for part in parts:
        found = getattr(found, part, None)
    return found


def _is_installed(name: str, file: str | None) -> bool:
    """Whether a module is fxq's or comes with Python, torch or another installed package."""
    top = name.partition(".")[0]
    if name == "__main__":
        return False
    if top == "fxq" or top in sys.builtin_module_names or top in sys.stdlib_module_names:
        return True
    places = {sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")}
    return name != "__main__" and (file is None or any(Path(file).is_relative_to(place) for place in places))
