"""A PyTorch model becomes a graph: symbolic tracing that knows where each node came from.

The model is copied (in eval mode), so nothing the caller has is changed. Each node gets its
:class:`~fxq.graph.Origin` (module path, the user's source line) while it is traced and its
:class:`~fxq.graph.TensorInfo` from one propagation of the example inputs without data. What the model decided by
the shapes of its inputs is kept as :class:`~fxq.guards.Guard`.
"""

from __future__ import annotations

import copy
import linecache
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ..arguments import bind_arguments, has_tensor, kept_arguments
from ..errors import FxqError, TraceError
from ..forward_code import ForwardCode
from ..graph import Note, State, attribute, origin, set_state
from ..ops import WEIGHTED_MODULES
from ..recipe import Recipe
from ..shapes import propagate_shapes
from ..target import Target
from .leaves import Function, Leaf, Leaves
from .proxies import WAYS_OUT
from .recorder import Recorder, user_frame
from .symbolic import Example, SymbolicRun, ValueDependentError
from .traced_module import TracedModule, free_names

__all__ = ["DynamicShapes", "trace_model", "weighted_leaves"]

DynamicShapes = str | Mapping[str, Mapping[int, str | tuple[int, int]]] | None


def trace_model(  # noqa: PLR0913 - what the user's door takes
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    target: Target,
    recipe: Recipe,
    leaf_modules: Sequence[Leaf] = (),
    concrete_args: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "any",
    on_untraceable: Literal["raise", "leaf"] = "raise",
) -> fx.GraphModule:
    """Trace a copy of `model` in eval mode.

    Args:
        model: Any module that symbolic tracing can follow; it is not changed.
        args: Positional example inputs; tuples, lists and dicts of tensors may be nested in them.
        kwargs: Example inputs by name. Parameters without an example keep their default.
        target: Goes into the graph's state.
        recipe: Goes into the graph's state.
        leaf_modules: Types, or dotted paths, of modules that stay whole; functions marked with torch.fx.wrap, or
            their names, too. Such functions are traced through otherwise, where their decisions depend on shapes
            alone, and kept whole with a note where not.
        concrete_args: Parameters of forward that are fixed to a value.
        dynamic_shapes: Which dimensions of the inputs stay expressions when the model reads their size: ``"any"``
            (default), ``"batch"`` (the first of every input), None, or ``{input: {dimension: …}}`` as
            :func:`fxq.export` takes it. The others are read as plain numbers, and a guard holds them.
        on_untraceable: ``"raise"`` (default), or ``"leaf"``: keep the smallest module whole in whose forward
            tracing stops, with a note.

    Returns:
        A GraphModule with origins, shapes, dtypes and state.

    Raises:
        TraceError: Tracing stopped; the message names the user's line and the ways out.
    """
    if isinstance(model, fx.GraphModule) and isinstance(model.meta.get("fxq"), State):
        raise TraceError("this model was traced by fxq already", hint="give prepare the original model")
    if on_untraceable not in ("raise", "leaf"):
        raise TraceError(f"on_untraceable is {on_untraceable!r}", hint='use "raise" or "leaf"')
    with torch.inference_mode(mode=False):
        root = _copy(model)
        leaves = Leaves.of(root, leaf_modules)
        bound = bind_arguments(root, args, kwargs, concrete_args or {})
        inputs = {k: v for k, v in bound.items() if has_tensor(v) and k not in (concrete_args or {})}
        tracing = _Tracing(root, inputs, {k: v for k, v in bound.items() if k not in inputs}, dynamic_shapes)
        graph, run = tracing.with_leaves(leaves, keep=on_untraceable == "leaf")
        if run.guards:
            _guard(graph, run)
        free_names(root, graph)
        gm = TracedModule(root, graph, type(model).__name__)
        gm.eval()
        propagate_shapes(gm, tracing.tensors)
    in_args, in_kwargs = kept_arguments(root, args, kwargs, inputs)
    new = State(
        target=target,
        recipe=recipe,
        example_args=in_args,
        example_kwargs=in_kwargs,
        properties=frozenset({"traced"}),
        notes=(*tracing.notes(gm), *weighted_leaves(gm)),
        provenance={"torch": torch.__version__, "model": type(model).__qualname__},
        guards=tuple(run.guards.values()),
    )
    set_state(gm, new)
    return gm


