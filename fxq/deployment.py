"""From a converted graph to a file, an engine, and what they hold: the doors behind :mod:`fxq.flow`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from .errors import FxqError
from .export_checks import check_exportable, islands_of, warn_of_types
from .graph import state
from .recipe import Match
from .target import Target
from .tracing import DynamicShapes

if TYPE_CHECKING:
    from .backends.onnx_fix import Fixed
    from .backends.trt_engine import Engine
    from .backends.trt_prediction import Prediction
    from .backends.trt_report import EngineReport
    from .findings import Findings

__all__ = ["build", "engine_report", "export", "fix", "lint", "load_engine", "predict"]


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

    check_exportable(quantized)
    held = state(quantized)
    written = export_onnx(
        quantized,
        held.example_args,
        dict(held.example_kwargs),
        path,
        dynamic_shapes=dynamic_shapes,
        opset=opset,
        input_names=input_names,
        output_names=output_names,
        typing=Typed(compute_dtype, keep_io_types, islands_of(quantized, islands)),
    )
    warn_of_types(quantized, written)
    return written


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


def lint(model: fx.GraphModule | str | Path, *, target: str | Path | Target | None = None) -> Findings:
    """Check a quantized network against its backend's rules.

    Args:
        model: An ONNX file from any tool; or a prepared, trained or converted graph, of which those rules are checked
            that it can show (:func:`fxq.fx_lint.lint_graph`).
        target: The target whose rules to check a file by. None (default) is the one that the file was exported for, by
            its metadata, and TensorRT for a file of another tool. A graph has its own.

    Returns:
        Findings with rule, node, reason and fix; empty if the rules are kept.

    Raises:
        PassError: The GraphModule does not come from fxq.
        FxqError: There is no such file, it holds no ONNX model, the graph has no quantizers yet, or there are no checks
            of graphs for its target's rules.
        TargetError: There is no such target.
    """
    if isinstance(model, fx.GraphModule):
        if target is not None:
            raise FxqError("a graph has its own target", hint="give target with a file, or prepare for another target")
        from .fx_lint import lint_graph

        return lint_graph(model)
    from .backends.onnx_lint import lint_onnx

    return lint_onnx(model, family=None if target is None else Target.load(target).rules)


def fix(
    path: str | Path,
    output: str | Path | None = None,
    *,
    in_place: bool = False,
    rounding: bool = False,
    rules: Collection[str] | None = None,
) -> Fixed:
    """Mend what :func:`lint` finds in an ONNX file, as far as a machine can.

    The result is checked by ONNX and linted before it is written.

    Args:
        path: An ONNX file from any tool.
        output: Where to write; None (default) takes the file's name with ``.fixed`` before its suffix. Written whole or
            not at all.
        in_place: Replace the file itself.
        rounding: Also make the changes by which a rounding goes or comes, such as reading the skip of a residual
            addition in INT8 (R23): outputs change slightly. Without it (default) the file computes the same as before.
        rules: Ids of the rules whose findings to mend; None (default) takes all.

    Returns:
        What was changed and what the linter still finds; print it, or take ``to_dict()``.

    Raises:
        FxqError: There is no such file, it holds no ONNX model, or `output` is the file itself.
        ExportError: ONNX's checker refuses the file.
    """
    from .backends.onnx_fix import fix_onnx

    return fix_onnx(path, output, in_place=in_place, rounding=rounding, rules=rules)


def predict(path: str | Path, *, library: str = "tensorrt") -> Prediction:
    """List the kernels that TensorRT's documented fusions give for an ONNX file; needs no TensorRT and no GPU.

    Args:
        path: An ONNX file from any tool.
        library: ``"tensorrt"`` (default), or ``"tensorrt-rtx"`` for what its builder does.

    Returns:
        Each kernel with its ONNX nodes, precision, tensors and bytes.

    Raises:
        FxqError: There is no such file or library, the file holds no ONNX model, or it was quantized by another
            backend's rules.
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
