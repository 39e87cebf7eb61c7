"""A traced graph as a module: its errors name the node and the user's line, and its names stay free."""

from __future__ import annotations

import keyword
from types import TracebackType
from typing import Any, ClassVar, NoReturn

from torch import fx, nn

from ..errors import FxqError
from ..graph import origin, tensor_info

__all__ = ["TracedModule", "free_names"]


class TracedModule(fx.GraphModule):
    """A GraphModule that says where a call of it failed, as a note on the error, whatever its type."""

    _wrapped_call: ClassVar[Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # torch.fx makes a class for each graph. Its own wrapper around calls prints to stderr what the note says, and
        # takes the error's traceback away; it leaves alone a class that has one already.
        cls._wrapped_call = staticmethod(TracedModule.__call__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except FxqError:
            raise
        except Exception as error:
            node = self._failed(error.__traceback__)
            if node is not None:
                error.add_note(_place(node))
            raise

    def _failed(self, tb: TracebackType | None) -> fx.Node | None:
        """The node whose line of the generated forward a traceback goes through."""
        line = None
        while tb is not None:
            if tb.tb_frame.f_code is type(self).forward.__code__:
                line = tb.tb_lineno
            tb = tb.tb_next
        index = None if line is None else (self._lineno_map or {}).get(line - self._prologue_start)
        return None if index is None else list(self.graph.nodes)[index]

    def __reduce__(self) -> NoReturn:
        raise FxqError(
            "a traced graph cannot be pickled: the functions and the sources in it have no place in a file",
            hint="save gm.state_dict() and load it into a graph that fxq.prepare (and convert) makes of the same "
            "model, or write the converted graph with fxq.export",
        )


def _place(node: fx.Node) -> str:
    """Node, module, line, and the shapes that the node's inputs had in the example."""
    where = origin(node)
    shapes = [f"{n.name} {list(info.shape)}" for n in node.all_input_nodes if (info := tensor_info(n)) is not None]
    parts = [
        f"in node {node.name}",
        f"of module {where.module_path}" if where.module_path else "",
        f"at {where.source}: {where.code}" if where.source else "",
        f"whose inputs had the shapes {', '.join(shapes)} when it was traced" if shapes else "",
    ]
    return ", ".join(part for part in parts if part)


def free_names(root: nn.Module, graph: fx.Graph) -> None:
    """Rename what a GraphModule cannot hold: submodules and tensors with names of its own, and Python's keywords.

    They get an underscore (``graph_.weight``). Origins keep the user's names.

    Args:
        root: The module that was traced; it is changed.
        graph: Its graph; targets follow.
    """
    names: dict[tuple[int, str], str] = {}
    for module in root.modules():
        for name in (*module._modules, *module._parameters, *module._buffers):
            if keyword.iskeyword(name) or (module is root and (hasattr(fx.GraphModule, name) or name == "meta")):
                names[id(module), name] = _free(module, name)
    if not names:
        return
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = _renamed(root, str(node.target), names)
    for module in list(root.modules()):
        for held in (module._modules, module._parameters, module._buffers):
            items = {names.get((id(module), name), name): value for name, value in held.items()}
            held.clear()
            held.update(items)  # type: ignore[arg-type]


def _free(module: nn.Module, name: str) -> str:
    while name in {*module._modules, *module._parameters, *module._buffers} or hasattr(fx.GraphModule, name):
        name += "_"
    return name


def _renamed(root: nn.Module, path: str, names: dict[tuple[int, str], str]) -> str:
    parts = []
    here: Any = root
    for part in path.split("."):
        parts.append(names.get((id(here), part), part))
        here = getattr(here, part)
    return ".".join(parts)
