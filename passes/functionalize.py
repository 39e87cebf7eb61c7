"""Functionalize: no node changes a tensor in place."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from torch import fx

from ..editor import Editor
from ..graph import ALIASES, TENSOR, tensor_info
from ..indexing import refuse
from ..ops import bind, inplace_target, spelling, split_args
from ..out_of_place import inplace_argument, make_pure, out_of_place, written_argument
from ..passbase import Pass
from ..views import aliases, put_back

__all__ = ["Functionalize"]

_NO_WRITE: Final = frozenset(("requires_grad_", "detach_", "share_memory_"))
_SHAPE_ONLY: Final = frozenset(("squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_"))
_BATCH_STATISTICS: Final = {"batch_norm": "training", "instance_norm": "use_input_stats"}


@dataclass(frozen=True)
class Functionalize(Pass):
    """Rewrite in-place operations so that later reads of the tensor become reads of the result.

    Problem: ``x.relu_()`` changes what every later reader of ``x`` sees, and what readers of its views see; a
    graph rewrite that moves or drops nodes would not know. fx's own dead-code elimination drops ``x.relu_()``
    outright.

    Rewrite: which nodes write, and which tensors share memory, is known from the example run, not guessed
    from names. A write becomes the same operation out of place, in the tensor's own dtype; its result is
    carried back through views to the tensor that owns the memory (``reshape_as``, inverse permutation,
    ``slice_scatter``), and a view that is read after the write is taken again from the new owner. In-place
    spellings that change no memory (``+=`` on a size, dropout in eval mode) become the plain spelling.

    A function that ``torch.fx.wrap`` kept whole, and that changes its first argument, is called on a copy, which then
    stands for the argument.

    Declines: nothing. A write that it cannot rewrite (through ``expand``, ``out=``, inside a leaf module, to
    the model's own parameters and buffers) is a TraceError with the user's line, which names the function to
    keep whole where torch.fx.wrap had marked one. Inputs of the model that
    were changed in place no longer are.
    """

    name: ClassVar[str] = "functionalize"
    requires: ClassVar[tuple[str, ...]] = ("traced",)
    provides: ClassVar[tuple[str, ...]] = ("functional",)

    def call(self, editor: Editor) -> None:
        memory = _Memory(editor)
        for node in list(editor.graph.nodes):
            with editor.before(node):
                editor.map_args(node, memory.read)
            if node.op == "output":
                continue
            if node.target in _SHAPE_ONLY and node.op == "call_method":
                memory.reshape(node)
            elif not _forget_statistics(editor, node) and aliases(node).written:
                memory.write(node)
            elif not _tidy(editor, node):
                memory.define(node)
        for node in editor.graph.nodes:
            node.meta.pop(ALIASES, None)


def _tidy(editor: Editor, node: fx.Node) -> bool:
    """Rewrite an in-place spelling that changes no memory; whether the node is gone."""
    if node.op == "call_method" and node.target in _NO_WRITE:
        editor.replace(node, node.args[0])  # type: ignore[arg-type]
        editor.erase(node)
        return True
    pure = inplace_target(node)
    if (pure is not None or inplace_argument(node) is not None) and not make_pure(editor, node) and pure is not None:
        raise refuse(node, "changes its input in a way that cannot be rewritten")
    return False


def _forget_statistics(editor: Editor, node: fx.Node) -> bool:
    """A norm that takes the batch's statistics need not have running ones, which it would update."""
    spelled = spelling(node)
    flag = _BATCH_STATISTICS.get(spelled.kind.name) if spelled is not None else None
    bound = bind(spelled, node.args, node.kwargs) if spelled is not None and flag is not None else None
    if spelled is None or bound is None or bound[str(flag)] is not True or bound["running_mean"] is None:
        return False
    args, kwargs = split_args(spelled.kind, {**bound, "running_mean": None, "running_var": None})
    return editor.retarget(node, spelled.kind.target, args, kwargs)


@dataclass
class _Memory:
    """Which node stands for which tensor, while the graph is walked in order.

    Attributes:
        editor: Makes the nodes.
        base: A view and the node that it was taken from; an owner of memory has no entry.
        version: How often the memory of an owner was written so far.
        latest: The node that stands for a tensor, and the version that it stands for.
        original: A node that stands for a tensor, and that tensor's own node.
        reshaped: A tensor whose shape was changed in place, and the node that it has become.
        tangled: An owner that shares memory with another in a way that nobody can follow, and the node at
            fault.
    """

    editor: Editor
    base: dict[fx.Node, fx.Node] = field(default_factory=dict)
    version: dict[fx.Node, int] = field(default_factory=dict)
    latest: dict[fx.Node, tuple[int, fx.Node]] = field(default_factory=dict)
    original: dict[fx.Node, fx.Node] = field(default_factory=dict)
    reshaped: dict[fx.Node, fx.Node] = field(default_factory=dict)
    tangled: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def key(self, node: fx.Node) -> fx.Node:
        """The node that a tensor is known by."""
        node = self.original.get(node, node)
        while node in self.reshaped:
            node = self.reshaped[node]
        return node

    def owner(self, node: fx.Node) -> fx.Node:
        while node in self.base:
            node = self.base[node]
        return node

    def current(self, node: fx.Node) -> fx.Node:
        """The node that stood for a tensor when it was last looked at."""
        return self.latest.get(node, (0, node))[1]

    def define(self, node: fx.Node) -> None:
        """Enter a node that writes nothing: a view of one of its inputs, or an owner of its own."""
        mine = {s.address for s in aliases(node).storages}
        if node.op in ("placeholder", "get_attr") or not mine:
            return
        sources = [self.key(n) for n in node.all_input_nodes]
        shared = [s for s in sources if mine & {t.address for t in aliases(s).storages}]
        if not shared:
            return
        if node.target is operator.getitem and self._is_made_tuple(shared[0]):
            self._define_item(node, shared[0])
            return
        self.base[node] = shared[0]
        self.latest[node] = (self.version.get(self.owner(node), 0), node)
        owners = {self.owner(s) for s in shared}
        if len(owners) > 1:
            self.tangled.update(dict.fromkeys(owners, node))

    def _is_made_tuple(self, node: fx.Node) -> bool:
        return node not in self.base and isinstance(node.meta.get(TENSOR), tuple)

    def _define_item(self, node: fx.Node, made: fx.Node) -> None:
        """Enter an item of a tuple whose items own their memory (``torch.max(x, 0)``): an owner, seen
        once.
        """
        mine = aliases(node).storages
        if any(user.target is not operator.getitem for user in made.users):
            self.tangled[node] = node
        for other in made.users:
            if other is node or other not in self.version or not aliases(other).storages:
                continue
            if aliases(other).storages == mine:
                self.original[node] = other
                return
            if {s.address for s in aliases(other).storages} & {s.address for s in mine}:
                self.tangled.update({other: node, node: node})
        self.version[node] = 0

    def read(self, node: fx.Node) -> fx.Node:
        """The node that stands for `node` now; views of written memory are taken again."""
        return self._read(self.key(node))

    def _read(self, node: fx.Node) -> fx.Node:
        version = self.version.get(self.owner(node), 0)
        known, stands = self.latest.get(node, (0, node))
        if known == version:
            return stands
        again = self._replay(node, self._read(self.base[node]))
        self._stands(node, version, again)
        return again

    def _stands(self, node: fx.Node, version: int, new: fx.Node) -> None:
        self.latest[node] = (version, new)
        if new is not node:
            self.original.setdefault(new, node)

    def _replay(self, view: fx.Node, source: fx.Node) -> fx.Node:
        """`view` taken again, from `source`."""
        old = self.base[view]

        def swap(node: fx.Node) -> fx.Node:
            return source if self.original.get(node, node) is old else node

        args, kwargs = fx.map_arg((view.args, view.kwargs), swap)
        return self.editor.copy(view, args, kwargs)

    def reshape(self, node: fx.Node) -> None:
        """``x.unsqueeze_(0)``: the tensor itself becomes a view of what it was."""
        tensor = self.key(node.args[0])  # type: ignore[arg-type]
        self.editor.retarget_method(node, str(node.target)[:-1])
        self.base[node] = tensor
        self.latest[node] = (self.version.get(self.owner(tensor), 0), node)
        self.reshaped[tensor] = node

    def write(self, node: fx.Node) -> None:
        """Turn a write into a computation whose result stands for the tensor from here on."""
        written = written_argument(node)
        target = self.key(written)
        self._check(node, target)
        with self.editor.before(node.next):
            if node.target is operator.setitem and self._is_own_item(target, node.args[1], node.args[2]):
                self.editor.erase(node)
                return
            result = out_of_place(self.editor, node, written)
            self._spread(target, result)
        if node is not result:
            self.editor.replace(node, result)
            if not node.users:  # a cast of its result needs it
                self.editor.erase(node)

    def _check(self, node: fx.Node, target: fx.Node) -> None:
        written = aliases(node).written
        inputs = {self.key(n) for n in node.all_input_nodes}
        changed = {self.owner(n) for n in inputs if written & {s.address for s in aliases(n).storages}}
        owner = self.owner(target)
        if changed != {owner}:
            raise refuse(node, "changes a tensor that is not its first argument")
        if owner.op == "get_attr":
            raise refuse(node, f"changes the model's own {owner.target}, which a graph cannot repeat")
        if owner in self.tangled:
            raise refuse(self.tangled[owner], "gives views of several tensors, and one is changed later")

    def _is_own_item(self, tensor: fx.Node, index: Any, value: Any) -> bool:
        """Whether ``tensor[index] = value`` puts back a view that is there already, as ``x[0] += 1`` does
        last.
        """
        if not isinstance(value, fx.Node):
            return False
        view = self.key(value)
        return view.target is operator.getitem and self.base.get(view) is tensor and view.args[1] == index

    def _spread(self, tensor: fx.Node, value: fx.Node) -> None:
        """`value` is what `tensor` holds now; carry it back to the owner of the memory."""
        version = self.version.get(self.owner(tensor), 0)
        self.version[self.owner(tensor)] = version + 1
        self._stands(tensor, version + 1, value)
        while tensor in self.base:
            source = holder = self.base[tensor]
            if tensor_info(source) is None and source in self.base:
                holder = self.base[source]  # parts of a split: what was split holds them
            base = self._before(holder, version)
            value = put_back(self.editor, tensor, source, base, value)
            tensor = holder
            self._stands(tensor, version + 1, value)

    def _before(self, node: fx.Node, version: int) -> fx.Node:
        """The node that stands for a tensor before the write that is under way, taken again if need be."""
        known, stands = self.latest.get(node, (0, node))
        if known >= version:
            return stands
        again = self._replay(node, self._before(self.base[node], version))
        self._stands(node, version, again)
        return again
