"""Concatenations whose result meets a quantizer only behind pointwise operations: they travel in INT8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import fx

from ..editor import Editor
from ..graph import Annotation, State, constant, edge_annotations, state, tensor_info
from ..ops import kind_name
from ..passbase import Pass
from .annotate import applied, asked, governing
from .tie_scales import moved, tied

__all__ = ["QuantizeConcat"]


@dataclass(frozen=True)
class QuantizeConcat(Pass):
    """Quantize what goes into a concatenation, and what comes out, where every reader quantizes its result anyway.

    Problem: where a normalization or an activation stands between a concatenation and the convolution behind it
    (DenseNet, and pre-activation blocks of its kind), the quantizer lies behind that operation and does not move over
    it. So each part is written in float and read again in float, in DenseNet by every layer that follows.

    Rewrite: each such concatenation, and each tensor that goes into one, gets a quantizer on its output. ``tie-scales``
    gives them one scale, so TensorRT pushes the quantizer behind the concatenation onto its inputs, where it cancels
    out (R27), and moves it over a max-pool (R19): the parts are stored in INT8, at a quarter of the bytes. What reads
    them meets a quantizer behind it, so no operation without weights is given INT8 and gives float (R26).

    It is decided for all tensors together that only pass values on to each other, which share one scale. Their readers
    may be: edges that are quantized already, operations of the target's ``concat.through`` with one input whose own
    readers are likewise, and operations that pass the values on.

    Declines, with a note where a quantizer is near: any other reader (an addition, which takes a convolution's result
    in float; a model's output) and what a recipe keeps float. Without one: concatenations that a quantizer follows
    anyway, those of which nothing is read twice, where two roundings would gain little (R31), and inputs of several
    types.
    """

    name: ClassVar[str] = "quantize-concat"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)

    def call(self, editor: Editor) -> None:
        now = state(editor.gm)
        if not now.target.concat.kinds:
            return
        for members in tied(editor.graph, now.target.ties):
            group = _Group(tuple(members), now)
            if not (group.open and group.shared and group.uniform):
                continue
            refusal = group.refusal()
            if refusal is not None:
                if group.near:
                    editor.note(group.concats[0], *refusal)
                continue
            for tensor in (*group.parts, *group.concats):
                if "output" not in edge_annotations(tensor):
                    editor.annotate(tensor, "output", _annotation(tensor, group, now))


@dataclass(frozen=True)
class _Group:
    """Tensors that only pass values on to each other, with at least one concatenation or none.

    Attributes:
        members: In the order of the graph.
        now: What is known of the graph.
    """

    members: tuple[fx.Node, ...]
    now: State

    @cached_property
    def concats(self) -> list[fx.Node]:
        return [m for m in self.members if kind_name(m) in self.now.target.concat.kinds]

    @cached_property
    def parts(self) -> list[fx.Node]:
        """What goes into the concatenations, constants left out, and comes out of none of them."""
        found = (part for concat in self.concats for part in moved(concat, self.now.target.ties))
        return [part for part in dict.fromkeys(found) if kind_name(part) not in self.now.target.concat.kinds]

    @cached_property
    def behind(self) -> list[fx.Node]:
        """The concatenations, and the members that pass their values on, in the order of the graph."""
        found: dict[fx.Node, None] = {}
        for member in self.members:
            concat = kind_name(member) in self.now.target.concat.kinds
            if concat or any(source in found for source in moved(member, self.now.target.ties)):
                found[member] = None
        return list(found)

    @property
    def open(self) -> bool:
        """Whether there are concatenations, and no quantizer whose place could move in front of them (R19, R27)."""
        return bool(self.concats) and all(governing(member) is None for member in self.behind)

    @property
    def shared(self) -> bool:
        """Whether one of the tensors is read more than once, so that its bytes count more than once (R31)."""
        return any(len(tensor.users) > 1 for tensor in (*self.parts, *self.concats))

    @property
    def uniform(self) -> bool:
        """Whether all are single floating tensors of one type."""
        infos = [tensor_info(tensor) for tensor in (*self.parts, *self.concats)]
        types = {None if info is None else info.dtype for info in infos}
        return len(types) == 1 and all(dtype is not None and dtype.is_floating_point for dtype in types)

    @property
    def near(self) -> bool:
        """Whether a quantizer lies behind one of the concatenations."""
        return any(quantized for concat in self.concats for _, quantized in self._ends(concat))

    def refusal(self) -> tuple[str, str] | None:
        """Rule and sentence that speak against it."""
        for tensor in (*self.parts, *self.concats):
            said = applied(tensor, "output", self.now.recipe)
            if said is not None and said[1].edges.output is None:
                reason = said[1].reason or f"recipe rule {said[0]}, {said[1].text}"
                return "recipe", f"this concatenation stays float: {tensor}, {reason}"
        for tensor in self.members:
            for reader, quantized in self._ends(tensor):
                if not quantized:
                    return "R26", f"this concatenation stays float: {reader} reads {tensor} and gives no INT8"
        return None

    def _ends(self, tensor: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
        """The readers of a tensor, behind what it may pass through, and whether they read it quantized."""
        ties, waiting = self.now.target.ties, [tensor]
        while waiting:
            here = waiting.pop()
            for user in here.users:
                if user in self._held and any(source is here for source in moved(user, ties)):
                    continue
                if _reads_quantized(user, here):
                    yield user, True
                elif self._passes_on(user, here):
                    waiting.append(user)
                else:
                    yield user, False

    @cached_property
    def _held(self) -> frozenset[fx.Node]:
        return frozenset(self.members)

    def _passes_on(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether `node` only computes something of `source` that a kernel computes on the way."""
        target = self.now.target
        moving = [n for n in node.all_input_nodes if constant(n) is None]
        return kind_name(node) in target.concat.through | target.ties and moving == [source]


def _reads_quantized(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` reads `source` through a quantizer, or gives its own result through one."""
    decided = edge_annotations(node)
    read = [decided.get(edge) for edge, argument in enumerate(node.args) if argument is source]
    here = bool(read) and all(annotation is not None and annotation.spec is not None for annotation in read)
    own = decided.get("output")
    return here or (own is not None and own.spec is not None)


def _annotation(tensor: fx.Node, group: _Group, now: State) -> Annotation:
    concats = [tensor, *tensor.users] if tensor in group.concats else tensor.users
    concat = next(node for node in concats if node in group.concats)
    spec, priority, how = asked(concat, "input", "input 0", now)
    if tensor is concat:
        reason = "this concatenation is read through operations that give INT8, and so are its parts"
    else:
        reason = f"it goes into {concat} and is stored in INT8: all that read it give INT8 themselves"
    return Annotation(spec, "R27", reason + how, priority)
