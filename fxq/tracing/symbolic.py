"""What a model may know of its values while it is traced: sizes as expressions, types, but no tensor's data.

The run is lazy: nothing is computed until the model asks (``if``, ``int``, ``range``, ``isinstance`` …), and then
the graph so far is run once on tensors without data, whose sizes are symbols of torch's own symbolic shapes. What
the model decides by such an expression becomes a :class:`~fxq.guards.Guard`. What operations decide by themselves,
such as whether two shapes broadcast, is no guard: they are in the graph and decide again.
"""

from __future__ import annotations

import builtins
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import fake_tensor
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    StatelessSymbolicContext,
)
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from ..errors import TraceError
from ..graph import attribute, origin
from ..guards import Guard
from ..shapes import thawed
from .sizes import Abbreviations, ExampleEnv

__all__ = ["Example", "SymbolicRun", "ValueDependentError", "depends_on_sizes"]

_ISINSTANCE: Final = builtins.isinstance
_MODULE_CALL: Final = nn.Module.__call__
_MODULE_GETATTR: Final = nn.Module.__getattr__
_SYMBOLIC: Final[tuple[type, ...]] = (torch.SymInt, torch.SymFloat, torch.SymBool)


class ValueDependentError(TraceError):
    """A decision that depends on the data in a tensor."""


@dataclass(frozen=True)
class Example:
    """One input of the example.

    Attributes:
        tensor: The example.
        dynamic: The dimensions that stay symbolic.
    """

    tensor: torch.Tensor
    dynamic: frozenset[int]

    def repeated(self, *, lift: bool) -> torch.Tensor:
        """The tensor, or two of it along a batch of one."""
        tensor = self.tensor.detach()
        return torch.cat([tensor, tensor]) if lift and tensor.ndim else tensor


