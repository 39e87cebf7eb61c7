"""Reading an FX graph, and the one object that changes it.

What fxq knows about a node lies in ``node.meta`` under a few keys, each a frozen value, so that a copied graph shares
nothing that can change: :class:`Origin` (where the user wrote it), :class:`TensorInfo` (what it gives) and, from
annotation on, :class:`Annotation` for each of its edges. What fxq knows about a whole graph lies in
``gm.meta["fxq"]``, a frozen :class:`State`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx

from .errors import FxqError, PassError
from .recipe import QSpec, Recipe
from .target import Target

__all__ = [
    "Aliases",
    "Annotation",
    "Editor",
    "Note",
    "Origin",
    "State",
    "Storage",
    "TensorInfo",
    "attribute",
    "chain_users",
    "constant",
    "edge_annotations",
    "error_at",
    "has_state",
    "origin",
    "set_state",
    "state",
    "tensor_info",
    "update_state",
]

STATE: Final = "fxq"
ORIGIN: Final = "origin"
TENSOR: Final = "tensor"
EDGES: Final = "edges"
ALIASES: Final = "aliases"


@dataclass(frozen=True)
class Origin:
    """Where a node comes from.

    Attributes:
        module_path: Dotted path of the innermost module whose forward made the node; "" for the model itself.
        module_types: Types of the modules from the model down to that one.
        source: The user's ``file:line``, the innermost frame outside torch; None where there is none.
        code: That line's text.
        call: True if the node is the whole of that module's own call (as ``layer1.0.conv1`` is of its Conv2d).
    """

    module_path: str = ""
    module_types: tuple[type[torch.nn.Module], ...] = ()
    source: str | None = None
    code: str = ""
    call: bool = False

    @property
    def module_type(self) -> type[torch.nn.Module] | None:
        """The innermost module's type."""
        return self.module_types[-1] if self.module_types else None


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a node's tensor, as the example inputs gave it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """The memory behind one tensor of the example run: address, shape, strides (elements), offset (elements)."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Aliases:
    """What the example run showed of a node's memory.

    Attributes:
        storages: The storage behind each tensor that the node gave.
        written: Addresses that the node changed in place.
    """

    storages: tuple[Storage, ...] = ()
    written: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Annotation:
    """What placement decided for one edge (or, under the key "output", for a node's own tensor).

    Attributes:
        spec: The complete spec; None leaves the edge float.
        rule: Id of the rule that decided (``R20``), or ``recipe``.
        reason: One sentence for people.
        priority: Index of the recipe rule that decided; -1 for the target's own placement.
        tie: Name of the tie group: quantizers with one tie share a scale (R27).
    """

    spec: QSpec | None
    rule: str
    reason: str
    priority: int = -1
    tie: str | None = None


@dataclass(frozen=True)
class Note:
    """Something a user should hear about a node: a declined fusion, an advice, a part that stays float.

    Attributes:
        node: Name of the node.
        rule: Rule id or the pass's name.
        text: One sentence.
        module_path: Where it came from.
        source: The user's ``file:line``.
        kind: ``declined``, ``advice`` or ``opaque``.
    """

    node: str
    rule: str
    text: str
    module_path: str = ""
    source: str | None = None
    kind: str = "declined"


