"""Where an ONNX node comes from, and what it and its tensors are called.

torch's exporter renames what it translates (``conv2d``, ``conv2d_1`` …). So each FX node carries its own name
through torch.export in ``node.meta["custom"]``; from there it comes back as the ONNX node's
``metadata_props``:

* ``fxq.node``: the FX node,
* ``fxq.module_path``: dotted path of the user's module,
* ``fxq.source``: the user's ``file:line``.

An ONNX node is called after its module where the FX node is that module's own call (``layer1.0.conv1``), else
after the FX node. Where one FX node became several ONNX nodes, the last, which gives the FX node's value, has
the plain name and those before it have ``_1``, ``_2`` …. The tensor with the FX node's value is called after
the FX node.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from torch import fx

from ..graph import origin

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    import torch

__all__ = [
    "MODULE_PATH",
    "NODE",
    "RULE_FAMILY",
    "SOURCE",
    "carried_name",
    "carry_name",
    "free_name",
    "label_nodes",
    "name_nodes",
    "nodes_of",
    "not_for_tensorrt",
    "properties",
]

NODE: Final = "fxq.node"
MODULE_PATH: Final = "fxq.module_path"
SOURCE: Final = "fxq.source"
RULE_FAMILY: Final = "fxq.rules"
"""The key of the model's metadata that says whose rules the file was made by, as families of rules are called."""

_TENSORRT: Final = "R"
_CUSTOM: Final = "custom"
_KEY: Final = "fxq"
_SCOPES: Final = "pkg.torch.onnx.name_scopes"


