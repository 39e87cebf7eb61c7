"""The rule table, what a check finds, and where checks register.

The rules of each backend are data (``rules.yaml`` TensorRT's, ``rules_onnxruntime.yaml`` ONNX Runtime's):
:data:`RULES` holds them by id. A check is a generator function over one kind of graph that yields a
:class:`Finding` wherever a rule is broken::

    @check("onnx", "R14")
    def integer_operators(graph: OnnxGraph) -> Iterator[Finding]: ...

``python -m fxq.rules`` prints the table as Markdown, which is docs/rules.md.
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, Literal, TypeAlias, TypeVar, overload

import yaml

from . import html
from .errors import FxqError

__all__ = [
    "FILES",
    "FIX_OPTIONS",
    "RULES",
    "SEVERITIES",
    "Check",
    "Finding",
    "Findings",
    "Fixable",
    "GraphKind",
    "RuleInfo",
    "Severity",
    "check",
    "checks",
    "rank",
    "rules_as_markdown",
    "run_checks",
]

Severity: TypeAlias = Literal["error", "warning", "advice"]
SEVERITIES: Final[tuple[Severity, ...]] = ("error", "warning", "advice")
"""Worst first.

``error``: TensorRT refuses the network, cannot run the layer as it is meant, or computes something else.
``warning``: the network builds, and loses speed or accuracy.
``advice``: a kernel heuristic, or something that costs little; measure.
"""

GraphKind: TypeAlias = Literal["onnx", "fx"]

Fixable: TypeAlias = Literal["", "exact", "rounding"]
"""Whether a machine can mend a finding, and at what cost.

``exact``: the mended file computes the same, rounding for rounding. ``rounding``: a rounding goes or comes, so that
the outputs change slightly. ``""``: it takes a person, or data.
"""
FIX_OPTIONS: Final[Mapping[Fixable, str]] = {"exact": "--fix", "rounding": "--fix-rounding"}
"""The command line's names for them."""

WIDTH: Final = 110


@dataclass(frozen=True)
class RuleInfo:
    """One of a backend's rules for explicit quantization.

    Attributes:
        id: ``R23`` for TensorRT, ``ORT4`` for ONNX Runtime.
        title: What the rule says.
        why: What happens to a network that breaks it.
        fix: What to do.
        trt: The TensorRT versions it is known to hold for; None for all with explicit quantization.
        check: What a check of a graph looks at; None if a graph cannot show the rule.
        source: Where the rule stands, such as the part of the backend that makes it so; None where it is not given.
        fixable: What ``fxq lint --fix`` and ``--fix-rounding`` do of it; None for nothing.
    """

    id: str
    title: str
    why: str
    fix: str
    trt: str | None = None
    check: str | None = None
    source: str | None = None
    fixable: str | None = None

    @property
    def family(self) -> str:
        """The letters of its id, which say whose rule it is: ``R`` for TensorRT, ``ORT`` for ONNX Runtime."""
        return self.id.rstrip("0123456789")

    @property
    def number(self) -> int:
        """The number of its id."""
        return int(self.id.removeprefix(self.family))


FILES: Final[Mapping[str, str]] = {"R": "rules.yaml", "ORT": "rules_onnxruntime.yaml"}
"""Family to the file that holds its rules."""


def _load(file: str) -> dict[str, RuleInfo]:
    data = yaml.safe_load((resources.files("fxq") / file).read_text(encoding="utf-8"))
    return {name: RuleInfo(name, **row) for name, row in data.items()}


RULES: Final[Mapping[str, RuleInfo]] = {name: rule for file in FILES.values() for name, rule in _load(file).items()}
"""The rules by id, family by family in the order of their numbers."""


def rank(rule: str) -> tuple[int, int]:
    """Where a rule stands among all, by its id: families in the order of :data:`FILES`, then by number."""
    found = RULES[rule]
    return list(FILES).index(found.family), found.number


@dataclass(frozen=True)
class Finding:
    """A place where a graph breaks a rule.

    Attributes:
        rule: Id of the rule, a key of :data:`RULES`.
        severity: One of :data:`SEVERITIES`.
        node: Name of the graph's node; None if the whole file is meant.
        message: What is wrong there, one sentence with names and numbers.
        why: Why it matters; "" takes the rule's.
        fix: What to do; "" takes the rule's.
        module_path: Dotted path of the user's module that the node came from, if the graph says so.
        source: The user's ``file:line``, if the graph says so.
        fixable: Whether ``fxq lint --fix`` mends it: ``"exact"``, ``"rounding"`` or ``""``.

    Raises:
        FxqError: There is no such rule or severity.
    """

    rule: str
    severity: Severity
    node: str | None
    message: str
    why: str = ""
    fix: str = ""
    module_path: str | None = None
    source: str | None = None
    fixable: Fixable = ""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise FxqError(f"no rule {self.rule!r}", node=self.node, hint="add it to fxq/rules.yaml")
        if self.severity not in SEVERITIES:
            raise FxqError(f"no severity {self.severity!r}", node=self.node, hint=f"use one of {', '.join(SEVERITIES)}")
        object.__setattr__(self, "why", self.why or RULES[self.rule].why)
        object.__setattr__(self, "fix", self.fix or RULES[self.rule].fix)

    @property
    def place(self) -> str:
        """Module path and source line, as far as they are known; "" if neither is."""
        return " at ".join(part for part in (self.module_path, self.source) if part)

    def __str__(self) -> str:
        text = f"{self.severity} {self.rule} {self.node or 'the file'}: {self.message}{_mended(self)}"
        return f"{text} ({self.place})" if self.place else text


