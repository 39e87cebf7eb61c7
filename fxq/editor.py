"""The one object that changes a graph, and counts what it did."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from .graph import (
    ALIASES,
    EDGES,
    ORIGIN,
    TENSOR,
    Annotation,
    Note,
    TensorInfo,
    attribute,
    edge_annotations,
    origin,
)

__all__ = ["Editor"]


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
        self._stored: dict[str, list[fx.Node]] | None = None
        self._made: set[fx.Node] = set()

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
        with self.graph.inserting_before(anchor.next):
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
        self._count_made(node)
        return node

    def call_module(self, path: str, args: tuple[Any, ...], *, like: fx.Node, name: str | None = None) -> fx.Node:
        """A new ``call_module`` node at the current insertion point; see :meth:`call`."""
        node = self.graph.create_node("call_module", path, args, {}, name=name)
        self._inherit(node, like, None)
        self._count_made(node)
        return node

    def get_attr(self, path: str, *, like: fx.Node) -> fx.Node:
        """A new ``get_attr`` node for the tensor at `path`, at the current insertion point."""
        node = self.graph.create_node("get_attr", path, (), {}, name=path.replace(".", "_"))
        value = attribute(self.gm, path)
        info = TensorInfo(tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None
        self._inherit(node, like, info)
        if info is None:
            node.meta.pop(TENSOR, None)
        if self._stored is not None:
            self._stored.setdefault(path, []).append(node)
        self._count_made(node)
        return node

    def stored(self, path: str) -> Sequence[fx.Node]:
        """The ``get_attr`` nodes for what is stored at `path`; looked up, not searched for."""
        if self._stored is None:
            self._stored = {}
            for node in self.graph.nodes:
                if node.op == "get_attr":
                    self._stored.setdefault(str(node.target), []).append(node)
        return self._stored.get(path, ())

    def copy(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> fx.Node:
        """What `node` calls, called again with other arguments, at the current insertion point."""
        made = self.graph.create_node(node.op, node.target, args, dict(kwargs), name=node.name)
        made.meta.update({key: value for key, value in node.meta.items() if key != ALIASES})
        self._count_made(made)
        return made

    def _count_made(self, node: fx.Node) -> None:
        self._made.add(node)
        self.counts["created"] += 1

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
        if same and _same(node.args, args) and _same(node.kwargs, new_kwargs):
            return False
        if not same:
            node.op, node.target = "call_function", target
        node.args, node.kwargs = args, new_kwargs
        self.counts["retargeted"] += 1
        return True

    def retarget_method(self, node: fx.Node, method: str) -> None:
        """Make `node`, a method call, call another method with the same arguments."""
        if node.target != method:
            node.target = method
            self.counts["retargeted"] += 1

    def retarget_module(self, node: fx.Node, path: str, args: tuple[Any, ...]) -> bool:
        """Make `node` a ``call_module`` of the module at `path`; it keeps its name, place, users and origin.

        Returns:
            Whether that changed anything.
        """
        if node.op == "call_module" and node.target == path and node.args == args and not node.kwargs:
            return False
        if node.op != "call_module" or node.target != path:
            node.op, node.target = "call_module", path
        node.args, node.kwargs = args, {}
        self.counts["retargeted"] += 1
        return True

    def replace(self, old: fx.Node, new: fx.Node, only: Callable[[fx.Node], bool] | None = None) -> int:
        """Let users of `old` read `new`; `only` picks which.

        Without `only` those are all but `new` itself and the nodes that were made for it, which may read `old`.

        Returns:
            How many changed.
        """
        changed = old.replace_all_uses_with(new, delete_user_cb=only or self._not_behind(new))
        if changed:
            self.counts["rewired"] += len(changed)
        return len(changed)

    def _not_behind(self, new: fx.Node) -> Callable[[fx.Node], bool]:
        """Whether a user is neither `new` nor a node that this editor made on the way to it."""
        behind, work = {new}, [new]
        for node in work:
            more = [n for n in node.all_input_nodes if n in self._made and n not in behind]
            behind.update(more)
            work += more
        return lambda user: user not in behind

    def set_arg(self, node: fx.Node, index: int, value: Any) -> None:
        """Set one positional argument of `node`."""
        if node.args[index] is value:
            return
        node.update_arg(index, value)
        self.counts["rewired"] += 1

    def set_kwarg(self, node: fx.Node, name: str, value: Any) -> None:
        """Set one keyword argument of `node`."""
        if name in node.kwargs and _same(node.kwargs[name], value):
            return
        node.update_kwarg(name, value)
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
        if self._stored is not None and node.op == "get_attr":
            self._stored[str(node.target)].remove(node)
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
        """Store a tensor at a dotted path: a Parameter stays one, any other tensor becomes a buffer."""
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
        self.make_modules(owner_path).add_module(name, module.train(self.gm.training))
        self.counts["stored"] += 1

    def set_option(self, path: str, name: str, value: Any) -> None:
        """Set a plain attribute of the module at a dotted path."""
        setattr(attribute(self.gm, path), name, value)
        self.counts["stored"] += 1

    def make_modules(self, path: str) -> torch.nn.Module:
        """The module at a dotted path; missing ones on the way are made."""
        owner: torch.nn.Module = self.gm
        for part in path.split(".") if path else ():
            child = getattr(owner, part, None)
            if child is None:
                child = torch.nn.Module().train(self.gm.training)
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
            if not used.isdisjoint(_prefixes(path)):
                continue
            for registry in (module._parameters, module._buffers):
                for name, stored in registry.items():
                    if stored is not None and (f"{path}.{name}" if path else name) not in used:
                        registry[name] = None  # not deleted: printing a Conv2d asks for its bias
                        self.counts["dropped"] += 1
        keep = {prefix for u in used for prefix in _prefixes(u)}
        for path, _ in sorted(self.gm.named_modules(remove_duplicate=False), key=lambda row: -len(row[0])):
            if path and path not in keep and used.isdisjoint(_prefixes(path)):
                owner_path, _, name = path.rpartition(".")
                owner = attribute(self.gm, owner_path) if owner_path else self.gm
                del owner._modules[name]
                self.counts["dropped"] += 1


def _prefixes(path: str) -> list[str]:
    """``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


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
