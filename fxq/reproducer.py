"""A failing pass, saved with the graph that it got: a Python script and a file of tensors.

They run on their own, and nothing in them is pickled. The script builds the graph node by node, so it can be
read, cut down and put into a bug report. Passes and functions of the user's come along: a lone file as a
copy, a package by its place.
"""

from __future__ import annotations

import builtins
import copy
import dataclasses
import enum
import importlib.util
import math
import re
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, _get_qualified_name  # type: ignore[attr-defined]

from .errors import FxqError, PassError
from .forward_code import ForwardCode
from .graph import ALIASES, EDGES, ORIGIN, SEQUENCE, TENSOR, Origin, attribute, state
from .instruments import Instrument, NumericError
from .passbase import Pass
from .printer import format_graph
from .quantizer import Quantizer
from .target import Target

__all__ = ["Reproducer", "save_reproducer"]

_PLAIN: Final = (bool, int, float, str, bytes)
_META: Final = (ORIGIN, TENSOR, EDGES, ALIASES, SEQUENCE)
_HEAD: Final = '''\
"""Pass {name} failed; this runs it on the graph that it got. Made by torch {torch}: python {script}"""
# {message}
#
{graph}

from pathlib import Path

import torch
from safetensors.torch import load_file
{imports}

T = load_file(Path(__file__).with_name("tensors.safetensors"))
root = torch.nn.Module()


def put(path, value):
    owner, _, name = path.rpartition(".")
    module = root
    for part in owner.split(".") if owner else ():
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if isinstance(value, torch.nn.Parameter):
        module._parameters.pop(name, None)
        module.register_parameter(name, value)
    elif isinstance(value, torch.nn.Module):
        module.add_module(name, value)
    else:
        module._buffers.pop(name, None)
        module.register_buffer(name, value)


'''


