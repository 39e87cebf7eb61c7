"""Reading an FX graph: what fxq knows about its nodes and about the whole.

What fxq knows about a node lies in ``node.meta`` under a few keys, each a frozen value, so that a copied
graph shares nothing that can change: :class:`Origin` (where the user wrote it), :class:`TensorInfo` (what it
gives) and, from annotation on, :class:`Annotation` for each of its edges. What fxq knows about a whole graph
lies in ``gm.meta["fxq"]``, a frozen :class:`State`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import torch
from torch import fx

from .errors import FxqError, PassError
from .guards import Guard
from .recipe import QSpec, Recipe
from .target import Target

__all__ = [
    "Aliases",
    "Annotation",
    "Note",
    "Origin",
    "State",
    "Storage",
    "TensorInfo",
    "attribute",
    "chain_users",
    "constant",
    "device_of",
    "edge_annotations",
    "error_at",
    "has_state",
    "origin",
    "reads_sizes",
    "remember",
    "set_state",
    "state",
    "stored_alone",
    "tensor_info",
    "update_state",
]

_Error = TypeVar("_Error", bound=FxqError)
STATE: Final = "fxq"
ORIGIN: Final = "origin"
TENSOR: Final = "tensor"
EDGES: Final = "edges"
ALIASES: Final = "aliases"
SEQUENCE: Final = "sequence"  # the node gives a tuple or list without tensors: a shape


@dataclass(frozen=True)
class Origin:
    """Where a node comes from.

    Attributes:
        module_path: Dotted path of the innermost module whose forward made the node; "" for the model itself.
        module_types: Types of the modules from the model down to that one.
        source: The user's ``file:line``, the innermost frame outside torch; None where there is none.
        code: That line's text.
        call: True if the node is the whole of that module's own call (as ``layer1.0.conv1`` is of its
            Conv2d).
        leaf: True if the user asked for that module to stay whole.
        function: The outermost function marked with torch.fx.wrap that was traced through to get there; "" for none.
    """

    module_path: str = ""
    module_types: tuple[type[torch.nn.Module], ...] = ()
    source: str | None = None
    code: str = ""
    call: bool = False
    leaf: bool = False
    function: str = ""

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
    """The memory behind one tensor of the example run: address, shape, strides (elements), offset
    (elements).
    """

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
        guards: What tracing decided by the inputs' shapes.
    """

    target: Target
    recipe: Recipe = field(default_factory=Recipe)
    example_args: tuple[Any, ...] = ()
    example_kwargs: Mapping[str, Any] = field(default_factory=dict)
    properties: frozenset[str] = frozenset()
    notes: tuple[Note, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return self


def state(gm: fx.GraphModule) -> State:
    """The graph's :class:`State`.

    Raises:
        PassError: The GraphModule does not come from fxq.
    """
    found = getattr(gm, "meta", {}).get(STATE)
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


def remember(gm: fx.GraphModule, **facts: Any) -> None:
    """Add to the provenance in the state of a graph, in place."""
    update_state(gm, provenance={**state(gm).provenance, **facts})


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


def error_at(kind: type[_Error], message: str, node: fx.Node, hint: str | None = None) -> _Error:
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


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module's tensors are: the first parameter, or else the first buffer; the CPU if it has neither."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def constant(node: Any) -> torch.Tensor | None:
    """The tensor behind a ``get_attr`` node; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or node.graph.owning_module is None:
        return None
    found = attribute(node.graph.owning_module, str(node.target))
    return found if isinstance(found, torch.Tensor) else None


_SIZES: Final = frozenset(("size", "dim", "ndimension", "numel", "nelement", "shape", "ndim", "dtype", "device"))


def reads_sizes(node: fx.Node) -> bool:
    """Whether `node` asks a tensor for its shape or type (``x.shape``, ``x.size(0)``) and leaves its values alone."""
    if node.op == "call_method":
        return node.target in _SIZES
    return node.target is getattr and node.args[1] in _SIZES


def stored_alone(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values depend on no input, only on stored tensors and constants."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "placeholder" and (reads_sizes(node) or found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def chain_users(node: fx.Node, through: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """The first users of `node` for which `through` is false, looking past those for which it is true."""
    for user in node.users:
        if through(user):
            yield from chain_users(user, through)
        else:
            yield user