@dataclass(frozen=True)
class Findings(Sequence[Finding]):
    """What the checks of one graph found, in the graph's order. Empty, and so false, if nothing.

    Attributes:
        items: The findings.
    """

    items: tuple[Finding, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", tuple(self.items))

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> Findings: ...
    def __getitem__(self, index: int | slice) -> Finding | Findings:
        return Findings(self.items[index]) if isinstance(index, slice) else self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def errors(self) -> Findings:
        """The findings of severity ``error``."""
        return self.of(severity="error")

    @property
    def warnings(self) -> Findings:
        """The findings of severity ``warning``."""
        return self.of(severity="warning")

    @property
    def advice(self) -> Findings:
        """The findings of severity ``advice``."""
        return self.of(severity="advice")

    def of(self, rule: str | None = None, *, severity: Severity | None = None) -> Findings:
        """The findings of one rule, one severity, or both.

        Args:
            rule: Rule id; None (default) takes all.
            severity: Severity; None (default) takes all.
        """
        return Findings(tuple(f for f in self.items if rule in (None, f.rule) and severity in (None, f.severity)))

    def __str__(self) -> str:
        if not self.items:
            return "no findings"
        parts = [f"{len(self)} finding{'s' if len(self) > 1 else ''}: {self._counts()}"]
        parts += [_section(severity, rule, found) for (severity, rule), found in self._grouped()]
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        if not self.items:
            return html.card("no findings", ())
        blocks = [_section_html(severity, rule, found) for (severity, rule), found in self._grouped()]
        return html.card(f"{len(self)} finding{'s' if len(self) > 1 else ''}: {self._counts()}", blocks)

    def to_dict(self) -> dict[str, Any]:
        """Counts by severity and the findings, as plain data ready for JSON."""
        counts = {severity: len(self.of(severity=severity)) for severity in SEVERITIES}
        return {"counts": counts, "findings": [dataclasses.asdict(finding) for finding in self.items]}

    def _counts(self) -> str:
        counts = [(len(self.of(severity=s)), s) for s in SEVERITIES]
        plural = {"error": "errors", "warning": "warnings", "advice": "advice"}
        return ", ".join(f"{n} {s if n == 1 else plural[s]}" for n, s in counts if n)

    def _grouped(self) -> list[tuple[tuple[Severity, str], list[Finding]]]:
        """By severity and rule, worst first and then by the rule's number."""
        groups: dict[tuple[Severity, str], list[Finding]] = {}
        for finding in self.items:
            groups.setdefault((finding.severity, finding.rule), []).append(finding)
        return sorted(groups.items(), key=lambda row: (SEVERITIES.index(row[0][0]), rank(row[0][1])))


def _mended(finding: Finding) -> str:
    return f" [fixed by {FIX_OPTIONS[finding.fixable]}]" if finding.fixable else ""


def _section(severity: Severity, rule: str, found: Sequence[Finding]) -> str:
    """The findings of one rule: its title, a line for each place, and each why and fix once."""
    lines = [f"{severity}  {rule}  {RULES[rule].title}"]
    for finding in found:
        lines += _wrap(f"- {finding.node or 'the file'}: {finding.message}{_mended(finding)}", indent=4)
        lines += [f"    {finding.place}"] if finding.place else []
    for label, texts in (("why: ", [f.why for f in found]), ("fix: ", [f.fix for f in found])):
        lines += [line for text in dict.fromkeys(texts) for line in _wrap(label + text, indent=7)]
    return "\n".join(lines)


def _section_html(severity: Severity, rule: str, found: Sequence[Finding]) -> html.Html:
    rows = [(finding.node or "the file", finding.message + _mended(finding), finding.place) for finding in found]
    head = html.element("p", html.element("strong", f"{severity}  {rule}  {RULES[rule].title}"))
    whys = [html.element("p", f"why: {text}") for text in dict.fromkeys(f.why for f in found)]
    fixes = [html.element("p", f"fix: {text}") for text in dict.fromkeys(f.fix for f in found)]
    shown = html.folded_table(("node", "what is wrong", "from"), rows, "places")
    return html.element("div", [head, shown, *whys, *fixes])


def _wrap(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="  ",
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


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


def rules_as_markdown() -> str:
    """The rule table as Markdown: what docs/rules.md holds."""
    head = """\
# TensorRT's rules for explicit quantization

The rules that fxq places quantizers by, cites in its reports and looks for in ONNX files; in its own graphs
`fxq.lint` looks for R9, R10, R11, R20, R23, R27 and R29. Behind them stand those of ONNX Runtime. Printed by
`python -m fxq.rules` from `fxq/rules.yaml` and `fxq/rules_onnxruntime.yaml`: change them there.

A finding is an **error** where TensorRT refuses the network, cannot run the layer as it is meant or computes
something else, a **warning** where the network builds and loses speed or accuracy, and **advice** where it
is a kernel heuristic or costs little. Some findings `fxq lint --fix` mends by itself: see [lint.md](lint.md).
"""
    runtime = """
# ONNX Runtime's rules for 8-bit graphs on a CPU

The rules of the target `onnxruntime`: which patterns of Q/DQ its optimizer makes into kernels on integers.
"""
    own, other = ("".join(_rule_as_markdown(r) for r in RULES.values() if r.family == family) for family in FILES)
    return head + own + runtime + other


def _rule_as_markdown(rule: RuleInfo) -> str:
    rows = [
        ("Why", rule.why),
        ("Fix", rule.fix),
        ("TensorRT", rule.trt),
        ("Checked", rule.check),
        ("From", rule.source),
        ("Fixed by a machine", rule.fixable),
    ]
    items = [
        textwrap.fill(f"- *{label}*: {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        for label, text in rows
        if text
    ]
    return f"\n## {rule.id}: {rule.title}\n\n" + "\n".join(items) + "\n"


if __name__ == "__main__":
    sys.stdout.write(rules_as_markdown())
