"""The user's door: from a model to an engine, each function the list of its steps."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import fx, nn

from . import calibration
from .arguments import example_arguments
from .batches import Inputs, each_batch, model_inputs, moved
from .bias_correction import CORRECTIONS, Sampler, correct_biases
from .calibration_report import CalibrationReport
from .errors import CalibrationError, ConvertError, ExportError, RecipeError, TraceError
from .explanations import Explanation, build_explanation
from .graph import edge_annotations, error_at, origin, state, tensor_info, update_state
from .manager import PassManager, Pipeline
from .passes import CONVERT, PREPARE, PREPARE_QAT, FuseBatchNorm, RestoreTraining
from .passes.annotate import matches
from .qdq import QUANTIZE
from .quantizer import quantizers, submodule_name
from .ranks import TIMEOUT, joined, on_first
from .recipe import Match, Method, Recipe, Rule
from .reports import Report, build_report, warnings_of
from .scale_policy import POLICIES, ScalePolicy
from .target import Target
from .tracer import DynamicShapes, trace_model

if TYPE_CHECKING:
    from .backends.trt_engine import Engine
    from .backends.trt_prediction import Prediction
    from .backends.trt_report import EngineReport
    from .rules import Findings

__all__ = [
    "build",
    "calibrate",
    "convert",
    "engine_report",
    "export",
    "lint",
    "predict",
    "prepare",
    "prepare_qat",
    "quantize",
    "report",
    "solve",
    "trace",
]


_LOG: Final = logging.getLogger(__name__)
_TYPE_RULES: Final = frozenset({"R9", "R10", "R12", "R13"})
_NAMED: Final = 3


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    target: str | Path | Target = "tensorrt",
    recipe: Recipe | None = None,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    concrete_args: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "any",
    on_untraceable: Literal["raise", "leaf"] = "raise",
) -> fx.GraphModule:
    """Trace a model to a graph whose nodes know their shape, module path and source line.

    Args:
        model: Any module that torch.fx can follow; it is copied, in eval mode, and not changed.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of inputs by name.
        example_kwargs: More inputs by name.
        target: ``"tensorrt"``, ``"tensorrt-fast"``, a target file, or a Target.
        recipe: What to quantize beyond the target's defaults.
        leaf_modules: Module types or paths that stay whole.
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


def prepare(
    model: nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    target: str | Path | Target = "tensorrt",
    pipeline: Pipeline | None = None,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    concrete_args: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "any",
    on_untraceable: Literal["raise", "leaf"] = "raise",
) -> fx.GraphModule:
    """Trace, normalize, fuse, and put observers where the target's rules want quantizers.

    Args:
        model: The float model; not changed. On a GPU, the result is there too.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of inputs by name.
        example_kwargs: More inputs by name.
        recipe: Rules that change the target's placement; None for none.
        target: ``"tensorrt"`` (default), ``"tensorrt-fast"``, a target file, or a Target.
        pipeline: What to run instead of :data:`fxq.passes.PREPARE`.
        leaf_modules: Module types or paths that stay whole, and float.
        concrete_args: Parameters of forward fixed to a value.
        dynamic_shapes: Which dimensions of the inputs stay expressions when the model reads their size: ``"any"``
            (default), ``"batch"``, None, or a dict as for :func:`export`. The others are read as plain numbers.
            What the model decides by a size holds for the graph, and a call that violates it is a GuardError.
        on_untraceable: ``"leaf"`` keeps the smallest module whole, and float, in whose forward tracing stops, with
            a note; ``"raise"`` (default) makes that an error.

    Returns:
        A GraphModule with observers, ready for :func:`calibrate`.

    Raises:
        TraceError: Tracing stopped.
        RecipeError: A rule matches nothing or asks for what cannot be.
    """
    gm = trace(
        model,
        example_inputs,
        example_kwargs=example_kwargs,
        target=target,
        recipe=recipe,
        leaf_modules=leaf_modules,
        concrete_args=concrete_args,
        dynamic_shapes=dynamic_shapes,
        on_untraceable=on_untraceable,
    )
    chosen = pipeline or PREPARE
    gm = PassManager().run(chosen, gm, inplace=True)
    _remember(gm, prepare=str(chosen))
    return gm


