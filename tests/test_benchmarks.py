"""The tables of measured figures in the docs are what their scripts make of the committed results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "accuracy.json", ROOT / "docs" / "calibration.md"


def check(results: Path, page: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "accuracy.py", "--check", "--results", results, "--page", page]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def test_the_page_shows_the_committed_accuracies(tmp_path: Path) -> None:
    done = check(RESULTS, PAGE)
    assert done.returncode == 0, done.stderr
    results = json.loads(RESULTS.read_text())
    results["mnist_lenet/fxq/32/0"]["methods"]["mse"][0] += 1
    (tmp_path / "other.json").write_text(json.dumps(results))
    done = check(tmp_path / "other.json", PAGE)
    assert "does not show" in done.stderr
    assert done.returncode == 1


def test_no_method_is_worse_than_modelopts_by_more_than_the_committed_noise() -> None:
    """What the page says of its figures: SQNR on the same subsets in the same placement."""
    results = json.loads(RESULTS.read_text())
    for task, suffix in (("cifar_resnet20", " adds"), ("mnist_lenet", "")):
        for method in ("max", "percentile", "entropy", "mse"):
            keys = [key for key in results if key.startswith(f"{task}/fxq/")]
            gains = [
                results[key]["methods"][method + suffix][1]
                - results[key.replace("/fxq/", "/modelopt/")]["methods"][method][1]
                for key in keys
            ]
            assert len(gains) >= 9
            assert sum(gains) / len(gains) > -0.02, (task, method)


def compared(results: Path, page: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "comparison.py", "--check", "--results", results, "--page", page]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_the_page_shows_the_committed_engines(tmp_path: Path) -> None:
    committed, page = ROOT / "benchmarks" / "comparison.json", ROOT / "docs" / "comparison.md"
    done = compared(committed, page)
    assert done.returncode == 0, done.stderr
    results = json.loads(committed.read_text())
    results["engines"]["resnet18"]["fxq"]["activation_bytes_total"] += 1_000_000
    (tmp_path / "other.json").write_text(json.dumps(results))
    done = compared(tmp_path / "other.json", page)
    assert "does not show" in done.stderr
    assert done.returncode == 1


def test_no_float32_is_left_in_the_16_bit_engines() -> None:
    """What the page says of them."""
    results = json.loads((ROOT / "benchmarks" / "comparison.json").read_text())["types"]
    assert set(results) == {"resnet18", "resnet50", "mobilenet_v3_large"}
    assert not [r for rows in results.values() for r in (rows["fp16"], rows["bf16"]) if r["causes"]["float32_left"]]


def test_every_checked_finding_stands_in_the_page_as_true() -> None:
    code = "import json, lint_peers; print(json.dumps([(c.peer, c.rule, c.node) for c in lint_peers.CHECKS]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT / "benchmarks",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "lint.md").read_text().splitlines()]
    shown = [(row[0], *row[1].split(" ", 1), row[-1]) for row in rows if len(row) == 7 and row[1].startswith("R")]
    assert len(shown) == len(checks) >= 15
    for (peer, rule, node), (row_peer, row_rule, row_node, verdict) in zip(checks, shown, strict=True):
        assert (row_peer, row_rule, verdict) == (peer, rule, "yes")
        assert row_node.startswith(node)
