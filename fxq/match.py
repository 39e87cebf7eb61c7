"""Patterns over a graph: a picture of some nodes, found wherever the graph has them.

A picture is made of parts. :class:`Op` is a call, :class:`Var` stands for anything, :class:`Constant` for a
stored tensor or a number, :class:`OneOf` for alternatives and :func:`maybe` for an optional link. A part that
appears twice in a picture has to be the same thing both times, so a picture may be a graph, not only a tree.
:class:`Pattern` names the parts that the rest of the graph reads, and :func:`find` looks for it::

    conv = Op("conv2d", Var("x"), Constant("weight"), name="conv")
    pattern = Pattern(maybe("relu", maybe("batch_norm", conv, name="norm"), name="act"))

The order is fixed: a graph is searched from its end to its beginning, at each node the first alternative that
fits wins (an optional link is taken where it is there), and a node belongs to one match only. So of two
overlapping matches the later one is found, the longest form of a chain wins, and back-to-back matches, where
one reads what the other gives, are both found.

The cost is linear in the graph: at each node a pattern makes a number of comparisons that depends on the
pattern alone, which :attr:`Found.visits` counts.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import torch
from torch import fx, nn

from .errors import PassError
from .graph import attribute, constant, origin
from .ops import bind, kind_name, spelling, split_args

__all__ = [
    "Constant",
    "Found",
    "Match",
    "NoMatch",
    "OneOf",
    "Op",
    "Part",
    "Pattern",
    "Var",
    "explain",
    "find",
    "maybe",
]

MAX_READERS: Final = 64
"""How many readers of a shared part are tried as the second output of a pattern."""

Goal = tuple[Any, Any]
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
            return f"{_show(value)} is not what {self.name or 'the operand'} may be"
        return [[]]


@dataclass(frozen=True, eq=False)
class Constant(Part):
    """A stored tensor, or with `equals` a number.

    Args:
        name: What a match calls it.
        equals: The number it has to be, in float32: written in the call, or stored as a tensor of one element.
        where: Says whether a stored tensor will do; None takes all.
    """

    name: str = ""
    equals: float | None = field(default=None, kw_only=True)
    where: Callable[[torch.Tensor], bool] | None = field(default=None, kw_only=True)

    def goals(self, value: Any) -> Sequence[Sequence[Goal]] | str:
        tensor = constant(value)
        if self.equals is not None:
            return (
                [[]]
                if _number(value, tensor) == _float32(self.equals)
                else f"{_show(value)} is not {self.equals}"
            )
        if tensor is None:
            return f"{_show(value)} is computed, not stored"
        if self.where is not None and not self.where(tensor):
            return f"{_show(value)} is not what {self.name or 'the constant'} may be"
        return [[]]


class Op(Part):
    """A call: of an op kind, a function, a method, or a module.

    Args:
        calls: What is called, or a tuple of that: an op kind's name (``conv2d``, ``conv*d``; of a graph that is
            not canonical also a method's name), a function, or a module type.
        operands: Parts or literals for the first arguments in their canonical order; a list stands for a list of
            that length (``Op("cat", [a, b])``). Arguments that are not mentioned may be anything.
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
                raise PassError(
                    f"a pattern calls {one!r}", hint="give an op kind, a function or a module type"
                )
        if commutative and len(operands) < 2:
            raise PassError(
                "a commutative pattern has two operands", hint="write Op(..., a, b, commutative=True)"
            )
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
            return f"{_show(value)} is no call of {self.text}"
        if not any(_calls(value, one) for one in self.calls):
            return f"{value.name} is {kind_name(value)}, not {self.text}"
        args, kwargs = _arguments(value)
        if len(args) < len(self.operands):
            return f"{value.name} has {len(args)} operands, not {len(self.operands)}"
        for key, wanted in self.attributes.items():
            given = _attribute(value, kwargs, key)
            if not (wanted(given) if callable(wanted) else _equal(wanted, given)):
                return f"{value.name} has {key}={_show(given)}" + (
                    "" if callable(wanted) else f", not {wanted!r}"
                )
        orders = [args]
        if self.commutative and len(args) > 1:
            orders.append((args[1], args[0], *args[2:]))
        return [list(zip(self.operands, order, strict=False)) for order in orders]

    def parts(self) -> Iterator[Part]:
        for operand in self.operands:
            yield from (
                p
                for p in (operand if isinstance(operand, list | tuple) else [operand])
                if isinstance(p, Part)
            )

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

    Raises:
        PassError: Two parts have one name, an output is no call, or shares no part with the outputs before it.
    """

    def __init__(self, *outputs: Part) -> None:
        self.outputs = outputs
        self.names: frozenset[str] = frozenset()
        if not outputs or not all(map(_is_call, outputs)):
            raise PassError("the output of a pattern has to be a call", hint="write Pattern(Op(...))")
        seen: dict[Part, int] = {}
        self._seeds: list[Part] = []
        for number, output in enumerate(outputs):
            mine = _depths(output)
            shared = [p for p in mine if p in seen and p is not output]
            if number and not shared:
                raise PassError(f"output {number} of a pattern shares no part with those before it")
            if number:
                self._seeds.append(min(shared, key=lambda p: (not isinstance(p, Op), mine[p])))
            seen.update({p: d for p, d in mine.items() if p not in seen})
        self.depth = 1 + max(max(_depths(o).values()) for o in outputs)
        named = [p.name for p in seen if p.name]
        twice = sorted({n for n in named if named.count(n) > 1})
        if twice:
            raise PassError(f"a pattern has two parts called {', '.join(twice)}")
        self.names = frozenset(named)


@dataclass(frozen=True)
class Match:
    """A place where a pattern fits.

    Attributes:
        outputs: The nodes that the rest of the graph reads, in the pattern's order.
        nodes: All nodes that belong to the match, in the graph's order: calls that are not shared.
        values: What each named part is.
        names: All names of the pattern.
    """

    outputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    values: Mapping[str, Any]
    names: frozenset[str]

    @property
    def output(self) -> fx.Node:
        """The output of a pattern that has one; of several the first."""
        return self.outputs[0]

    def __getitem__(self, name: str) -> fx.Node:
        """The node that the part called `name` is.

        Raises:
            PassError: The pattern has no such part, the part is not there, or it is no node.
        """
        found = self.value(name)
        if not isinstance(found, fx.Node):
            raise PassError(f"{name} is {found!r} in this match, no node", hint=f"use match.value({name!r})")
        return found

    def get(self, name: str) -> fx.Node | None:
        """The node that an optional part is; None where it is not there."""
        found = self.value(name)
        return found if isinstance(found, fx.Node) else None

    def value(self, name: str) -> Any:
        """What the part called `name` is: a node, a literal, or None.

        Raises:
            PassError: The pattern has no such part.
        """
        if name not in self.names:
            raise PassError(
                f"the pattern has no part called {name!r}", hint=f"it has {', '.join(sorted(self.names))}"
            )
        return self.values.get(name)


@dataclass(frozen=True)
class NoMatch:
    """Why a pattern does not fit at a node.

    Attributes:
        node: Where the picture was held against the graph: the node of its first output.
        reason: What did not fit.
        matched: How many calls of the picture fitted before that.
        complete: Whether the whole picture was there, and something else spoke against it: another reader, an
            overlap, or the caller's check.
    """

    node: fx.Node
    reason: str
    matched: int
    complete: bool = False

    def __str__(self) -> str:
        where = origin(self.node)
        place = f" ({', '.join(filter(None, (where.module_path, where.source)))})" if where.source else ""
        return f"at {self.node.name}{place}: {self.reason}"


@dataclass(frozen=True)
class Found:
    """What a search gave.

    Attributes:
        matches: In the graph's order; no two have a node in common.
        misses: One for each other node at which at least one call of the picture fitted, the nearest for it, in
            the graph's order.
        visits: How often a part was compared with a value.
    """

    matches: tuple[Match, ...]
    misses: tuple[NoMatch, ...]
    visits: int

    @property
    def nearest(self) -> NoMatch | None:
        """The miss where most of the picture fitted; the first of several."""
        return max(self.misses, key=lambda miss: (miss.complete, miss.matched), default=None)


def find(graph: fx.Graph, pattern: Pattern, check: Callable[[Match], str | None] | None = None) -> Found:
    """Look for a pattern.

    Args:
        graph: What to search; it is not changed.
        pattern: What to look for.
        check: Says why a match will not do; None where it will. A match that will not do keeps no other from
            its nodes.

    Returns:
        Matches and misses.
    """
    search = _Search(pattern, {node: i for i, node in enumerate(graph.nodes)}, check)
    for node in reversed(graph.nodes):
        if node.op.startswith("call_") and node not in search.owner:
            search.at(node)
    return Found(tuple(reversed(search.matches)), tuple(reversed(search.misses)), search.visits)


def explain(graph: fx.Graph, pattern: Pattern, check: Callable[[Match], str | None] | None = None) -> str:
    """What a search found and what came nearest, for people.

    Args:
        graph: What to search.
        pattern: What to look for.
        check: As for :func:`find`.
    """
    found = find(graph, pattern, check)
    lines = [f"{len(found.matches)} matches" + "".join(f"\n  at {m.output.name}" for m in found.matches)]
    if found.nearest is not None:
        lines.append(f"nearest miss {found.nearest}")
    elif not found.matches:
        kinds = sorted({kind_name(n) for n in graph.nodes if n.op.startswith("call_")})
        lines.append(f"no node comes near; the graph calls {', '.join(kinds) or 'nothing'}")
    return "\n".join(lines)


class _Search:
    """One search: what is found so far, and the nearest miss at the node under search."""

    def __init__(
        self, pattern: Pattern, position: Mapping[fx.Node, int], check: Callable[[Match], str | None] | None
    ) -> None:
        self.pattern, self.position, self.check = pattern, position, check
        self.owner: dict[fx.Node, Match] = {}
        self.matches: list[Match] = []
        self.misses: list[NoMatch] = []
        self.visits = 0
        self.miss: NoMatch | None = None
        self.node: fx.Node

    def at(self, node: fx.Node) -> None:
        """Hold the picture's first output against `node`."""
        self.node, self.miss = node, None
        for bound in self.solve([(self.pattern.outputs[0], node)], {}):
            for full in self.others(bound, 0):
                match = self.accepted(full)
                if match is not None:
                    self.matches.append(match)
                    self.owner.update(dict.fromkeys(match.nodes, match))
                    return
        if self.miss is not None:
            self.misses.append(self.miss)

    def solve(self, goals: Sequence[Goal], bound: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        """Every way to fulfil all goals, with what each part is then."""
        if not goals:
            yield bound
            return
        (part, value), rest = goals[0], goals[1:]
        self.visits += 1
        if not isinstance(part, Part):
            inner = _literal(part, value)
            if inner is None:
                self.fail(bound, f"{_show(value)} is not {_show(part)}")
            else:
                yield from self.solve([*inner, *rest], bound)
        elif part in bound:
            if _equal(bound[part], value):
                yield from self.solve(rest, bound)
            else:
                self.fail(
                    bound,
                    f"{_show(value)} is not {_show(bound[part])}, which {part.name or 'it'} is elsewhere",
                )
        else:
            ways = part.goals(value)
            if isinstance(ways, str):
                self.fail(bound, ways)
                return
            for way in ways:
                yield from self.solve([*way, *rest], {**bound, part: value})

    def others(self, bound: dict[Any, Any], done: int) -> Iterator[dict[Any, Any]]:
        """Every way to find the outputs after the first too, among the readers of what they share with it."""
        if done == len(self.pattern.outputs) - 1:
            yield bound
            return
        output, seed = self.pattern.outputs[done + 1], self.pattern._seeds[done]
        taken = {bound[o] for o in self.pattern.outputs[: done + 1]}
        readers = self.readers(bound, bound.get(seed))
        for node in readers:
            if node not in taken:
                for more in self.solve([(output, node)], bound):
                    yield from self.others(more, done + 1)

    def readers(self, bound: dict[Any, Any], node: Any) -> list[fx.Node]:
        """The calls that read `node`, directly or over as many calls as the pattern has."""
        found: dict[fx.Node, int] = {}
        work = [(node, 0)] if isinstance(node, fx.Node) else []
        for reader, depth in work:
            for user in reader.users if depth < self.pattern.depth else ():
                if len(found) == MAX_READERS:
                    self.fail(bound, f"{_show(node)} has more than {MAX_READERS} readers to choose from")
                    return []
                if user.op.startswith("call_") and user not in found:
                    found[user] = depth + 1
                    work.append((user, depth + 1))
        return list(found)

    def accepted(self, bound: dict[Any, Any]) -> Match | None:
        """The match, unless another reader, an overlap or the check speaks against it."""
        outputs = tuple(bound[o] for o in self.pattern.outputs)
        mine = {v for p, v in bound.items() if isinstance(p, Op) and not p.shared}
        inputs = [v for v in bound.values() if isinstance(v, fx.Node) and v not in mine]
        ordered = tuple(sorted(mine, key=self.position.__getitem__))
        values = {p.name: v for p, v in bound.items() if p.name}
        match = Match(outputs, ordered, values, self.pattern.names)
        why = self.outside(match) or self.overlap(match) or self.late(match, inputs)
        why = why or (self.check(match) if self.check is not None else None)
        if why:
            self.fail(bound, why, complete=True)
            return None
        return match

    @staticmethod
    def outside(match: Match) -> str | None:
        """Who outside the match reads a node inside it."""
        inside = set(match.nodes)
        for node in match.nodes:
            if node not in match.outputs:
                others = list(islice((u.name for u in node.users if u not in inside), 3))
                if others:
                    return f"{node.name} is read by {', '.join(others)} too"
        return None

    def overlap(self, match: Match) -> str | None:
        """Which match has one of its nodes already."""
        for node in match.nodes:
            if node in self.owner:
                return f"{node.name} belongs to the match at {self.owner[node].output.name}"
        return None

    def late(self, match: Match, inputs: Sequence[fx.Node]) -> str | None:
        """Which input comes only after an output."""
        if len(match.outputs) > 1:
            first = min(match.outputs, key=self.position.__getitem__)
            for node in inputs:
                if self.position[node] > self.position[first]:
                    return f"{node.name} comes after {first.name}, which is to be replaced together with its reader"
        return None

    def fail(self, bound: Mapping[Any, Any], reason: str, *, complete: bool = False) -> None:
        """Keep the reason if it is nearer than what is known for this node."""
        matched = sum(isinstance(p, Op) for p in bound)
        if not matched:
            return
        if self.miss is None or (complete, matched) > (self.miss.complete, self.miss.matched):
            self.miss = NoMatch(self.node, reason, matched, complete)


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
        return (
            node.op == "call_module"
            and owner is not None
            and isinstance(attribute(owner, str(node.target)), wanted)
        )
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


def _literal(wanted: Any, value: Any) -> list[Goal] | None:
    """What has to fit for a literal of the picture, a list of parts among them, to be `value`."""
    if isinstance(wanted, list | tuple):
        fits = isinstance(value, list | tuple) and len(value) == len(wanted)
        return list(zip(wanted, value, strict=True)) if fits else None
    return [] if _equal(wanted, value) else None


def _equal(a: Any, b: Any) -> bool:
    """Equality that compares nodes by identity, lists with tuples, and 1 with 1.0 but not with True."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _number(value: Any, tensor: torch.Tensor | None) -> float | None:
    if tensor is not None and tensor.numel() == 1:
        return _float32(tensor.item())
    return _float32(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _show(value: Any) -> str:
    if isinstance(value, Part):
        return value.name or type(value).__name__
    return value.name if isinstance(value, fx.Node) else repr(value)
