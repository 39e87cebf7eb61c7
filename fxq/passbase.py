"""The pass: one rewrite of a graph, with a contract.

A pass is a frozen dataclass whose fields are its options. Its author writes :meth:`Pass.call` and, if the
pass promises something, :meth:`Pass.ensures`; the base class owns the ritual around them (requirements,
recompilation, the promise, honest counts). A custom pass is written exactly like a built-in one.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, Self, get_args

from torch import fx

from . import html
from .editor import Editor
from .errors import FxqError, PassError
from .graph import EDGES, Note, state, update_state

__all__ = ["Numeric", "Pass", "PassResult", "providers"]

Numeric = Literal["exact", "rounding", "changes-values"]
_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*")


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

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Make a pass.

        Raises:
            PassError: Its class declares something wrongly; the message says what to write.
        """
        _check_declaration(cls)
        return super().__new__(cls)

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
            PassError: A required property does not hold; the pass failed, broke its promise, or changed the graph
                past the Editor and nothing through it.
        """
        missing = [p for p in self.requires if p not in state(gm).properties]
        if missing:
            raise PassError(
                f"pass {self.name} needs a graph that is {', '.join(missing)}",
                hint=f"run first: {', '.join(providers(p) for p in missing)}",
            )
        work = gm if inplace else copy.deepcopy(gm)
        editor, before = Editor(work), _calls(work)
        with self._bugs_named():
            self.call(editor)
        if editor.modified:
            self._finish(work)
        elif _calls(work) != before:
            raise PassError(
                f"pass {self.name} changed the graph past the Editor, which counts changes",
                hint="change it by editor.retarget, editor.replace, editor.erase, editor.annotate …",
            )
        with self._bugs_named():
            self.ensures(work)
        now = state(work)
        known = set(now.notes)
        new = tuple(note for note in dict.fromkeys(editor.notes) if note not in known)
        held = now.properties | set(self.provides)
        if new or held != now.properties:
            update_state(work, properties=held, notes=(*now.notes, *new))
        return PassResult(work, editor.modified, dict(editor.counts), new)

    @contextmanager
    def _bugs_named(self) -> Iterator[None]:
        """Turn what is no error of fxq into one that names the pass."""
        try:
            yield
        except FxqError:
            raise
        except Exception as error:
            raise PassError(
                f"pass {self.name} failed: {type(error).__name__}: {error}",
                hint="this is a bug in the pass; its traceback is above",
            ) from error

    def _finish(self, work: fx.GraphModule) -> None:
        try:
            work.graph.lint()
        except (RuntimeError, ValueError) as error:
            lines = str(error).splitlines()  # the graph follows
            raise PassError(
                f"pass {self.name} left a broken graph: {lines[0]}", hint="this is a bug in the pass"
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
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = (f"{f.name}={_text(getattr(value, f.name))}" for f in dataclasses.fields(value) if f.init)
        return f"{type(value).__name__}({', '.join(given)})"
    if type(value) is dict:
        return "{" + ", ".join(f"{_text(key)}: {_text(held)}" for key, held in value.items()) + "}"
    if type(value) in (set, frozenset) and value:
        held = "{" + ", ".join(sorted(map(_text, value))) + "}"
        return held if type(value) is set else f"frozenset({held})"
    if type(value) in (tuple, list):
        inner = ", ".join(map(_text, value))
        return f"[{inner}]" if type(value) is list else f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def _check_declaration(kind: type[Pass]) -> None:
    """Refuse what would go wrong later, or change nothing in silence."""
    name, where = getattr(kind, "name", None), kind.__qualname__
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        said = "has no name" if name is None else f"is called {name!r}, which pipelines cannot write"
        raise PassError(f"pass {where} {said}", hint='give it one in kebab-case: name = "fold-pad"')
    for key in ("requires", "provides"):
        value: object = getattr(kind, key)
        if not isinstance(value, tuple) or not all(isinstance(one, str) for one in value):
            raise PassError(
                f"{key} of pass {name} is {value!r}, no tuple of names", hint=f'write {key} = ("canonical",)'
            )
    if kind.numeric not in get_args(Numeric):
        raise PassError(
            f"numeric of pass {name} is {kind.numeric!r}", hint=f"use one of {', '.join(get_args(Numeric))}"
        )
    loose = [key for key, kept in inspect.get_annotations(kind).items() if "ClassVar" not in str(kept)]
    if loose and "__dataclass_params__" not in vars(kind):
        raise PassError(
            f"pass {name} has the options {', '.join(loose)} and is no dataclass",
            hint=f"write @dataclass(frozen=True) above class {where}",
        )


def _calls(gm: fx.GraphModule) -> list[tuple[Any, ...]]:
    """What each node calls and how it is annotated; fx replaces these values and does not change them."""
    return [(n, n.op, n.target, n.args, n.kwargs, n.meta.get(EDGES)) for n in gm.graph.nodes]


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
