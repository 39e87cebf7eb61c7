"""The parts of a picture that :mod:`fxq.match` looks for; that room has the whole story."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .errors import PassError
from .graph import attribute, constant
from .ops import bind, kind_name, spelling, split_args

__all__ = [
    "Constant",
    "Goal",
    "OneOf",
    "Op",
    "Part",
    "Pattern",
    "Var",
    "equal",
    "literal_goals",
    "maybe",
    "shown",
]

Goal = tuple[Any, Any]
"""A part or a literal, and what it has to be."""
Calls = str | Callable[..., Any] | tuple[str | Callable[..., Any], ...]


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a picture.

    Attributes:
        name: What a match calls it; "" for a part that nobody asks for.
    """

    name: str = field(default="", kw_only=True)

    def goals(self, value: Any) -> Sequence[Sequence[Goal]] | str:
        """What else has to fit if this part is `value`: the alternatives in order, or why it cannot be."""
        raise NotImplementedError

    def parts(self) -> Iterator[Part]:
        """The parts that this one mentions."""
        return iter(())


@dataclass(frozen=True, eq=False)
class Var(Part):
    """Anything: a node, a number, None.

    Args:
        name: What a match calls it.
        where: Says whether a value will do; None takes all.
    """

    name: str = ""
    where: Callable[[Any], bool] | None = field(default=None, kw_only=True)

    def goals(self, value: Any) -> Sequence[Sequence[Goal]] | str:
        if self.where is not None and not self.where(value):
            return f"{shown(value)} is not what {self.name or 'the operand'} may be"
        return [[]]


@dataclass(frozen=True, eq=False)
class Constant(Part):
    """A stored tensor, or with `equals` a number.

    Args:
        name: What a match calls it.
        equals: The number it has to be, in float32: written in the call, or stored as a tensor of one
            element.
        where: Says whether a stored tensor will do; None takes all.
    """

    name: str = ""
    equals: float | None = field(default=None, kw_only=True)
    where: Callable[[torch.Tensor], bool] | None = field(default=None, kw_only=True)

    def goals(self, value: Any) -> Sequence[Sequence[Goal]] | str:
        tensor = constant(value)
        if self.equals is not None:
            return [[]] if _number(value, tensor) == _float32(self.equals) else f"{shown(value)} is not {self.equals}"
        if tensor is None:
            return f"{shown(value)} is computed, not stored"
        if self.where is not None and not self.where(tensor):
            return f"{shown(value)} is not what {self.name or 'the constant'} may be"
        return [[]]


class Op(Part):
    """A call: of an op kind, a function, a method, or a module.

    Args:
        calls: What is called, or a tuple of that: an op kind's name (``conv2d``, ``conv*d``), a function, or
            a module type.
        operands: Parts or literals for the first arguments in their canonical order; a list stands for one
            of its length (``Op("cat", [a, b])``). Arguments that are not mentioned may be anything.
        name: What a match calls the node.
        commutative: The first two operands may change places.
        shared: Others may read the node too; a rewrite then has to leave it there.
        attributes: Keyword arguments of the call, or attributes of the module: a literal, or a function that
            says whether a value will do.
    """

    def __init__(
        self,
        calls: Calls,
        *operands: Any,
        name: str = "",
        commutative: bool = False,
        shared: bool = False,
        **attributes: Any,
    ) -> None:
        super().__init__(name=name)
        wanted = calls if isinstance(calls, tuple) else (calls,)
        for one in wanted:
            if not isinstance(one, str) and not callable(one):
                raise PassError(f"a pattern calls {one!r}", hint="give an op kind, a function or a module type")
        if commutative and len(operands) < 2:
            raise PassError("a commutative pattern has two operands", hint="write Op(..., a, b, commutative=True)")
        for key, value in (("calls", wanted), ("operands", operands), ("commutative", commutative),
                           ("shared", shared), ("attributes", attributes)):  # fmt: skip
            object.__setattr__(self, key, value)

    calls: tuple[str | Callable[..., Any], ...]
    operands: tuple[Any, ...]
    commutative: bool
    shared: bool
    attributes: Mapping[str, Any]

    def goals(self, value: Any) -> Sequence[Sequence[Goal]] | str:
        if not isinstance(value, fx.Node) or not value.op.startswith("call_"):
            return f"{shown(value)} is no call of {self.text}"
        if not any(_calls(value, one) for one in self.calls):
            return f"{value.name} is {kind_name(value)}, not {self.text}"
        args, kwargs = _arguments(value)
        if len(args) < len(self.operands):
            return f"{value.name} has {len(args)} operands, not {len(self.operands)}"
        for key, wanted in self.attributes.items():
            given = _attribute(value, kwargs, key)
            if not (wanted(given) if callable(wanted) else equal(wanted, given)):
                return f"{value.name} has {key}={shown(given)}" + ("" if callable(wanted) else f", not {wanted!r}")
        orders = [args]
        if self.commutative and len(args) > 1:
            orders.append((args[1], args[0], *args[2:]))
        return [list(zip(self.operands, order, strict=False)) for order in orders]

    def parts(self) -> Iterator[Part]:
        for operand in self.operands:
            yield from (p for p in (operand if isinstance(operand, list | tuple) else [operand]) if isinstance(p, Part))

    @property
    def text(self) -> str:
        """What it calls, for people."""
        return " or ".join(c if isinstance(c, str) else c.__name__ for c in self.calls)


