"""A PyTorch model becomes a graph: symbolic tracing that knows where each node came from.

The model is copied (in eval mode), so nothing the caller has is changed. Each node gets its
:class:`~fxq.graph.Origin` (module path, the user's source line) while it is traced and its
:class:`~fxq.graph.TensorInfo` from one propagation of the example inputs without data.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import linecache
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from .arguments import bind_arguments, has_tensor, kept_arguments
from .errors import FxqError, TraceError
from .graph import ORIGIN, Note, Origin, State, attribute, origin, set_state
from .ops import WEIGHTED_MODULES
from .proxies import INPLACE_OPERATORS, WAYS_OUT, NestedInputs, TensorProxy
from .recipe import Recipe
from .shapes import propagate_shapes
from .target import Target

__all__ = ["trace_model", "weighted_leaves"]

_TORCH: Final = f"{Path(torch.__file__).parent}/"
_HERE: Final = f"{Path(__file__).parent}/"


class _Tracer(fx.Tracer):
    """fx's tracer with recorded origins and user-minded leaves."""

    record_stack_traces = True

    def __init__(
        self,
        leaf_modules: Sequence[type[nn.Module] | str],
        inputs: Mapping[str, Any],
        fixed: Mapping[str, Any],
    ) -> None:
        super().__init__(param_shapes_constant=True)
        self.inputs, self.fixed = inputs, fixed
        self.leaf_types = tuple(m for m in leaf_modules if isinstance(m, type))
        self.leaf_paths = {m for m in leaf_modules if isinstance(m, str)}
        self.stack: list[tuple[str, type[nn.Module]]] = []
        self.stopped: str | None = None

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

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        path = self.stack[-1][0] if self.stack else ""
        node = super().create_node(*self._named(path, *args), **kwargs)
        frame = None if node.op in ("placeholder", "output") else _user_frame(_current_frames())
        node.meta[ORIGIN] = Origin(
            module_path=path,
            module_types=(type(self.root), *(kind for _, kind in self.stack)),
            source=f"{frame[0]}:{frame[1]}" if frame else None,
            code=linecache.getline(*frame).strip() if frame else "",
            call=node.op == "call_module",
            leaf=node.op == "call_module" and self._asked(self.root.get_submodule(str(node.target)), path),
        )
        return node

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the inputs: one each, or one for every tensor where an input nests several."""
        nested = any(not isinstance(value, torch.Tensor) for value in self.inputs.values())
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
            self.graph.set_codegen(NestedInputs(list(self.inputs), parts))
        by_name = {n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        positional = [values[n] for n in signature.parameters if n in values and n not in by_name]
        keywords = {n: values[n] for n in by_name if n in values}
        hooked = self.root._forward_hooks or self.root._forward_pre_hooks
        call = type(self.root)._call_impl if hooked else root_fn
        return (lambda: call(self.root, *positional, **keywords)), []

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
        raise TraceError("control flow depends on a tensor's value or size", hint=WAYS_OUT)

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        try:
            return super().iter(obj)
        except fx.proxy.TraceError as error:
            raise TraceError("a loop runs over a tensor whose length tracing does not know", hint=WAYS_OUT) from error

    def keys(self, obj: fx.Proxy) -> Any:
        raise TraceError("an input is unpacked with ** or .keys()", hint=WAYS_OUT)


def _current_frames() -> Iterable[tuple[str, int]]:
    """(file, line) of the running frames, innermost first, as far as the traced model reaches."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not trace_model.__code__:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def _user_frame(frames: Iterable[tuple[str, int]]) -> tuple[str, int] | None:
    """The first frame that lies outside torch and outside fxq."""
    for file, line in frames:
        if not file.startswith((_TORCH, _HERE, "<eval_with_key>", "<frozen")) and Path(file).suffix == ".py":
            return file, line
        if file.startswith("<ipython-input") or "ipykernel_" in file:
            return file, line
    return None


