"""Calibration: feed data to a prepared graph's observers, then solve their scales, as often as wanted."""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from .batches import limited, model_inputs, moved, random_batches
from .errors import CalibrationError
from .graph import constant, origin
from .nonfinite import NonfiniteProbe
from .observers import NEVER, Histogram
from .quantizer import Mode, Quantizer, quantized_nodes, quantizers, solve_all
from .recipe import Method

__all__ = [
    "CalibrationReport",
    "CalibrationRow",
    "calibrate",
    "model_inputs",
    "random_batches",
    "solve",
]

_CHECK_EVERY: Final = 8  # batches between two looks for NaN; as many batches are kept to find the place
_OUTLIER: Final = 100.0
_WIDTH: Final = 118

Forward = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class CalibrationRow:
    """What calibration found for one tensor.

    Attributes:
        name: The tensor's name, which is its quantizer's.
        module_path: Where in the model it comes from.
        method: How its range was taken.
        amin: Smallest value seen, over all channels.
        amax: Largest value seen, likewise.
        scale: The solved scale, one per channel.
        batches: How many batches reached it.
        counted: The share of its elements that went into its histogram; None if it has none.
        marks: What looks odd: ``all-zero``, ``outlier`` (the largest value is 100 times what 99.9% of the
            values stay below), ``3 dead channels``.
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
    """

    rows: tuple[CalibrationRow, ...]
    batches: int

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(
            title=f"calibrated on {self.batches} batches", box=box.SIMPLE_HEAD, title_justify="left"
        )
        for name in ("tensor", "module", "method"):
            table.add_column(name, overflow="fold")
        for name in ("min", "max", "scale"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("marks", overflow="fold")
        for row in self.rows:
            scale = f"{row.scale[0]:.6g}"
            if len(row.scale) > 1:
                scale = f"{min(row.scale):.4g} … {max(row.scale):.4g}"
            cells = (row.name, row.module_path, row.method, f"{row.amin:.6g}", f"{row.amax:.6g}", scale)
            table.add_row(*cells, ", ".join(row.marks))
        text = io.StringIO()
        Console(file=text, width=_WIDTH, color_system=None).print(table)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def calibrate(
    gm: fx.GraphModule,
    batches: Any,
    *,
    max_batches: int | None = None,
    progress: bool = True,
    forward: Forward | None = None,
    reset: bool = True,
) -> CalibrationReport:
    """Feed batches to the observers of a prepared graph and solve every scale.

    The graph runs in eval mode under inference mode, on its own device; modes are put back afterwards. Ctrl-C
    leaves what was collected: go on with ``reset=False``, or :func:`solve`.

    Args:
        gm: A prepared graph; its quantizers are changed.
        batches: Any iterable of batches, or one tensor as the only batch. A batch is a tensor, a tuple or
            list of positional inputs (elements beyond the model's inputs, such as labels, are dropped), or a
            dict of inputs by name (further keys are dropped). NumPy arrays become tensors.
        max_batches: Stop after so many; None (default) takes all.
        progress: Show a progress bar if stderr is a terminal.
        forward: ``forward(model, batch)`` runs one batch in your own way; the batch is handed over as it
            came.
        reset: Forget earlier statistics first (default); False adds to them.

    Returns:
        Ranges and scales per tensor.

    Raises:
        CalibrationError: There was no batch, or one that does not fit the model; NaN or Inf reached a
            quantizer (the message names the batch and the node that made it); or a quantizer saw no data (all
            are named).
    """
    found = quantizers(gm)
    if not found:
        raise CalibrationError(
            "this graph has no quantizers",
            hint="calibrate what fxq.prepare returned, with a recipe that quantizes",
        )
    if max_batches is not None and max_batches < 1:
        raise CalibrationError(f"max_batches is {max_batches}", hint="give 1 or more, or None for all")
    observing = [q for q in found.values() if q.observer is not None]
    if reset:
        for quantizer in observing:
            quantizer.reset()
    feeder = _Feeder(gm, observing, forward or _plain_forward(gm))
    with _collecting(gm, observing):
        fed = feeder.run(limited(batches, max_batches, show=progress))
    if fed == 0:
        raise CalibrationError(
            "there was no batch to calibrate on", hint="pass at least one; a generator can be read only once"
        )
    return solve(gm)


def solve(gm: fx.GraphModule, method: Method | str | None = None) -> CalibrationReport:
    """Solve every scale from what was collected; no data is needed, and it can be repeated.

    Tensors with a shared scale are solved over their merged statistics, weights from their own values.

    Args:
        gm: A calibrated graph; its scales are changed.
        method: How to take the ranges: a name in :data:`fxq.recipe.METHODS` or a Method; None (default) is
            what each tensor's spec says. Percentile, entropy and MSE need histograms, which a spec with any
            of them collects.

    Raises:
        CalibrationError: A quantizer saw no data, or its statistics cannot answer the method; all are named,
            and no scale is changed.
    """
    places = quantized_nodes(gm)
    found = quantizers(gm)
    observed = {name: q for name, q in found.items() if not q.weight}
    unfed = [name for name, q in observed.items() if not q.fed]
    if unfed:
        named = (f"{name} ({_module(places.get(name)) or 'the model itself'})" for name in unfed)
        raise CalibrationError(
            f"{len(unfed)} quantizers saw no data: {', '.join(named)}",
            hint="feed batches that reach them, or leave these operations float with a recipe rule",
        )
    solve_all(gm, method)
    for name, quantizer in found.items():
        weight = constant(places.get(name))
        if quantizer.weight and weight is not None:
            quantizer.solve_weight(weight)
    rows = tuple(_row(q, _module(places.get(name)), method) for name, q in observed.items())
    return CalibrationReport(rows, max((row.batches for row in rows), default=0))


def _module(node: fx.Node | None) -> str:
    return "" if node is None else origin(node).module_path


def _plain_forward(gm: fx.GraphModule) -> Forward:
    """Run a batch of any form that :func:`fxq.batches.model_inputs` knows, on the model's device."""
    quantizing = {id(b) for q in quantizers(gm).values() for b in q.buffers()}
    tensors = itertools.chain(gm.parameters(), (b for b in gm.buffers() if id(b) not in quantizing))
    first = next(tensors, None)
    device = None if first is None else first.device

    def forward(model: Any, batch: Any) -> Any:
        args, kwargs = moved(model_inputs(gm, batch), device)
        return model(*args, **kwargs)

    return forward


@contextmanager
def _collecting(gm: fx.GraphModule, observing: Iterable[Quantizer]) -> Iterator[None]:
    """Eval mode and inference mode, with only `observing` at work; everything is put back."""
    trained = [(module, module.training) for module in gm.modules()]
    modes = [(quantizer, quantizer.mode) for quantizer in quantizers(gm).values()]
    for quantizer, _ in modes:
        quantizer.mode = Mode.OFF
    for quantizer in observing:
        quantizer.mode = Mode.OBSERVE
    gm.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in trained:
            module.training = training
        for quantizer, mode in modes:
            quantizer.mode = mode


@dataclass
class _Feeder:
    """Runs batches through a graph and looks, every few of them, whether NaN or Inf came up."""

    gm: fx.GraphModule
    observing: Sequence[Quantizer]
    forward: Forward

    def run(self, batches: Iterator[Any]) -> int:
        """Feed all batches; gives how many there were."""
        recent: deque[tuple[int, Any]] = deque(maxlen=_CHECK_EVERY)
        fed = 0
        try:
            for batch in batches:
                recent.append((fed, batch))
                self._feed(fed, batch)
                fed += 1
                if len(recent) == _CHECK_EVERY:
                    self._check(recent)
        except KeyboardInterrupt as stop:
            stop.add_note(
                f"fxq keeps the statistics of {fed} batches: go on with reset=False, or call fxq.solve"
            )
            raise
        self._check(recent)
        return fed

    def _feed(self, index: int, batch: Any) -> None:
        try:
            self.forward(self.gm, batch)
        except Exception as error:
            error.add_note(f"while fxq calibrated on batch {index}")
            raise

    def _check(self, recent: deque[tuple[int, Any]]) -> None:
        """Raise if any observer saw NaN or Inf; the one read from the device in so many batches."""
        observers = [q.observer for q in self.observing if q.observer is not None and q.observer.fed]
        for observer in observers:
            observer.flush()
        flags = [o.bad for o in observers]
        if not flags or not bool(torch.stack([flag.to(flags[0].device) for flag in flags]).lt(NEVER).any()):
            recent.clear()
            return
        for quantizer in self.observing:
            quantizer.mode = Mode.OFF
        for index, batch in recent:
            probe = NonfiniteProbe(self.gm)
            self.forward(probe, batch)
            probe.check(f"batch {index}: ")
        names = [q.tensor for q in self.observing if q.observer is not None and int(q.observer.bad) < NEVER]
        raise CalibrationError(
            f"NaN or Inf reached the quantizers of {', '.join(names)}",
            hint="they did not come again when the last batches were run again: is the model random?",
        )


def _row(quantizer: Quantizer, module_path: str, method: Method | str | None) -> CalibrationRow:
    observer = quantizer.observer
    assert observer is not None
    chosen = method if method is not None else quantizer.spec.calibration
    return CalibrationRow(
        name=quantizer.tensor,
        module_path=module_path,
        method=chosen if isinstance(chosen, str) else chosen.name,
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
    dead = int((reach == 0).sum())
    if dead == reach.numel():
        yield "all-zero"
    elif dead:
        yield f"{dead} dead channels"
    if isinstance(observer, Histogram):
        low, high = observer.compute(Method("percentile", percentile=99.9), quantizer.spec)
        usual = torch.maximum(low.abs(), high.abs())
        if bool((reach > _OUTLIER * usual).logical_and(usual > 0).any()):
            yield "outlier"
