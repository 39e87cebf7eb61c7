"""Where NaN or Inf came from: run one batch node by node and look at every result."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .arguments import forward_values
from .errors import CalibrationError
from .graph import error_at
from .quantizer import quantized_nodes
from .shapes import Interpreter

__all__ = ["NonfiniteProbe"]


class NonfiniteProbe(Interpreter):
    """Runs a graph, as the graph itself would be called, and notes which nodes gave NaN or Inf."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.gm = gm
        self.nan: set[fx.Node] = set()
        self.inf: set[fx.Node] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*forward_values(self.gm, args, kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["gm"], name)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(leaf.isfinite().all()):
                (self.nan if bool(leaf.isnan().any()) else self.inf).add(n)
        return result

    def check(self, where: str) -> None:
        """Raise for the first node whose NaN or Inf reached a quantizer.

        NaN goes before Inf: Inf may be a mask that a softmax takes away.

        Args:
            where: What the message begins with.

        Raises:
            CalibrationError: There is one; the message names the node.
        """
        for node in quantized_nodes(self.gm).values():
            if node in self.nan | self.inf:
                ancestors = _ancestors(node)
                nan = [n for n in self.gm.graph.nodes if n in self.nan & ancestors]
                inf = [n for n in self.gm.graph.nodes if n in self.inf & ancestors]
                raise _error(where, (nan or inf)[0], "NaN" if nan else "Inf", inf[0] if nan and inf else None)


def _error(where: str, node: fx.Node, what: str, before: fx.Node | None) -> CalibrationError:
    if node.op == "placeholder":
        return CalibrationError(
            f"{where}the input {node.name} holds {what} itself",
            node=node.name,
            hint="clean the calibration data",
        )
    text = f"{where}{what} first comes up in {node.name}"
    error = error_at(
        CalibrationError,
        text if before is None else f"{text}, and Inf before it in {before.name}",
        node,
        "look at this operation's inputs and weights; the float model run on the same batch shows it too",
    )
    assert isinstance(error, CalibrationError)
    return error


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """`node` and everything it is computed from."""
    seen: set[fx.Node] = set()
    open_nodes = [node]
    while open_nodes:
        current = open_nodes.pop()
        if current not in seen:
            seen.add(current)
            open_nodes.extend(current.all_input_nodes)
    return seen
