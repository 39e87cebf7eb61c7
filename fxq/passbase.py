"""The pass: one rewrite of a graph, with a contract.

A pass is a frozen dataclass whose fields are its options. Its author writes :meth:`Pass.call` and, if the
pass promises something, :meth:`Pass.ensures`; the base class owns the ritual around them (requirements,
recompilation, the promise, honest counts). A custom pass is written exactly like a built-in one.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import fx

from . import html
from .editor import Editor
from .errors import FxqError, PassError
from .graph import Note, state, update_state

__all__ = ["Numeric", "Pass", "PassResult", "providers"]

Numeric = Literal["exact", "rounding", "changes-values"]


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        graph_module: The graph after the pass.
        modified: Whether anything in it changed.
        counts: How often each kind of change was made, as the Editor counted.
        notes: What the pass wants users to hear.
    """

    graph_module: fx.GraphModule
    modified: bool
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    def _repr_html_(self) -> str:
        counts = ", ".join(f"{kind} {n}" for kind, n in sorted(self.counts.items()))
        told = [(note.rule, note.node, note.text) for note in self.notes]
        shown = [html.folded_table(("rule", "node", ""), told, "notes")] if told else []
        nodes = html.element("p", f"the graph has {len(self.graph_module.graph.nodes)} nodes")
        return html.card(counts or "nothing changed", [nodes, *shown])


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes.

    Class attributes:
        name: Kebab-case name, by which pipelines know the pass.
        requires: Properties that must hold before it (see :data:`fxq.verify.PROPERTIES`).
        provides: Properties that hold after it.
        numeric: What it does to the model's output: ``exact``, ``rounding`` or ``changes-values``.

    Example:
        >>> import torch
        >>> from fxq.editor import Editor
        >>> @dataclass(frozen=True)
        ... class TanhToSigmoid(Pass):
        ...     name = "tanh-to-sigmoid"
        ...     numeric = "changes-values"
        ...     def call(self, editor: Editor) -> None:
        ...         for node in editor.graph.find_nodes(op="call_function", target=torch.tanh):
        ...             editor.retarget(node, torch.sigmoid, node.args)
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ()
    numeric: ClassVar[Numeric] = "exact"

    @abstractmethod
    def call(self, editor: Editor) -> None:
        """Change the graph through `editor`, and in no other way."""

    def ensures(self, gm: fx.GraphModule) -> None:
        """Check what the pass promises on the graph that it left.

        Raises:
            PassError: The promise is broken.
        """
        return

    def __call__(self, gm: fx.GraphModule, *, inplace: bool = False) -> PassResult:
        """Run the pass.

        Args:
            gm: A graph module from fxq.
            inplace: Change `gm` itself instead of a copy.

        Raises:
            PassError: A required property does not hold, or the pass broke its promise.
        """
        missing = [p for p in self.requires if p not in state(gm).properties]
        if missing:
            raise PassError(
                f"pass {self.name} needs a graph that is {', '.join(missing)}",
                hint=f"run first: {', '.join(providers(p) for p in missing)}",
            )
        work = gm if inplace else copy.deepcopy(gm)
        editor = Editor(work)
        try:
            self.call(editor)
        except FxqError:
            raise
        except Exception as error:
            raise PassError(
                f"pass {self.name} failed: {type(error).__name__}: {error}",
                hint="this is a bug in the pass; its traceback is above",
            ) from error
        if editor.modified:
            self._finish(work)
        self.ensures(work)
        now = state(work)
        known = set(now.notes)
        new = tuple(note for note in dict.fromkeys(editor.notes) if note not in known)
        held = now.properties | set(self.provides)
        if new or held != now.properties:
            update_state(work, properties=held, notes=(*now.notes, *new))
        return PassResult(work, editor.modified, dict(editor.counts), new)

    def _finish(self, work: fx.GraphModule) -> None:
        try:
            work.graph.lint()
        except (RuntimeError, ValueError) as error:
            raise PassError(
                f"pass {self.name} left a broken graph: {error}", hint="this is a bug in the pass"
            ) from error
        work.recompile()

    def __str__(self) -> str:
        options = ", ".join(f"{k}={_text(v)}" for k, v in self.options.items())
        return f"{self.name}{{{options}}}" if options else self.name

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        }


def _text(value: Any) -> str:
    """An option as :mod:`fxq.pass_text` reads it."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    return repr(value)


def providers(need: str) -> str:
    """Which passes provide a property, for people (``DropIdentities()``), of all that are loaded."""
    found: set[str] = set()
    work = list(Pass.__subclasses__())
    while work:
        kind = work.pop()
        work.extend(kind.__subclasses__())
        if need in kind.provides:
            found.add(f"{kind.__name__}()")
    return " or ".join(sorted(found)) or f"a pass that provides {need!r}"