@dataclass(frozen=True)
class State:
    """What fxq knows about a whole graph; frozen, so a copied GraphModule can share it.

    Attributes:
        target: What the graph is being prepared for.
        recipe: What the user asked for.
        example_args: Positional example inputs.
        example_kwargs: Keyword example inputs.
        properties: What holds of the graph by now (``traced``, ``canonical``, ``observed`` …).
        notes: What users should hear.
        provenance: Where the numbers came from: fxq's and torch's version, pipelines run, calibration.
    """

    target: Target
    recipe: Recipe = Recipe()
    example_args: tuple[Any, ...] = ()
    example_kwargs: Mapping[str, Any] = field(default_factory=dict)
    properties: frozenset[str] = frozenset()
    notes: tuple[Note, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def state(gm: fx.GraphModule) -> State:
    """The graph's :class:`State`.

    Raises:
        PassError: The GraphModule does not come from fxq.
    """
    found = gm.meta.get(STATE)
    if not isinstance(found, State):
        raise PassError(
            "this GraphModule does not come from fxq",
            hint="make it with fxq.trace(model, example_inputs) or fxq.prepare",
        )
    return found


def has_state(gm: fx.GraphModule) -> bool:
    """Whether the GraphModule comes from fxq."""
    return isinstance(gm.meta.get(STATE), State)


def set_state(gm: fx.GraphModule, new: State) -> None:
    """Give `gm` the state `new`."""
    gm.meta[STATE] = new


def update_state(gm: fx.GraphModule, **changes: Any) -> None:
    """Replace fields of the graph's state."""
    gm.meta[STATE] = dataclasses.replace(state(gm), **changes)


def origin(node: fx.Node) -> Origin:
    """Where `node` comes from; an empty Origin if nobody knows."""
    found = node.meta.get(ORIGIN)
    return found if isinstance(found, Origin) else Origin()


def tensor_info(node: fx.Node) -> TensorInfo | None:
    """Shape and dtype of what `node` gives; None if that is no single tensor."""
    found = node.meta.get(TENSOR)
    return found if isinstance(found, TensorInfo) else None


def edge_annotations(node: fx.Node) -> Mapping[int | str, Annotation]:
    """The node's annotations: by argument index for its edges, under "output" for its own tensor."""
    found: Mapping[int | str, Annotation] = node.meta.get(EDGES, {})
    return found


def error_at(kind: type[FxqError], message: str, node: fx.Node, hint: str | None = None) -> FxqError:
    """An error of type `kind` that names the node, its module path and the user's source line."""
    where = origin(node)
    source = f"{where.source}: {where.code}" if where.source and where.code else where.source
    return kind(message, node=node.name, module_path=where.module_path or None, source=source, hint=hint)


def attribute(gm: torch.nn.Module, path: str) -> Any:
    """What the dotted `path` names under `gm`."""
    found: Any = gm
    for part in path.split("."):
        found = getattr(found, part)
    return found


def constant(node: Any) -> torch.Tensor | None:
    """The tensor behind a ``get_attr`` node; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or node.graph.owning_module is None:
        return None
    found = attribute(node.graph.owning_module, str(node.target))
    return found if isinstance(found, torch.Tensor) else None


def chain_users(node: fx.Node, through: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """The first users of `node` for which `through` is false, looking past those for which it is true."""
    for user in node.users:
        if through(user):
            yield from chain_users(user, through)
        else:
            yield user


class Editor:
    """The only thing that changes a graph; it counts what it did.

    A pass gets one, changes the graph through it and never otherwise, so ``modified`` and the counts of a
    PassResult are true by construction.

    Attributes:
        gm: The graph module under change.
        counts: How often each kind of change was made.
        notes: What the pass wants users to hear.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.counts: Counter[str] = Counter()
        self.notes: list[Note] = []

    @property
    def graph(self) -> fx.Graph:
        """The graph under change."""
        return self.gm.graph

    @property
    def modified(self) -> bool:
        """Whether anything was changed."""
        return bool(self.counts)

    def note(self, node: fx.Node, rule: str, text: str, kind: str = "declined") -> None:
        """Keep something that users should hear about `node`; this is no change of the graph."""
        where = origin(node)
        self.notes.append(Note(node.name, rule, text, where.module_path, where.source, kind))

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """New nodes go before `node`."""
        with self.graph.inserting_before(node):
            yield

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """New nodes go after `node`; after a placeholder, after the last placeholder."""
        anchor = node
        while node.op == "placeholder" and anchor.next.op == "placeholder":
            anchor = anchor.next
        with self.graph.inserting_after(anchor):
            yield

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        like: fx.Node,
        name: str | None = None,
        info: TensorInfo | None = None,
    ) -> fx.Node:
        """A new ``call_function`` node at the current insertion point.

        Args:
            target: What it calls.
            args: Positional arguments.
            kwargs: Keyword arguments.
            like: The node whose origin, and unless `info` is given tensor info, it takes.
            name: A wish for its name; fx adds a suffix if it is taken.
            info: Shape and dtype of its result.
        """
        node = self.graph.create_node("call_function", target, args, dict(kwargs or {}), name=name)
        self._inherit(node, like, info)
        self.counts["created"] += 1
        return node

    def call_module(
        self, path: str, args: tuple[Any, ...], *, like: fx.Node, name: str | None = None
    ) -> fx.Node:
        """A new ``call_module`` node at the current insertion point; see :meth:`call`."""
        node = self.graph.create_node("call_module", path, args, {}, name=name)
        self._inherit(node, like, None)
        self.counts["created"] += 1
        return node

    def get_attr(self, path: str, *, like: fx.Node) -> fx.Node:
        """A new ``get_attr`` node for the tensor at `path`, at the current insertion point."""
        node = self.graph.create_node("get_attr", path, (), {}, name=path.replace(".", "_"))
        value = attribute(self.gm, path)
        info = TensorInfo(tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None
        self._inherit(node, like, info)
        if info is None:
            node.meta.pop(TENSOR, None)
        self.counts["created"] += 1
        return node

    def _inherit(self, node: fx.Node, like: fx.Node, info: TensorInfo | None) -> None:
        if ORIGIN in like.meta:
            node.meta[ORIGIN] = dataclasses.replace(origin(like), call=False)
        if info is not None:
            node.meta[TENSOR] = info
        elif TENSOR in like.meta:
            node.meta[TENSOR] = like.meta[TENSOR]

    def retarget(
        self,
        node: fx.Node,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Make `node` a ``call_function`` of `target`; it keeps its name, place, users and origin.

        Returns:
            Whether that changed anything.
        """
        new_kwargs = dict(kwargs or {})
        same = node.op == "call_function" and node.target is target
        if same and node.args == args and dict(node.kwargs) == new_kwargs:
            return False
        if not same:
            node.op, node.target = "call_function", target
        node.args, node.kwargs = args, new_kwargs
        self.counts["retargeted"] += 1
        return True

    def replace(self, old: fx.Node, new: fx.Node, only: Callable[[fx.Node], bool] | None = None) -> int:
        """Let users of `old` read `new`; `only` picks which. Returns how many changed."""
        changed = old.replace_all_uses_with(new, delete_user_cb=only or (lambda user: user is not new))
        if changed:
            self.counts["rewired"] += len(changed)
        return len(changed)

    def set_arg(self, node: fx.Node, index: int, value: Any) -> None:
        """Set one positional argument of `node`."""
        if node.args[index] is value:
            return
        node.update_arg(index, value)
        self.counts["rewired"] += 1

    def map_args(self, node: fx.Node, change: Callable[[fx.Node], Any]) -> None:
        """Replace each node among the arguments of `node`, nested ones too, by ``change(it)``."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), change)
        if not _same(args, node.args) or not _same(kwargs, node.kwargs):
            node.args, node.kwargs = args, kwargs
            self.counts["rewired"] += 1

    def erase(self, node: fx.Node) -> None:
        """Remove `node`, which nobody may use any more."""
        self.graph.erase_node(node)
        self.counts["erased"] += 1

    def erase_dead(self, nodes: Iterable[fx.Node]) -> None:
        """Remove those of `nodes` that nobody uses, and what only they used; inputs stay."""
        work = list(nodes)
        while work:
            node = work.pop()
            if node.users or node.op in ("placeholder", "output") or node._erased:
                continue
            work.extend(node.all_input_nodes)
            self.erase(node)

    def annotate(self, node: fx.Node, edge: int | str, annotation: Annotation) -> None:
        """Say how an edge of `node` (argument index), or its own tensor ("output"), is quantized."""
        old = edge_annotations(node)
        if old.get(edge) != annotation:
            node.meta[EDGES] = {**old, edge: annotation}
            self.counts["annotated"] += 1

    def set_tensor(self, path: str, value: torch.Tensor) -> None:
        """Store a tensor at a dotted path: a floating Parameter if it requires grad or was one, else a buffer."""
        owner_path, _, name = path.rpartition(".")
        owner = self.make_modules(owner_path)
        for registry in (owner._parameters, owner._buffers):
            registry.pop(name, None)
        if isinstance(value, torch.nn.Parameter):
            owner.register_parameter(name, value)
        else:
            owner.register_buffer(name, value)
        self.counts["stored"] += 1

    def set_module(self, path: str, module: torch.nn.Module) -> None:
        """Store a module at a dotted path."""
        owner_path, _, name = path.rpartition(".")
        self.make_modules(owner_path).add_module(name, module)
        self.counts["stored"] += 1

    def make_modules(self, path: str) -> torch.nn.Module:
        """The module at a dotted path; missing ones on the way are made."""
        owner: torch.nn.Module = self.gm
        for part in path.split(".") if path else ():
            child = getattr(owner, part, None)
            if child is None:
                child = torch.nn.Module()
                owner.add_module(part, child)
            owner = child
        return owner

    def free_path(self, path: str) -> str:
        """`path`, or with the first numeric suffix under which nothing is stored yet."""
        candidate, number = path, 0
        while _has(self.gm, candidate):
            number += 1
            candidate = f"{path}_{number}"
        return candidate

    def drop_unused(self) -> None:
        """Remove submodules, parameters and buffers that no node reads."""
        used = {str(n.target) for n in self.graph.nodes if n.op in ("get_attr", "call_module")}
        for path, module in list(self.gm.named_modules(remove_duplicate=False)):
            if any(path == u or path.startswith(f"{u}.") for u in used):
                continue
            for registry in (module._parameters, module._buffers):
                for name in [n for n in registry if (f"{path}.{n}" if path else n) not in used]:
                    del registry[name]
                    self.counts["dropped"] += 1
        keep = {u[:i] for u in used for i in range(len(u) + 1) if i == len(u) or u[i] == "."}
        for path, _ in sorted(self.gm.named_modules(remove_duplicate=False), key=lambda row: -len(row[0])):
            if path and path not in keep and not any(path.startswith(f"{u}.") for u in used):
                owner_path, _, name = path.rpartition(".")
                owner = attribute(self.gm, owner_path) if owner_path else self.gm
                del owner._modules[name]
                self.counts["dropped"] += 1


def _has(gm: torch.nn.Module, path: str) -> bool:
    """Whether something is stored at `path`; a parameter registered as None (``bias=False``) is nothing."""
    found: Any = gm
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return False
    return True


def _same(a: Any, b: Any) -> bool:
    """Equality of argument trees that compares nodes by identity and never tensors by value."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, slice) and isinstance(b, slice):
        return all(_same(getattr(a, k), getattr(b, k)) for k in ("start", "stop", "step"))
    return a is b or bool(type(a) is type(b) and a == b)
