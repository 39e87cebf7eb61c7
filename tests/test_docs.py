"""The documentation's Python runs: each page's blocks in order, in one namespace, in an empty folder.

A block that begins with ```` ```python trt ```` needs TensorRT; a page without a Python block is not listed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python(?P<needs>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(p.read_text())]


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """(line of the first statement, what the block needs, code) for each Python block of a page."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start()) + 2, m["needs"].strip(), m["code"]) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, needs, code in blocks(page):
        assert needs in ("", "trt"), f"{page.name}:{line}: unknown mark {needs!r}"
        if needs == "trt":
            request.getfixturevalue("trt")
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_the_readme_is_among_the_pages() -> None:
    assert PAGES[0].name == "README.md"
    assert len(blocks(PAGES[0])) >= 3
