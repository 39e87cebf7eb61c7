"""Where a quantized graph parts from the float model: every tensor, in numbers, as a table, a picture, a curve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from torch import fx
from torch.utils import _pytree as pytree

from . import html
from .drawing import View, view
from .errors import FxqError
from .pictures import curves_picture
from .tables import plain_number, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .backends.onnx_compare import NodeDifference

__all__ = ["Comparison", "ComparisonRow"]

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

    subject: ClassVar[str] = "float against quantized"
    series: ClassVar[str] = "quantized, in PyTorch"

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
        shown = html.card(self.subject, [*summary, words, worst, every])
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
        series = {self.series: [row.sqnr for row in self.rows]}
        if self.runtime is not None:
            found = (row.sqnr if row.runtime_sqnr is None else row.runtime_sqnr for row in self.rows)
            series["exported, in ONNX Runtime"] = list(found)
        named = {self.rows.index(row): row.node for row in self.drops(_NAMED)}
        title = f"{self.subject}, {self.samples} samples; named: where most is lost"
        return curves_picture(series, named, title=title)


def _db(value: float) -> str:
    return f"{value:.1f} dB"
