"""From a graph to what a picture of it shows.

Parameters, and what quantizes them, are part of the operation that reads them. A quantizer, and quantize with its
dequantize, is one mark of its own behind the tensor that it quantizes, in that tensor's box: whoever reads the tensor
through it is joined to the mark.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, fx

from ..graph import Note, constant, edge_annotations, has_state, origin, state, tensor_info
from ..ops import kind_name
from ..placement import EdgeRow, OpRow, operations
from ..printer import format_node, format_numbers
from ..qdq import QUANTIZE
from ..rules import RULES
from ..verify import is_dequantized, quantizer_of
from .sketch import Item, Sketch

__all__ = ["depict"]

_HALF: Final = (torch.float16, torch.bfloat16)
TIMES: Final = "\u00d7"
_NAME: Final = 26


def depict(gm: fx.GraphModule) -> Sketch:
    """What a picture of `gm` shows.

    Args:
        gm: Any GraphModule; of one that is not from fxq less is known.
    """
    return _Depiction(gm).sketch()


class _Depiction:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        known = has_state(gm)
        self.rows: dict[str, OpRow] = {row.node: row for row in operations(gm)} if known else {}
        self.notes: dict[str, list[Note]] = defaultdict(list)
        for note in state(gm).notes if known else ():
            self.notes[note.node].append(note)
        self.shown = {node: self._find(node) for node in gm.graph.nodes}
        self.ties = self._ties()

    def sketch(self) -> Sketch:
        items: list[Item] = []
        marks: dict[fx.Node, list[Item]] = defaultdict(list)
        nodes = [mark for node, mark in self.shown.items() if mark is node and mark is not None]
        for node in nodes:
            item = self._item(node)
            if _is_mark(node) and item.inputs:
                marks[self._behind(node)].append(item)
            else:
                items.append(item)
        ordered: list[Item] = []
        for item in items:  # a mark follows what it marks, so that both are in one box
            ordered += [item, *marks.get(self._by_name[item.key], ())]
        types = self._types()
        return Sketch(types.get("", self.gm.__class__.__name__), tuple(ordered), types)

    def _types(self) -> dict[str, str]:
        """Types of modules by path; of those that only hold others, where their path and their calls go together."""
        types = {}
        for where in map(origin, self.gm.graph.nodes):
            parts = where.module_path.split(".") if where.module_path else []
            if where.module_type is not None:
                types[where.module_path] = where.module_type.__name__
            if len(parts) + 1 == len(where.module_types):
                for depth in range(len(parts)):
                    types.setdefault(".".join(parts[:depth]), where.module_types[depth].__name__)
        return types

    def _find(self, node: fx.Node) -> fx.Node | None:
        """The node whose mark stands for `node`; None for parameters and what only prepares them."""
        if node.op == "get_attr":
            return node if any(user.op == "output" for user in node.users) else None
        read = node.args[0] if node.args else None
        if isinstance(read, fx.Node) and _is_mark(node):
            return node if self._find(read) is not None else None
        if isinstance(read, fx.Node) and is_dequantized(node):
            return self._find(read)
        return node

    def _behind(self, mark: fx.Node) -> fx.Node:
        """The operation whose tensor a mark, or a row of marks, quantizes."""
        source = self.shown[mark.all_input_nodes[0]]
        assert source is not None
        return self._behind(source) if _is_mark(source) else source

    def _ties(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = defaultdict(list)
        for node in self.gm.graph.nodes:
            tie = self._tie(node)
            if tie is not None:
                groups[tie].append(node.name)
        return groups

    def _tie(self, node: fx.Node) -> str | None:
        if not _is_mark(node) or self.shown[node] is not node:
            return None
        for user in _readers(node):
            for edge, annotation in edge_annotations(user).items():
                read = user.args[edge] if isinstance(edge, int) else None
                if isinstance(read, fx.Node) and annotation.tie and self.shown.get(read) is node:
                    return str(annotation.tie)
        quantizer = quantizer_of(node)
        return quantizer.tie if quantizer is not None else None

    def _item(self, node: fx.Node) -> Item:
        inputs = (self.shown[n] for n in node.all_input_nodes)
        row = self.rows.get(node.name)
        common = {
            "key": node.name,
            "path": self._path(self._behind(node) if _is_mark(node) else node),
            "inputs": tuple(dict.fromkeys(n.name for n in inputs if n is not None)),
        }
        if _is_mark(node):
            return self._mark(node, common)  # type: ignore[arg-type]
        return Item(
            **common,  # type: ignore[arg-type]
            label=self._label(node),
            sub=self._sub(node),
            style=self._style(node),
            facts=tuple(self._facts(node)),
            related=tuple(self._skips(row)),
            weighted=row.weighted if row else 0,
            low=row.weighted if row and row.low else 0,
        )

    @staticmethod
    def _path(node: fx.Node) -> tuple[str, ...]:
        """The modules around a node; a module's own call is not inside it."""
        where = origin(node)
        path = tuple(where.module_path.split(".")) if where.module_path else ()
        return path[:-1] if where.call else path

    def _mark(self, node: fx.Node, common: Mapping[str, tuple[str, ...]]) -> Item:
        rows = [(row, edge) for row in self.rows.values() for edge in row.edges if self._reads(row, edge, node)]
        numbers = list(self._numbers(node))
        spec = next((edge.spec for _, edge in rows), "") or dict(numbers).get("spec", "")
        tie = self._tie(node)
        group = self.ties.get(tie, []) if tie else []
        letter = f" {_letter(list(self.ties).index(tie))}" if tie in self.ties else ""
        others = ", ".join(name for name in group if name != node.name)
        facts = [("quantizes", self._behind(node).name), ("node", node.name), *numbers]
        facts += [("spec", spec)] if spec and "spec" not in dict(numbers) else []
        facts += [("tie", f"{letter.strip()}: shares its scale with {others}")] if others else []
        for row, edge in rows:
            facts.append((f"read by {row.node}", f"{edge.role}: {_why(edge.rule, edge.reason)}"))
        solved = "scale" in dict(numbers)
        return Item(
            **common,  # type: ignore[arg-type]
            label=(spec.split()[0] if spec else "quantize") + letter,
            style="quantizer" if solved else "unsolved",
            facts=(*facts, *self._place(node)),
            related=tuple(n for n in group if n != node.name),
        )

    def _reads(self, row: OpRow, edge: EdgeRow, mark: fx.Node) -> bool:
        if not edge.quantized or not isinstance(edge.edge, int):
            return False
        reader = self._by_name[row.node]
        read = reader.args[edge.edge]
        return isinstance(read, fx.Node) and self.shown.get(read) is mark

    @cached_property
    def _by_name(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.gm.graph.nodes}

    def _numbers(self, node: fx.Node) -> Iterator[tuple[str, str]]:
        quantizer = quantizer_of(node)
        if quantizer is not None:
            yield "spec", str(quantizer.spec)
            if quantizer.solved:
                yield "scale", format_numbers(quantizer.scale)
                yield "zero point", format_numbers(quantizer.zero_point)
                yield "range", f"by {quantizer.solved_by}" if quantizer.solved_by else "set"
            else:
                yield "observes", "no scale yet: run fxq.calibrate"
            return
        for label, argument in zip(("scale", "zero point"), node.args[1:3], strict=False):
            values = constant(argument)
            if values is not None:
                yield label, format_numbers(values)

    def _label(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "output"):
            return node.name if node.op == "placeholder" else "output"
        weight = node.args[1] if kind_name(node).startswith("conv") and len(node.args) > 1 else None
        info = tensor_info(weight) if isinstance(weight, fx.Node) else None
        size = f" {TIMES.join(map(str, info.shape[2:]))}" if info and len(info.shape) > 2 else ""
        row = self.rows.get(node.name)
        residual = row is not None and any(edge.role == "skip" for edge in row.edges)
        return f"{'residual ' if residual else ''}{_shorten(kind_name(node))}{size}"

    def _sub(self, node: fx.Node) -> str:
        where, path = origin(node), self._path(node)
        name = node.name.removeprefix("_".join(path)).lstrip("_") or node.name
        if where.call:
            parts = where.module_path.split(".")
            name = ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
        info = tensor_info(node)
        shape = TIMES.join(map(str, info.shape)) if info else ""
        if node.op in ("placeholder", "output"):
            return shape
        return f"{_shorten(name)}  {shape}" if shape else _shorten(name)

    def _style(self, node: fx.Node) -> str:
        row, info = self.rows.get(node.name), tensor_info(node)
        if node.op in ("placeholder", "output"):
            return "io"
        if row is not None and row.low:
            return "int8" if row.precision == "int8" else "low"
        if info is not None and info.dtype in _HALF:
            return "half"
        known = info is not None or node.op == "call_module" or not node.meta
        return "float" if known or not has_state(self.gm) else "plain"

    def _facts(self, node: fx.Node) -> Iterator[tuple[str, str]]:
        yield "node", node.name
        yield "call", format_node(self.gm, node).split("  ")[0]
        info, row = tensor_info(node), self.rows.get(node.name)
        if info is not None:
            yield "shape", f"[{', '.join(map(str, info.shape))}]"
            yield "dtype", str(info.dtype).removeprefix("torch.")
        if row is not None:
            yield "precision", row.precision
            for edge in row.edges:
                planned = edge_annotations(node)[edge.edge].spec
                yield f"{edge.role} {edge.tensor}", _edge(edge, "" if planned is None else f"to be {planned}. ")
        held = [(n, constant(n)) for n in node.all_input_nodes]
        parameters = [f"{n.target} {_tensor(t)}" for n, t in held if t is not None]
        if parameters:
            yield "parameters", ", ".join(parameters)
        for note in self.notes.get(node.name, ()):
            yield note.kind, _why(note.rule, note.text)
        yield from self._place(node)

    def _place(self, node: fx.Node) -> Iterator[tuple[str, str]]:
        where = origin(node)
        if where.module_path:
            kind = f" ({where.module_type.__name__})" if where.module_type else ""
            yield "module", f"{where.module_path}{kind}"
        if where.source:
            yield "source", short_source(where.source)
        if where.code:
            yield "code", where.code.strip()

    def _skips(self, row: OpRow | None) -> Iterator[str]:
        """What a residual addition has to do with: the mark or tensor on its skip."""
        for edge in row.edges if row else ():
            if edge.role == "skip" and isinstance(edge.edge, int):
                read = self._by_name[row.node].args[edge.edge]  # type: ignore[union-attr]
                found = self.shown.get(read) if isinstance(read, fx.Node) else None
                if found is not None:
                    yield found.name


