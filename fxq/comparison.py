"""Where a quantized graph parts from the float model: every tensor, in numbers, on the user's own inputs.

Both graphs run side by side, node by node. They have the same node names, for a fused node takes the name of
the last node that it replaced; so a row is one tensor of the user's model, whatever happened around it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from . import html
from .batches import Inputs, model_inputs, moved
from .errors import CalibrationError, FxqError
from .graph import has_state, origin, state
from .manager import PassManager, Pipeline
from .ops import kind_name
from .passes import PREPARE
from .pictures import curves_picture
from .qdq import DEQUANTIZE, QUANTIZE
from .quantizer import quantizers
from .stepping import Stepper, quantizing
from .tables import plain_number, table
from .tracer import trace_model
from .verify import is_dequantized, is_quantizer
from .viewer import View, view

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .backends.onnx_compare import NodeDifference

__all__ = ["Comparison", "ComparisonRow", "compare"]

THRESHOLD: Final = 20.0
"""SQNR in dB, 1% noise power, below which a tensor counts as parted from its float value."""
_SHOWN: Final = 12
_NAMED: Final = 5


@dataclass(frozen=True)
class ComparisonRow:
    """One tensor of the model, float against quantized, over all inputs that were given.

    Attributes:
        node: Its node.
        kind: The node's op kind.
        module_path: The user's module.
        source: The user's ``file:line``.
        sqnr: Power of the float tensor to that of the difference, dB; infinite where nothing differs.
        cosine: Cosine of the angle between the two, in [-1, 1].
        max_error: Largest absolute difference.
        drop: How much lower the SQNR is than that of the worst tensor that the node reads, dB; NaN where none
            of them has a row or differs.
        runtime_sqnr: The same SQNR for ONNX Runtime's tensor in place of PyTorch's; None without a file, or
            where the file lacks the tensor.
    """

    node: str
    kind: str
    module_path: str
    source: str | None
    sqnr: float
    cosine: float
    max_error: float
    drop: float = math.nan
    runtime_sqnr: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A float model against its quantized graph; prints as a table.

    Attributes:
        rows: One per tensor that both have, in graph order.
        samples: How many samples were compared.
        runtime: Where ONNX Runtime's own operations differ from PyTorch's on the same inputs by more than
            rounding: over 0.1% of a tensor's integers, or any by more than one step; for a float tensor below
            60 dB. Empty if they agree, None without a file.
    """

    rows: tuple[ComparisonRow, ...]
    samples: int
    runtime: tuple[NodeDifference, ...] | None = None
    _graph: fx.GraphModule | None = field(default=None, repr=False, compare=False)

    @property
    def output(self) -> ComparisonRow:
        """The last tensor's row, which is the model's answer or next to it."""
        return self.rows[-1]

    def worst(self, count: int = _SHOWN) -> tuple[ComparisonRow, ...]:
        """The rows with the lowest SQNR, worst first."""
        return tuple(sorted(self.rows, key=lambda row: row.sqnr))[:count]

    def drops(self, count: int = _SHOWN) -> tuple[ComparisonRow, ...]:
        """The rows at which most SQNR is lost, worst first: the operations to look at."""
        lost = (row for row in self.rows if not math.isnan(row.drop))
        return tuple(sorted(lost, key=lambda row: -row.drop))[:count]

    def first_below(self, sqnr: float = THRESHOLD) -> ComparisonRow | None:
        """The first row in graph order whose SQNR is below `sqnr` dB; None if there is none."""
        return next((row for row in self.rows if row.sqnr < sqnr), None)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON; infinities as strings."""
        runtime = None
        if self.runtime is not None:
            runtime = [{**dataclasses.asdict(row), "dtype": str(row.dtype)} for row in self.runtime]
        rows = [dataclasses.asdict(row) for row in self.rows]
        plain = {"samples": self.samples, "rows": rows, "runtime": runtime}
        found: dict[str, Any] = pytree.tree_map(plain_number, plain)
        return found

    def __str__(self) -> str:
        return "\n".join([*self._summary(), "", self.table(self.drops(), "where most is lost")])

    def _summary(self) -> Iterator[str]:
        first, last = self.first_below(), self.output
        yield f"{len(self.rows)} tensors compared on {self.samples} samples; {last.node}: {_db(last.sqnr)}"
        if first is None:
            yield f"no tensor is below {THRESHOLD:g} dB"
        else:
            where = f" ({first.source})" if first.source else ""
            yield f"first below {THRESHOLD:g} dB: {first.node}, {_db(first.sqnr)}{where}"
        if self.runtime is not None and not self.runtime:
            yield "ONNX Runtime agrees with PyTorch at every node"
        elif self.runtime:
            part = self.runtime[0]
            yield f"ONNX Runtime parts from PyTorch at {len(self.runtime)} nodes, first at {part.node}"

    def table(self, rows: Iterable[ComparisonRow] | None = None, title: str = "") -> str:
        """Rows as text; all of them by default."""
        return table(self._headings(), self._cells(self.rows if rows is None else rows), title=title)

    def _headings(self) -> dict[str, bool]:
        """Column to whether it holds numbers."""
        names = {"tensor": False, "kind": False, "module": False, "SQNR dB": True, "drop dB": True}
        names |= {"cosine": True, "max error": True}
        if self.runtime is not None:
            names["ORT dB"] = True
        return names

    def _cells(self, rows: Iterable[ComparisonRow]) -> Iterator[tuple[str, ...]]:
        for row in rows:
            drop = "" if math.isnan(row.drop) else f"{row.drop:.1f}"
            numbers = (f"{row.sqnr:.1f}", drop, f"{row.cosine:.5f}", f"{row.max_error:.3g}")
            runtime = "" if row.runtime_sqnr is None else f"{row.runtime_sqnr:.1f}"
            more = () if self.runtime is None else (runtime,)
            yield (row.node, row.kind, row.module_path, *numbers, *more)

    def view(self) -> View:
        """The quantized graph as a picture, whose panel says each tensor's SQNR, drop and largest error."""
        facts = {
            row.node: [
                ("SQNR", _db(row.sqnr) + ("" if math.isnan(row.drop) else f", {row.drop:.1f} dB below what it reads")),
                ("largest error", f"{row.max_error:.3g}"),
            ]
            for row in self.rows
        }
        if self._graph is None:
            raise FxqError("this comparison was not made by fxq.compare", hint="draw the graph with fxq.view(gm)")
        return view(self._graph).with_facts(facts)

    def _repr_html_(self) -> str:
        summary = [html.element("p", line) for line in self._summary()]
        worst = html.table(list(self._headings()), self._linked(self.drops()), right=range(3, 8))
        every = html.details(
            f"all {len(self.rows)} tensors", html.table(list(self._headings()), self._linked(self.rows))
        )
        words = html.element("p", "Where most is lost; click a name to find it in the picture.")
        shown = html.card("float against quantized", [*summary, words, worst, every])
        if self._graph is None:
            return shown
        picture = [self.view().fragment(), html.sheet(html.SCRIPT)]
        return html.element("div", [html.Html(shown), *picture], class_="fxq-linked")

    def _linked(self, rows: Iterable[ComparisonRow]) -> list[list[str]]:
        """Cells whose first one names the node to the picture's script."""
        return [[html.element("span", name, data_node=name), *rest] for name, *rest in self._cells(rows)]

    def plot(self) -> Figure:
        """SQNR along the graph, with the places where most is lost.

        Returns:
            A matplotlib figure, made without pyplot.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        series = {"quantized, in PyTorch": [row.sqnr for row in self.rows]}
        if self.runtime is not None:
            found = (row.sqnr if row.runtime_sqnr is None else row.runtime_sqnr for row in self.rows)
            series["exported, in ONNX Runtime"] = list(found)
        named = {self.rows.index(row): row.node for row in self.drops(_NAMED)}
        title = f"float against quantized, {self.samples} samples; named: where most is lost"
        return curves_picture(series, named, title=title)


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
    batches = [moved(model_inputs(quantized, batch), _device(quantized)) for batch in _batches(inputs)]
    if not batches:
        raise CalibrationError("there is no input to compare on", hint="pass one batch or more")
    unsolved = [name for name, quantizer in quantizers(quantized).items() if not quantizer.solved]
    if unsolved:
        raise CalibrationError(
            f"{len(unsolved)} quantizers have no scale: {', '.join(unsolved)}",
            node=unsolved[0],
            hint="run fxq.calibrate(prepared, batches) first",
        )
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


def _device(gm: nn.Module) -> torch.device:
    return next((t.device for t in (*gm.parameters(), *gm.buffers())), torch.device("cpu"))


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
    return PassManager().run(pipeline, traced, inplace=True).to(_device(quantized))


def _compare_batch(
    real: fx.GraphModule, quantized: fx.GraphModule, batch: Inputs, sums: dict[str, _Sums], runtime: _Runtime | None
) -> None:
    """Run both graphs on one batch, and add each pair of tensors to `sums`."""
    one, other = Stepper(real, lambda _: False), Stepper(quantized, lambda _: True)
    shared = {n.name for n in one.nodes if _comparable(n)} & {n.name for n in other.nodes if _comparable(n)}
    expected = _Ahead(((n.name, v) for n, v in one.steps(one.begin(batch))), shared)
    values = other.begin(batch)
    ran = None if runtime is None else runtime.values(quantized, batch, shared)
    for node, value in other.steps(values):
        if node.name not in shared:
            continue
        wanted = expected.take(node.name)
        if isinstance(wanted, Tensor) and isinstance(value, Tensor) and wanted.is_floating_point():
            theirs = None if ran is None else ran.take(node.name)
            sums.setdefault(node.name, _Sums()).add(wanted, value, theirs)


def _comparable(node: fx.Node) -> bool:
    """Whether it computes a tensor of the user's model, rather than quantizing or holding one."""
    computes = node.op in ("call_function", "call_method", "call_module")
    return computes and not (is_quantizer(node) or is_dequantized(node) or node.target in (QUANTIZE, DEQUANTIZE))