def not_for_tensorrt(name: str, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """What is wrong, and what to do, where a file's metadata name another backend's rules than TensorRT's.

    Args:
        name: What the message calls the file.
        metadata: The file's metadata; a file of another tool says nothing of rules.
    """
    family = metadata.get(RULE_FAMILY, _TENSORRT)
    if family == _TENSORRT:
        return None
    made_for = metadata.get("fxq.target", "?")
    text = f"{name} was quantized for target {made_for}, by rules that are not TensorRT's ({family})"
    return text, 'quantize it for TensorRT: fxq.prepare(model, inputs, target="tensorrt")'


def carry_name(node: fx.Node, name: str) -> None:
    """Let `node` carry `name` through torch.export."""
    node.meta[_CUSTOM] = {**node.meta.get(_CUSTOM, {}), _KEY: name}


def carried_name(node: fx.Node) -> str | None:
    """The name that a node of an exported program carries; None if it carries none."""
    found: str | None = node.meta.get(_CUSTOM, {}).get(_KEY)
    return found


def properties(node: onnx.NodeProto) -> dict[str, str]:
    """The node's metadata_props as a dictionary."""
    return {p.key: p.value for p in node.metadata_props}


def nodes_of(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """The graph's nodes by the FX node they came from, in graph order."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        name = properties(node).get(NODE)
        if name is not None:
            found.setdefault(name, []).append(node)
    return found


def label_nodes(model: ir.Model, program: torch.export.ExportedProgram, gm: fx.GraphModule, reserved: set[str]) -> None:
    """Give every ONNX node its FX node's name as metadata, and every tensor a name made from it.

    Args:
        model: What the exporter made of `program`, unoptimized: its values have the program's node names.
        program: The exported program, whose nodes carry FX names.
        gm: The graph that was exported.
        reserved: Tensor names that are taken; the new ones are added.
    """
    results = _result_names(program, gm)
    carried = {node.name: carried_name(node) for node in program.graph.nodes}
    for node in model.graph:
        name = carried.get(_exported_step(node))
        node.metadata_props.clear()
        if name is None:
            continue
        node.metadata_props[NODE] = name
        for value in node.outputs:
            wish = results.get(str(value.name), f"{name}.{value.name}")
            value.name = free_name(wish, reserved)
            reserved.add(value.name)
    _label_from_users(model)


def _exported_step(node: ir.Node) -> str:
    """Name of the exported program's node that an ONNX node was made for."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return str(scopes[-1]) if scopes else ""


def _result_names(program: torch.export.ExportedProgram, gm: fx.GraphModule) -> dict[str, str]:
    """Names for FX nodes' values, by the exported program's: ``split``, ``split__0`` for one of several."""
    several = {str(n.args[0]) for n in gm.graph.nodes if _is_item(n) and isinstance(n.args[1], int)}
    last = {carried_name(n): n for n in program.graph.nodes if carried_name(n) and not _is_item(n)}
    names = {}
    for name, node in last.items():
        names[node.name] = str(name)
        for item in node.users:
            # What PyTorch gives as one tensor may be the first of several, as with batch normalization.
            if _is_item(item) and carried_name(item) == name:
                wish = f"{name}__{item.args[1]}" if name in several or item.args[1] else str(name)
                names[item.name] = names[f"{node.name}__{item.args[1]}"] = wish
    return names


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def _label_from_users(model: ir.Model) -> None:
    """Nodes that the exporter added for itself (sizes of inputs) belong to the first node that needs them."""
    for node in reversed(list(model.graph)):
        if NODE in node.metadata_props:
            continue
        users = [use.node for value in node.outputs for use in value.uses()]
        labels = [user.metadata_props[NODE] for user in users if NODE in user.metadata_props]
        if labels:
            node.metadata_props[NODE] = labels[0]


def name_nodes(model: onnx.ModelProto, gm: fx.GraphModule) -> None:
    """Name every ONNX node and write its metadata_props, from the FX node that each is labelled with.

    Args:
        model: Labelled nodes; what optimization added without a label takes the label of its producer.
            Changed in place; afterwards node names are unique.
        gm: The graph that was exported.
    """
    origins = {node.name: node for node in gm.graph.nodes}
    _label_the_rest(model, origins)
    groups = nodes_of(model)
    _name_split_results(model, groups)
    plain = _plain_names([origins[name] for name in groups])
    taken = set(plain.values())
    for name, group in groups.items():
        for index, node in enumerate(group):
            is_last = index == len(group) - 1
            node.name = plain[name] if is_last else _numbered(plain[name], index + 1, taken)
            taken.add(node.name)
            _write_properties(node, _provenance(origins[name]))


def _label_the_rest(model: onnx.ModelProto, known: Mapping[str, fx.Node]) -> None:
    """Nodes that optimization made without a label take that of their tensors, or of their producers."""
    producer: dict[str, str] = {}
    fallback = next(name for name, node in known.items() if node.op == "output")
    for node in model.graph.node:
        label = properties(node).get(NODE)
        if label not in known:
            own = [owner for name in node.output for owner in _owners(name) if owner in known]
            label = next(iter([*own, *(producer[name] for name in node.input if name in producer)]), fallback)
            _write_properties(node, {NODE: label})
        producer.update(dict.fromkeys(node.output, label))


def _owners(value: str) -> tuple[str, ...]:
    """FX nodes whose value, or part of it, may be called so."""
    # The last is onnxscript's name for what it splits a sequence into.
    return value, value.partition(".")[0], value.rpartition("__")[0], value.rpartition("_split_")[0]


def _name_split_results(model: onnx.ModelProto, groups: Mapping[str, list[onnx.NodeProto]]) -> None:
    """Results of Split, which optimization makes of sequences, become ``<node>__0`` and so on."""
    kept = {value.name for value in model.graph.output}
    names = {
        old: f"{name}__{index}"
        for name, group in groups.items()
        for index, old in enumerate(group[-1].output)
        if group[-1].op_type == "Split" and old not in kept
    }
    for node in model.graph.node:
        for names_of in (node.input, node.output):
            for index, old in enumerate(names_of):
                names_of[index] = names.get(old, old)
    for value in model.graph.value_info:
        value.name = names.get(value.name, value.name)


def _plain_names(nodes: list[fx.Node]) -> dict[str, str]:
    """A unique ONNX name for each FX node."""
    taken = {node.name for node in nodes if not origin(node).call}
    names = {}
    for node in nodes:
        where = origin(node)
        if not where.call:
            names[node.name] = node.name
            continue
        path = where.module_path
        names[node.name] = path if path and path not in taken else free_name(node.name, taken)
        taken.add(names[node.name])
    return names


def _provenance(node: fx.Node) -> dict[str, str]:
    where = origin(node)
    found = {NODE: node.name, MODULE_PATH: where.module_path, SOURCE: where.source or ""}
    return {key: value for key, value in found.items() if value}


def _write_properties(node: onnx.NodeProto, values: Mapping[str, str]) -> None:
    del node.metadata_props[:]
    for key, value in values.items():
        node.metadata_props.add(key=key, value=value)


def _numbered(name: str, number: int, taken: set[str]) -> str:
    return next(n for n in _numbers(name, number) if n not in taken)


def _numbers(name: str, start: int) -> Iterator[str]:
    number = start
    while True:
        yield f"{name}_{number}"
        number += 1


def free_name(name: str, taken: set[str]) -> str:
    """`name`, or with the first suffix ``_1``, ``_2`` … that is not taken."""
    return name if name not in taken else _numbered(name, 1, taken)
