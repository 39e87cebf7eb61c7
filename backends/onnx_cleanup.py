"""Cleaning up an ONNX graph without losing its quantization: small steps over onnx-graphsurgeon, run to a
fixpoint.

Each step takes a graph, changes it in place and returns how much it changed, 0 where there was nothing to do.
Steps are idempotent and keep the model's meaning to the bit; none folds the Q/DQ pair of a weight into a
float weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ..errors import ExportError
from .onnx_surgery import content, drop, free_name, ids, is_plain, onnx_dtype, producer, reroute

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

__all__ = ["STEPS", "Step", "clean"]

Step: TypeAlias = "Callable[[gs.Graph], int]"

QUANTIZE: Final = "QuantizeLinear"
DEQUANTIZE: Final = "DequantizeLinear"
QDQ: Final = frozenset({QUANTIZE, DEQUANTIZE})

_MAX_ROUNDS: Final = 16
_MAX_INFLATED: Final = 1 << 16
"""Elements up to which a constant that could be computed is stored all the same."""


def fold_constants(graph: gs.Graph) -> int:
    """Compute nodes whose inputs are all constant, Q/DQ excepted."""
    before = len(graph.nodes)
    _widen_no_floats(graph)
    graph.fold_constants(should_exclude_node=lambda node: _beyond_numpy(node) or _inflates(node)).cleanup()
    return before - len(graph.nodes)


def _widen_no_floats(graph: gs.Graph) -> None:
    """Spell Constant's float attributes as float32 tensors: graphsurgeon would make doubles of them."""
    import numpy as np
    import onnx_graphsurgeon as gs

    for node in graph.nodes:
        for key in {"value_float", "value_floats"} & set(node.attrs) if node.op == "Constant" else ():
            array = np.asarray(node.attrs.pop(key), np.float32)
            node.attrs["value"] = gs.Constant(node.outputs[0].name, array)


def _inflates(node: gs.Node) -> bool:
    """Whether a node makes a big tensor of little, as Expand does, so that the file would grow if it were
    folded.
    """
    return node.op in {"ConstantOfShape", "Expand", "Range", "Tile"} and any(
        t.shape is None or not all(isinstance(d, int) for d in t.shape) or math.prod(t.shape) > _MAX_INFLATED
        for t in node.outputs
    )


def _beyond_numpy(node: gs.Node) -> bool:
    """Whether a node touches a type that numpy lacks, such as FP8 or bfloat16, whose values graphsurgeon
    would change.
    """
    import onnx

    unsafe = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    return node.attrs.get("to") in unsafe or any(not is_plain(t) for t in [*node.inputs, *node.outputs])


def merge_constants(graph: gs.Graph) -> int:
    """Let the Q/DQ nodes share equal scales, zero points and weights."""
    first: dict[tuple[Any, ...], gs.Tensor] = {}
    changes = 0
    for node in _qdq(graph):
        for index, tensor in enumerate(node.inputs):
            key = content(tensor)
            if key is None:
                continue
            kept = first.setdefault(key, tensor)
            if kept is not tensor:
                node.inputs[index] = kept
                changes += 1
    return changes


def merge_duplicates(graph: gs.Graph) -> int:
    """Let users of one tensor share the Q/DQ nodes that quantize it with one scale."""
    first: dict[tuple[Any, ...], gs.Node] = {}
    outputs = ids(graph.outputs)
    changes = 0
    for node in _qdq(graph):
        key = (node.op, id(node.inputs[0]), *_parameters(node))
        kept = first.setdefault(key, node)
        if kept is not node and id(node.outputs[0]) not in outputs:
            reroute(node.outputs[0], kept.outputs[0])
            changes += drop(graph, node)
    return changes


def remove_requantization(graph: gs.Graph) -> int:
    """Remove DQ → Q with one scale between: quantizing again what was just dequantized gives the same
    integers.
    """
    outputs = ids(graph.outputs)
    changes = 0
    for node in _qdq(graph):
        before = producer(node.inputs[0]) if node.op == QUANTIZE else None
        if before is None or before.op != DEQUANTIZE or id(node.outputs[0]) in outputs:
            continue
        if _parameters(before) == _parameters(node) and _same_dtype(before, node):
            reroute(node.outputs[0], before.inputs[0])
            changes += drop(graph, node)
    return changes


def transpose_weights(graph: gs.Graph) -> int:
    """Transpose an integer weight where it is stored instead of after its DQ at run time (R16, MatMul)."""
    changes = 0
    for node in list(graph.nodes):
        dequantize = producer(node.inputs[0]) if node.op == "Transpose" else None
        if dequantize is None or dequantize.op != DEQUANTIZE or len(dequantize.outputs[0].outputs) != 1:
            continue
        weight = dequantize.inputs[0]
        if content(weight) is None or not is_plain(weight) or id(node.outputs[0]) in ids(graph.outputs):
            continue
        order = list(node.attrs.get("perm") or reversed(range(len(weight.shape))))
        dequantize.inputs[0] = _stored(graph, weight, order)
        if dequantize.inputs[1].shape:
            dequantize.attrs["axis"] = order.index(dequantize.attrs.get("axis", 1) % len(order))
        result = node.outputs[0]
        # The tensor has another shape now, so another name.
        result.name = free_name(graph, f"{dequantize.outputs[0].name}_transposed")
        changes += drop(graph, node)
        dequantize.outputs[0] = result
    return changes


def _stored(graph: gs.Graph, weight: gs.Constant, order: list[int]) -> gs.Constant:
    import numpy as np
    import onnx_graphsurgeon as gs

    name = free_name(graph, f"{weight.name}_transposed")
    return gs.Constant(name, np.ascontiguousarray(weight.values.transpose(order)))