class SymbolicRun:
    """The graph under construction, run on symbolic shapes as far as the model asks.

    Args:
        root: The module that is traced.
        examples: One for each placeholder, in order.
        lift: Take an example with a batch of one for one of two, since sizes of one broadcast.
    """

    def __init__(self, root: nn.Module, examples: Sequence[Example], *, lift: bool) -> None:
        self.root, self.examples = root, tuple(examples)
        batches = {e.tensor.shape[0] for e in examples if e.tensor.ndim}
        self.lifted = lift and batches == {1}
        self.guards: dict[str, Guard] = {}
        self._started = False
        self._values: dict[fx.Node, Any] = {}
        self._opaque: set[fx.Node] = set()
        self._last: fx.Node | None = None
        self._names: dict[str, tuple[str, int]] = {}
        self._pinned: set[str] = set()
        self._stored: dict[int, torch.Tensor] = {}
        self._fakes: dict[str, torch.Tensor] = {}

    def value(self, node: fx.Node) -> Any:
        """What `node` gives: a tensor without data, a number or symbolic number, or a structure of these.

        Raises:
            TraceError: The graph so far does not run.
        """
        if node not in self._values:
            with self._running():
                for each in self._pending(node):
                    if _loses_dimensions(each):
                        self._run_observed(each)
                    else:
                        with self._env.operating():
                            self._values[each] = self._run(each)
        return self._values[node]

    def decide(self, node: fx.Node, convert: Callable[[Any], Any], where: Guard) -> Any:
        """What the model makes of the value that `node` gives, which holds for the whole graph from here on.

        Args:
            node: The value.
            convert: ``bool``, ``int``, ``len`` ….
            where: Who asks; its text and inputs are filled in.

        Raises:
            ValueDependentError: It depends on a tensor's data.
        """
        value = self.value(node)
        if isinstance(value, torch.Tensor) and convert is not len:
            raise ValueDependentError("a Python decision depends on a tensor's value")
        with self._running():
            before = len(self._env.guards)
            try:
                if node in self._opaque or (convert is len and isinstance(value, tuple | list)):
                    value = self._again(node)
                result = convert(value)
            except GuardOnDataDependentSymNode as error:
                raise ValueDependentError("a Python decision depends on a tensor's value") from error
            found = [guard.expr for guard in self._env.guards[before:]]
        for expression in found:
            self._keep(expression, where)
        self._keep_ones(where)
        return result

    def plain(self, node: fx.Node) -> bool:
        """Whether `node` gives a number that depends on no dimension that is to stay symbolic."""
        value = self.value(node)
        if depends_on_sizes(value) and not isinstance(value, tuple | list):
            return self._symbols(value.node.expr) <= self._pinned
        return isinstance(value, int | float)

    def _pending(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes up to `node` that did not run yet; each is run before the next is asked for."""
        here = next(iter(node.graph.nodes)) if self._last is None else self._last.next
        while True:
            if here not in self._values:
                yield here
            self._last = here
            if here is node:
                return
            here = here.next

    def _start(self) -> None:
        self._started = True
        self._env = ExampleEnv(specialize_zero_one=False, duck_shape=False)
        self._mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True, shape_env=self._env)
        self._mode.cache_enabled = False  # a cached result decides nothing, so no guard would be seen
        self._short = Abbreviations(self._env)
        self._inputs = [example.repeated(lift=self.lifted) for example in self.examples]

    def _fake(self, name: str, tensor: torch.Tensor, dynamic: frozenset[int]) -> torch.Tensor:
        kinds = [DimDynamic.STATIC if size in (0, 1) else DimDynamic.DYNAMIC for size in tensor.shape]
        with self._env.operating():
            fake = self._mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))
        for dim, size in enumerate(fake.shape):
            if depends_on_sizes(size):
                symbol = str(size.node.expr)  # type: ignore[attr-defined]
                self._names[symbol] = (name, dim)
                self._pinned |= set() if dim in dynamic else {symbol}
        self._fakes[name] = fake
        return fake

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Tensors without data, and modules as they are outside of tracing."""
        patched = nn.Module.__call__, nn.Module.__getattr__
        asked, builtins.isinstance = builtins.isinstance, _ISINSTANCE
        nn.Module.__call__, nn.Module.__getattr__ = _MODULE_CALL, _MODULE_GETATTR  # type: ignore[method-assign]
        try:
            if not self._started:
                self._start()
            with self._mode, enable_python_dispatcher(), torch.no_grad():
                yield
        finally:
            nn.Module.__call__, nn.Module.__getattr__ = patched  # type: ignore[method-assign]
            builtins.isinstance = asked

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            index = len(self._fakes)
            return self._fake(str(node.target), self._inputs[index], self.examples[index].dynamic)
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        try:
            result = self._call(node, args, kwargs)
        except GuardOnDataDependentSymNode as error:
            raise ValueDependentError("a Python decision depends on a tensor's value") from error
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            raise TraceError(f"the sizes at {node.name} cannot be told: {type(error).__name__}: {text}") from error
        depends = any(n in self._opaque or depends_on_sizes(self._values[n]) for n in node.all_input_nodes)
        leaves = pytree.tree_leaves(result)
        if depends and not any(isinstance(leaf, (torch.Tensor, *_SYMBOLIC)) for leaf in leaves):
            self._opaque.add(node)
        with self._env.operating():
            return self._short.shortened(result, (args, kwargs))

    def _run_observed(self, node: fx.Node) -> None:
        """Run a node of which the model may ask the rank, and keep what decided that."""
        before, at = len(self._env.guards), origin(node)
        self._values[node] = self._run(node)
        for guard in self._env.guards[before:]:
            self._keep(guard.expr, Guard("", (), at.source, at.code, at.module_path))

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        args, kwargs = thawed(args), thawed(kwargs)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return _SYMBOLIC_FUNCTIONS.get(node.target, node.target)(*args, **kwargs)

    def _attribute(self, path: str) -> Any:
        found = attribute(self.root, path)
        if not isinstance(found, torch.Tensor):
            return found
        if id(found) not in self._stored:
            self._stored[id(found)] = self._mode.from_tensor(found, static_shapes=True)
        return self._stored[id(found)]

    def _again(self, node: fx.Node) -> Any:
        """The value of `node` computed once more, from symbolic values on, so that what it decides is seen: how two
        shapes compare, how many parts a split gives.
        """
        known: dict[fx.Node, Any] = {}

        def compute(n: fx.Node) -> Any:
            if n is not node and n not in self._opaque:
                return self._values[n]
            if n not in known:
                args, kwargs = fx.map_arg((n.args, n.kwargs), compute)
                known[n] = self._call(n, args, kwargs)
            return known[n]

        return compute(node)

    def _keep(self, expression: Any, where: Guard) -> None:
        text, inputs = self._text(expression)
        if inputs and text not in self.guards:
            self.guards[text] = Guard(text, inputs, where.source, where.code, where.module_path)

    def _text(self, expression: Any) -> tuple[str, tuple[str, ...]]:
        """An expression over symbols as Python over the inputs' shapes, and those inputs."""
        read = [symbol for symbol in self._names if symbol in self._symbols(expression)]
        text = self._written_out(expression)
        for symbol in read:
            name, dim = self._names[symbol]
            text = re.sub(rf"\b{symbol}\b", f"{name}.shape[{dim}]", text)
        if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
            text = text[1:-1]
        return text, tuple(dict.fromkeys(self._names[symbol][0] for symbol in read))

    def _symbols(self, expression: Any) -> set[str]:
        """The input sizes that an expression depends on."""
        found = {str(symbol) for symbol in expression.free_symbols}
        for name in found & self._short.meant.keys():
            found |= self._symbols(self._short.meant[name])
        return found - self._short.meant.keys()

    def _written_out(self, expression: Any) -> str:
        """An expression as Python over the input sizes."""
        text: str = PythonPrinter().doprint(expression)
        for name in {str(s) for s in expression.free_symbols} & self._short.meant.keys():
            text = re.sub(rf"\b{name}\b", f"({self._written_out(self._short.meant[name])})", text)
        return text

    def _keep_ones(self, where: Guard) -> None:
        """Sizes of one broadcast, so what was decided behind them holds only while they are one."""
        for name, fake in self._fakes.items():
            for dim, size in enumerate(fake.shape):
                text = f"{name}.shape[{dim}] == {size}"
                if not depends_on_sizes(size) and text not in self.guards:
                    self.guards[text] = Guard(text, (name,), where.source, where.code, where.module_path)


def _loses_dimensions(node: fx.Node) -> bool:
    """Whether the rank of what `node` gives depends on sizes: a squeeze of whatever is one."""
    name = str(getattr(node.target, "__name__", node.target))
    return name == "squeeze" and len(node.args) + len(node.kwargs) == 1


def depends_on_sizes(value: Any) -> bool:
    """Whether a Python value holds a symbolic number; tensors are no Python values."""
    return any(isinstance(leaf, _SYMBOLIC) for leaf in pytree.tree_leaves(value))


_SYMBOLIC_FUNCTIONS: Final[Mapping[Any, Callable[..., Any]]] = {
    math.sqrt: torch.sym_sqrt,
    round: lambda x, digits=None: x.__round__() if digits is None else x.__round__(digits),
}
"""For functions that would turn a symbolic number into a plain one, those that do not."""
