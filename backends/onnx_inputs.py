"""Example inputs, flattened, and the names of an ONNX file's inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import ExportError
from .onnx_names import free_name

__all__ = ["Examples", "output_names", "placeholder_values", "to_cpu"]


@dataclass(frozen=True)
class Examples:
    """A value for each placeholder, flattened.

    Attributes:
        leaves: Tensors on the CPU, and constants.
        structure: How they nest.
        names: A name for each tensor.
    """

    leaves: tuple[Any, ...]
    structure: pytree.TreeSpec
    names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        gm: fx.GraphModule,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        wanted: Sequence[str] | None,
    ) -> Examples:
        """The example inputs of a graph.

        Args:
            gm: The graph.
            args: Positional inputs.
            kwargs: Inputs by name.
            wanted: Names that the user asked for; None for parameter names and the path in nested inputs.

        Raises:
            ExportError: The inputs do not fit the graph, or the names do not fit the inputs.
        """
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        values = placeholder_values(gm, args, kwargs)
        leaves, structure = pytree.tree_flatten(tuple(to_cpu(value) for value in values))
        own: list[str] = []
        for node, value in zip(placeholders, values, strict=True):
            found, _ = pytree.tree_flatten_with_path(value)
            own += [_path_name(str(node.target), keys) for keys, leaf in found if isinstance(leaf, Tensor)]
        return cls(tuple(leaves), structure, _checked_names("input", own, wanted))

    @property
    def tensors(self) -> list[Tensor]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Examples:
        """The same with other tensors."""
        rest = iter(tensors)
        leaves = tuple(next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves)
        return Examples(leaves, self.structure, self.names)

    def arguments(self) -> tuple[Any, ...]:
        """One argument for each placeholder."""
        found: tuple[Any, ...] = pytree.tree_unflatten(self.leaves, self.structure)
        return found

    def shapes(self, dims: Sequence[dict[int, Any]]) -> tuple[Any, ...]:
        """`dims`, one for each tensor, in the structure of the arguments."""
        rest = iter(dims)
        flat = [next(rest) if isinstance(leaf, Tensor) else None for leaf in self.leaves]
        found: tuple[Any, ...] = pytree.tree_unflatten(flat, self.structure)
        return found


def placeholder_values(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """The inputs as the graph's placeholders take them: flat where the graph flattens its inputs itself.

    Raises:
        ExportError: They do not fit.
    """
    count = sum(node.op == "placeholder" for node in gm.graph.nodes)
    try:
        bound = inspect.signature(gm.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ExportError(f"the example inputs do not fit the graph: {error}") from error
    bound.apply_defaults()
    values: Sequence[Any] = gm.graph.process_inputs(*bound.args, **bound.kwargs)
    if len(values) != count:
        values = [value for value in values if isinstance(value, Tensor)]
    if len(values) != count:
        raise ExportError(f"the graph has {count} inputs, the examples give {len(values)}")
    return values


def output_names(gm: fx.GraphModule, wanted: Sequence[str] | None, inputs: Sequence[str]) -> tuple[str, ...]:
    """A name for each output tensor.

    Args:
        gm: The graph.
        wanted: What the user asked for; None for ``output``, or where there are several the keys of a dict or
            ``output_0``, ``output_1`` …; a name that an input has gets a number more.
        inputs: Names that are taken.

    Raises:
        ExportError: The names do not fit the outputs, or there are none.
    """
    result = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    leaves, _ = pytree.tree_flatten_with_path(result)
    found = [path for keys, leaf in leaves if isinstance(leaf, fx.Node) for path in _parts(keys, leaf)]
    if not found:
        raise ExportError("the graph has no output tensor")
    by_key = all(keys and isinstance(keys[0], pytree.MappingKey) for keys in found)
    own = ["_".join(map(_key, keys)) if by_key else _path_name("output", keys) for keys in found]
    if wanted is None:
        own = [free_name(name, {*inputs, *own[:index]}) for index, name in enumerate(own)]
    names = _checked_names("output", own, wanted)
    both = sorted(set(names) & set(inputs))
    if both:
        raise ExportError(f"{both} would name both an input and an output", hint="give output_names")
    return names


def _parts(keys: Sequence[Any], leaf: fx.Node) -> list[Sequence[Any]]:
    """Paths of the tensors that an output node gives: its own, or a namedtuple's fields, which fx makes by a call."""
    fields = getattr(leaf.target, "_fields", None) if leaf.op == "call_function" else None
    return [keys] if fields is None else [(*keys, pytree.MappingKey(field)) for field in fields]


def _path_name(name: str, keys: Sequence[Any]) -> str:
    return "_".join([name, *map(_key, keys)])


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", key)))


def _checked_names(kind: str, own: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    names = tuple(own if wanted is None else wanted)
    if len(names) != len(own):
        raise ExportError(f"{kind}_names={wanted!r} for {len(own)} {kind}s", hint=f"the {kind}s are {', '.join(own)}")
    if len(set(names)) < len(names) or not all(names):
        raise ExportError(f"{kind}_names={names!r} are not distinct names", hint=f"give a name for each of {own}")
    return names


def to_cpu(value: Any) -> Any:
    """`value` with the tensors in it detached and on the CPU; those that are there already are not copied."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), value)
