"""Functionalize: no node changes a tensor in place."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from ..editor import Editor
from ..errors import FxqError, TraceError
from ..graph import ALIASES, Aliases, TensorInfo, attribute, error_at, tensor_info
from ..ops import inplace_target
from ..passbase import Pass

__all__ = ["Functionalize"]

_RESHAPES = frozenset(
    ("view", "reshape", "flatten", "unsqueeze", "squeeze", "unflatten", "view_as", "reshape_as", "ravel")
)
_TRANSPOSES = frozenset(("transpose", "swapaxes", "swapdims", "t"))
_PARTS = frozenset(("chunk", "split", "unbind", "tensor_split"))


@dataclass(frozen=True)
class Functionalize(Pass):
    """Rewrite in-place operations so that later reads of the tensor become reads of the result.

    Problem: ``x.relu_()`` changes what every later reader of ``x`` sees, and what readers of its views see; a graph
    rewrite that moves or drops nodes would not know. fx's own dead-code elimination drops ``x.relu_()`` outright.

    Rewrite: which nodes write, and which tensors share memory, is known from the example run, not guessed from names.
    A write becomes the same operation out of place; its result is carried back through views to the tensor that owns
    the memory (``reshape_as``, inverse permutation, ``slice_scatter``), and a view that is read after the write is
    taken again from the new owner.

    Declines: nothing. A write that it cannot rewrite (through ``expand``, ``out=``, inside a leaf module) is a
    TraceError with the user's line. Inputs of the model that were changed in place no longer are.
    """

    name: ClassVar[str] = "functionalize"
    requires: ClassVar[tuple[str, ...]] = ("traced",)
    provides: ClassVar[tuple[str, ...]] = ("functional",)

    def call(self, editor: Editor) -> None:
        memory = _Memory(editor)
        for node in list(editor.graph.nodes):
            if memory.version:
                with editor.before(node):
                    editor.map_args(node, memory.read)
            if _aliases(node).written and node.op != "output":
                memory.write(node)
            else:
                memory.define(node)
        for node in editor.graph.nodes:
            node.meta.pop(ALIASES, None)


def _aliases(node: fx.Node) -> Aliases:
    found = node.meta.get(ALIASES)
    return found if isinstance(found, Aliases) else Aliases()


@dataclass
class _Memory:
    """Which node stands for which tensor, while the graph is walked in order.

    Attributes:
        base: A view and the node it was taken from; an owner of memory has no entry.
        version: How often the memory of an owner was written so far.
        latest: The node that stands for a tensor, and the version it stands for.
    """

    editor: Editor
    base: dict[fx.Node, fx.Node] = field(default_factory=dict)
    version: dict[fx.Node, int] = field(default_factory=dict)
    latest: dict[fx.Node, tuple[int, fx.Node]] = field(default_factory=dict)
    original: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def define(self, node: fx.Node) -> None:
        """Enter a node that writes nothing: a view of one of its inputs, or an owner of its own."""
        mine = {s.address for s in _aliases(node).storages}
        if node.op in ("placeholder", "output", "get_attr") or not mine:
            return
        for source in node.all_input_nodes:
            source = self.original.get(source, source)
            if mine & {s.address for s in _aliases(source).storages}:
                self.base[node] = source
                return

    def owner(self, node: fx.Node) -> fx.Node:
        while node in self.base:
            node = self.base[node]
        return node

    def read(self, node: fx.Node) -> fx.Node:
        """The node that stands for `node` now; views of written memory are taken again."""
        node = self.original.get(node, node)
        version = self.version.get(self.owner(node), 0)
        known = self.latest.get(node, (0, node))
        if known[0] == version:
            return known[1]
        again = self._replay(node, self.read(self.base[node]))
        self._stands(node, version, again)
        return again

    def _stands(self, node: fx.Node, version: int, new: fx.Node) -> None:
        self.latest[node] = (version, new)
        self.original.setdefault(new, node)

    def _replay(self, view: fx.Node, source: fx.Node) -> fx.Node:
        old = self.base[view]
        current = self.latest.get(old, (0, old))[1]
        swap: Callable[[fx.Node], fx.Node] = lambda n: (
            source if self.original.get(n, n) is old or n is current else n
        )
        args, kwargs = fx.map_arg((view.args, view.kwargs), swap)
        copy = self.editor.graph.create_node(view.op, view.target, args, kwargs)
        copy.meta.update({k: v for k, v in view.meta.items() if k != ALIASES})
        self.editor.counts["created"] += 1
        return copy

    def write(self, node: fx.Node) -> None:
        """Turn a write into a computation whose result stands for the tensor from here on."""
        written = node.args[0] if node.args else None
        if not isinstance(written, fx.Node) or "out" in node.kwargs:
            raise _refuse(node, "writes through out= or a keyword")
        target = self.original.get(written, written)
        result = self._out_of_place(node, written)
        self._spread(target, result)
        if node is not result:
            node.replace_all_uses_with(result)
            self.editor.erase(node)
        else:
            self.base[node] = target
            self._stands(node, self.version[self.owner(target)], result)

    def _spread(self, tensor: fx.Node, value: fx.Node) -> None:
        """`value` is what `tensor` holds now; carry it back to the owner of the memory."""
        owner = self.owner(tensor)
        version = self.version.get(owner, 0)
        path: list[tuple[fx.Node, fx.Node]] = [(tensor, value)]
        anchor = value
        while tensor in self.base:
            source = self.base[tensor]
            with self.editor.after(anchor):
                value = self._into(tensor, self.latest.get(source, (0, source))[1], value)
            anchor = value
            tensor = source
            path.append((tensor, value))
        self.version[owner] = version + 1
        for held, new in path:
            self._stands(held, version + 1, new)

    def _out_of_place(self, node: fx.Node, written: fx.Node) -> fx.Node:
        editor = self.editor
        if node.target is operator.setitem:
            index, value = node.args[1], node.args[2]
            with editor.before(node):
                return _set_item(editor, node, written, index, value)
        pure = inplace_target(node)
        if callable(pure):
            editor.retarget(node, pure, node.args, node.kwargs)
            return node
        if isinstance(pure, str) and hasattr(torch.Tensor, pure):
            node.target = pure
            editor.counts["retargeted"] += 1
            return node
        if node.kwargs.get("inplace") is True:
            editor.retarget(node, node.target, node.args, {**node.kwargs, "inplace": False})  # type: ignore[arg-type]
            return node
        if node.op == "call_function" and True in node.args[1:]:  # inplace=True given by position
            at = len(node.args) - 1
            editor.set_arg(node, at, False)
            return node
        if node.op == "call_module":
            module = attribute(editor.gm, str(node.target))
            if hasattr(module, "inplace") and not list(module.children()):
                module.inplace = False  # for all its calls: each of them is found to write
                editor.counts["retargeted"] += 1
                return node
        raise _refuse(node, "changes its input in a way that cannot be rewritten")

    def _into(self, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
        """The tensor `base` with `value` in the place that `view` shows of it."""
        info = tensor_info(self.base[view])
        mine, whole = _aliases(view).storages, _aliases(self.base[view]).storages
        if not mine or (len(whole) == 1 and mine == whole):
            return value
        call = str(getattr(view.target, "__name__", view.target))
        editor = self.editor
        if call in _RESHAPES:
            return editor.call(torch.Tensor.reshape_as, (value, base), like=base, info=info)
        if call in _TRANSPOSES:
            return editor.call(view.target if callable(view.target) else getattr(torch, call),
                               (value, *view.args[1:]), view.kwargs, like=base, info=info)  # fmt: skip
        if call == "permute":
            dims = view.args[1] if isinstance(view.args[1], tuple | list) else view.args[1:]
            inverse = tuple(sorted(range(len(dims)), key=lambda i: dims[i] % len(dims)))  # type: ignore[arg-type,operator]
            return editor.call(torch.permute, (value, inverse), like=base, info=info)
        if view.target is operator.getitem:
            return self._into_part(view, base, value)
        raise _refuse(view, f"is a view through {call} whose memory is changed later")

    def _into_part(self, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
        source = self.base[view]
        call = str(getattr(source.target, "__name__", source.target))
        if tensor_info(source) is not None:
            return _scatter(
                self.editor,
                view,
                base,
                _index_items(view, view.args[1], len(tensor_info(source).shape)),
                value,
            )  # type: ignore[union-attr]
        if call not in _PARTS or not isinstance(view.args[1], int):
            raise _refuse(view, f"is a part of {call} whose memory is changed later")
        # a part of chunk or split: the tuple has no value of its own, so write into what was split and split it again
        whole = self.base[source]
        current = self.latest.get(whole, (0, whole))[1]
        dim = source.kwargs.get("dim", source.args[2] if len(source.args) > 2 else 0)
        if call == "unbind":
            dim = source.kwargs.get("dim", source.args[1] if len(source.args) > 1 else 0)
            new = self.editor.call(torch.select_scatter, (current, value, dim, view.args[1]), like=current)
        else:
            sizes = [info.shape[dim] for info in source.meta["tensor"]]
            start = sum(sizes[: view.args[1]])
            new = self.editor.call(
                torch.slice_scatter, (current, value, dim, start, start + sizes[view.args[1]]), like=current
            )
        with self.editor.after(new):
            return self._replay_on(source, new)

    def _replay_on(self, parts: fx.Node, whole: fx.Node) -> fx.Node:
        """The split of `whole`; `whole` stands for what was split from the next version on."""
        owner = self.owner(parts)
        self._stands(self.base[parts], self.version.get(owner, 0) + 1, whole)
        return self._replay(parts, whole)


def _refuse(node: fx.Node, why: str) -> FxqError:
    return error_at(
        TraceError, f"{node.name} {why}", node, "write that line without changing a tensor in place"
    )


def _index_items(node: fx.Node, index: Any, rank: int) -> list[tuple[int, Any]]:
    """A basic index as (dimension, int or slice), without full slices."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (isinstance(i, int | slice) or i is Ellipsis) for i in items):
        raise _refuse(node, "indexes with a tensor or None and is changed in place")
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
    return [(dim, item) for dim, item in enumerate(items) if item != slice(None)]


