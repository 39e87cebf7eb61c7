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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from torch import fx

from .errors import PassError
from .graph import origin
from .ops import kind_name
from .patterns import Constant, Goal, OneOf, Op, Part, Pattern, Var, equal, literal_goals, maybe, shown

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
            raise PassError(f"the pattern has no part called {name!r}", hint=f"it has {', '.join(sorted(self.names))}")
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
        misses: One for each other node at which at least one call of the picture fitted, the nearest for it,
            in the graph's order.
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
        self.begin(node)
        for bound in self.solve([(self.pattern.outputs[0], node)], {}):
            for full in self.others(bound, 0):
                match = self.accepted(full)
                if match is not None:
                    self.matches.append(match)
                    self.owner.update(dict.fromkeys(match.nodes, match))
                    return
        if self.miss is not None:
            self.misses.append(self.miss)

    def begin(self, node: fx.Node) -> None:
        """Forget what is known of the node before."""
        self.node, self.miss = node, None

    def solve(self, goals: Sequence[Goal], bound: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        """Every way to fulfil all goals, with what each part is then."""
        if not goals:
            yield bound
            return
        (part, value), rest = goals[0], goals[1:]
        self.visits += 1
        if not isinstance(part, Part):
            inner = literal_goals(part, value)
            if inner is None:
                self.fail(bound, f"{shown(value)} is not {shown(part)}")
            else:
                yield from self.solve([*inner, *rest], bound)
        elif part in bound:
            if equal(bound[part], value):
                yield from self.solve(rest, bound)
            else:
                self.fail(
                    bound,
                    f"{shown(value)} is not {shown(bound[part])}, which {part.name or 'it'} is elsewhere",
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
        output, seed = self.pattern.outputs[done + 1], self.pattern.seeds[done]
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
                    self.fail(bound, f"{shown(node)} has more than {MAX_READERS} readers to choose from")
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
                    return f"{node.name} comes after {first.name}, with which its reader is to be replaced"
        return None

    def fail(self, bound: Mapping[Any, Any], reason: str, *, complete: bool = False) -> None:
        """Keep the reason if it is nearer than what is known for this node."""
        matched = sum(isinstance(p, Op) for p in bound)
        if not matched:
            return
        if self.miss is None or (complete, matched) > (self.miss.complete, self.miss.matched):
            self.miss = NoMatch(self.node, reason, matched, complete)
