"""A PyTorch model becomes a graph: symbolic tracing that knows where each node came from.

The model is copied (in eval mode), so nothing the caller has is changed. Each node gets its :class:`~fxq.graph.Origin`
(module path, the user's source line) while it is traced and its :class:`~fxq.graph.TensorInfo` from one propagation of
the example inputs without data.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import operator
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch import fx, nn
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree

from .errors import FxqError, TraceError
from .graph import (
    ALIASES,
    ORIGIN,
    TENSOR,
    Aliases,
    Note,
    Origin,
    State,
    Storage,
    TensorInfo,
    attribute,
    set_state,
)
from .recipe import Recipe
from .target import Target

__all__ = ["example_arguments", "propagate_shapes", "trace_model", "weighted_leaves"]

_TORCH: Final = f"{Path(torch.__file__).parent}/"
_HERE: Final = f"{Path(__file__).parent}/"
_WEIGHTED: Final = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
)
_WAYS_OUT: Final = (
    "rewrite that line with torch operations (torch.where), pass the value it depends on as "
    "concrete_args={name: value}, or keep the module whole with leaf_modules=[its type or path]"
)


class _Proxy(fx.Proxy):
    """A Proxy that sees in-place operators and item assignment, which plain fx loses or refuses."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        raise TraceError("the length of a tensor is used as a Python number", hint=_WAYS_OUT)

    def __int__(self) -> int:
        raise TraceError("a tensor's value is used as a Python number", hint=_WAYS_OUT)

    __index__ = __int__

    def __float__(self) -> float:
        raise TraceError("a tensor's value is used as a Python number", hint=_WAYS_OUT)


