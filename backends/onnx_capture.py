"""From an FX graph through torch.export and torch's ONNX exporter; where they stop, the node at which they
do.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import ExportError
from ..graph import attribute, error_at
from .onnx_inputs import Examples, to_cpu
from .onnx_names import carry_name
from .onnx_types import translations

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

__all__ = ["Source", "run_exporter"]

_FAILURES: Final = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What torch.export and the exporter raise; they have no common root of their own."""

_POOLS: Final[Mapping[Any, int]] = {
    F.adaptive_avg_pool1d: 1,
    F.adaptive_avg_pool2d: 2,
    F.adaptive_avg_pool3d: 3,
    torch.nn.AdaptiveAvgPool1d: 1,
    torch.nn.AdaptiveAvgPool2d: 2,
    torch.nn.AdaptiveAvgPool3d: 3,
}
"""Spatial dimensions of the adaptive average pools."""


def _pooled(x: torch.Tensor, spatial: int) -> torch.Tensor:
    return x.mean(tuple(range(-spatial, 0)), keepdim=True)


torch.library.define("fxq::global_average_pool", "(Tensor x, int spatial) -> Tensor")
torch.library.impl("fxq::global_average_pool", "CompositeExplicitAutograd", _pooled)
torch.library.impl("fxq::global_average_pool", "Meta", _pooled)
GLOBAL_AVERAGE_POOL: Final = torch.ops.fxq.global_average_pool.default
"""The mean over the last `spatial` dimensions: one node in torch.export, and one in ONNX."""


@dataclass(frozen=True)
class Source:
    """What is exported, and how.

    Attributes:
        gm: The graph; it is not changed.
        examples: Its example inputs.
        dims: For each input tensor, ``{dimension: torch.export.Dim}``.
        opset: The ONNX opset.
    """

    gm: fx.GraphModule
    examples: Examples
    dims: list[dict[int, Any]]
    opset: int


