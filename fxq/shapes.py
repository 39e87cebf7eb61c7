"""One run of a graph on example inputs: shape, dtype and memory of every node.

The run uses tensors without data where it can. Besides shapes it shows what no name tells reliably: which
nodes share memory and which change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree

from .errors import TraceError
from .graph import ALIASES, SEQUENCE, TENSOR, Aliases, Storage, TensorInfo, error_at

__all__ = ["Interpreter", "propagate_shapes", "thawed"]


class Interpreter(fx.Interpreter):
    """fx's interpreter, with lists and dicts in arguments that a function may change, as the graph's code has them."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return thawed(args), thawed(kwargs)


class _Observed(Interpreter):
    """Runs the graph and notes what each node gives, aliases and writes.

    Args:
        gm: The graph.
        mode: Makes parameters and buffers tensors without data; None copies them, for what the graph changes
            in place.
    """

    def __init__(self, gm: fx.GraphModule, mode: fake_tensor.FakeTensorMode | None) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.mode = mode
        self.stored: dict[int, torch.Tensor] = {}
        self.alive: list[Any] = []  # keeps storages alive, so that their addresses stay unique
        self.running: fx.Node | None = None

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().get_attr(target, args, kwargs)
        if not isinstance(found, torch.Tensor):
            return found
        if id(found) not in self.stored:
            self.stored[id(found)] = self.mode.from_tensor(found) if self.mode else found.detach().clone()
        return self.stored[id(found)]

    def run_node(self, n: fx.Node) -> Any:
        self.running = n
        inputs = [self.env[a] for a in n.all_input_nodes]
        tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
        before = [t._version for t in tensors]
        result = super().run_node(n)
        self.alive.append(result)
        written = [t for t, version in zip(tensors, before, strict=True) if t._version != version]
        _note(n, result)
        n.meta[ALIASES] = Aliases(
            tuple(_storage(t) for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)),
            frozenset(_storage(t).address for t in written),
        )
        return result


def thawed(value: Any) -> Any:
    """A node's arguments with lists and dicts that may be changed, as the graph's code passes them."""
    if isinstance(value, list):
        return [thawed(item) for item in value]
    if isinstance(value, dict):
        return {key: thawed(item) for key, item in value.items()}
    return tuple(thawed(item) for item in value) if type(value) is tuple else value


def _note(node: fx.Node, result: Any) -> None:
    """Note shape and dtype of what `node` gave."""
    node.meta.pop(TENSOR, None)
    node.meta.pop(SEQUENCE, None)
    if isinstance(result, torch.Tensor):
        node.meta[TENSOR] = _info(result)
    elif isinstance(result, tuple | list) and any(isinstance(r, torch.Tensor) for r in result):
        node.meta[TENSOR] = tuple(_info(r) if isinstance(r, torch.Tensor) else None for r in result)
    elif isinstance(result, tuple | list):
        node.meta[SEQUENCE] = True


def _info(tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), tensor.dtype)


def _storage(tensor: torch.Tensor) -> Storage:
    strided = tensor.layout is torch.strided
    return Storage(
        tensor.untyped_storage()._cdata if strided else id(tensor),
        tuple(tensor.shape),
        tuple(tensor.stride()) if strided else (),
        int(tensor.storage_offset()) if strided else 0,
    )


def propagate_shapes(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Note shape, dtype and memory of every node for these inputs (one per placeholder).

    Tensors without data are used, so this costs no memory and no device time. A graph whose shapes depend on
    values is run for real instead, on copies: neither the inputs nor the model's tensors change.

    Raises:
        TraceError: The graph does not run on these inputs; the message names the node and the user's line.
    """
    plain = [x.detach().clone() if isinstance(x, torch.Tensor) and x.is_inference() else x for x in inputs]
    try:
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in plain]
            _Observed(gm, mode).run(*fake, enable_io_processing=False)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError):
        _run_for_shapes(gm, plain)


def _run_for_shapes(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    interpreter = _Observed(gm, None)
    try:
        with torch.no_grad():
            copies = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs]
            interpreter.run(*copies, enable_io_processing=False)
    except Exception as error:
        what = f"the traced graph does not run on the example inputs: {type(error).__name__}: {error}"
        hint = "check that the model itself runs on them"
        if interpreter.running is None:
            raise TraceError(what, hint=hint) from error
        raise error_at(TraceError, what, interpreter.running, hint) from error