def prepare_qat(
    model: nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    target: str | Path | Target = "tensorrt",
    scales: str | ScalePolicy = "fixed",
    batch_norm: Literal["train", "fold"] = "train",
    pipeline: Pipeline | None = None,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    concrete_args: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "any",
    on_untraceable: Literal["raise", "leaf"] = "raise",
) -> fx.GraphModule:
    """:func:`prepare` for training: fake quantizers in the same places, under the same names and keys.

    Args:
        model: The float model; not changed. Parameters that need no gradient in it need none in the result.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of inputs by name.
        example_kwargs: More inputs by name.
        recipe: Rules that change the target's placement; None for none.
        target: ``"tensorrt"`` (default), ``"tensorrt-fast"``, a target file, or a Target.
        scales: What moves the scales: a name in :data:`fxq.qat.POLICIES` or a :class:`fxq.qat.ScalePolicy`.
            ``"fixed"`` (default) needs :func:`calibrate` or :func:`fxq.qat.load_scales` before training; the others
            begin by themselves, and better after either.
        batch_norm: ``"train"`` (default) keeps BatchNorm trainable while weights are quantized as folded;
            ``"fold"`` folds it first, as :func:`prepare` does.
        pipeline: What to run instead of :data:`fxq.passes.PREPARE_QAT`; `scales` and `batch_norm` are its matter then.
        leaf_modules: Module types or paths that stay whole, and float.
        concrete_args: Parameters of forward fixed to a value.
        dynamic_shapes: Which dimensions of the inputs stay expressions when the model reads their size: ``"any"``
            (default), ``"batch"``, None, or a dict as for :func:`export`. The others are read as plain numbers.
            What the model decides by a size holds for the graph, and a call that violates it is a GuardError.
        on_untraceable: ``"leaf"`` keeps the smallest module whole, and float, in whose forward tracing stops, with
            a note; ``"raise"`` (default) makes that an error.

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
    gm = trace(
        model,
        example_inputs,
        example_kwargs=example_kwargs,
        target=target,
        recipe=recipe,
        leaf_modules=leaf_modules,
        concrete_args=concrete_args,
        dynamic_shapes=dynamic_shapes,
        on_untraceable=on_untraceable,
    )
    policy = POLICIES[scales] if isinstance(scales, str) else scales
    chosen = pipeline or PREPARE_QAT.replace("restore-training", RestoreTraining(policy))
    if batch_norm == "fold" and pipeline is None:
        chosen = chosen.before("set-aside-training", FuseBatchNorm())
    gm = PassManager().run(chosen, gm, inplace=True)
    wanted = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point():
            parameter.requires_grad_(wanted.get(name, True))
    _remember(gm, prepare=str(chosen), trains=True)
    return gm.train()


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
    keep = sampler.keep if wanted else None
    shapes = SeenShapes(prepared)
    with _watched(prepared, lambda inputs: shapes.see(*inputs)), _watched(prepared, keep):
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
    with joined(rank_timeout) if across_ranks and keep is not None else nullcontext() as ranks:
        corrections = on_first(ranks, lambda: correct_biases(prepared, sampler.kept) if sampler.kept else {})
    _store_corrections(prepared, corrections)
    facts = {"batches": found.batches, "performance_only": performance_only}
    _remember(prepared, calibration={**facts, "input_shapes": shapes.summary()})
    return replace(found, warnings=warnings_of(prepared))


@contextmanager
def _watched(prepared: fx.GraphModule, keep: Callable[[Inputs], None] | None) -> Iterator[None]:
    """Hand what the graph is called with to `keep`."""
    if keep is None:
        yield
        return
    hook = prepared.register_forward_pre_hook(lambda _, args, kwargs: keep(Inputs(args, kwargs)), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _store_corrections(prepared: fx.GraphModule, corrections: Mapping[str, torch.Tensor]) -> None:
    """Keep what the biases are to gain; an empty mapping takes earlier corrections away."""
    holder = torch.nn.Module()
    device = next((p.device for p in prepared.parameters()), torch.device("cpu"))
    for name, correction in corrections.items():
        holder.register_buffer(submodule_name(name), correction.to(device, copy=True))
    prepared.add_module(CORRECTIONS, holder)


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
        device = next((p.device for p in prepared.parameters()), torch.device("cpu"))
        inputs = [moved(model_inputs(prepared, batch), device) for batch in each_batch(batches)]
        _store_corrections(prepared, correct_biases(prepared, inputs))
    elif not same:
        _store_corrections(prepared, {})
    earlier = state(prepared).provenance.get("calibration", {})
    _remember(prepared, calibration={"performance_only": False, **earlier, "batches": found.batches})
    return replace(found, warnings=warnings_of(prepared))


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
    _remember(gm, convert=str(chosen))
    return gm


def export(
    quantized: fx.GraphModule,
    path: str | Path,
    *,
    dynamic_shapes: DynamicShapes = "batch",
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    compute_dtype: str = "fp32",
    keep_io_types: bool = True,
    islands: Sequence[Match] = (),
) -> Path:
    """Write a converted graph as a Q/DQ ONNX file, cleaned up, strongly typed and checked.

    TensorRT takes the types of an engine from this file (R1, R4): what is not quantized computes in
    `compute_dtype`, scales and weights included. Where float16 has too little room for what calibration's
    scales or the example inputs show, a float32 island remains; the file's nodes say why
    (``fxq.float32`` in their metadata).

    Args:
        quantized: What :func:`convert` returned, or a traced float graph.
        path: Where to write; written whole or not at all.
        dynamic_shapes: ``"batch"`` (the first dimension of every input), None for static shapes, or
            ``{input: {dim: name or (min, max)}}``.
        opset: ONNX opset; None takes the lowest that holds what the graph uses (R15).
        input_names: Names of the ONNX inputs; None keeps the names of forward's parameters.
        output_names: Names of the ONNX outputs; None gives ``output`` or ``output_0``, ``output_1`` ….
        compute_dtype: What is not quantized computes in ``"fp32"`` (default), ``"fp16"`` or ``"bf16"``.
        keep_io_types: Keep float inputs and outputs float32 (default), as the model has them, and cast there;
            False gives them the compute dtype. A quantizer at an input reads either, so a quantized network is
            not slowed at its input; its outputs are small as a rule.
        islands: What stays float32 whatever its range: matches as in :class:`fxq.Rule`, such as
            ``"op:softmax"``, ``nn.LayerNorm`` or ``"decoder.*"``.

    Returns:
        The path.

    Raises:
        ExportError: The graph has observers still, or cannot be exported so.
        RecipeError: An island matches nothing.
    """
    from .backends.onnx_export import Typed, export_onnx

    held = state(quantized)
    if "observed" in held.properties and "quantized" not in held.properties:
        raise ExportError("this graph has observers, not quantizers", hint="run fxq.convert(prepared) first")
    for node in quantized.graph.find_nodes(op="call_function", target=QUANTIZE):
        info = tensor_info(node.all_input_nodes[0])
        if info is not None and info.dtype is not torch.float32:
            raise error_at(
                ExportError,
                f"the graph computes in {str(info.dtype).removeprefix('torch.')}; Q/DQ files are written in float32",
                node,
                "prepare model.float(), and name the type here: "
                'fxq.export(..., compute_dtype="fp16" or "bf16") writes it into the file',
            )
    written = export_onnx(
        quantized,
        held.example_args,
        dict(held.example_kwargs),
        path,
        dynamic_shapes=dynamic_shapes,
        opset=opset,
        input_names=input_names,
        output_names=output_names,
        typing=Typed(compute_dtype, keep_io_types, _islands(quantized, islands)),
    )
    _say_what_cannot_run(quantized, written)
    return written


def _say_what_cannot_run(gm: fx.GraphModule, path: Path) -> None:
    """Log which tensors of a file are in types that TensorRT does not run there: what is quantized for study."""
    specs = (a.spec for node in gm.graph.nodes for a in edge_annotations(node).values() if a.spec is not None)
    if {spec.qdtype.name for spec in specs} <= {"int8"}:
        return
    found = [finding for finding in lint(path) if finding.rule in _TYPE_RULES]
    if found:
        rules = ", ".join(sorted({finding.rule for finding in found}))
        named = "; ".join(f"{finding.node}: {finding.message} ({finding.rule})" for finding in found[:_NAMED])
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        _LOG.warning("%s holds what TensorRT cannot run, by %s: %s%s", path.name, rules, named, more)


def _islands(gm: fx.GraphModule, wanted: Sequence[Match]) -> dict[str, str]:
    """Names of the nodes that the user wants in float32, with the reason."""
    if isinstance(wanted, str | type) or callable(wanted):
        raise RecipeError(f"islands={wanted!r} is no list", hint="write islands=[...]")
    found: dict[str, str] = {}
    for match in wanted:
        rule = Rule(match, None)
        names = [node.name for node in gm.graph.nodes if node.op.startswith("call_") and matches(rule, node)]
        if not names:
            paths = sorted({path for node in gm.graph.nodes if (path := origin(node).module_path)})
            raise RecipeError(
                f"the island {rule.text} matches no operation", hint=f"module paths here: {', '.join(paths[:12])}"
            )
        found.update(dict.fromkeys(names, f"islands names {rule.text}"))
    return found


def build(path: str | Path, engine_path: str | Path, **options: Any) -> Engine:
    """Build a strongly typed TensorRT engine from a Q/DQ ONNX file.

    Args:
        path: The ONNX file.
        engine_path: Where to write the engine; written whole or not at all. Beside it goes a record of how it was
            built.
        options: Shapes, caches, weights, compatibility and more: see :func:`fxq.backends.trt_build.build`.

    Returns:
        What was built, with its kernels where TensorRT shows them. It is loaded only when run.

    Raises:
        BuildError: TensorRT refused the network; every parser error is named.
        MissingDependencyError: The package tensorrt is not installed.
    """
    from .backends.trt_build import build as build_engine

    return build_engine(path, engine_path, **options)


def load_engine(path: str | Path, *, weights_from: str | Path | None = None) -> Engine:
    """An engine file, from here or elsewhere, with what is known of how it was built. Nothing of it runs yet.

    An engine holds code: run those only whose origin you trust.

    Args:
        path: The engine file. What fxq built has a record beside it, ``<file>.json``; print it before you run the
            engine, or ask ``engine.mismatches()``. :meth:`~fxq.backends.trt_engine.Engine.run` refuses a mismatch.
        weights_from: For an engine that was built with ``weights="stripped"``: the ONNX file that it was built from.

    Raises:
        EngineError: There is no such file, or its record is unreadable or belongs to another engine.
    """
    from .backends.trt_engine import Engine

    return Engine.load(path, weights_from=weights_from)


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    recipe: Recipe | None = None,
    target: str | Path | Target = "tensorrt",
    max_batches: int | None = None,
    progress: bool = True,
) -> fx.GraphModule:
    """:func:`prepare`, :func:`calibrate` and :func:`convert` in one call.

    Args:
        model: The float model; not changed.
        batches: Calibration data; its first batch serves as the example too.
        recipe: Rules that change the target's placement.
        target: ``"tensorrt"``, ``"tensorrt-fast"``, a target file, or a Target.
        max_batches: Stop calibration after so many.
        progress: Show a progress bar if stderr is a terminal.

    Raises:
        CalibrationError: There is no batch.
    """
    iterator = iter(each_batch(batches))
    first = next(iterator, None)
    if first is None:
        raise CalibrationError("there is no batch to calibrate on", hint="pass an iterable of inputs")
    args, kwargs = model_inputs(model, first)
    prepared = prepare(model, args, example_kwargs=kwargs, recipe=recipe, target=target)
    calibrate(prepared, itertools.chain([first], iterator), max_batches=max_batches, progress=progress)
    return convert(prepared)


def report(gm: fx.GraphModule) -> Report:
    """What is quantized in `gm`, where, by which rule, and what is not and why.

    Args:
        gm: A prepared or converted graph.
    """
    return build_report(gm)


def explain(gm: fx.GraphModule, where: str = "*") -> Explanation:
    """Why each edge is quantized or float: rule, sentence, and what a float residual addition lacked.

    Where :func:`report` sums a graph up, this goes edge by edge: all that have a quantizer, and all that a reader
    would expect to have one (inputs of convolutions, matrix products, additions, concatenations, pools,
    multiplications, norms and activations).

    Args:
        gm: A prepared, trained or converted graph.
        where: A glob over module paths or ``op:kind``, as in a recipe rule: ``"layer1.*"``, ``"op:add"``.

    Returns:
        The edges in graph order; print it, or take ``to_dict()``.

    Raises:
        PassError: Nothing is placed in the graph yet: it was traced and no more.
        RecipeError: Nothing in the graph matches `where`.
    """
    return build_explanation(gm, where)


def lint(model: fx.GraphModule | str | Path) -> Findings:
    """Check a quantized network against TensorRT's rules.

    Args:
        model: An ONNX file from any tool; or a prepared, trained or converted graph, of which those rules are checked
            that it can show (:func:`fxq.fx_lint.lint_graph`).

    Returns:
        Findings with rule, node, reason and fix; empty if the rules are kept.

    Raises:
        PassError: The GraphModule does not come from fxq.
        FxqError: There is no such file, it holds no ONNX model, or the graph has no quantizers yet.
    """
    if isinstance(model, fx.GraphModule):
        from .fx_lint import lint_graph

        return lint_graph(model)
    from .backends.onnx_lint import lint_onnx

    return lint_onnx(model)


def predict(path: str | Path, *, library: str = "tensorrt") -> Prediction:
    """List the kernels that TensorRT's documented fusions give for an ONNX file; needs no TensorRT and no GPU.

    Args:
        path: An ONNX file from any tool.
        library: ``"tensorrt"`` (default), or ``"tensorrt-rtx"`` for what its builder does.

    Returns:
        Each kernel with its ONNX nodes, precision, tensors and bytes.

    Raises:
        FxqError: There is no such file or library, or the file holds no ONNX model.
    """
    from .backends.trt_predict import predict_kernels

    return predict_kernels(path, library=library)


def engine_report(engine: Engine | str | Path, path: str | Path) -> EngineReport:
    """Compare an engine's kernels with those that its ONNX file should have become.

    Args:
        engine: What :func:`build` returned; or a file with the inspector's JSON (TensorRT 10 or 11), or a builder's log
            that lists kernels.
        path: The ONNX file that it was built from.

    Returns:
        Each kernel with its ONNX nodes, FX nodes, module and source line, and every difference with the rule that was
        broken and the fix; as text, dictionary (``to_dict``) or HTML (``html``, ``save``).

    Raises:
        EngineError: The kernels are not known: no GPU here can load the engine, or the file lists none.
        FxqError: There is no such ONNX file.
    """
    from .backends.trt_report import report_engine

    return report_engine(engine, path)


def _remember(gm: fx.GraphModule, **facts: Any) -> None:
    """Add to the graph's provenance."""
    update_state(gm, provenance={**state(gm).provenance, **facts})
