"""Which tensor hurts: each quantizer alone, and all up to it, by what they do to the model's output.

The graph is walked once with two sets of values, float and quantized so far. At each quantizer the rest of the
graph runs from there on: once with this quantizer alone on float values, once with all up to it. So n
quantizers cost about n forward passes, not 2 n.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from . import html
from .batches import Inputs, model_inputs, moved
from .errors import CalibrationError, FxqError
from .graph import constant, device_of, origin
from .pictures import Bar, bars_picture
from .quantizer import quantizers
from .sqnr import decibels
from .stepping import Stepper, quantizing, require_solved
from .tables import plain_number, table
from .verify import quantizer_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Sensitivity", "SensitivityRow", "sensitivity"]

_SHOWN: Final = 20
_HEADINGS: Final = {"tensor": False, "of": False, "module": False, "alone dB": True, "all up to it dB": True}


@dataclass(frozen=True)
class SensitivityRow:
    """What one quantizer does to the model's output.

    Attributes:
        tensor: The tensor that it quantizes.
        weight: Whether that is a weight.
        module_path: Where in the model the tensor comes from, or is read if it is a weight.
        source: The user's ``file:line``.
        alone: SQNR of the output with this quantizer alone, dB; infinite where the output does not change.
        cumulative: SQNR of the output with this and all quantizers before it in graph order, dB.
    """

    tensor: str
    weight: bool
    module_path: str
    source: str | None
    alone: float
    cumulative: float


@dataclass(frozen=True)
class Sensitivity:
    """What each quantizer does to the model's output; prints as a table, worst first.

    Attributes:
        rows: One per quantizer, in graph order.
        samples: How many samples were used.
    """

    rows: tuple[SensitivityRow, ...]
    samples: int

    def worst(self, count: int | None = None) -> tuple[SensitivityRow, ...]:
        """Rows by the harm that the quantizer does alone, worst first; all of them by default."""
        return tuple(sorted(self.rows, key=lambda row: row.alone))[:count]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON; infinities as strings."""
        plain = {"samples": self.samples, "rows": [dataclasses.asdict(row) for row in self.rows]}
        found: dict[str, Any] = pytree.tree_map(plain_number, plain)
        return found

    @property
    def _title(self) -> str:
        return f"{len(self.rows)} quantizers on {self.samples} samples: SQNR of the output, worst first"

    def __str__(self) -> str:
        shown = self.worst(_SHOWN)
        more = len(self.rows) - len(shown)
        return table(_HEADINGS, map(_cells, shown), title=self._title) + (
            f"\n… and {more} more in .rows" if more else ""
        )

    def _repr_html_(self) -> str:
        rows = [_cells(row) for row in self.worst()]
        return html.card(self._title, [html.folded_table(list(_HEADINGS), rows, "quantizers", right=(3, 4))])

    def plot(self, count: int = _SHOWN) -> Figure:
        """The worst quantizers, worst first.

        Args:
            count: How many.

        Returns:
            A matplotlib figure, made without pyplot.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        bars = [Bar(row.tensor, row.weight, row.alone, row.cumulative) for row in self.worst(count)]
        return bars_picture(bars, title=f"the {len(bars)} quantizers that hurt most, of {len(self.rows)}")


def _cells(row: SensitivityRow) -> tuple[str, ...]:
    of = "weight" if row.weight else "activation"
    return row.tensor, of, row.module_path, f"{row.alone:.1f}", f"{row.cumulative:.1f}"


def sensitivity(prepared: fx.GraphModule, inputs: Any, *, progress: bool = True) -> Sensitivity:
    """Measure what each quantizer of a calibrated graph does to the output, alone and with all before it.

    Biases are taken as the model has them: corrections that :func:`fxq.calibrate` measured count for all
    quantizers together and are left out.

    Args:
        prepared: A calibrated graph with quantizers; not changed.
        inputs: One batch of a few dozen samples: a tensor, a tuple of inputs, or a dict by name. Or a list of
            batches, whose results are added up.
        progress: Show a progress bar if stderr is a terminal.

    Returns:
        A row for each quantizer, in graph order.

    Raises:
        CalibrationError: A quantizer has no scale yet, or there is no input.
        FxqError: The graph has no quantizers, or returns no floating-point tensor.
    """
    _require_quantizers(prepared)
    require_solved(prepared)
    several = inputs if isinstance(inputs, list) else [inputs]
    batches = [moved(model_inputs(prepared, batch), device_of(prepared)) for batch in several]
    if not batches:
        raise CalibrationError("there is no input to measure on", hint="pass one batch or more")
    signal, noises = 0.0, dict[str, tuple[float, float]]()
    with torch.no_grad(), quantizing(prepared):
        for batch in batches:
            power, found = _measure(prepared, batch, progress=progress)
            signal += power
            noises = {name: _added(noises.get(name, (0.0, 0.0)), noise) for name, noise in found.items()}
    samples = sum(len(t) for b in batches if (t := _first_tensor(tuple(b))) is not None and t.dim())
    return Sensitivity(tuple(_rows(prepared, signal, noises)), samples)


def _added(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] + other[0], one[1] + other[1]


def _first_tensor(value: Any) -> Tensor | None:
    return next((leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)), None)


def _require_quantizers(prepared: fx.GraphModule) -> None:
    if not quantizers(prepared):
        raise FxqError(
            "this graph has no quantizers to switch",
            hint="measure what fxq.prepare returned, calibrated, before fxq.convert",
        )


def _measure(gm: fx.GraphModule, batch: Inputs, *, progress: bool) -> tuple[float, dict[str, tuple[float, float]]]:
    """Power of the float output, and for each quantizer the noise power that it adds alone and cumulatively."""
    from tqdm import tqdm

    plain, rounding = Stepper(gm, lambda _: False), Stepper(gm)
    wanted = _leaves(plain.finish(plain.begin(batch)))
    found: dict[str, tuple[float, float]] = {}
    real, rounded = plain.begin(batch), plain.begin(batch)
    calls = {node: module for node in plain.nodes if (module := quantizer_of(node)) is not None}
    bar = tqdm(total=len(calls), desc="sensitivity", disable=not (progress and sys.stderr.isatty()))
    quantized = rounding.steps(rounded)
    with bar:
        for index, (node, _) in enumerate(plain.steps(real)):
            next(quantized)
            if node not in calls:
                continue
            own = {**real, node: rounding.value(node, real)}
            alone = _noise(wanted, _leaves(plain.finish(own, index + 1)))
            cumulative = _noise(wanted, _leaves(plain.finish(rounded, index + 1)))
            name = calls[node].tensor
            found[name] = _added(found.get(name, (0.0, 0.0)), (alone, cumulative))
            bar.update()
    return float(sum(float(t.square().sum()) for t in wanted)), found


def _leaves(output: Any) -> Sequence[Tensor]:
    found = [t.double() for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    if not found:
        raise FxqError("the graph returns no floating-point tensor to measure")
    return found


def _noise(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    return sum(float((w - g).square().sum()) for w, g in zip(wanted, got, strict=True))


def _rows(gm: fx.GraphModule, signal: float, noises: Mapping[str, tuple[float, float]]) -> Iterator[SensitivityRow]:
    for node in gm.graph.nodes:
        module = quantizer_of(node)
        if module is None or module.tensor not in noises:
            continue
        weight = constant(node.args[0]) is not None
        where = origin(next(iter(node.users)) if weight else node.args[0])
        alone, cumulative = (decibels(signal, noise) for noise in noises[module.tensor])
        yield SensitivityRow(module.tensor, weight, where.module_path, where.source, alone, cumulative)
