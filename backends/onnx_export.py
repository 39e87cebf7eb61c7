"""A converted graph becomes an ONNX file with QuantizeLinear and DequantizeLinear.

The steps: a copy of the graph on the CPU with flat inputs and outputs, torch.export, torch's ONNX exporter
with fxq's translation of its two operators, types for the zero points, names, cleanup, check, one atomic
write. torch.export and the exporter run once each and take nearly all the time (a few seconds for ResNet-50).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from ..errors import EngineError, ExportError
from ..graph import has_state, state
from . import onnx_inputs
from .onnx_capture import Source, run_exporter
from .onnx_cleanup import clean
from .onnx_dynamic import DynamicShapes, check_guards, dynamic_dims
from .onnx_files import write_model
from .onnx_inputs import Examples
from .onnx_names import label_nodes, name_nodes
from .onnx_numbers import ComputeDtype, compute_dtype
from .onnx_profiles import shape_ranges
from .onnx_ranges import largest_magnitudes
from .onnx_types import needed_opset, type_zero_points
from .onnx_typing import type_model

if TYPE_CHECKING:
    import onnx
    from torch.onnx import ONNXProgram

__all__ = ["Typed", "export_onnx"]


@dataclass(frozen=True)
class Typed:
    """The types of what is not quantized.

    Attributes:
        compute_dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        keep_io_types: Whether float inputs and outputs stay float32.
        islands: Names of FX nodes that stay float32, with the reason.
    """

    compute_dtype: str = "fp32"
    keep_io_types: bool = True
    islands: Mapping[str, str] = field(default_factory=dict)


FLOAT32: Final = Typed()
"""No type but float32."""


def export_onnx(  # noqa: PLR0913 - each is an option that fxq.export passes on by its own name
    gm: fx.GraphModule,
    example_args: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None,
    path: str | Path,
    *,
    dynamic_shapes: DynamicShapes = "batch",
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    typing: Typed = FLOAT32,
) -> Path:
    """Write a converted graph as ONNX.

    Nodes and tensors are named as :mod:`fxq.backends.onnx_names` says. What the graph's state knows of its
    provenance (that it was calibrated on random data, for one) goes into the model's metadata_props, under
    ``fxq.<key>``. Inputs that are no tensors become constants, outputs that are no tensors are left out.

    Args:
        gm: What ``fxq.convert`` returned, or any GraphModule of functions; it is not changed, and may be on a
            GPU.
        example_args: Positional inputs; tuples, lists and dicts of tensors may be nested in them.
        example_kwargs: Inputs by name.
        path: The file to write; an existing one is replaced only once the new one is complete.
        dynamic_shapes: ``"batch"`` makes dimension 0 of every input one symbolic ``batch`` (default); None
            makes all shapes those of the examples; a dict ``{input: {dim: name or (min, max)}}`` makes just
            those dynamic, and dimensions with one name equal.
        opset: ONNX opset; default is 18, or what the graph's types need beyond that (R15).
        input_names: One per input tensor; default are the graph's parameter names, with the path inside
            nested ones.
        output_names: One per output tensor; default ``output``, numbered or with the keys of a dict where
            there are several.
        typing: The types of what is not quantized; default all float32.

    Returns:
        `path`. Weights lie in the file itself up to 2 GB; beyond that in one file beside it.

    Raises:
        ExportError: Bad names, shapes or opset; an operation that ONNX lacks; a graph that fixes a dimension
            which should be dynamic, or was traced for some of its sizes alone; a result that the ONNX checker
            refuses. The message names the node or line at fault where that can be found, and the next step.
    """
    if not isinstance(gm, fx.GraphModule):
        raise ExportError(f"cannot export a {type(gm).__name__}", hint="give export what fxq.convert returned")
    kind = compute_dtype(typing.compute_dtype)
    version = needed_opset(gm, opset, at_least=kind.opset, because=f"compute_dtype={kind.name!r}")
    examples = Examples.of(gm, example_args, example_kwargs or {}, input_names)
    outputs = onnx_inputs.output_names(gm, output_names, examples.names)
    dims, tensors = dynamic_dims(examples.names, examples.tensors, dynamic_shapes)
    if has_state(gm):
        own = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
        check_guards(state(gm).guards, own, tensors, dims)
    source = Source(gm, examples.with_tensors(tensors), dims, version)
    model = _name_and_clean(source, run_exporter(source), outputs)
    _check_result(model, source)
    if kind.name != "fp32":
        _type(model, kind, typing, dict(zip(examples.names, tensors, strict=True)))
    seen = (state(gm).provenance.get("calibration") or {}).get("input_shapes") or [] if has_state(gm) else []
    ranges = shape_ranges(examples.names, examples.tensors, dims, seen)
    _write_provenance(model, gm, compute_dtype=kind.name, **({"profiles": ranges} if ranges else {}))
    write_model(model, Path(path))
    return Path(path)


def _name_and_clean(source: Source, exported: ONNXProgram, outputs: Sequence[str]) -> onnx.ModelProto:
    """The exporter's program as a cleaned model whose nodes and tensors have their final names."""
    model, program = exported.model, exported.exported_program
    assert program is not None
    type_zero_points(model, program, source.gm)
    label_nodes(model, program, source.gm, {*source.examples.names, *outputs, *model.graph.initializers})
    exported.optimize()
    for values, names in ((model.graph.inputs, source.examples.names), (model.graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    proto = exported.model_proto
    _drop_exporter_metadata(proto)
    proto, _ = clean(proto)
    name_nodes(proto, source.gm)
    proto.producer_name, proto.producer_version = "fxq", f"torch {torch.__version__}"
    return proto


def _drop_exporter_metadata(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes for itself: signatures and stack traces of the exporting machine."""
    holders: list[Any] = [model, model.graph, *model.graph.initializer, *model.graph.value_info]
    for holder in [*holders, *model.graph.input, *model.graph.output]:
        del holder.metadata_props[:]


def _check_result(model: onnx.ModelProto, source: Source) -> None:
    """The file is what was asked for: the opset, and symbols where dimensions are dynamic."""
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset != source.opset:
        raise ExportError(
            f"torch's exporter could not convert the graph to opset {source.opset} and left it at {opset}",
            hint=f"use opset={opset}, or None",
        )
    for value, dims in zip(model.graph.input, source.dims, strict=True):
        shape = value.type.tensor_type.shape.dim
        for axis, dim in dims.items():
            if not shape[axis].dim_param:
                raise ExportError(
                    f"dimension {axis} of input {value.name!r} came out fixed, not as {dim.__name__!r}",
                    hint="export static shapes with dynamic_shapes=None",
                )


def _type(model: onnx.ModelProto, kind: ComputeDtype, typing: Typed, inputs: Mapping[str, Tensor]) -> None:
    """Write the compute dtype into a float32 model, with islands where its range is too small."""
    largest: Mapping[str, float] = {}
    if kind.has_less_range:
        try:
            largest = largest_magnitudes(model, inputs)
        except EngineError as error:
            raise ExportError(
                f"the ranges that decide what cannot be {kind.name} are unknown: {error.message}",
                hint='use compute_dtype="bf16", which has the range of float32, or "fp32"',
            ) from error
    type_model(model, kind, keep_io_types=typing.keep_io_types, islands=typing.islands, largest=largest)


def _write_provenance(model: onnx.ModelProto, gm: fx.GraphModule, **more: Any) -> None:
    """What the graph's state knows about where its numbers came from, one entry each, as text or JSON."""
    held = state(gm) if has_state(gm) else None
    known = {**(held.provenance if held is not None else {}), **more}
    if held is not None:
        known |= {"target": held.target.name, "rules": held.target.rules}
    for key, value in known.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        model.metadata_props.add(key=f"fxq.{key}", value=text)
