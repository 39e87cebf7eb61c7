"""The rule table: each backend's rules for explicit quantization, as data.

``rules.yaml`` holds TensorRT's, ``rules_onnxruntime.yaml`` ONNX Runtime's; :data:`RULES` has them by id. What breaks a
rule is a :class:`fxq.findings.Finding`; what looks for it is registered with :mod:`fxq.checks`.

``python -m fxq.rules`` prints the table as Markdown, which is docs/rules.md.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Final

import yaml

__all__ = ["FILES", "RULES", "RuleInfo", "rank", "rules_as_markdown"]

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