def _scatter(
    editor: Editor, like: fx.Node, base: fx.Node, items: list[tuple[int, Any]], value: fx.Node
) -> fx.Node:
    """`base` with `value` at the basic index `items`; one dimension at a time, the outermost last."""
    if not items:
        return editor.call(torch.Tensor.expand_as, (value, base), like=base)
    (dim, item), rest = items[0], items[1:]
    if rest:
        index = tuple([slice(None)] * dim + [item])
        inner = editor.call(operator.getitem, (base, index), like=like, info=_indexed(base, dim, item))
        left = 1 if isinstance(item, int) else 0
        value = _scatter(editor, like, inner, [(d - left, i) for d, i in rest], value)
    if isinstance(item, int):
        return editor.call(torch.select_scatter, (base, value, dim, item), like=base)
    return editor.call(
        torch.slice_scatter, (base, value, dim, item.start, item.stop, item.step or 1), like=base
    )


def _indexed(base: fx.Node, dim: int, item: Any) -> TensorInfo | None:
    info = tensor_info(base)
    if info is None:
        return None
    shape = list(info.shape)
    if isinstance(item, int):
        del shape[dim]
    else:
        shape[dim] = len(range(*item.indices(shape[dim])))
    return TensorInfo(tuple(shape), info.dtype)


def _set_item(editor: Editor, node: fx.Node, base: fx.Node, index: Any, value: Any) -> fx.Node:
    """``base[index] = value`` out of place."""
    if isinstance(index, fx.Node):
        info = tensor_info(index)
        if info is not None and info.dtype is torch.bool and not isinstance(value, fx.Node):
            return editor.call(torch.masked_fill, (base, index, value), like=base)
        if info is not None and isinstance(value, fx.Node):
            return editor.call(torch.index_put, (base, (index,), value), like=base)
    info = tensor_info(base)
    if info is None:
        raise _refuse(node, "sets items of something that is no tensor")
    items = _index_items(node, index, len(info.shape))
    part = editor.call(operator.getitem, (base, index), like=base)
    if isinstance(value, fx.Node):
        value = editor.call(torch.Tensor.expand_as, (value, part), like=part)
    else:
        value = editor.call(torch.full_like, (part, value), like=part)
    return _scatter(editor, node, base, items, value)
