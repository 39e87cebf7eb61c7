"""A float model and its quantized graph, run side by side on the user's own inputs.

Both graphs run node by node. They have the same node names, for a fused node takes the name of the last node that it
replaced; so a row of a comparison is one tensor of the user's model, whatever happened around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .batches import Inputs, model_inputs, moved
from .comparison import Comparison, ComparisonRow
from .errors import CalibrationError, FxqError
from .graph import device_of, has_state, origin, state
from .manager import PassManager, Pipeline
from .ops import kind_name
from .passes import PREPARE
from .qdq import DEQUANTIZE, QUANTIZE
from .sqnr import ErrorSums
from .stepping import Ahead, Stepper, quantizing, require_solved
from .tracing import trace_model
from .verify import is_dequantized, is_quantizer

if TYPE_CHECKING:
    from .backends.onnx_compare import NodeDifference

__all__ = ["compare"]


def compare(model: nn.Module, quantized: fx.GraphModule, inputs: Any, *, onnx: str | Path | None = None) -> Comparison:
    """Compare a float model with its quantized graph, tensor by tensor.

    Args:
        model: The float model that `quantized` was made from, or a prepared graph of it, whose quantizers then
            stand aside; not changed.
        quantized: A converted graph, or a calibrated one, whose quantizers then quantize; not changed.
        inputs: One batch: a tensor, a tuple of inputs, or a dict by name. Or an iterable of batches, such as a
            list of them or a DataLoader.
        onnx: The file that `quantized` was exported to, to compare ONNX Runtime too.

    Returns:
        A row for each tensor that both graphs have.

    Raises:
        CalibrationError: There is no input, or `quantized` has no scales yet.
        FxqError: `model` is another model: no tensor of the two has the same name.
    """
    batches = [moved(model_inputs(quantized, batch), device_of(quantized)) for batch in _batches(inputs)]
    if not batches:
        raise CalibrationError("there is no input to compare on", hint="pass one batch or more")
    require_solved(quantized)
    real = model if isinstance(model, fx.GraphModule) and has_state(model) else _float_graph(model, quantized)
    sums: dict[str, _Sums] = {}
    runtime = None if onnx is None else _Runtime(Path(onnx))
    with torch.no_grad(), quantizing(real), quantizing(quantized):
        for batch in batches:
            _compare_batch(real, quantized, batch, sums, runtime)
    if not sums:
        raise FxqError(
            "no tensor of the model is in the quantized graph",
            hint="compare a quantized graph with the model that it was prepared from",
        )
    parted = None if onnx is None else _parted(Path(onnx), quantized, batches[0])
    samples = sum(len(next(t for t in pytree.tree_leaves(tuple(b)) if isinstance(t, Tensor))) for b in batches)
    return Comparison(tuple(_rows(quantized, sums)), samples, parted, quantized)


def _batches(inputs: Any) -> list[Any]:
    """One batch, or several: a list counts as several, a tuple as one."""
    if isinstance(inputs, Tensor | tuple | Mapping | Inputs):
        return [inputs]
    return list(inputs)


def _float_graph(model: nn.Module, quantized: fx.GraphModule) -> fx.GraphModule:
    """The model, prepared as `quantized` was, so that its nodes have the same names."""
    held = state(quantized)
    recorded = held.provenance.get("prepare")
    pipeline = Pipeline.parse(recorded) if recorded and not held.provenance.get("trains") else PREPARE
    leaves = [str(n.target) for n in quantized.graph.find_nodes(op="call_module") if origin(n).leaf]
    traced = trace_model(
        model,
        held.example_args,
        dict(held.example_kwargs),
        target=held.target,
        recipe=held.recipe,
        leaf_modules=leaves,
    )
    return PassManager().run(pipeline, traced, inplace=True).to(device_of(quantized))


def _compare_batch(
    real: fx.GraphModule, quantized: fx.GraphModule, batch: Inputs, sums: dict[str, _Sums], runtime: _Runtime | None
) -> None:
    """Run both graphs on one batch, and add each pair of tensors to `sums`."""
    one, other = Stepper(real, lambda _: False), Stepper(quantized, lambda _: True)
    shared = {n.name for n in one.nodes if _comparable(n)} & {n.name for n in other.nodes if _comparable(n)}
    expected = Ahead(((n.name, v) for n, v in one.steps(one.begin(batch))), shared)
    values = other.begin(batch)
    ran = None if runtime is None else runtime.values(quantized, batch, shared)
    for node, value in other.steps(values):
        if node.name not in shared:
            continue
        wanted = expected.take(node.name)
        if isinstance(wanted, Tensor) and isinstance(value, Tensor) and wanted.is_floating_point():
            theirs = None if ran is None else ran.take(node.name)
            sums.setdefault(node.name, _Sums()).add_both(wanted, value, theirs)


def _comparable(node: fx.Node) -> bool:
    """Whether it computes a tensor of the user's model, rather than quantizing or holding one."""
    computes = node.op in ("call_function", "call_method", "call_module")
    return computes and not (is_quantizer(node) or is_dequantized(node) or node.target in (QUANTIZE, DEQUANTIZE))