class _Ahead:
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


class _Sums:
    """What one tensor's row is computed from, summed over batches in float64."""

    def __init__(self) -> None:
        self.signal = self.other = self.noise = self.product = self.largest = 0.0
        self.runtime_noise: float | None = None

    def add(self, wanted: Tensor, value: Tensor, theirs: Tensor | None) -> None:
        real, ours = wanted.double(), value.double()
        off = real - ours
        found = torch.stack((real.square().sum(), ours.square().sum(), off.square().sum(), (real * ours).sum()))
        signal, other, noise, product = found.tolist()
        self.signal, self.other = self.signal + signal, self.other + other
        self.noise, self.product = self.noise + noise, self.product + product
        self.largest = max(self.largest, float(off.abs().max()) if off.numel() else 0.0)
        if theirs is not None:
            more = float((real.cpu() - theirs.double()).square().sum())
            self.runtime_noise = (self.runtime_noise or 0.0) + more

    def sqnr(self, noise: float) -> float:
        return math.inf if noise == 0 else 10 * math.log10(self.signal / noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        lengths = math.sqrt(self.signal * self.other)
        return max(-1.0, min(1.0, self.product / lengths)) if lengths else float(self.signal == self.other)


def _rows(quantized: fx.GraphModule, sums: Mapping[str, _Sums]) -> Iterator[ComparisonRow]:
    worst: dict[fx.Node, float] = {}  # of each node: its own SQNR, or that of the worst tensor behind it
    for node in quantized.graph.nodes:
        before = min((worst[n] for n in node.all_input_nodes if n in worst), default=math.inf)
        held = sums.get(node.name)
        sqnr = before if held is None else held.sqnr(held.noise)
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
            runtime_sqnr=None if held.runtime_noise is None else held.sqnr(held.runtime_noise),
        )