def _flat_copy(gm: fx.GraphModule, until: fx.Node | None = None) -> fx.GraphModule:
    """The graph, or its part up to `until`, on the CPU, with one argument per placeholder and a flat tuple of
    results.

    Every node carries its name. Tensors that are on the CPU already are shared, not copied: nothing writes to
    them.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            break
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].kwargs = {k: _on_cpu(v) for k, v in copies[node].kwargs.items()}
        _spell_global_pool(copies[node], gm)
        carry_name(copies[node], node.name)
        if node is until:
            break
    result = until or next(node for node in gm.graph.nodes if node.op == "output").args[0]
    graph.output(tuple(copies[leaf] for leaf in pytree.tree_leaves(result) if isinstance(leaf, fx.Node)))
    moved: dict[int, Any] = {}
    root = {str(n.target): _moved(gm, n, moved) for n in graph.nodes if n.op in ("get_attr", "call_module")}
    return fx.GraphModule(root, graph).eval()


def _spell_global_pool(node: fx.Node, gm: fx.GraphModule) -> None:
    """Spell an adaptive average pool to size 1 as the global pool that it is.

    Runtimes have a kernel for global pooling, in integers too. PyTorch's own decomposition gives a mean, and restores
    channels-last strides with as_strided, which becomes Range and Gather in ONNX wherever the input was permuted.
    """
    if node.op == "call_function":
        spatial = _POOLS.get(node.target)
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
    elif node.op == "call_module":
        module = attribute(gm, str(node.target))
        spatial, size = _POOLS.get(type(module)), getattr(module, "output_size", None)
    else:
        return
    if spatial is not None and size in (1, (1,) * spatial, [1] * spatial):
        source = node.args[0] if node.args else node.kwargs["input"]
        node.op, node.target, node.args, node.kwargs = "call_function", GLOBAL_AVERAGE_POOL, (source, spatial), {}


def _moved(gm: fx.GraphModule, node: fx.Node, moved: dict[int, Any]) -> Any:
    value = attribute(gm, str(node.target))
    if isinstance(value, torch.nn.Module):
        return moved.setdefault(id(value), copy.deepcopy(value).cpu())
    return moved.setdefault(id(value), to_cpu(value))


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def run_exporter(source: Source) -> ONNXProgram:
    """Take a graph through torch.export and torch's ONNX exporter, each once, without optimization.

    Raises:
        ExportError: One of them stopped; the message names the first node with which it does.
    """
    try:
        program = _capture(source, _flat_copy(source.gm))
    except _FAILURES as error:
        raise _capture_error(source, error) from error
    try:
        return _translate(source, program)
    except _FAILURES as error:
        raise _translation_error(source, error) from error


def _capture(source: Source, module: fx.GraphModule) -> torch.export.ExportedProgram:
    # Called here and not left to the exporter, which fixes a dimension without a word where torch.export
    # refuses.
    shapes = source.examples.shapes(source.dims)
    with _quiet():
        return torch.export.export(module, source.examples.arguments(), dynamic_shapes=shapes, strict=False)


def _translate(source: Source, program: torch.export.ExportedProgram) -> ONNXProgram:
    with _quiet():
        result = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            optimize=False,  # nodes are labelled before they are optimized
            opset_version=source.opset,
            dynamic_shapes=_names_of_dims(source.dims),
            custom_translation_table={**translations(), GLOBAL_AVERAGE_POOL: _translate_pool()},
        )
    if result is None:
        raise ExportError("torch's ONNX exporter gave no program")
    return result


def _translate_pool() -> Callable[..., Any]:
    from onnxscript import opset18 as op

    def global_average_pool(x: Any, spatial: int) -> Any:
        if len(x.shape) == spatial + 2:
            return op.GlobalAveragePool(x)
        axes: Any = op.Constant(value_ints=list(range(-spatial, 0)))
        return op.ReduceMean(x, axes, keepdims=1)  # ONNX's pool wants a batch

    return global_average_pool


def _names_of_dims(dims: list[dict[int, Any]]) -> tuple[dict[int, Any], ...] | None:
    """Where the exporter learns what symbols are called: each only once, or it warns."""
    seen: set[str] = set()
    first: list[dict[int, Any]] = []
    for own in dims:
        named = {}
        for axis, dim in own.items():
            if dim.__name__ not in seen:
                named[axis] = dim
                seen.add(dim.__name__)
        first.append(named)
    return tuple(first) if seen else None


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch.export copies its own tree specs in a way that it warns of itself.
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        yield


def _capture_error(source: Source, error: Exception) -> ExportError:
    """Why torch.export stopped, at the first node with which it does."""
    fixed = [line.strip() for line in str(error).splitlines() if line.lstrip().startswith("- ")]
    if any(source.dims) and "Constraints violated" in str(error):
        names = ", ".join(sorted({dim.__name__ for dims in source.dims for dim in dims.values()}))
        message = f"the graph cannot be exported with dynamic {names}: " + " ".join(fixed or [str(error)])
        hint = (
            "compute with the input's own size there (x.shape[0]); give a dimension that the graph bounds its range, "
            "dynamic_shapes={input: {dimension: (min, max)}}; or export static shapes with dynamic_shapes=None"
        )
    elif "data-dependent" in str(error):
        message = "a module decides by a tensor's value, which an exported file cannot hold"
        hint = "rewrite that line of its forward with torch operations (torch.where)"
    else:
        message = f"torch.export stopped with {type(error).__name__}: {_first_line(error)}"
        hint = "check that the graph runs on the example inputs"
        hint += ", or export static shapes with dynamic_shapes=None" if any(source.dims) else ""
    node = _first_failing(source, lambda module: _capture(source, module))
    return _located(message, node, hint)


def _translation_error(source: Source, error: Exception) -> ExportError:
    causes = [error]
    while causes[-1].__cause__ is not None and isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)
    node = _first_failing(source, lambda module: _translate(source, _capture(source, module)))
    return _located(
        f"torch's ONNX exporter cannot translate the graph: {_first_line(causes[-1])}",
        node,
        "write this operation with others that ONNX has, or ask for a higher opset",
    )


def _located(message: str, node: fx.Node | None, hint: str) -> ExportError:
    if node is None:
        return ExportError(message, hint=hint)
    found = error_at(ExportError, message, node, hint)
    assert isinstance(found, ExportError)
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _first_failing(source: Source, attempt: Callable[[fx.GraphModule], object]) -> fx.Node | None:
    """The node at which `attempt` begins to fail, by bisection over the graph's beginnings."""
    nodes = [n for n in source.gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]

    def fails(count: int) -> bool:
        try:
            attempt(_flat_copy(source.gm, nodes[count - 1]))
        except _FAILURES:
            return True
        return False

    low, high = 0, len(nodes)
    if not nodes or not fails(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(middle) else (middle, high)
    found: fx.Node = nodes[high - 1]
    return found
