"""What checks of a graph find: one place where a rule is broken, and all of them as text, HTML and data."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, overload

from . import html
from .errors import FxqError
from .rules import RULES, WIDTH, rank

__all__ = ["FIX_OPTIONS", "SEVERITIES", "Finding", "Findings", "Fixable", "Severity"]

Severity: TypeAlias = Literal["error", "warning", "advice"]
SEVERITIES: Final[tuple[Severity, ...]] = ("error", "warning", "advice")
"""Worst first.

``error``: TensorRT refuses the network, cannot run the layer as it is meant, or computes something else.
``warning``: the network builds, and loses speed or accuracy.
``advice``: a kernel heuristic, or something that costs little; measure.
"""

Fixable: TypeAlias = Literal["", "exact", "rounding"]
"""Whether a machine can mend a finding, and at what cost.

``exact``: the mended file computes the same, rounding for rounding. ``rounding``: a rounding goes or comes, so that
the outputs change slightly. ``""``: it takes a person, or data.
"""
FIX_OPTIONS: Final[Mapping[Fixable, str]] = {"exact": "--fix", "rounding": "--fix-rounding"}
"""The command line's names for them."""


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
