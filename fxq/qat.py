"""Quantization-aware training: what a training loop wants of a graph that :func:`fxq.prepare_qat` made.

The graph is an ordinary module: ``train()``, ``eval()``, optimizers, autocast, ``torch.compile``,
DistributedDataParallel, ``state_dict`` and ``deepcopy`` work as with any other. What is here are the few things that
other modules do not have: BatchNorm that can be frozen, ranges that can stop moving, scales as parameters.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from .batch_norm import TrainedBatchNorm, batch_norms
from .errors import CalibrationError, RecipeError
from .fake_quantizers import FakeQuantizer
from .graph import origin
from .optional import require
from .quantizer import Mode, quantized_nodes, quantizers
from .scale_policy import POLICIES, ScalePolicy

__all__ = [
    "POLICIES",
    "FakeQuantizer",
    "ScalePolicy",
    "Schedule",
    "TrainedBatchNorm",
    "disable_observers",
    "disable_quantizers",
    "enable_observers",
    "enable_quantizers",
    "freeze_bn",
    "lightning_callback",
    "load_scales",
    "parameter_groups",
    "schedule",
    "unfreeze_bn",
]


def freeze_bn(gm: nn.Module, pattern: str = "*") -> None:
    """Have BatchNorm compute with its running statistics in training too, and leave them as they are.

    From then on training computes what the deployed graph computes, folded BatchNorm included. Its weight and bias are
    trained on. Freezing what is frozen changes nothing.

    Args:
        gm: What :func:`fxq.prepare_qat` returned; its BatchNorms are changed.
        pattern: A glob over the BatchNorms' paths.

    Raises:
        RecipeError: There are BatchNorms, and the pattern matches none of them.
    """
    for norm in _norms(gm, pattern):
        norm.frozen = True


def unfreeze_bn(gm: nn.Module, pattern: str = "*") -> None:
    """Have BatchNorm compute with the statistics of each batch again; see :func:`freeze_bn`."""
    for norm in _norms(gm, pattern):
        norm.frozen = False


def _norms(gm: nn.Module, pattern: str) -> list[TrainedBatchNorm]:
    found = batch_norms(gm)
    chosen = [norm for path, norm in found.items() if fnmatch.fnmatchcase(path, pattern)]
    if found and not chosen:
        raise RecipeError(f"no BatchNorm matches {pattern!r}", hint=f"there are {', '.join(found)}")
    return chosen


def _fake_quantizers(gm: nn.Module, pattern: str) -> list[FakeQuantizer]:
    """The fake quantizers whose name, or whose tensor's module path, matches the glob."""
    found = {name: q for name, q in quantizers(gm).items() if isinstance(q, FakeQuantizer)}
    if not found:
        raise RecipeError("this graph has no fake quantizers", hint="make it with fxq.prepare_qat")
    places = quantized_nodes(gm) if isinstance(gm, fx.GraphModule) else {}
    chosen = []
    for name, quantizer in found.items():
        path = origin(places[name]).module_path if name in places else ""
        parts = path.split(".") if path else []
        names = [name, quantizer.tensor, *(".".join(parts[:n]) for n in range(1, len(parts) + 1))]
        if any(fnmatch.fnmatchcase(candidate, pattern) for candidate in names):
            chosen.append(quantizer)
    if not chosen:
        raise RecipeError(f"no quantizer matches {pattern!r}", hint=f"there are {', '.join(found)}")
    return chosen


@contextmanager
def _held(gm: nn.Module, pattern: str, attribute: Literal["observing", "mode"], *, value: Any) -> Iterator[None]:
    chosen = _fake_quantizers(gm, pattern)
    before = [getattr(q, attribute) for q in chosen]
    for quantizer in chosen:
        setattr(quantizer, attribute, value)
    try:
        yield
    finally:
        for quantizer, old in zip(chosen, before, strict=True):
            setattr(quantizer, attribute, old)


@contextmanager
def disable_observers(gm: nn.Module, pattern: str = "*") -> Iterator[None]:
    """Hold the scales that move by themselves (``moving-average`` and ``max``) for the length of a ``with`` block.

    Learned scales are the optimizer's matter and go on.

    Args:
        gm: What :func:`fxq.prepare_qat` returned.
        pattern: A glob over the quantizers' names and over the module paths of what they quantize.

    Raises:
        RecipeError: The pattern matches no quantizer.
    """
    with _held(gm, pattern, "observing", value=False):
        yield


@contextmanager
def enable_observers(gm: nn.Module, pattern: str = "*") -> Iterator[None]:
    """Let scales move for the length of a ``with`` block; see :func:`disable_observers`."""
    with _held(gm, pattern, "observing", value=True):
        yield


@contextmanager
def disable_quantizers(gm: nn.Module, pattern: str = "*") -> Iterator[None]:
    """Compute with float tensors for the length of a ``with`` block; ranges are still observed in training.

    Args:
        gm: What :func:`fxq.prepare_qat` returned.
        pattern: A glob over the quantizers' names and over the module paths of what they quantize.

    Raises:
        RecipeError: The pattern matches no quantizer.
    """
    with _held(gm, pattern, "mode", value=Mode.OFF):
        yield


@contextmanager
def enable_quantizers(gm: nn.Module, pattern: str = "*") -> Iterator[None]:
    """Compute with quantized tensors for the length of a ``with`` block; see :func:`disable_quantizers`."""
    with _held(gm, pattern, "mode", value=Mode.QUANTIZE):
        yield


