"""The user's door to calibration: from data to scales and the biases' corrections, as often as wanted."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from . import calibration
from .batches import each_batch, model_inputs, moved, watched
from .bias_correction import Sampler, correct_biases, store_corrections
from .calibration_report import CalibrationReport
from .errors import CalibrationError
from .graph import device_of, remember, state
from .quantizer import quantizers
from .ranks import TIMEOUT, joined, on_first
from .recipe import Method
from .reports import warnings_of

__all__ = ["calibrate", "solve"]


def calibrate(
    prepared: fx.GraphModule,
    batches: Iterable[Any] | torch.Tensor | None,
    *,
    max_batches: int | None = None,
    progress: bool = True,
    forward: calibration.Forward | None = None,
    reset: bool = True,
    bias_correction: bool = True,
    performance_only: bool = False,
    across_ranks: bool = True,
    rank_timeout: float = TIMEOUT,
) -> CalibrationReport:
    """Feed data to the observers of `prepared` and solve their scales.

    Ctrl-C keeps what was collected: go on with ``reset=False``, or :func:`solve`. Where torch.distributed has
    several processes, each feeds batches of its own and all get the scales of one that saw everything.

    Args:
        prepared: What :func:`prepare` returned; its observers are changed.
        batches: A DataLoader or any iterable of inputs: a tensor, a tuple of inputs (further elements, such
            as labels, are dropped), or a dict by input name. About 500 images in all are usual (R34).
        max_batches: Stop after so many.
        progress: Show a progress bar if stderr is a terminal.
        forward: ``forward(model, batch)`` runs one batch in your own way; the batch is handed over as it
            came.
        reset: Forget earlier statistics first (default); False adds to them.
        bias_correction: Also take out the mean error that quantization leaves in each channel
            (:mod:`fxq.bias_correction`); costs two more forwards over a part of the data. A graph that is to
            be trained is left alone: training moves its biases itself.
        performance_only: With ``batches=None``: calibrate on random data, good for measuring speed and
            nothing else. The report and the exported file say so.
        across_ranks: Merge the statistics of all processes of torch.distributed's default group, where there is
            one; every rank has to call.
        rank_timeout: Seconds that ranks wait for each other.

    Returns:
        Ranges and scales per tensor.

    Raises:
        CalibrationError: No data, NaN or Inf, or a quantizer that no data reached; the message names the
            place. If one rank has such a problem or dies, all ranks raise.
    """
    from .backends.onnx_profiles import SeenShapes

    if (batches is None) != performance_only:
        raise CalibrationError(
            "performance_only goes with batches=None, and only then",
            hint="pass real data, or batches=None, performance_only=True to measure speed",
        )
    held = state(prepared)
    if "quantized" in held.properties:
        raise CalibrationError("this graph is converted already", hint="calibrate what fxq.prepare returned")
    if batches is None:
        batches = calibration.random_batches(held.example_args, held.example_kwargs)
    sampler = Sampler(prepared, [])
    wanted = bias_correction and not performance_only and not held.provenance.get("trains")
    shapes = SeenShapes(prepared)
    with watched(prepared, lambda inputs: shapes.see(*inputs), *([sampler.keep] if wanted else [])):
        found = calibration.calibrate(
            prepared,
            batches,
            max_batches=max_batches,
            progress=progress,
            forward=forward,
            reset=reset,
            across_ranks=across_ranks,
            rank_timeout=rank_timeout,
        )
    with joined(rank_timeout) if across_ranks and wanted else nullcontext() as ranks:
        corrections = on_first(ranks, lambda: correct_biases(prepared, sampler.kept) if sampler.kept else {})
    store_corrections(prepared, corrections)
    facts = {"batches": found.batches, "performance_only": performance_only}
    remember(prepared, calibration={**facts, "input_shapes": shapes.summary()})
    return replace(found, warnings=warnings_of(prepared))


def solve(
    prepared: fx.GraphModule, method: Method | str | None = None, *, batches: Iterable[Any] | None = None
) -> CalibrationReport:
    """Solve every scale again from what :func:`calibrate` collected; no data is needed.

    Args:
        prepared: A calibrated graph; its scales are changed.
        method: ``max``, ``moving-average``, ``percentile``, ``entropy``, ``mse`` or a Method, for all
            activations; ``auto`` takes for each tensor the one of these with the least squared quantization
            error over what was collected. None (default) is what each tensor's recipe rule says. ``max`` can
            always be solved, ``moving-average`` where it was prepared for, the others where any of them was.
            Weights keep to their recipe rule.
        batches: A few hundred samples to measure the bias correction with. Corrections that were measured under
            other scales do not fit any more: without this they are dropped.

    Returns:
        Ranges and scales per tensor.

    Raises:
        CalibrationError: A quantizer saw no data, or its statistics cannot answer the method; all are named, and
            no scale is changed.
    """
    before = {name: q.scale.cpu() for name, q in quantizers(prepared).items()}
    found = calibration.solve(prepared, method)
    same = all(torch.equal(before[name], q.scale.cpu()) for name, q in quantizers(prepared).items())
    if batches is not None:
        inputs = [moved(model_inputs(prepared, batch), device_of(prepared)) for batch in each_batch(batches)]
        store_corrections(prepared, correct_biases(prepared, inputs))
    elif not same:
        store_corrections(prepared, {})
    earlier = state(prepared).provenance.get("calibration", {})
    remember(prepared, calibration={"performance_only": False, **earlier, "batches": found.batches})
    return replace(found, warnings=warnings_of(prepared))
