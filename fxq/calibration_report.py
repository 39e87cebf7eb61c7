"""What calibration found: ranges and scales per tensor, what looks odd, and pictures of histograms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from . import html
from .errors import CalibrationError
from .observing import Histogram
from .pictures import GREEN, LINES, new_figure
from .quantizer import Quantizer
from .recipe import Method
from .tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RANDOM_DATA", "CalibrationReport", "CalibrationRow", "report_row"]

RANDOM_DATA: Final = "calibrated on random data: good for measuring speed, useless for accuracy"
_OUTLIER: Final = 100.0
_SATURATING: Final = 0.05
_SHOWN: Final = ("max", "percentile", "entropy", "mse")
_PICTURE_BINS: Final = 256


@dataclass(frozen=True)
class CalibrationRow:
    """What calibration found for one tensor.

    Attributes:
        name: The tensor's name, which is its quantizer's.
        module_path: Where in the model it comes from.
        method: How its range was taken; ``auto (mse)`` where auto chose.
        amin: Smallest value seen, over all channels.
        amax: Largest value seen, likewise.
        scale: The solved scale, one per channel.
        batches: How many batches reached it.
        counted: The share of its elements that went into its histogram; None if it has none.
        marks: What looks odd: ``all-zero``; ``outlier`` (the largest value is over 100 times what 99.9% of the
            values stay below); ``saturating`` (over 5% of the values that are not 0 fall on the last level or
            beyond it); ``3 dead channels`` (zero in every batch looked at, the first and then one of eight;
            of a tensor with a range per channel, in all).
    """

    name: str
    module_path: str
    method: str
    amin: float
    amax: float
    scale: tuple[float, ...]
    batches: int
    counted: float | None = None
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found; prints as a table.

    Attributes:
        rows: One per activation tensor, in graph order.
        batches: How many batches were fed since the last reset.
        warnings: What makes the numbers unfit for use, such as calibration on random data.
    """

    rows: tuple[CalibrationRow, ...]
    batches: int
    _quantizers: Mapping[str, Quantizer] = field(default_factory=dict, repr=False, compare=False)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        headings = {"tensor": False, "module": False, "method": False}
        headings |= {"min": True, "max": True, "scale": True, "marks": False}
        shown = table(headings, map(_cells, self.rows), title=f"calibrated on {self.batches} batches")
        return "\n".join([*(f"WARNING: {warning}" for warning in self.warnings), shown])

    def _repr_html_(self) -> str:
        marked = [row for row in self.rows if row.marks]
        rows = [_cells(row) for row in self.rows]
        columns = ("tensor", "module", "method", "min", "max", "scale", "marks")
        odd = ", ".join(f"{row.name} ({', '.join(row.marks)})" for row in marked)
        words = [html.element("p", f"to look at: {odd}")] if odd else []
        shown = html.folded_table(columns, rows, "tensors", right=(3, 4, 5))
        return html.card(f"{len(rows)} tensors calibrated on {self.batches} batches", [*words, shown])

    def plot(self, tensor: str) -> Figure:
        """A picture of a tensor's histogram, with the range in use and the ends that each method chooses.

        It shows the statistics as they are now, of this tensor alone, also where it shares its scale.

        Args:
            tensor: Its name, as in :attr:`rows`.

        Returns:
            A matplotlib figure, made without pyplot: ``report.plot("relu").savefig("relu.png")``.

        Raises:
            CalibrationError: There is no such tensor, or it has no histogram, or one per channel.
            MissingDependencyError: matplotlib is not installed.
        """
        quantizer = self._quantizers.get(tensor)
        if quantizer is None:
            raise CalibrationError(
                f"no calibrated tensor is called {tensor!r}",
                hint=f"there are {', '.join(row.name for row in self.rows)}",
            )
        observer = quantizer.observer
        if not isinstance(observer, Histogram) or observer.axis is not None:
            raise CalibrationError(
                f"{tensor} has no histogram of the whole tensor",
                node=tensor,
                hint='prepare with QSpec(method="mse") or another method that solves from histograms',
            )
        return _picture(quantizer, observer)


def _cells(row: CalibrationRow) -> tuple[str, ...]:
    scale = f"{row.scale[0]:.6g}"
    if len(row.scale) > 1:
        scale = f"{min(row.scale):.4g} … {max(row.scale):.4g}"
    ends = (f"{row.amin:.6g}", f"{row.amax:.6g}")
    return (row.name, row.module_path, row.method, *ends, scale, ", ".join(row.marks))


