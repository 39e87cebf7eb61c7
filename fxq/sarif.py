"""Findings as SARIF 2.1.0, the format that code scanners and editors read (OASIS standard of 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from .findings import Finding
from .rules import RULES, rank

__all__ = ["findings_as_sarif"]

_LEVELS: Final[Mapping[str, str]] = {"error": "error", "warning": "warning", "advice": "note"}
_SCHEMA: Final = "https://json.schemastore.org/sarif-2.1.0.json"


def findings_as_sarif(findings: Iterable[Finding], file: str | Path | None = None) -> dict[str, Any]:
    """A SARIF log with one run.

    Args:
        findings: What the checks found.
        file: The file that was checked; it becomes each result's location. None leaves only the node's name.

    Returns:
        Plain data, ready for JSON. ``advice`` becomes SARIF's level ``note``; the ONNX node is a logical location, and
        the user's source line, where it is known, a related one.
    """
    found = list(findings)
    ids = sorted({finding.rule for finding in found}, key=rank)
    driver = {"name": "fxq", "rules": [_rule(rule) for rule in ids]}
    results = [_result(finding, ids.index(finding.rule), file) for finding in found]
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def _rule(name: str) -> dict[str, Any]:
    rule = RULES[name]
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.why},
        "help": {"text": rule.fix},
    }


def _result(finding: Finding, index: int, file: str | Path | None) -> dict[str, Any]:
    location: dict[str, Any] = {}
    if file is not None:
        location["physicalLocation"] = {"artifactLocation": {"uri": _uri(file)}}
    if finding.node is not None:
        logical = {"name": finding.node, "kind": "node"}
        location["logicalLocations"] = [logical | _qualified(finding)]
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": _LEVELS[finding.severity],
        "message": {"text": f"{finding.message}. {finding.why} Fix: {finding.fix}"},
        "locations": [location] if location else [],
    }
    if finding.fixable:
        result["properties"] = {"fixable": finding.fixable}
    name, _, line = (finding.source or "").rpartition(":")
    if name and line.isdigit() and int(line) > 0:
        region = {"startLine": int(line)}
        result["relatedLocations"] = [
            {"id": 1, "physicalLocation": {"artifactLocation": {"uri": _uri(name)}, "region": region}}
        ]
    return result


def _qualified(finding: Finding) -> dict[str, str]:
    return {"fullyQualifiedName": finding.module_path} if finding.module_path else {}


def _uri(file: str | Path) -> str:
    """A URI: absolute for an absolute path, else relative."""
    path = Path(file)
    return path.as_uri() if path.is_absolute() else path.as_posix().replace(" ", "%20")
