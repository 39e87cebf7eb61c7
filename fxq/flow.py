"""The user's door: from a model to a quantized graph, each function the list of its steps.

:mod:`fxq.deployment` goes on from there to files and engines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from torch import fx, nn

from .arguments import example_arguments
from .batches import each_batch, model_inputs, moved
from .errors import CalibrationError, ConvertError, RecipeError, TraceError
from .graph import device_of, remember, state
from .manager import PassManager, Pipeline
from .passes import CONVERT, PREPARE, PREPARE_QAT, FuseBatchNorm, RestoreTraining
from .recipe import Recipe
from .scale_policy import POLICIES, ScalePolicy
from .scales import calibrate
from .target import Target
from .tracing import DynamicShapes, Leaf, trace_model

__all__ = [
    "convert",
    "prepare",
    "prepare_qat",
    "quantize",
    "trace",
]


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    target: str | Path | Target = "tensorrt",
    recipe: Recipe | None = None,
    leaf_modules: Sequence[Leaf] = (),
    concrete_args: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "any",
    on_untraceable: Literal["raise", "leaf"] = "raise",
) -> fx.GraphModule:
    """Trace a model to a graph whose nodes know their shape, module path and source line.

    Args:
        model: Any module that torch.fx can follow; it is copied, in eval mode, and not changed.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of inputs by name.
        example_kwargs: More inputs by name.
        target: ``"tensorrt"``, ``"tensorrt-fast"``, ``"onnxruntime"``, a target file, or a Target.
        recipe: What to quantize beyond the target's defaults.
        leaf_modules: Module types or paths that stay whole, and functions marked with ``torch.fx.wrap``, or their
            names: others are traced through where their decisions depend on shapes alone.
        concrete_args: Parameters of forward fixed to a value.
        dynamic_shapes: Which dimensions of the inputs stay expressions when the model reads their size: ``"any"``
            (default), ``"batch"``, None, or a dict as for :func:`export`. The others are read as plain numbers.
            What the model decides by a size holds for the graph, and a call that violates it is a GuardError.
        on_untraceable: ``"leaf"`` keeps the smallest module whole, and float, in whose forward tracing stops, with
            a note; ``"raise"`` (default) makes that an error.

    Raises:
        TraceError: Tracing stopped; the message names the user's line and the ways out.
    """
    if recipe is not None and not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe is a {type(recipe).__name__}", hint="write fxq.Recipe([fxq.Rule(...), ...])")
    if not isinstance(model, nn.Module):
        raise TraceError(f"cannot trace a {type(model).__name__}", hint="give an nn.Module; wrap a function in one")
    args, kwargs = example_arguments(example_inputs, example_kwargs)
    return trace_model(
        model,
        args,
        kwargs,
        target=Target.load(target),
        recipe=recipe or Recipe(),
        leaf_modules=leaf_modules,
        concrete_args=concrete_args,
        dynamic_shapes=dynamic_shapes,
        on_untraceable=on_untraceable,
    )


class TraceOptions(TypedDict, total=False):
    """What :func:`prepare` and :func:`prepare_qat` hand on to :func:`trace`, which says what each is for."""

    example_kwargs: Mapping[str, Any] | None
    leaf_modules: Sequence[Leaf]
    concrete_args: Mapping[str, Any] | None
    dynamic_shapes: DynamicShapes
    on_untraceable: Literal["raise", "leaf"]


def prepare(
    model: nn.Module,
    example_inputs: Any,
    *,
    recipe: Recipe | None = None,
    target: str | Path | Target = "tensorrt",
    pipeline: Pipeline | None = None,
    **tracing: Unpack[TraceOptions],
) -> fx.GraphModule:
    """Trace, normalize, fuse, and put observers where the target's rules want quantizers.

    Args:
        model: The float model; not changed. On a GPU, the result is there too.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of inputs by name.
        recipe: Rules that change the target's placement; None for none.
        target: ``"tensorrt"`` (default), ``"tensorrt-fast"``, ``"onnxruntime"``, a target file, or a Target.
        pipeline: What to run instead of :data:`fxq.passes.PREPARE`.
        tracing: What else :func:`trace` takes: ``example_kwargs``, ``leaf_modules``, ``concrete_args``,
            ``dynamic_shapes`` and ``on_untraceable``.

    Returns:
        A GraphModule with observers, ready for :func:`calibrate`.

    Raises:
        TraceError: Tracing stopped.
        RecipeError: A rule matches nothing or asks for what cannot be.
    """
    gm = trace(model, example_inputs, target=target, recipe=recipe, **tracing)
    chosen = pipeline or PREPARE
    gm = PassManager().run(chosen, gm, inplace=True)
    remember(gm, prepare=str(chosen))
    return gm


def prepare_qat(
    model: nn.Module,
    example_inputs: Any,
    *,
    recipe: Recipe | None = None,
    target: str | Path | Target = "tensorrt",
    scales: str | ScalePolicy = "fixed",
    batch_norm: Literal["train", "fold"] = "train",
    pipeline: Pipeline | None = None,
    **tracing: Unpack[TraceOptions],
) -> fx.GraphModule:
    """:func:`prepare` for training: fake quantizers in the same places, under the same names and keys.

    Args:
        model: The float model; not changed. Parameters that need no gradient in it need none in the result.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of inputs by name.
        recipe: Rules that change the target's placement; None for none.
        target: ``"tensorrt"`` (default), ``"tensorrt-fast"``, ``"onnxruntime"``, a target file, or a Target.
        scales: What moves the scales: a name in :data:`fxq.qat.POLICIES` or a :class:`fxq.qat.ScalePolicy`.
            ``"fixed"`` (default) needs :func:`calibrate` or :func:`fxq.qat.load_scales` before training; the others
            begin by themselves, and better after either.
        batch_norm: ``"train"`` (default) keeps BatchNorm trainable while weights are quantized as folded;
            ``"fold"`` folds it first, as :func:`prepare` does.
        pipeline: What to run instead of :data:`fxq.passes.PREPARE_QAT`; `scales` and `batch_norm` are its matter then.
        tracing: What else :func:`trace` takes: ``example_kwargs``, ``leaf_modules``, ``concrete_args``,
            ``dynamic_shapes`` and ``on_untraceable``.

    Returns:
        A GraphModule in training mode. :func:`calibrate`, :func:`convert` and :func:`export` take it.

    Raises:
        TraceError: Tracing stopped.
        RecipeError: A rule matches nothing or asks for what cannot be; or there is no such scale policy.
    """
    if isinstance(scales, str) and scales not in POLICIES:
        raise RecipeError(f"no scale policy is called {scales!r}", hint=f"use one of {', '.join(POLICIES)}")
    if batch_norm not in ("train", "fold"):
        raise RecipeError(f"batch_norm is {batch_norm!r}", hint='use "train" or "fold"')
    gm = trace(model, example_inputs, target=target, recipe=recipe, **tracing)
    policy = POLICIES[scales] if isinstance(scales, str) else scales
    chosen = pipeline or PREPARE_QAT.replace("restore-training", RestoreTraining(policy))
    if batch_norm == "fold" and pipeline is None:
        chosen = chosen.before("set-aside-training", FuseBatchNorm())
    gm = PassManager().run(chosen, gm, inplace=True)
    wanted = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point():
            parameter.requires_grad_(wanted.get(name, True))
    remember(gm, prepare=str(chosen), trains=True)
    return gm.train()


def convert(prepared: fx.GraphModule, pipeline: Pipeline | None = None) -> fx.GraphModule:
    """Make quantization explicit: integer weights, and quantize and dequantize operations with constant
    scales.

    Args:
        prepared: A calibrated graph; it stays usable.
        pipeline: What to run instead of :data:`fxq.passes.CONVERT`.

    Returns:
        A new GraphModule that runs in PyTorch as the engine will compute.

    Raises:
        ConvertError: The graph is converted already.
        CalibrationError: Quantizers have no scale yet; all of them are named.
    """
    if "quantized" in state(prepared).properties:
        raise ConvertError("this graph is converted already", hint="export it, or convert what fxq.prepare returned")
    chosen = pipeline or CONVERT
    gm = PassManager().run(chosen, prepared)
    remember(gm, convert=str(chosen))
    return gm


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    recipe: Recipe | None = None,
    target: str | Path | Target = "tensorrt",
    max_batches: int | None = None,
    progress: bool = True,
    **tracing: Unpack[TraceOptions],
) -> fx.GraphModule:
    """:func:`prepare`, :func:`calibrate` and :func:`convert` in one call.

    Args:
        model: The float model; not changed.
        batches: Calibration data; its first batch serves as the example too.
        recipe: Rules that change the target's placement.
        target: ``"tensorrt"``, ``"tensorrt-fast"``, ``"onnxruntime"``, a target file, or a Target.
        max_batches: Stop calibration after so many.
        progress: Show a progress bar if stderr is a terminal.
        tracing: What else :func:`trace` takes: ``leaf_modules``, ``concrete_args``, ``dynamic_shapes`` and
            ``on_untraceable``. The first batch is the example.

    Raises:
        CalibrationError: There is no batch.
        TraceError: Tracing stopped.
    """
    iterator = iter(each_batch(batches))
    first = next(iterator, None)
    if first is None:
        raise CalibrationError("there is no batch to calibrate on", hint="pass an iterable of inputs")
    args, kwargs = moved(model_inputs(model, first), device_of(model))
    tracing["example_kwargs"] = kwargs
    prepared = prepare(model, args, recipe=recipe, target=target, **tracing)
    calibrate(prepared, itertools.chain([first], iterator), max_batches=max_batches, progress=progress)
    return convert(prepared)
