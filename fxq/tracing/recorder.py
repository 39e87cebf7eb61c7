"""fx's tracer with fxq's additions: where each node comes from, and what the model may decide while it is traced."""

from __future__ import annotations

import inspect
import linecache
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..errors import TraceError
from ..forward_code import ForwardCode
from ..graph import ORIGIN, Origin
from ..guards import Guard
from .leaves import Function, wrapped, wrapped_functions
from .patches import questions, stored_tensors
from .proxies import INPLACE_OPERATORS, LIBRARIES, WAYS_OUT, StoredProxy, TensorProxy
from .symbolic import SymbolicRun, ValueDependentError

__all__ = ["Recorder", "user_frame"]

_SIZED: Final = (
    torch.zeros,
    torch.ones,
    torch.empty,
    torch.rand,
    torch.randn,
    torch.eye,
    torch.tensor,
    torch.as_tensor,
)
"""Factories that torch does not let a proxy into by itself."""
_LIMITS: Final = (torch.finfo, torch.iinfo)
_RECORDING: Final = (LIBRARIES[1], f"{LIBRARIES[0]}fx/")


class Recorder(fx.Tracer):
    """fx's tracer with recorded origins, user-minded leaves and a symbolic run that answers questions.

    Args:
        leaf_modules: Types, or dotted paths, of modules that stay whole.
        inputs: Example inputs by parameter of forward, those that hold tensors.
        fixed: The other parameters' values.
        whole: Functions marked with torch.fx.wrap that stay whole; the others are traced through.
    """

    record_stack_traces = True
    run: SymbolicRun

    def __init__(
        self,
        leaf_modules: Sequence[type[nn.Module] | str],
        inputs: Mapping[str, Any],
        fixed: Mapping[str, Any],
        whole: Iterable[Function] = (),
    ) -> None:
        super().__init__((math,), (*_SIZED, *_LIMITS), param_shapes_constant=True)
        self._autowrap_search.append(torch)
        self.inputs, self.fixed = inputs, fixed
        self.leaf_types = tuple(m for m in leaf_modules if isinstance(m, type))
        self.leaf_paths = {m for m in leaf_modules if isinstance(m, str)}
        self.stack: list[tuple[str, type[nn.Module]]] = []
        self.wrapped, self.whole = wrapped(), frozenset(whole)
        self.stopped: str | None = None
        self.stopped_in: Function | None = None
        self.inside: list[Function] = []
        self.plain = False
        self._taken: list[tuple[fx.Proxy, tuple[FrameType, int], Guard]] = []

    def record(self, root: nn.Module, run: SymbolicRun, *, plain: bool) -> fx.Graph:
        """The graph of `root`.

        Args:
            root: What to trace.
            run: Answers what the model asks of its values.
            plain: Give the model plain numbers for sizes of dimensions that are not to stay symbolic.
        """
        self.run, self.plain = run, plain
        graph = self.trace(root)
        self._settle(None, None)
        for node in graph.nodes:
            if node.target in (*_SIZED, *_LIMITS):  # fx would ask to wrap them again wherever the code runs
                node.meta.pop("is_wrapped", None)
        return graph

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        found = super().getattr(attr, attr_val, parameter_proxy_cache)
        if type(found) is fx.proxy.ParameterProxy:
            found = StoredProxy(self, found.node, found.name, found.param)
            parameter_proxy_cache[found.name] = found
        return found

    def _asked(self, m: nn.Module, path: str) -> bool:
        """Whether the user asked for this module to stay whole."""
        return isinstance(m, self.leaf_types) or path in self.leaf_paths

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._asked(m, module_qualified_name):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.stack.append((self.path_of_module(m), type(m)))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.stopped = self.stopped or self.stack[-1][0]
            raise
        finally:
            self.stack.pop()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TensorProxy(node, self)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,  # fx asks whether it is there
    ) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        self._settle(proxy.node, _outside(sys._getframe(1)))
        if kind in ("call_function", "call_method") and target is not getattr:
            return self.settled(proxy)
        return proxy

    def settled(self, proxy: fx.Proxy) -> Any:
        """The number that a proxy stands for, if sizes are to be plain numbers and it depends on no other."""
        if self.plain and self.run.plain(proxy.node):
            return self.decide(proxy, _number, "a Python decision depends on a tensor's value")
        return proxy

    def decide(self, proxy: fx.Proxy, convert: Callable[[Any], Any], problem: str) -> Any:
        """What the model makes of a value: ``bool``, ``int``, ``float`` or ``len`` of it.

        Raises:
            TraceError: It depends on a tensor's data; `problem` says so.
        """
        self._settle(None, None)
        try:
            return self.run.decide(proxy.node, convert, self._where())
        except ValueDependentError as error:
            raise ValueDependentError(problem, hint=WAYS_OUT) from error

    def index(self, proxy: fx.Proxy, frame: FrameType) -> int:
        """The number that Python, or torch's argument parser, takes a size for.

        The parser asks for numbers before it hands the call over with the proxies in it. Such a call takes no
        decision; it is known by the call that is recorded next, from the same instruction.
        """
        value = self.run.value(proxy.node)
        hint = value.node.hint if type(value) is torch.SymInt else None
        if hint is None:
            return int(self.decide(proxy, int, "a tensor's value is used as a Python number"))
        self._settle(None, (frame, frame.f_lasti))
        self._taken.append((proxy, (frame, frame.f_lasti), self._where()))
        return int(hint)

    def _settle(self, recorded: fx.Node | None, place: tuple[FrameType, int] | None) -> None:
        """Decide what was taken for a number, but for what the call now recorded, or under way, holds itself."""
        taken, self._taken = self._taken, []
        for proxy, asked, where in taken:
            if asked == place and recorded is None:
                self._taken.append((proxy, asked, where))
            elif asked != place or proxy.node not in recorded.all_input_nodes:  # type: ignore[union-attr]
                self.run.decide(proxy.node, int, where)

    def _where(self) -> Guard:
        """Who asks, as a guard without a text."""
        frame = user_frame(_current_frames())
        path = self.stack[-1][0] if self.stack else ""
        source, code = (f"{frame[0]}:{frame[1]}", linecache.getline(*frame).strip()) if frame else (None, "")
        return Guard("", (), source, code, path)

    def type_of(self, proxy: fx.Proxy) -> type:
        """The type that the model's own code sees."""
        value = self.run.value(proxy.node)
        if isinstance(value, torch.Tensor):
            return torch.Tensor
        return next((plain for symbolic, plain in _NUMBERS if isinstance(value, symbolic)), type(value))

    def key(self, proxy: fx.Proxy) -> int:
        """The hash by which the model's own code looks it up: that of a number or type, and a tensor's identity."""
        kind = self.type_of(proxy)
        if kind in (int, float, bool):
            return hash(self.decide(proxy, kind, "a tensor's value is used as a key"))
        return id(proxy) if kind is torch.Tensor else hash(self.run.value(proxy.node))

    def hint(self, proxy: fx.Proxy) -> Any:
        """The value in the example, for texts."""
        value = self.run.value(proxy.node)
        return value.node.hint if type(value) in dict(_NUMBERS) else value

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        path = self.stack[-1][0] if self.stack else ""
        node = super().create_node(*self._named(path, *args), **kwargs)
        frame = None if node.op in ("placeholder", "output") else user_frame(_current_frames())
        node.meta[ORIGIN] = Origin(
            module_path=path,
            module_types=(type(self.root), *(kind for _, kind in self.stack)),
            source=f"{frame[0]}:{frame[1]}" if frame else None,
            code=linecache.getline(*frame).strip() if frame else "",
            call=node.op == "call_module",
            leaf=node.op == "call_module" and self._asked(self.root.get_submodule(str(node.target)), path),
            function=self.inside[0].__name__ if self.inside else "",
        )
        return node

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the inputs: one each, or one for every tensor where an input nests several."""
        nested = any(not isinstance(value, torch.Tensor) for value in self.inputs.values())
        self.stack.clear()
        values: dict[str, Any] = dict(self.fixed)
        signature = inspect.signature(self.root.forward)
        parts: list[str] = []
        for name, value in self.inputs.items():
            leaves, spec = pytree.tree_flatten_with_path(value)
            parts += [name + pytree.keystr(path) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
            if len(leaves) == 1 and isinstance(value, torch.Tensor):
                default = signature.parameters[name].default
                args = () if nested or default is inspect.Parameter.empty else (default,)
                values[name] = self.create_proxy("placeholder", name, args, {})
            else:
                made = [self._nested_input(name, path, leaf) for path, leaf in leaves]
                values[name] = pytree.tree_unflatten(made, spec)
        if nested:
            self.graph.set_codegen(ForwardCode(list(self.inputs), parts))
        by_name = {n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        positional = [values[n] for n in signature.parameters if n in values and n not in by_name]
        keywords = {n: values[n] for n in by_name if n in values}
        hooked = self.root._forward_hooks or self.root._forward_pre_hooks
        call = type(self.root)._call_impl if hooked else root_fn

        def forward() -> Any:
            with stored_tensors(self), questions(self), wrapped_functions(self):
                return call(self.root, *positional, **keywords)

        return forward, []

    def _nested_input(self, name: str, path: Sequence[Any], leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        keys = (str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        return self.create_proxy("placeholder", "_".join([name, *keys]), (), {})

    def _named(
        self, path: str, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, *rest: Any
    ) -> tuple[Any, ...]:
        """Arguments of create_node in which a function's name begins with its module's (``layer1_0_add``)."""
        if name is None and path and kind in ("call_function", "call_method"):
            call = target if isinstance(target, str) else getattr(target, "__name__", "call")
            plain = call.strip("_")
            plain = plain.removeprefix("i") if target in INPLACE_OPERATORS else plain
            name = f"{path.replace('.', '_')}_{plain}"
        return kind, target, args, kwargs, name, *rest

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.decide(obj, bool, "control flow depends on a tensor's value"))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = self.run.value(obj.node)
        if not isinstance(value, torch.Tensor | tuple | list | dict) or (
            isinstance(value, torch.Tensor) and not value.ndim
        ):
            raise TraceError(f"a loop runs over {self.type_of(obj).__name__}, which has no items", hint=WAYS_OUT)
        if isinstance(value, dict):
            return iter(value)
        count = self.decide(obj, len, "a loop runs over a tensor whose length depends on values")
        return iter([obj[i] for i in range(count)])  # type: ignore[index]

    def keys(self, obj: fx.Proxy) -> Any:
        raise TraceError("an input is unpacked with ** or .keys()", hint=WAYS_OUT)


_NUMBERS: Final[tuple[tuple[Any, Any], ...]] = ((torch.SymInt, int), (torch.SymFloat, float), (torch.SymBool, bool))


def _number(value: Any) -> Any:
    """A plain number for a symbolic one."""
    return next((plain(value) for symbolic, plain in _NUMBERS if isinstance(value, symbolic)), value)


def _outside(frame: FrameType | None) -> tuple[FrameType, int] | None:
    """The instruction outside fx and fxq from which a call comes."""
    while frame is not None and frame.f_code.co_filename.startswith(_RECORDING):
        frame = frame.f_back
    return (frame, frame.f_lasti) if frame is not None else None


def _current_frames() -> Iterable[tuple[str, int]]:
    """(file, line) of the running frames, innermost first, as far as the traced model reaches."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not Recorder.record.__code__:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def user_frame(frames: Iterable[tuple[str, int]]) -> tuple[str, int] | None:
    """The first frame that lies outside torch and outside fxq."""
    for file, line in frames:
        if not file.startswith((*LIBRARIES, "<eval_with_key>", "<frozen")) and Path(file).suffix == ".py":
            return file, line
        if file.startswith("<ipython-input") or "ipykernel_" in file:
            return file, line
    return None