def _inplace_operator(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


_INPLACE_OPERATORS: Final = tuple(
    getattr(operator, name)
    for name in "iadd isub imul itruediv ipow ifloordiv imod iand ior ixor imatmul".split()
)
for _operator in _INPLACE_OPERATORS:
    setattr(_Proxy, f"__{_operator.__name__}__", _inplace_operator(_operator))


class _NestedInputs(fx.graph.CodeGen):
    """Code for a forward whose inputs nest tensors: it takes them apart by plain indexing (``a = pair[0]``).

    Args:
        names: Parameters of forward, in order.
        parts: For each placeholder, the expression over the parameters that it stands for.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[str]) -> None:
        super().__init__()
        self.names, self.parts = tuple(names), tuple(parts)

    def process_inputs(self, *args: Any) -> Any:
        return [leaf for leaf in pytree.tree_leaves(list(args)) if isinstance(leaf, torch.Tensor)]

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        definition = super().gen_fn_def(list(self.names), maybe_return_annotation, **options)
        variables = [v.split(":")[0].split("=")[0].strip() for v in free_vars]
        taken = (f"\n    {v} = {part}" for v, part in zip(variables, self.parts, strict=True) if v != part)
        return definition + "".join(taken)


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

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, self.leaf_types) or module_qualified_name in self.leaf_paths:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.stack.append((self.path_of_module(m), type(m)))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.stack.pop()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

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
            self.graph.set_codegen(_NestedInputs(list(self.inputs), parts))
        by_name = {n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        positional = [values[n] for n in signature.parameters if n in values and n not in by_name]
        keywords = {n: values[n] for n in by_name if n in values}
        return (lambda: root_fn(self.root, *positional, **keywords)), []

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
            plain = plain.removeprefix("i") if target in _INPLACE_OPERATORS else plain
            name = f"{path.replace('.', '_')}_{plain}"
        return kind, target, args, kwargs, name, *rest

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise TraceError("control flow depends on a tensor's value", hint=_WAYS_OUT)

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        try:
            return super().iter(obj)
        except fx.proxy.TraceError as error:
            raise TraceError(
                "a loop runs over a tensor whose length tracing does not know", hint=_WAYS_OUT
            ) from error

    def keys(self, obj: fx.Proxy) -> Any:
        raise TraceError("an input is unpacked with ** or .keys()", hint=_WAYS_OUT)


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
        if file.startswith(("<ipython-input", "/tmp/ipykernel")) or "ipykernel_" in file:
            return file, line
    return None


def example_arguments(
    example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (args, kwargs).

    Args:
        example_inputs: A tensor, a tuple or list of positional inputs, or a dict of inputs by name.
        example_kwargs: More inputs by name.

    Raises:
        TraceError: There is no input at all.
    """
    kwargs = dict(example_kwargs or {})
    if isinstance(example_inputs, Mapping):
        args: tuple[Any, ...] = ()
        kwargs = {**example_inputs, **kwargs}
    elif isinstance(example_inputs, tuple | list):
        args = tuple(example_inputs)
    else:
        args = () if example_inputs is None else (example_inputs,)
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise TraceError(
            "example_inputs hold no tensor", hint="pass a tensor, a tuple of inputs or a dict of them"
        )
    return args, kwargs


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
    try:
        root = copy.deepcopy(model).eval()
    except (RuntimeError, TypeError) as error:
        raise TraceError(
            f"the model cannot be copied: {error}",
            hint="tensors that are attributes must be leaves (detach them)",
        ) from error
    bound = _bind(root, args, kwargs)
    concrete = dict(concrete_args or {})
    fixed = {k: v for k, v in bound.items() if not _has_tensor(v)} | concrete
    inputs = {k: v for k, v in bound.items() if k not in fixed}
    tracer = _Tracer(leaf_modules, inputs, fixed)
    graph = _trace(tracer, root)
    gm = fx.GraphModule(tracer.root, graph, type(model).__name__)
    gm.eval()
    propagate_shapes(
        gm, [leaf for leaf in pytree.tree_leaves(list(inputs.values())) if isinstance(leaf, torch.Tensor)]
    )
    in_args, in_kwargs = _kept(root, args, kwargs, fixed)
    set_state(
        gm,
        State(
            target=target,
            recipe=recipe,
            example_args=in_args,
            example_kwargs=in_kwargs,
            properties=frozenset({"traced"}),
            notes=tuple(weighted_leaves(gm)),
            provenance={"torch": torch.__version__, "model": type(model).__qualname__},
        ),
    )
    return gm


def _bind(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Values by parameter name of forward, defaults included."""
    signature = inspect.signature(root.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(
            f"example inputs do not fit {type(root).__name__}.forward{signature}: {error}",
            hint="a tuple gives positional inputs, a dict gives inputs by name; wrap a single dict input in a tuple",
        ) from error
    bound.apply_defaults()
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            if value:
                raise TraceError(f"{type(root).__name__}.forward takes *{name}, which has no fixed inputs",
                                 hint="wrap the model in a module whose forward names its inputs")  # fmt: skip
        elif kind is inspect.Parameter.VAR_KEYWORD:
            if value:
                raise TraceError(f"{type(root).__name__}.forward takes **{name}, which has no fixed inputs",
                                 hint="wrap the model in a module whose forward names its inputs")  # fmt: skip
        else:
            values[name] = value
    return values


def _kept(
    root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], fixed: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs without those that tracing fixed to a value, which the graph no longer takes."""
    names = inspect.signature(root.forward).parameters
    kept = tuple(value for name, value in zip(names, args, strict=False) if name not in fixed)
    return kept, {k: v for k, v in kwargs.items() if k not in fixed}


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _trace(tracer: _Tracer, root: nn.Module) -> fx.Graph:
    """Run the tracer; whatever stops it becomes a TraceError at the user's line."""
    try:
        return tracer.trace(root)
    except FxqError as error:
        frame = _user_frame(_frames_of(error.__traceback__))
        raise _located(error.message, frame, error.hint, tracer) from error
    except Exception as error:
        frame = _user_frame(_frames_of(error.__traceback__))
        text = f"{type(error).__name__}: {error}"
        raise _located(f"tracing stopped with {text.splitlines()[0]}", frame, _WAYS_OUT, tracer) from error


def _frames_of(tb: TracebackType | None) -> list[tuple[str, int]]:
    """(file, line) of a traceback's frames, innermost first."""
    return [(f.filename, f.lineno or 0) for f in reversed(traceback.extract_tb(tb))]


def _located(message: str, frame: tuple[str, int] | None, hint: str | None, tracer: _Tracer) -> TraceError:
    path = tracer.stack[-1][0] if tracer.stack else None
    source = f"{frame[0]}:{frame[1]}: {linecache.getline(*frame).strip()}" if frame else None
    return TraceError(message, module_path=path, source=source, hint=hint)


class _ShapeInterpreter(fx.Interpreter):
    """Runs the graph, on tensors without data where it can, and notes what each node gives, aliases and writes."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.alive: list[Any] = []  # keeps storages alive, so that their addresses stay unique

    def run_node(self, n: fx.Node) -> Any:
        inputs = [self.env[a] for a in n.all_input_nodes]
        tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
        before = [t._version for t in tensors]
        result = super().run_node(n)
        self.alive.append(result)
        written = [t for t, version in zip(tensors, before, strict=True) if t._version != version]
        if isinstance(result, torch.Tensor):
            n.meta[TENSOR] = TensorInfo(tuple(result.shape), result.dtype)
        elif isinstance(result, tuple | list) and any(isinstance(r, torch.Tensor) for r in result):
            n.meta[TENSOR] = tuple(
                TensorInfo(tuple(r.shape), r.dtype) if isinstance(r, torch.Tensor) else None for r in result
            )
        else:
            n.meta.pop(TENSOR, None)
        n.meta[ALIASES] = Aliases(
            tuple(_storage(t) for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)),
            frozenset(_storage(t).address for t in written),
        )
        return result


def _storage(tensor: torch.Tensor) -> Storage:
    strided = tensor.layout is torch.strided
    return Storage(
        tensor.untyped_storage()._cdata if strided else id(tensor),
        tuple(tensor.shape),
        tuple(tensor.stride()) if strided else (),
        tensor.storage_offset() if strided else 0,
    )


def propagate_shapes(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Note shape and dtype of every node for these inputs (one per placeholder).

    Tensors without data are used, so this costs no memory and no device time. A graph whose shapes depend on values
    is run for real instead.

    Raises:
        TraceError: The graph does not run on these inputs; the message names the node and the user's line.
    """
    try:
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            fake = [mode.from_tensor(x) for x in inputs]
            _ShapeInterpreter(gm).run(*fake, enable_io_processing=False)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        fake_tensor.DynamicOutputShapeException,
    ):
        _run_for_shapes(gm, inputs)


def _run_for_shapes(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    interpreter = _ShapeInterpreter(gm)
    interpreter.extra_traceback = False
    try:
        with torch.no_grad():
            interpreter.run(*inputs, enable_io_processing=False)
    except Exception as error:
        node = next((n for n in gm.graph.nodes if n.op != "output" and n not in interpreter.env), None)
        where = node.meta.get(ORIGIN, Origin()) if node is not None else Origin()
        raise TraceError(
            f"the traced graph does not run on the example inputs: {type(error).__name__}: {error}",
            node=node.name if node is not None else None,
            module_path=where.module_path or None,
            source=where.source,
            hint="check that the model itself runs on them",
        ) from error


def weighted_leaves(gm: fx.GraphModule) -> Iterator[Note]:
    """A note for each module kept whole that hides weighted operations, which therefore stay float."""
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = attribute(gm, str(node.target))
        inner = [path for path, m in module.named_modules() if path and isinstance(m, _WEIGHTED)]
        own = isinstance(module, _WEIGHTED) and not isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        if not inner and not own:
            continue
        what = f"{len(inner)} weighted operations inside" if inner else "its weighted operations"
        where = node.meta.get(ORIGIN, Origin())
        yield Note(
            node.name,
            "R20",
            f"{type(module).__name__} is kept whole, so {what} are not quantized; write it out of "
            "traceable modules, or trace into a subclass of your own, to quantize them",
            str(node.target),
            where.source,
            "opaque",
        )