def short_source(source: str) -> str:
    """``file:line`` without what depends on the machine: below the folder that Python imported it from, or the cell."""
    path, _, line = source.rpartition(":")
    if "ipykernel_" in path:
        return f"notebook cell, line {line}"
    roots = sorted((r.rstrip("/\\") for r in [*sys.path, str(Path.cwd())] if len(r) > 1), key=len, reverse=True)
    root = next((r for r in roots if path.startswith((f"{r}/", f"{r}\\"))), None)
    return f"{path[len(root) + 1 :]}:{line}" if root else source


def _is_mark(node: fx.Node) -> bool:
    return quantizer_of(node) is not None or node.target is QUANTIZE


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a quantized tensor: past dequantize and the cast behind it."""
    for user in node.users:
        if is_dequantized(user):
            yield from _readers(user)
        else:
            yield user


def _edge(edge: EdgeRow, planned: str) -> str:
    if not edge.quantized:
        return f"{planned or 'float. '}{_why(edge.rule, edge.reason)}"
    scales = ""
    if edge.scale is not None:
        several = f"{edge.channels} scales up to" if edge.channels > 1 else "scale"
        scales = f", {several} {edge.scale:.4g}"
    return f"{edge.spec}{scales}. {_why(edge.rule, edge.reason)}"


def _why(rule: str, reason: str) -> str:
    title = f" ({RULES[rule].title})" if rule in RULES and RULES[rule].title not in reason else ""
    return f"{rule}{title}: {reason}"


def _tensor(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')}[{','.join(map(str, values.shape))}]"


def _shorten(text: str) -> str:
    return text if len(text) <= _NAME else f"{text[: _NAME - 1]}…"


def _letter(index: int) -> str:
    return chr(ord("A") + index % 26) + (str(index // 26) if index >= 26 else "")
