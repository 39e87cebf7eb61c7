"""Running a graph node by node: values come one at a time, and go once nobody reads them any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from .arguments import forward_values
from .batches import Inputs
from .errors import CalibrationError
from .graph import attribute
from .quantizer import Mode, quantizers
from .shapes import thawed
from .verify import quantizer_of

__all__ = ["Ahead", "Stepper", "Values", "quantizing", "require_solved"]

Values = dict[fx.Node, Any]
"""What nodes gave."""


@contextmanager
def quantizing(gm: fx.GraphModule) -> Iterator[None]:
    """All quantizers of a graph quantize, in eval mode; modes are put back afterwards."""
    found = quantizers(gm).values()
    modes = [quantizer.mode for quantizer in found]
    training = [module for module in gm.modules() if module.training]
    gm.eval()
    for quantizer in found:
        quantizer.mode = Mode.QUANTIZE
    try:
        yield
    finally:
        for quantizer, mode in zip(found, modes, strict=True):
            quantizer.mode = mode
        for module in training:
            module.training = True


def require_solved(gm: fx.GraphModule) -> None:
    """Raise where a quantizer could not quantize.

    Raises:
        CalibrationError: Quantizers have no scale yet; all are named.
    """
    unsolved = [name for name, quantizer in quantizers(gm).items() if not quantizer.solved]
    if unsolved:
        raise CalibrationError(
            f"{len(unsolved)} quantizers have no scale: {', '.join(unsolved)}",
            node=unsolved[0],
            hint="run fxq.calibrate(prepared, batches) first",
        )


class Stepper:
    """Runs a graph from any of its nodes on, with those quantizers that are wanted.

    A value is dropped after its last reader, as fx's own interpreter does it, so memory holds what one forward
    pass would. The graph and its modules are not changed; it runs in whatever mode they are in.

    Args:
        gm: Any GraphModule.
        quantized: Whether the quantizer that a node calls quantizes; where it says False, the tensor goes
            through as it is. None (default) calls every module as it is.
    """

    def __init__(self, gm: fx.GraphModule, quantized: Callable[[fx.Node], bool] | None = None) -> None:
        self.gm = gm
        self.quantized = quantized
        self.nodes: Sequence[fx.Node] = list(gm.graph.nodes)
        self._calls_quantizer = {node for node in self.nodes if quantizer_of(node) is not None}
        last = {source: index for index, node in enumerate(self.nodes) for source in node.all_input_nodes}
        self._last_read: dict[int, list[fx.Node]] = {}
        for source, index in last.items():
            self._last_read.setdefault(index, []).append(source)

    def begin(self, inputs: Inputs) -> Values:
        """The values of the graph's placeholders, as a call with `inputs` fills them."""
        given = self.gm.graph.process_inputs(*forward_values(self.gm, *inputs))
        return dict(zip(self.gm.graph.find_nodes(op="placeholder"), given, strict=True))

    def steps(self, values: Values, start: int = 0) -> Iterator[tuple[fx.Node, Any]]:
        """Run from node number `start` on.

        Args:
            values: What the nodes before `start` gave, as far as it is read later; changed as the graph runs.
            start: Index into :attr:`nodes`.

        Yields:
            Each node and its value; for the output node, what the graph returns.
        """
        for index in range(start, len(self.nodes)):
            node = self.nodes[index]
            if node.op != "placeholder":
                values[node] = self.value(node, values)
            yield node, values[node]
            for source in self._last_read.get(index, ()):
                values.pop(source, None)

    def finish(self, values: Values, start: int = 0) -> Any:
        """What the graph returns, run from node number `start` on; `values` stays as it is."""
        *_, (_, result) = self.steps(dict(values), start)
        return result

    def value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """What `node` gives, from the values that it reads."""
        if node.op == "get_attr":
            return attribute(self.gm, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda read: values[read])
        if node.op == "output":
            return args[0]
        if node in self._calls_quantizer and self.quantized is not None and not self.quantized(node):
            return args[0]
        call: Any = node.target
        if node.op == "call_module":
            call = self.gm.get_submodule(str(node.target))
        elif node.op == "call_method":
            call = getattr(torch.Tensor, str(node.target))
        return call(*thawed(args), **thawed(kwargs))


class Ahead:
    """Takes named values out of a stream in about its order; what was passed by is held until asked for."""

    def __init__(self, values: Iterator[tuple[str, Any]], wanted: Iterable[str]) -> None:
        self._values, self._wanted = values, set(wanted)
        self._held: dict[str, Any] = {}

    def take(self, name: str) -> Any:
        """The value of that name; None if the stream has none."""
        while name in self._wanted and name not in self._held:
            found, value = next(self._values, (None, None))
            if found is None:
                return None
            if found in self._wanted:
                self._held[found] = value
        self._wanted.discard(name)
        return self._held.pop(name, None)
