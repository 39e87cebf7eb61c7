"""Calibration: feed data to a prepared graph's observers, then solve their scales, as often as wanted."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from .batches import limited, misfit, model_inputs, moved, random_batches
from .calibration_report import CalibrationReport, CalibrationRow, report_row
from .errors import CalibrationError
from .graph import constant, origin
from .nonfinite import NonfiniteProbe
from .observing import NEVER
from .quantizer import Mode, Quantizer, quantized_nodes, quantizers, solve_all
from .ranks import TIMEOUT, Ranks, joined
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

Forward = Callable[[Any, Any], Any]


def calibrate(
    gm: fx.GraphModule,
    batches: Any,
    *,
    max_batches: int | None = None,
    progress: bool = True,
    forward: Forward | None = None,
    reset: bool = True,
    across_ranks: bool = True,
    rank_timeout: float = TIMEOUT,
) -> CalibrationReport:
    """Feed batches to the observers of a prepared graph and solve every scale.

    The graph runs in eval mode under inference mode, on its own device; modes are put back afterwards. Ctrl-C
    leaves what was collected: go on with ``reset=False``, or :func:`solve`.

    Where torch.distributed has several processes, each feeds batches of its own and all get the scales of one
    process that saw everything: exactly for maxima and histograms, and for moving averages as if the ranks'
    batches had come one rank after the other.

    `gm` is a prepared graph, whose quantizers are changed. `batches` is any iterable of batches, or one tensor as the
    only batch; a batch is what :func:`fxq.batches.model_inputs` knows. The options are those of
    :func:`fxq.calibrate`, which says what each is for.

    Returns:
        Ranges and scales per tensor.

    Raises:
        CalibrationError: There was no batch, or one that does not fit the model; NaN or Inf reached a
            quantizer (the message names the batch and the node that made it); or a quantizer saw no data (all
            are named). If one rank has such a problem or dies, all ranks raise.
    """
    with joined(rank_timeout) if across_ranks else nullcontext() as ranks:
        failed: BaseException | None = None
        try:
            _collect(gm, batches, max_batches, forward, progress=progress, reset=reset, ranks=ranks)
        except BaseException as error:
            if ranks is None:
                raise
            failed = error
        if ranks is not None:
            ranks.agree(failed)
            _merge(gm, ranks)
    return solve(gm)


def _collect(
    gm: fx.GraphModule,
    batches: Any,
    max_batches: int | None,
    forward: Forward | None,
    *,
    progress: bool,
    reset: bool,
    ranks: Ranks | None,
) -> None:
    """Feed this process's batches."""
    found = quantizers(gm)
    if not found:
        raise CalibrationError(
            "this graph has no quantizers",
            hint="calibrate what fxq.prepare returned; if that is it, fxq.report says why all of it stays float",
        )
    if max_batches is not None and (not hasattr(max_batches, "__index__") or max_batches < 1):
        raise CalibrationError(f"max_batches is {max_batches!r}", hint="give a whole number from 1 on, or None for all")
    observing = [q for q in found.values() if q.observer is not None]
    later = ranks is not None and ranks.rank > 0
    for observer in (q.observer for q in observing if q.observer is not None):
        if reset or (later and observer.shared):  # what all ranks hold alike counts once: as the first one's
            observer.reset()
    feeder = _Feeder(gm, observing, forward or _plain_forward(gm), plain=forward is None)
    show = progress and (ranks is None or ranks.rank == 0)
    with _collecting(gm, observing):
        fed = feeder.run(limited(batches, max_batches, show=show))
    if fed == 0:
        raise CalibrationError(
            "there was no batch to calibrate on", hint="pass at least one; a generator can be read only once"
        )
    if not any(q.fed for q in observing) and observing:
        raise CalibrationError(
            f"none of {fed} batches reached a quantizer",
            hint="are the batches empty?" if forward is None else "forward(model, batch) is to call the given model",
        )


def _merge(gm: fx.GraphModule, ranks: Ranks) -> None:
    """Put the statistics of all ranks together, in their order, on every rank."""
    observing = {name: q.observer for name, q in quantizers(gm).items() if q.observer is not None}
    own = {f"{name}.{key}": value for name, o in observing.items() for key, value in o.state_dict().items()}
    states = ranks.gather(own)
    for name, observer in observing.items():
        prefix = f"{name}."
        part = copy.deepcopy(observer)
        observer.reset()
        for state in states:
            part.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
            observer.merge(part)
        observer.shared = True


def solve(gm: fx.GraphModule, method: Method | str | None = None) -> CalibrationReport:
    """Solve every scale from what was collected; no data is needed, and it can be repeated.

    Tensors with a shared scale are solved over their merged statistics, weights from their own values.

    Args:
        gm: A calibrated graph; its scales are changed.
        method: How to take the ranges: a name in :data:`fxq.recipe.METHODS` or a Method; None (default) is
            what each tensor's spec says. All but ``max`` and ``moving-average`` need histograms, which a spec
            with any of the others collects.

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
    rows = tuple(report_row(q, _module(places.get(name))) for name, q in observed.items())
    by_name = {q.tensor: q for q in observed.values()}
    return CalibrationReport(rows, max((row.batches for row in rows), default=0), by_name)


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
    plain: bool

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
            part = " and a part of the next one" if recent and recent[-1][0] == fed else ""
            kept = f"fxq keeps the statistics of {fed} batches{part}"
            stop.add_note(f"{kept}: go on with reset=False, or call fxq.solve")
            raise
        self._check(recent)
        return fed

    def _feed(self, index: int, batch: Any) -> None:
        try:
            self.forward(self.gm, batch)
        except Exception as error:
            told = misfit(self.gm, batch, error) if self.plain else None
            (told or error).add_note(f"while fxq calibrated on batch {index}")
            if told is None:
                raise
            raise told from error

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
