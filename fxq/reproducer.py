"""A failing pass, saved with the graph that it got: a Python script and a file of tensors.

They run on their own, and nothing in them is pickled. The script builds the graph node by node, so it can be
read, cut down and put into a bug report. Passes and functions of the user's come along: a lone file as a
copy, a package by its place.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from .errors import FxqError, PassError
from .forward_code import ForwardCode
from .graph import ALIASES, EDGES, ORIGIN, SEQUENCE, TENSOR, attribute, state
from .instruments import Instrument, NumericError
from .passbase import Pass
from .printer import format_graph
from .python_source import PythonSource
from .quantizer import Quantizer

__all__ = ["Reproducer", "save_reproducer"]

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
    writer = _GraphSource()
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


class _GraphSource(PythonSource):
    """Writes statements that build a graph and run a pass on it."""

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


def _tensors(named: Callable[..., Iterator[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    return named(remove_duplicate=False)