def _picture(quantizer: Quantizer, observer: Histogram) -> Figure:
    figure, axes = new_figure(8, 4)
    edges, counts = _bars(observer)
    axes.stairs(counts, edges, fill=True, color="0.8")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    for name, (colour, line) in zip(_SHOWN, LINES, strict=True):
        low, high = (float(end) for end in observer.compute(Method(name), quantizer.spec))
        ends = {high} if observer.symmetric else {low, high}
        if observer.symmetric:
            ends = {max(abs(low), abs(high))}
        for end in ends:
            label = f"{name} {high:.4g}" if end == max(ends) else None
            axes.axvline(end, color=colour, linestyle=line, label=label)
    spec = quantizer.spec.qdtype
    if quantizer.solved:
        scale, zero = float(quantizer.scale), int(quantizer.zero_point)
        start = 0.0 if observer.symmetric else (spec.qmin - zero) * scale
        axes.axvspan(start, (spec.qmax - zero) * scale, color=GREEN, alpha=0.12, label=f"in use, scale {scale:.4g}")
    axes.set_title(f"{quantizer.tensor}: {observer.fraction:.0%} of {int(observer.elements)} values counted")
    axes.set_xlabel("magnitude" if observer.symmetric else "value")
    axes.set_ylabel("values")
    axes.legend()
    return figure


def _bars(observer: Histogram) -> tuple[Any, Any]:
    """Edges and heights of few enough bars to see, as far as there are values: NumPy, [n + 1] and [n]."""
    counts = observer.counts.cpu()
    group = max(1, len(counts) // _PICTURE_BINS // (1 if observer.symmetric else 2))
    counts = counts.reshape(-1, group).sum(dim=1)
    zero = 0 if observer.symmetric else len(counts) // 2
    edges = torch.arange(-zero, len(counts) - zero + 1, dtype=torch.float64) * float(observer.width) * group
    filled = counts.nonzero()
    first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (zero, zero + 1)
    first = min(first, zero)
    return edges[first : last + 1].numpy(), counts[first:last].numpy()


def report_row(quantizer: Quantizer, module_path: str) -> CalibrationRow:
    """One solved activation quantizer's row.

    Args:
        quantizer: Not a weight's.
        module_path: Where in the model its tensor comes from.
    """
    observer = quantizer.observer
    assert observer is not None
    return CalibrationRow(
        name=quantizer.tensor,
        module_path=module_path,
        method=quantizer.solved_by,
        amin=float(observer.amin.min()),
        amax=float(observer.amax.max()),
        scale=tuple(quantizer.scale.reshape(-1).tolist()),
        batches=int(observer.batches),
        counted=observer.fraction if isinstance(observer, Histogram) else None,
        marks=tuple(_marks(quantizer)),
    )


def _marks(quantizer: Quantizer) -> Iterator[str]:
    observer = quantizer.observer
    assert observer is not None
    reach = torch.maximum(observer.amin.abs(), observer.amax.abs())
    dead = int((reach == 0).sum()) if observer.axis is not None else observer.dead_channels
    if not bool(reach.any()):
        yield "all-zero"
    elif dead:
        yield f"{dead} dead channel{'s' if dead > 1 else ''}"
    if isinstance(observer, Histogram):
        low, high = observer.compute(Method("percentile", percentile=99.9), quantizer.spec)
        usual = torch.maximum(low.abs(), high.abs())
        if bool((reach > _OUTLIER * usual).logical_and(usual > 0).any()):
            yield "outlier"
        if observer.axis is None and _share_at_ends(quantizer, observer) > _SATURATING:
            yield "saturating"


def _share_at_ends(quantizer: Quantizer, observer: Histogram) -> float:
    """The share of the values beyond the bin of 0 that fall on an end of the quantized range or outside it."""
    counts = observer.counts.cpu().double()
    zero = 0 if observer.symmetric else len(counts) // 2
    middle = (torch.arange(len(counts), dtype=torch.float64) - zero + 0.5) * float(observer.width.cpu())
    levels: Tensor = middle / float(quantizer.scale.detach())
    dtype, zero_point = quantizer.spec.qdtype, int(quantizer.zero_point)
    last = dtype.qmax - zero_point - 0.5
    ends = levels >= last
    if not observer.symmetric:
        ends |= levels <= dtype.qmin - zero_point + 0.5
    counts[zero] = 0
    ends[zero] = False
    return float(counts[ends].sum() / counts.sum().clamp(min=1))