class Reproducer(Instrument):
    """Saves a reproducer when a pass fails, and says so in a note of the error.

    It copies the graph before each pass, which costs as much memory as the model. What is saved
    runs on the CPU.

    Args:
        folder: Where to save; each failure goes into a folder of it that has the pass's name.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._graph: fx.GraphModule | None = None

    def before(self, p: Pass, gm: fx.GraphModule) -> None:
        self._graph = copy.deepcopy(gm)

    def failed(self, p: Pass, gm: fx.GraphModule, error: FxqError) -> None:
        if self._graph is None:
            return
        try:
            script = save_reproducer(p, self._graph, self.folder / p.name, error)
        except PassError as why:
            error.add_note(f"no reproducer was saved: {why.message}")
        else:
            error.add_note(f"to see it again: python {script}")


def save_reproducer(p: Pass, gm: fx.GraphModule, folder: str | Path, error: FxqError) -> Path:
    """Write what makes a pass fail.

    Args:
        p: The pass.
        gm: The graph that it got.
        folder: Where to write; files of an earlier reproducer are overwritten.
        error: How it failed, for the script's head; a failed numeric check is repeated in the script.

    Returns:
        The script's path.

    Raises:
        PassError: Something of the graph or of the pass cannot be written as text; nothing is left behind.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    writer = _Writer()
    body = "".join(f"{line}\n" for line in [*writer.graph(gm), *writer.run(p, error)])
    imports = "".join(f"\n{line}" for line in sorted(writer.imports))
    head = _HEAD.format(
        name=p.name, torch=torch.__version__, script="reproduce.py", imports=imports,
        message=" ".join(error.message.split()),
        graph="\n".join(f"# {line}" for line in format_graph(gm).splitlines()),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        save_file(writer.tensors, Path(work, "tensors.safetensors"))
        for name, text in {**writer.files, "reproduce.py": head + body}.items():
            Path(work, name).write_text(text, encoding="utf-8")
        for file in sorted(Path(work).iterdir()):
            file.replace(folder / file.name)
    return folder / "reproduce.py"


class _Writer:
    """Turns values into Python source, and keeps what that source needs: imports, tensors, copied files."""

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.tensors: dict[str, Tensor] = {}
        self.files: dict[str, str] = {}

    def graph(self, gm: fx.GraphModule) -> list[str]:
        """Statements that build `gm`."""
        called = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "call_module")
        lines = [line for path in called for line in self.module(path, attribute(gm, path))]
        read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
        loose: list[str] = []
        for path, tensor in (*_tensors(gm.named_parameters), *_tensors(gm.named_buffers)):
            owner = next((prefix for prefix in called if path.startswith(f"{prefix}.")), None)
            if owner is None or type(attribute(gm, owner)) is not Quantizer:
                put = f"put({path!r}, {self.stored(path, tensor)})"
                (lines if owner is not None or path in read else loose).append(put)
        lines += ["graph = torch.fx.Graph()", "n = {}"]
        for node in gm.graph.nodes:
            lines += self.node(node)
        if type(gm.graph._codegen) is ForwardCode:
            codegen = gm.graph._codegen
            given = f"{codegen.names!r}, {codegen.parts!r}, {self.source(codegen.guards)}"
            lines.append(f"graph.set_codegen({self.name(ForwardCode)}({given}))")
        elif type(gm.graph._codegen) is not CodeGen:
            raise PassError(f"its inputs are taken apart by a {type(gm.graph._codegen).__name__}")
        lines.append(f"gm = root = torch.fx.GraphModule(root, graph, {type(gm).__name__!r}).train({gm.training})")
        return [*lines, *loose, f'gm.meta["fxq"] = {self.source(state(gm))}']

    def stored(self, path: str, tensor: Tensor) -> str:
        """The expression for a parameter or buffer."""
        value = self.tensor(path, tensor)
        if isinstance(tensor, nn.Parameter):
            return f"torch.nn.Parameter({value}, requires_grad={tensor.requires_grad})"
        return value

    def node(self, node: fx.Node) -> list[str]:
        """Statements that build one node."""
        target = self.source(node.target) if node.op == "call_function" else repr(node.target)
        made = (
            f"graph.create_node({node.op!r}, {target}, {self.source(node.args)}, "
            f"{self.source(dict(node.kwargs))}, {node.name!r})"
        )
        lines = [f"n[{node.name!r}] = {made}"]
        held = [key for key in _META if key in node.meta]
        return lines + [f"n[{node.name!r}].meta[{key!r}] = {self.source(node.meta[key])}" for key in held]

    def module(self, path: str, module: nn.Module) -> list[str]:
        """Statements that put a called module at its place."""
        if type(module) is Quantizer:
            options = {
                "tensor": module.tensor,
                "axis": module.axis,
                "tie": module.tie,
                "weight": module.weight,
            }
            made = f"{self.name(Quantizer)}({self.source(module.spec)}, **{self.source(options)})"
            held = {key: value for key, value in module.state_dict(prefix="").items() if isinstance(value, Tensor)}
            values = ", ".join(f"{key!r}: {self.tensor(f'{path}.{key}', value)}" for key, value in held.items())
            return [
                f"put({path!r}, {made})",
                f"root.get_submodule({path!r}).load_state_dict({{{values}}})",
                f"root.get_submodule({path!r}).mode = {self.source(module.mode)}",
            ]
        text = repr(module)
        try:
            same = "\n" not in text and repr(eval(f"nn.{text}", {"nn": nn})) == text  # noqa: S307  torch's own text
        except (AttributeError, SyntaxError, NameError, TypeError, ValueError):
            same = False
        if not same or type(module) is not getattr(nn, type(module).__name__, None):
            raise PassError(f"module {path} is a {type(module).__name__}, which cannot be written as text")
        return [f"put({path!r}, torch.nn.{text})"]

    def run(self, p: Pass, error: FxqError) -> list[str]:
        """Statements that run the pass as it was run."""
        self.imports.add("from fxq.manager import PassManager, Pipeline")
        self.imports.add("import fxq.passes")
        options = ", ".join(f"{key}={self.source(value)}" for key, value in p.options.items())
        checks = ""
        if isinstance(error, NumericError):
            args, kwargs, tolerance = error.settings
            self.imports.add("from fxq.instruments import NumericCheck")
            checks = f"NumericCheck({self.source(args)}, {self.source(kwargs)}, tolerance={tolerance!r})"
        return [
            f"p = {self.name(type(p))}({options})",
            f"PassManager(instruments=[{checks}]).run(Pipeline('reproduce', (p,)), gm, inplace=True)",
            "print('the pass ran: nothing failed')",
        ]

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


_IMMUTABLE: Final = (type(fx.Graph().create_node("call_function", len, ((),)).args[0]),)


def _tensors(named: Callable[..., Iterator[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    return named(remove_duplicate=False)


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