def remove_identities(graph: gs.Graph) -> int:
    """Remove Identity, and Cast to the type that a tensor has, or had before a cast that lost nothing."""
    changes = 0
    for node in list(graph.nodes):
        source = _unchanged(node)
        if source is None:
            continue
        result = node.outputs[0]
        if id(result) not in ids(graph.outputs):
            reroute(result, source)
        elif _can_be_renamed(graph, source):
            drop(graph, node)
            _take_over(source, result)
            changes += 1
            continue
        else:
            continue
        changes += drop(graph, node)
    return changes


def _unchanged(node: gs.Node) -> gs.Tensor | None:
    """The tensor that `node` only passes on; None if it does more."""
    if node.op == "Identity":
        return node.inputs[0]
    if node.op != "Cast":
        return None
    source, to = node.inputs[0], onnx_dtype(node.outputs[0].dtype) or node.attrs["to"]
    if onnx_dtype(source.dtype) == to:
        return source
    before = producer(source)
    if before is None or before.op != "Cast" or onnx_dtype(before.inputs[0].dtype) != to:
        return None
    return before.inputs[0] if _is_widening(before.inputs[0], source) else None


def _is_widening(narrow: gs.Tensor, wide: gs.Tensor) -> bool:
    import numpy as np

    if narrow.dtype is None or wide.dtype is None or not (is_plain(narrow) and is_plain(wide)):
        return False
    return bool(np.can_cast(np.dtype(narrow.dtype), np.dtype(wide.dtype), "safe"))


def _can_be_renamed(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether a tensor may become a graph output: some node makes it, and it is none yet."""
    return len(tensor.inputs) == 1 and id(tensor) not in ids(graph.outputs)


def _take_over(source: gs.Tensor, result: gs.Tensor) -> None:
    """Let the producer of `source` write `result`, which all users of `source` then read."""
    maker = source.inputs[0]
    index = next(i for i, tensor in enumerate(maker.outputs) if tensor is source)
    result.dtype = result.dtype if result.dtype is not None else source.dtype
    maker.outputs[index] = result
    reroute(source, result)


def remove_dead(graph: gs.Graph) -> int:
    """Remove nodes that no output depends on; inputs stay, used or not."""
    before = len(graph.nodes)
    graph.cleanup()
    return before - len(graph.nodes)


STEPS: Final[tuple[Step, ...]] = (
    remove_dead,
    fold_constants,
    remove_identities,
    merge_constants,
    merge_duplicates,
    remove_requantization,
    transpose_weights,
)
"""The steps in order."""


def clean(model: onnx.ModelProto, steps: tuple[Step, ...] = STEPS) -> tuple[onnx.ModelProto, Counter[str]]:
    """Run the steps until none finds anything.

    Args:
        model: Not changed; its initializers may be shared with the result.
        steps: What to run.

    Returns:
        The cleaned model, with the metadata_props of nodes, graph and model as they were (graphsurgeon alone
        drops them), and how many changes each step made.

    Raises:
        ExportError: The steps still found something after 16 rounds, so two of them undo each other.
    """
    import onnx_graphsurgeon as gs
    from onnx_graphsurgeon.logger import G_LOGGER

    counts: Counter[str] = Counter()
    with G_LOGGER.suppress():
        graph = gs.import_onnx(model)
        kept = {id(node): proto.metadata_props for node, proto in _pairs(graph, model.graph)}
        for _ in range(_MAX_ROUNDS):
            found = Counter({step.__name__: step(graph) for step in steps})
            counts.update(+found)
            if not found.total():
                break
        else:
            names = ", ".join(name for name, count in found.items() if count)
            raise ExportError(
                f"ONNX cleanup does not settle: {names} still change the graph after {_MAX_ROUNDS} rounds"
            )
        result: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    for node, proto in _pairs(graph, result.graph):
        proto.metadata_props.extend(kept.get(id(node), ()))
    result.metadata_props.extend(model.metadata_props)
    result.graph.metadata_props.extend(model.graph.metadata_props)
    return result, counts


def _pairs(graph: gs.Graph, proto: onnx.GraphProto) -> Iterator[tuple[gs.Node, onnx.NodeProto]]:
    """graphsurgeon's nodes beside ONNX's, which have one order; subgraphs too."""
    for node, node_proto in zip(graph.nodes, proto.node, strict=True):
        yield node, node_proto
        for attribute in node_proto.attribute:
            if attribute.HasField("g"):
                yield from _pairs(node.attrs[attribute.name], attribute.g)


def _qdq(graph: gs.Graph) -> list[gs.Node]:
    return [node for node in graph.nodes if node.op in QDQ]


def _parameters(node: gs.Node) -> tuple[Any, ...]:
    """What a Q/DQ node does besides its input: scale, zero point and attributes, by value where they are
    constant.
    """
    values = tuple(content(tensor) or id(tensor) for tensor in node.inputs[1:] if not tensor.is_empty())
    axis = node.attrs.get("axis", 1) if node.inputs[1].shape else None
    rest = sorted((key, value) for key, value in node.attrs.items() if key != "axis")
    return values, axis, tuple(rest)


def _same_dtype(dequantize: gs.Node, quantize: gs.Node) -> bool:
    """Whether a Q gives the type that a DQ took; their zero points, where both have one, were compared
    already.
    """
    if len(dequantize.inputs) > 2 and len(quantize.inputs) > 2:
        return True
    types = (onnx_dtype(dequantize.inputs[0].dtype), onnx_dtype(quantize.outputs[0].dtype))
    return types[0] == types[1] and None not in types
