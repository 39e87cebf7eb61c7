"""The rule table, findings, and the registry of checks."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import golden
import pytest
import yaml

from fxq import checks as registering
from fxq.checks import check, checks, run_checks
from fxq.errors import FxqError
from fxq.findings import SEVERITIES, Finding, Findings
from fxq.rules import FILES, RULES, rank, rules_as_markdown

ROOT = Path(__file__).resolve().parents[2]
CITED = re.compile(r"\b(?:R|ORT)\d+\b")


def finding(rule: str = "R23", severity: str = "warning", node: str | None = "add", **more: str) -> Finding:
    return Finding(rule, severity, node, "both inputs are quantized", **more)  # type: ignore[arg-type]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> list[registering.Check]:
    """An empty registry for the length of a test."""
    empty: list[registering.Check] = []
    monkeypatch.setattr(registering, "_CHECKS", empty)
    return empty


class TestTable:
    def test_ids_are_in_the_order_of_their_numbers(self) -> None:
        assert list(RULES) == sorted(RULES, key=rank)
        for family in FILES:
            numbers = [rule.number for rule in RULES.values() if rule.family == family]
            assert numbers == sorted(set(numbers))
        assert {rule.family for rule in RULES.values()} == set(FILES)
        assert all(rule.id == name for name, rule in RULES.items())

    def test_every_rule_is_said_in_full(self) -> None:
        for rule in RULES.values():
            assert not rule.title.endswith("."), rule.id
            for text in (rule.why, rule.fix, *([rule.check] if rule.check else [])):
                assert text.endswith("."), rule.id
                assert text == " ".join(text.split()), rule.id

    def test_whatever_fxq_cites_is_in_the_table(self) -> None:
        rooms = [
            *ROOT.glob("fxq/*.py"),
            *ROOT.glob("passes/*.py"),
            *ROOT.glob("backends/*.py"),
            *ROOT.glob("backends/*.yaml"),
        ]
        cited = {rule: file.name for file in rooms for rule in CITED.findall(strip_examples(file.read_text("utf-8")))}
        assert {"R20", "R23", "R27", "ORT1", "ORT4"} <= set(cited)
        assert {rule: file for rule, file in cited.items() if rule not in RULES} == {}

    def test_the_page_in_docs_is_current(self) -> None:
        page = ROOT / "docs" / "rules.md"
        if golden.settings.update:
            page.parent.mkdir(exist_ok=True)
            page.write_text(rules_as_markdown(), encoding="utf-8")
        assert page.read_text(encoding="utf-8") == rules_as_markdown(), "run: python -m fxq.rules > docs/rules.md"

    def test_the_page_has_every_rule_and_every_field(self) -> None:
        text = " ".join(rules_as_markdown().split())
        for rule in RULES.values():
            assert f"## {rule.id}: {rule.title}" in text
            assert all(
                part in text for part in (rule.why, rule.fix, rule.trt, rule.check, rule.source, rule.fixable) if part
            )

    def test_the_module_prints_the_page(self) -> None:
        command = [sys.executable, "-m", "fxq.rules"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == rules_as_markdown()

    def test_the_table_is_plain_data(self) -> None:
        data = {}
        for family, file in FILES.items():
            own = yaml.safe_load((ROOT / "fxq" / file).read_text(encoding="utf-8"))
            assert {RULES[name].family for name in own} == {family}
            data |= own
        known = {"title", "why", "fix", "trt", "check", "source", "fixable"}
        assert {name: set(row) - known for name, row in data.items()} == {name: set() for name in RULES}


def strip_examples(text: str) -> str:
    """Text without the places where a rule id is an example of its form, or a range."""
    return text.replace("``R18``", "")


class TestFinding:
    def test_takes_why_and_fix_from_the_rule(self) -> None:
        assert (finding().why, finding().fix) == (RULES["R23"].why, RULES["R23"].fix)
        assert finding(fix="Do that.").fix == "Do that."

    def test_says_all_it_knows_in_one_line(self) -> None:
        assert str(finding()) == "warning R23 add: both inputs are quantized"
        placed = finding(module_path="layer1.0", source="resnet.py:93")
        assert str(placed) == "warning R23 add: both inputs are quantized (layer1.0 at resnet.py:93)"
        assert str(finding(node=None)).startswith("warning R23 the file: ")

    def test_an_unknown_rule_or_severity_is_an_error(self) -> None:
        with pytest.raises(FxqError, match=r"no rule 'R99'[\s\S]*node: add"):
            finding("R99")
        with pytest.raises(FxqError, match=r"no severity 'fatal'[\s\S]*error, warning, advice"):
            finding(severity="fatal")


class TestFindings:
    found = Findings(
        (
            finding("R29", "advice", "q2"),
            finding("R23", "warning", "add1", module_path="layer1.0"),
            finding("R9", "error", "q1"),
            finding("R23", "warning", "add2"),
        )
    )

    def test_is_a_sequence_in_the_order_given(self) -> None:
        assert [f.node for f in self.found] == ["q2", "add1", "q1", "add2"]
        assert self.found[1].node == "add1"
        assert self.found[-1] in self.found
        assert self.found[1:3] == Findings(self.found.items[1:3])
        assert len(self.found) == 4

    def test_is_false_when_empty(self) -> None:
        assert self.found
        assert not Findings()
        assert not self.found[:1].errors

    def test_picks_by_severity_and_rule(self) -> None:
        assert [f.node for f in self.found.errors] == ["q1"]
        assert [f.node for f in self.found.warnings] == ["add1", "add2"]
        assert [f.node for f in self.found.advice] == ["q2"]
        assert [f.node for f in self.found.of("R23")] == ["add1", "add2"]
        assert not self.found.of("R23", severity="error")
        assert sum(len(self.found.of(severity=s)) for s in SEVERITIES) == len(self.found)

    def test_prints_each_rule_once_worst_first(self) -> None:
        golden.check_golden("findings", str(self.found))

    def test_prints_that_there_are_none(self) -> None:
        assert str(Findings()) == "no findings"

    def test_counts_one_of_each_in_the_singular(self) -> None:
        assert str(self.found[2:3]).splitlines()[0] == "1 finding: 1 error"


@pytest.mark.usefixtures("registry")
class TestRegistry:
    """Checks over graphs that are plain lists of node names."""

    def test_a_registered_check_runs_on_its_kind_of_graph(self) -> None:
        @check("onnx", "R9", "R23")
        def each(graph: list[str]) -> Iterator[Finding]:
            yield from (finding("R9" if name.startswith("q") else "R23", node=name) for name in graph)

        assert [c.name for c in checks("onnx")] == ["each"]
        assert not checks("fx")
        assert [f.node for f in run_checks("onnx", ["q", "add"])] == ["q", "add"]
        assert [f.node for f in run_checks("onnx", ["q", "add"], rules=["R23"])] == ["add"]
        assert list(run_checks("onnx", ["q", "add"], rules=["R20"])) == []
        assert list(run_checks("fx", ["q", "add"])) == []

    def test_the_decorator_gives_the_function_back(self) -> None:
        def nothing(graph: object) -> list[Finding]:  # noqa: ARG001
            return []

        assert check("fx", "R20")(nothing) is nothing

    @pytest.mark.parametrize("named", [(), ("R20", "R99")])
    def test_a_check_of_no_rule_is_an_error(self, named: tuple[str, ...], registry: list[registering.Check]) -> None:
        with pytest.raises(FxqError, match=r"a check for (no rule|R99)"):
            check("onnx", *named)
        assert registry == []

    def test_a_check_that_finds_another_rule_is_an_error(self) -> None:
        @check("onnx", "R20")
        def confused(graph: object) -> Iterator[Finding]:  # noqa: ARG001
            yield finding("R23")

        with pytest.raises(FxqError, match=r"confused is registered for \('R20',\) and found R23"):
            list(run_checks("onnx", []))
