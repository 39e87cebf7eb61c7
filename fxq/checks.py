"""Where the checks of graphs register, and how they are run.

A check is a generator function over one kind of graph that yields a :class:`fxq.findings.Finding` wherever a rule is
broken::

    @check("onnx", "R14")
    def integer_operators(graph: OnnxGraph) -> Iterator[Finding]: ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, TypeVar

from .errors import FxqError
from .findings import Finding
from .rules import RULES

__all__ = ["Check", "CheckFunction", "GraphKind", "check", "checks", "run_checks"]

GraphKind: TypeAlias = Literal["onnx", "fx"]
CheckFunction: TypeAlias = Callable[[Any], Iterable[Finding]]
F = TypeVar("F", bound=CheckFunction)


@dataclass(frozen=True)
class Check:
    """A registered check.

    Attributes:
        graph: The kind of graph that it reads: ``onnx`` or ``fx``.
        rules: Ids of the rules whose breaches it finds.
        run: The check: takes the graph, gives findings.
    """

    graph: GraphKind
    rules: tuple[str, ...]
    run: CheckFunction

    @property
    def name(self) -> str:
        """The check function's name."""
        return self.run.__name__


_CHECKS: Final[list[Check]] = []


def check(graph: GraphKind, *rules: str) -> Callable[[F], F]:
    """Register a function as a check.

    Args:
        graph: The kind of graph that it reads.
        rules: Ids of the rules whose breaches it finds, at least one.

    Returns:
        A decorator that gives the function back as it is.

    Raises:
        FxqError: A rule is not in the table, or none is named.
    """
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown or not rules:
        raise FxqError(f"a check for {', '.join(unknown) or 'no rule'}", hint="name rules that fxq/rules.yaml holds")

    def register(function: F) -> F:
        _CHECKS.append(Check(graph, rules, function))
        return function

    return register


def checks(graph: GraphKind) -> tuple[Check, ...]:
    """The checks of one kind of graph, in the order of their registration.

    Args:
        graph: ``onnx`` (registered by :mod:`fxq.backends.onnx_lint`) or ``fx`` (by :mod:`fxq.fx_lint`).
    """
    return tuple(c for c in _CHECKS if c.graph == graph)


def run_checks(kind: GraphKind, graph: Any, *, rules: Collection[str] | None = None) -> Iterator[Finding]:
    """Run the checks of one kind of graph.

    Args:
        kind: The kind of graph.
        graph: What the checks read.
        rules: Ids of the rules to look for; None (default) takes all.

    Yields:
        Findings, check by check.

    Raises:
        FxqError: A check found a breach of a rule that it is not registered for.
    """
    for one in checks(kind):
        if rules is not None and not set(rules).intersection(one.rules):
            continue
        for finding in one.run(graph):
            if finding.rule not in one.rules:
                raise FxqError(
                    f"the check {one.name} is registered for {one.rules} and found {finding.rule}",
                    node=finding.node,
                )
            if rules is None or finding.rule in rules:
                yield finding