def trace_model(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    target: Target,
    recipe: Recipe,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    concrete_args: Mapping[str, Any] | None = None,
) -> fx.GraphModule:
    """Trace a copy of `model` in eval mode.

    Args:
        model: Any module that symbolic tracing can follow; it is not changed.
        args: Positional example inputs; tuples, lists and dicts of tensors may be nested in them.
        kwargs: Example inputs by name. Parameters without an example keep their default.
        target: Goes into the graph's state.
        recipe: Goes into the graph's state.
        leaf_modules: Types, or dotted paths, of modules that stay whole.
        concrete_args: Parameters of forward that are fixed to a value.

    Returns:
        A GraphModule with origins, shapes, dtypes and state.

    Raises:
        TraceError: Tracing stopped; the message names the user's line and the ways out.
    """
    if isinstance(model, fx.GraphModule) and isinstance(model.meta.get("fxq"), State):
        raise TraceError("this model was traced by fxq already", hint="give prepare the original model")
    with torch.inference_mode(mode=False):
        root = _copy(model)
        _check_leaves(root, leaf_modules)
        bound = bind_arguments(root, args, kwargs, concrete_args or {})
        inputs = {k: v for k, v in bound.items() if has_tensor(v) and k not in (concrete_args or {})}
        fixed = {k: v for k, v in bound.items() if k not in inputs}
        tracer = _Tracer(leaf_modules, inputs, fixed)
        gm = fx.GraphModule(root, _trace(tracer, root), type(model).__name__)
        gm.eval()
        leaves = pytree.tree_leaves(list(inputs.values()))
        propagate_shapes(gm, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
    in_args, in_kwargs = kept_arguments(root, args, kwargs, inputs)
    new = State(
        target=target,
        recipe=recipe,
        example_args=in_args,
        example_kwargs=in_kwargs,
        properties=frozenset({"traced"}),
        notes=tuple(weighted_leaves(gm)),
        provenance={"torch": torch.__version__, "model": type(model).__qualname__},
    )
    set_state(gm, new)
    return gm


def _copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode; tensors that some module computed (the old weight_norm's weight) are copied by
    value.
    """
    for path, parameter in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(parameter):
            raise TraceError(
                f"{path} has no shape yet",
                module_path=path.rpartition(".")[0],
                hint="run the lazy model once",
            )
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, memo).eval()
    except (RuntimeError, TypeError) as error:
        raise TraceError(
            f"the model cannot be copied: {error}", hint="give its class a __deepcopy__ that can copy it"
        ) from error


def _check_leaves(root: nn.Module, leaf_modules: Sequence[type[nn.Module] | str]) -> None:
    """Each path names a module, and each type is there."""
    known = dict(root.named_modules())
    for path in leaf_modules:
        if not isinstance(path, str | type):
            raise TraceError(f"leaf_modules holds {path!r}", hint="name module types or dotted paths in a list")
        if isinstance(path, type) and not any(isinstance(m, path) for m in known.values()):
            raise TraceError(f"leaf_modules names {path.__name__}, and the model has no such module")
        if isinstance(path, str) and path not in known:
            near = difflib.get_close_matches(path, known, 3, 0.3)
            raise TraceError(
                f"leaf_modules names {path!r}, and the model has no such module",
                hint=f"near it are {', '.join(near)}" if near else "paths are those of named_modules()",
            )


def _trace(tracer: _Tracer, root: nn.Module) -> fx.Graph:
    """Run the tracer; whatever stops it becomes a TraceError at the user's line."""
    stored = {path: (t, t._version) for path, t in (*root.named_parameters(), *root.named_buffers())}
    try:
        graph = tracer.trace(root)
    except FxqError as error:
        frame = _user_frame(_frames_of(error.__traceback__))
        raise _located(error.message, frame, error.hint, tracer) from error
    except Exception as error:
        frame = _user_frame(_frames_of(error.__traceback__))
        text = f"{type(error).__name__}: {error}"
        raise _located(f"tracing stopped with {text.splitlines()[0]}", frame, WAYS_OUT, tracer) from error
    changed = [path for path, (tensor, version) in stored.items() if tensor._version != version]
    if changed:
        raise TraceError(
            f"the model changes its own {', '.join(changed)} when it runs, which a graph cannot repeat",
            hint="compute a new tensor instead of changing the stored one",
        )
    return graph


def _frames_of(tb: TracebackType | None) -> list[tuple[str, int]]:
    """(file, line) of a traceback's frames, innermost first."""
    return [(f.filename, f.lineno or 0) for f in reversed(traceback.extract_tb(tb))]


def _located(message: str, frame: tuple[str, int] | None, hint: str | None, tracer: _Tracer) -> TraceError:
    source = f"{frame[0]}:{frame[1]}: {linecache.getline(*frame).strip()}" if frame else None
    return TraceError(message, module_path=tracer.stopped, source=source, hint=hint)


def weighted_leaves(gm: fx.GraphModule) -> Iterator[Note]:
    """A note for each module kept whole that hides weighted operations, which therefore stay float."""
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = attribute(gm, str(node.target))
        inner = [path for path, m in module.named_modules() if path and isinstance(m, WEIGHTED_MODULES)]
        plain = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not origin(node).leaf
        own = isinstance(module, WEIGHTED_MODULES) and not plain
        if not inner and not own:
            continue
        what = f"{len(inner)} weighted operations inside" if inner else "its weighted operations"
        where = origin(node)
        yield Note(
            node.name,
            "R20",
            f"{type(module).__name__} is kept whole, so {what} are not quantized; write it out of "
            "traceable modules, or trace into a subclass of your own, to quantize them",
            str(node.target),
            where.source,
            "opaque",
        )