class _Tracing:
    """The attempts at one model: with a batch of one taken for two, as it is, and with more leaves.

    Args:
        root: The copy that is traced.
        inputs: Example inputs that hold tensors, by parameter of forward.
        fixed: Values of the other parameters.
        dynamic_shapes: See :func:`trace_model`.
    """

    def __init__(
        self, root: nn.Module, inputs: Mapping[str, Any], fixed: Mapping[str, Any], dynamic_shapes: DynamicShapes
    ) -> None:
        self.root, self.inputs, self.fixed, self.plain = root, inputs, fixed, dynamic_shapes != "any"
        leaves, _ = pytree.tree_flatten_with_path(dict(inputs))
        named = [(_input_name(path), leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.tensors = [leaf for _, leaf in named]
        wanted = _dynamic_dims({name: leaf.ndim for name, leaf in named}, dynamic_shapes)
        self.examples = [Example(leaf, wanted[name]) for name, leaf in named]
        self.kept: dict[str | Function, TraceError] = {}
        self._stopped_in: Function | None = None

    def with_leaves(self, leaves: Leaves, *, keep: bool) -> tuple[fx.Graph, SymbolicRun]:
        """The graph, with functions kept whole that cannot be traced through, and modules where that is asked for."""
        self.asked = leaves.functions
        while True:
            try:
                return self._lifted(leaves.and_also(self.kept))
            except TraceError as error:
                places = (self._stopped_in, error.module_path if keep else None)
                new = [p for p in places if p and p not in self.kept and p not in self.asked]
                if not new:
                    raise
                self.kept[new[0]] = error

    def _lifted(self, leaves: Leaves) -> tuple[fx.Graph, SymbolicRun]:
        """The graph; a model that treats a batch of one apart is traced for that."""
        run = SymbolicRun(self.root, self.examples, lift=True)
        try:
            graph = self._once(run, leaves)
        except TraceError as error:
            if not run.lifted or isinstance(error.__cause__, ValueDependentError):
                raise
        else:
            names = [str(n.target) for n in graph.nodes if n.op == "placeholder"]
            shapes = {name: tuple(t.shape) for name, t in zip(names, self.tensors, strict=True)}
            if all(guard.holds(shapes) for guard in run.guards.values()):
                return graph, run
        run = SymbolicRun(self.root, self.examples, lift=False)
        return self._once(run, leaves), run

    def _once(self, run: SymbolicRun, leaves: Leaves) -> fx.Graph:
        recorder = Recorder(leaves.modules, self.inputs, self.fixed, leaves.functions)
        try:
            return _record(recorder, self.root, run, plain=self.plain)
        finally:
            self._stopped_in = recorder.stopped_in

    def notes(self, gm: fx.GraphModule) -> Iterator[Note]:
        """A note for each module, or function marked with torch.fx.wrap, that was kept whole."""
        for node in gm.graph.nodes:
            at = origin(node)
            place = at.module_path if node.op == "call_module" else node.target
            asked = node.op == "call_function" and place in self.asked
            error = self.kept.get(place) if node.op in ("call_module", "call_function") else None
            if error is None and not asked:
                continue
            what = type(attribute(gm, str(node.target))) if node.op == "call_module" else node.target
            reason = "leaf_modules names it" if error is None else error.message
            text = f"{what.__name__} is kept whole and float: {reason}"
            yield Note(node.name, "trace", text, at.module_path, error.source if error else at.source, "opaque")


def _input_name(path: Sequence[Any]) -> str:
    """How a placeholder is called: the parameter, and the path inside it."""
    return "_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def _dynamic_dims(ranks: Mapping[str, int], dynamic_shapes: DynamicShapes) -> Mapping[str, frozenset[int]]:
    """The dimensions of each input that stay symbolic."""
    if dynamic_shapes == "any":
        return {name: frozenset(range(rank)) for name, rank in ranks.items()}
    if dynamic_shapes == "batch":
        return {name: frozenset({0} if rank else ()) for name, rank in ranks.items()}
    if dynamic_shapes is None:
        return dict.fromkeys(ranks, frozenset())
    if isinstance(dynamic_shapes, str) or not all(isinstance(dims, Mapping) for dims in dynamic_shapes.values()):
        hint = 'use "any", "batch", None, or {input name: {dimension: name or (min, max)}}'
        raise TraceError(f"dynamic_shapes={dynamic_shapes!r} is not understood", hint=hint)
    for name, dims in dynamic_shapes.items():
        if name not in ranks:
            raise TraceError(f"dynamic_shapes names {name!r}, which is no input", hint=f"inputs: {', '.join(ranks)}")
        for dim in dims:
            if not -ranks[name] <= dim < ranks[name]:
                raise TraceError(f"input {name!r} has no dimension {dim!r}", hint=f"it has {ranks[name]} dimensions")
    return {name: frozenset(d % rank for d in dynamic_shapes.get(name, ())) for name, rank in ranks.items()}


def _guard(graph: fx.Graph, run: SymbolicRun) -> None:
    """Let the graph's code check the guards first."""
    code = graph._codegen
    names, parts = (code.names, code.parts) if isinstance(code, ForwardCode) else (None, ())
    graph.set_codegen(ForwardCode(names, parts, tuple(run.guards.values())))


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


def _record(recorder: Recorder, root: nn.Module, run: SymbolicRun, *, plain: bool) -> fx.Graph:
    """Run the recorder; whatever stops it becomes a TraceError at the user's line."""
    stored = {path: (t, t._version) for path, t in (*root.named_parameters(), *root.named_buffers())}
    try:
        graph = recorder.record(root, run, plain=plain)
    except FxqError as error:
        frame = user_frame(_frames_of(error.__traceback__))
        raise _located(error.message, frame, error.hint, recorder) from error
    except Exception as error:
        frame = user_frame(_frames_of(error.__traceback__))
        text = f"{type(error).__name__}: {error}"
        raise _located(f"tracing stopped with {text.splitlines()[0]}", frame, WAYS_OUT, recorder) from error
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


def _located(message: str, frame: tuple[str, int] | None, hint: str | None, recorder: Recorder) -> TraceError:
    source = f"{frame[0]}:{frame[1]}: {linecache.getline(*frame).strip()}" if frame else None
    return TraceError(message, module_path=recorder.stopped, source=source, hint=hint)


def weighted_leaves(gm: fx.GraphModule) -> Iterator[Note]:
    """A note for each module kept whole that hides weighted operations, which therefore stay float."""
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = attribute(gm, str(node.target))
        if isinstance(module, nn.MultiheadAttention) and not origin(node).leaf:
            continue  # the pass expand-attention takes it apart, or says why not
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