class _Runtime:
    """ONNX Runtime on the exported file, one value after the other."""

    def __init__(self, path: Path) -> None:
        from .backends.onnxrt import Session

        self.session = Session(path, optimize=False)

    def values(self, gm: fx.GraphModule, batch: Inputs, wanted: set[str]) -> _Ahead:
        from .backends.onnx_compare import value_names
        from .backends.onnx_inputs import placeholder_values

        given = [t for t in pytree.tree_leaves(placeholder_values(gm, *batch)) if isinstance(t, Tensor)]
        names = {onnx: ours for ours, onnx in value_names(self.session).items()}
        found = self.session.run_all(given)
        return _Ahead(((names.get(name, name), value) for name, value in found), wanted & set(names.values()))


def _parted(path: Path, quantized: fx.GraphModule, batch: Inputs) -> tuple[NodeDifference, ...]:
    from .backends.onnx_compare import compare_nodes

    found = compare_nodes(path, quantized, batch.args, batch.kwargs)
    return tuple(row for row in found if _departs(row))


def _departs(row: NodeDifference) -> bool:
    """Whether a node's tensors differ by more than rounding on the same inputs."""
    if row.dtype.is_floating_point:
        return row.sqnr < 60
    return row.largest > 1 or row.share > 1e-3


def _db(value: float) -> str:
    return f"{value:.1f} dB"