@dataclass(frozen=True, eq=False)
class OneOf(Part):
    """Alternatives; the first that fits wins."""

    choices: tuple[Part, ...]

    def __init__(self, *choices: Part, name: str = "") -> None:
        object.__setattr__(self, "choices", choices)
        object.__setattr__(self, "name", name)

    def goals(self, value: Any) -> Sequence[Sequence[Goal]] | str:
        return [[(choice, value)] for choice in self.choices]

    def parts(self) -> Iterator[Part]:
        return iter(self.choices)


def maybe(calls: Calls, inner: Part, *operands: Any, name: str = "", **options: Any) -> Part:
    """An optional link: a call on `inner`, or `inner` alone.

    Args:
        calls: What the link calls; see :class:`Op`.
        inner: What it reads.
        operands: Its further operands.
        name: What a match calls the link; :meth:`Match.get` gives None where it is not there.
        options: Further arguments of :class:`Op`.
    """
    return OneOf(Op(calls, inner, *operands, name=name, **options), inner)


class Pattern:
    """A picture with the parts that the rest of the graph may read.

    Args:
        outputs: One part or several. With several, all inputs of a match have to come before its first output
            in the graph, so that one node can replace them all.

    Attributes:
        outputs: As given.
        names: The names of its parts.
        seeds: For each output after the first, the part that it shares with those before it.
        depth: How many links lie between an output and its farthest part, at most, and one more.

    Raises:
        PassError: Two parts have one name, or an output is no call or shares no part with those before it.
    """

    def __init__(self, *outputs: Part) -> None:
        self.outputs = outputs
        self.names: frozenset[str] = frozenset()
        if not outputs or not all(map(_is_call, outputs)):
            raise PassError("the output of a pattern has to be a call", hint="write Pattern(Op(...))")
        seen: dict[Part, int] = {}
        self.seeds: list[Part] = []
        for number, output in enumerate(outputs):
            mine = _depths(output)
            shared = [p for p in mine if p in seen and p is not output]
            if number and not shared:
                raise PassError(f"output {number} of a pattern shares no part with those before it")
            if number:
                self.seeds.append(min(shared, key=lambda p: (not isinstance(p, Op), mine[p])))
            seen.update({p: d for p, d in mine.items() if p not in seen})
        self.depth = 1 + max(max(_depths(o).values()) for o in outputs)
        named = [p.name for p in seen if p.name]
        twice = sorted({n for n in named if named.count(n) > 1})
        if twice:
            raise PassError(f"a pattern has two parts called {', '.join(twice)}")
        self.names = frozenset(named)


def _is_call(part: Part) -> bool:
    return isinstance(part, Op) or (isinstance(part, OneOf) and bool(part.choices) and all(map(_is_call, part.choices)))


def _depths(root: Part) -> dict[Part, int]:
    """Every part under `root` with how many links it is away, at most."""
    depths: dict[Part, int] = {}
    work = [(root, 0)]
    while work:
        part, depth = work.pop()
        if depths.get(part, -1) < depth:
            depths[part] = depth
            work.extend((p, depth + 1) for p in part.parts())
    return depths


def _calls(node: fx.Node, wanted: str | Callable[..., Any]) -> bool:
    if isinstance(wanted, str):
        return fnmatch.fnmatchcase(kind_name(node), wanted)
    if isinstance(wanted, type) and issubclass(wanted, nn.Module):
        owner = node.graph.owning_module
        return node.op == "call_module" and owner is not None and isinstance(attribute(owner, str(node.target)), wanted)
    return node.op == "call_function" and node.target is wanted


def _arguments(node: fx.Node) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The node's operands and keyword arguments, in the canonical order where the call has one."""
    spelled = spelling(node)
    bound = None if spelled is None else bind(spelled, node.args, node.kwargs)
    if spelled is None or bound is None:
        return tuple(node.args), node.kwargs
    return split_args(spelled.kind, bound)


def _attribute(node: fx.Node, kwargs: Mapping[str, Any], key: str) -> Any:
    if node.op == "call_module" and node.graph.owning_module is not None:
        return getattr(attribute(node.graph.owning_module, str(node.target)), key, None)
    return kwargs.get(key)


def literal_goals(wanted: Any, value: Any) -> list[Goal] | None:
    """What has to fit for a literal of the picture, a list of parts among them, to be `value`."""
    if isinstance(wanted, list | tuple):
        fits = isinstance(value, list | tuple) and len(value) == len(wanted)
        return list(zip(wanted, value, strict=True)) if fits else None
    return [] if equal(wanted, value) else None


def equal(a: Any, b: Any) -> bool:
    """Equality that compares nodes by identity, lists with tuples, and 1 with 1.0 but not with True."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _number(value: Any, tensor: torch.Tensor | None) -> float | None:
    if tensor is not None and tensor.numel() == 1:
        return _float32(tensor.item())
    return _float32(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def shown(value: Any) -> str:
    """A value for people: a node by its name."""
    if isinstance(value, Part):
        return value.name or type(value).__name__
    return value.name if isinstance(value, fx.Node) else repr(value)