@dataclass(frozen=True)
class Schedule:
    """What of a graph trains when; :func:`schedule` makes one.

    Called with a step or epoch number it puts the graph into the state that belongs there, whatever came before, so
    going on after an interruption needs nothing but the number. It keeps no count of its own.

    Attributes:
        gm: The graph.
        quantize_from: The first number that computes with quantized tensors.
        observe_until: The first number that holds scales which move by themselves; None for never.
        freeze_bn_at: The first number with frozen BatchNorm; None for never.
    """

    gm: nn.Module
    quantize_from: int = 0
    observe_until: int | None = None
    freeze_bn_at: int | None = None

    def __call__(self, number: int) -> None:
        """Put the graph into the state of this step or epoch, counted from 0."""
        observing = self.observe_until is None or number < self.observe_until
        for quantizer in _fake_quantizers(self.gm, "*"):
            quantizer.observing = observing
            quantizer.mode = Mode.QUANTIZE if number >= self.quantize_from else Mode.OFF
        for norm in batch_norms(self.gm).values():
            norm.frozen = self.freeze_bn_at is not None and number >= self.freeze_bn_at


def schedule(
    gm: nn.Module,
    *,
    observe_until: int | None = None,
    freeze_bn_at: int | None = None,
    quantize_from: int = 0,
) -> Schedule:
    """A schedule over steps or epochs, whichever number it is called with.

    Args:
        gm: What :func:`fxq.prepare_qat` returned.
        observe_until: From this number on, scales that move by themselves are held; None (default) lets them move.
        freeze_bn_at: From this number on, BatchNorm is frozen (:func:`freeze_bn`); None (default) never freezes it.
        quantize_from: Before this number, tensors stay float while their ranges are observed; 0 by default.

    Returns:
        Call it with the number before each step or epoch.

    Raises:
        RecipeError: A number is negative, or the graph has no fake quantizers.
    """
    numbers = {"observe_until": observe_until, "freeze_bn_at": freeze_bn_at, "quantize_from": quantize_from}
    for name, number in numbers.items():
        if number is not None and number < 0:
            raise RecipeError(f"{name} is {number}", hint="count steps or epochs from 0")
    _fake_quantizers(gm, "*")
    return Schedule(gm, quantize_from, observe_until, freeze_bn_at)


def parameter_groups(
    gm: nn.Module, *, lr: float, scale_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: learned scales on their own, without weight decay.

    Args:
        gm: What :func:`fxq.prepare_qat` returned, or a module that holds it.
        lr: Learning rate of everything else.
        scale_lr: Learning rate of learned scales; None (default) takes `lr`.
        weight_decay: Weight decay of everything else.

    Returns:
        One or two groups with ``params``, ``lr`` and ``weight_decay``; parameters that need no gradient are left out.
    """
    owned = {id(m.scale): m.scale for m in gm.modules() if isinstance(m, FakeQuantizer) and m.learns}
    scales = [p for p in owned.values() if p.requires_grad]
    others = [p for p in gm.parameters() if p.requires_grad and id(p) not in owned]
    rate = lr if scale_lr is None else scale_lr
    groups = [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": scales, "lr": rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def load_scales(gm: nn.Module, calibrated: nn.Module | Mapping[str, Any]) -> None:
    """Start training from the scales that post-training quantization found.

    Args:
        gm: What :func:`fxq.prepare_qat` returned; its scales are changed.
        calibrated: What :func:`fxq.calibrate` worked on, or its ``state_dict()``, from the same model and recipe.

    Raises:
        CalibrationError: Quantizers find no scale in it; all are named, and nothing is changed.
    """
    stored = calibrated.state_dict() if isinstance(calibrated, nn.Module) else calibrated
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in quantizers(gm):
        key = f"quantizers.{name}"
        scale, zero_point = stored.get(f"{key}.scale"), stored.get(f"{key}.zero_point")
        if scale is not None and zero_point is not None and scale.numel() and not bool(scale.isnan().any()):
            found[name] = scale, zero_point
    missing = [name for name in quantizers(gm) if name not in found]
    if missing:
        raise CalibrationError(
            f"{len(missing)} quantizers find no scale: {', '.join(missing)}",
            hint="calibrate what fxq.prepare gives for the same model, recipe and target",
        )
    for name, (scale, zero_point) in found.items():
        quantizers(gm)[name].set_parameters(scale, zero_point)


def lightning_callback(plan: Schedule, every: Literal["epoch", "step"] = "epoch") -> Any:
    """A callback for Lightning's Trainer that keeps to a schedule.

    Args:
        plan: What :func:`schedule` returned.
        every: Whether the schedule counts epochs (default) or optimizer steps.

    Returns:
        An instance of ``lightning.pytorch.Callback``.

    Raises:
        RecipeError: `every` is neither.
        MissingDependencyError: Lightning is not installed.
    """
    if every not in ("epoch", "step"):
        raise RecipeError(f"every is {every!r}", hint='use "epoch" or "step"')
    base: Any = require("lightning.pytorch", purpose="the QAT callback", package="lightning").Callback

    class ScheduleCallback(base):  # type: ignore[misc]
        """Calls a schedule before each epoch or step."""

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if every == "epoch":
                plan(trainer.current_epoch)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if every == "step":
                plan(trainer.global_step)

    return ScheduleCallback()