class _Sums(ErrorSums):
    """A tensor's errors, and those of ONNX Runtime's tensor in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.runtime: ErrorSums | None = None

    def add_both(self, wanted: Tensor, value: Tensor, theirs: Tensor | None) -> None:
        """Take in one batch's tensors."""
        self.add(wanted, value)
        if theirs is not None:
            self.runtime = self.runtime or ErrorSums()
            self.runtime.add(wanted.cpu(), theirs)


def _rows(quantized: fx.GraphModule, sums: Mapping[str, _Sums]) -> Iterator[ComparisonRow]:
    worst: dict[fx.Node, float] = {}  # of each node: its own SQNR, or that of the worst tensor behind it
    for node in quantized.graph.nodes:
        before = min((worst[n] for n in node.all_input_nodes if n in worst), default=math.inf)
        held = sums.get(node.name)
        sqnr = before if held is None else held.sqnr
        if sqnr < math.inf or node.all_input_nodes:
            worst[node] = sqnr
        if held is None:
            continue
        where = origin(node)
        yield ComparisonRow(
            node=node.name,
            kind=kind_name(node),
            module_path=where.module_path,
            source=where.source,
            sqnr=sqnr,
            cosine=held.cosine,
            max_error=held.largest,
            drop=before - sqnr if before < math.inf else math.nan,
            runtime_sqnr=None if held.runtime is None else held.runtime.sqnr,
        )


class _Runtime:
    """ONNX Runtime on the exported file, one value after the other."""

    def __init__(self, path: Path) -> None:
        from .backends.onnxrt import Session

        self.session = Session(path, optimize=False)

    def values(self, gm: fx.GraphModule, batch: Inputs, wanted: set[str]) -> Ahead:
        from .backends.onnx_compare import value_names
        from .backends.onnx_inputs import placeholder_values

        given = [t for t in pytree.tree_leaves(placeholder_values(gm, *batch)) if isinstance(t, Tensor)]
        names = {onnx: ours for ours, onnx in value_names(self.session).items()}
        found = self.session.run_all(given)
        return Ahead(((names.get(name, name), value) for name, value in found), wanted & set(names.values()))


def _parted(path: Path, quantized: fx.GraphModule, batch: Inputs) -> tuple[NodeDifference, ...]:
    from .backends.onnx_compare import compare_nodes

    found = compare_nodes(path, quantized, batch.args, batch.kwargs)
    return tuple(row for row in found if _departs(row))


def _departs(row: NodeDifference) -> bool:
    """Whether a node's tensors differ by more than rounding on the same inputs."""
    if row.dtype.is_floating_point:
        return row.sqnr < 60
    return row.largest > 1 or row.share > 1e-3
