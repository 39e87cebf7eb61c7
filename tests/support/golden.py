"""Golden texts: what the code prints, kept under ``tests/golden`` and compared whole.

``make golden`` (``pytest --golden-update``) rewrites them; the diff is then read before it is committed.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "golden"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*")


class GoldenSettings:
    """What the command line said. One instance, set by conftest."""

    update = False


settings = GoldenSettings()


def check_golden(name: str, text: str) -> None:
    """Compare ``text`` with ``tests/golden/<name>.txt``, or rewrite that file under ``--golden-update``.

    Args:
        name: File name without suffix; ``/`` makes folders. Two tests must not share a name.
        text: What was printed. A missing final newline is added; trailing blanks of a line are dropped.

    Raises:
        AssertionError: The text differs or the file is missing; the message is a unified diff.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no golden name: use letters, digits, '_', '-', '.' and '/'")
    path = FOLDER / f"{name}.txt"
    text = "\n".join(line.rstrip() for line in text.rstrip().splitlines()) + "\n"
    if settings.update:
        _write(path, text)
        return
    if not path.exists():
        raise AssertionError(f"no golden text {path.name}: run `make golden`, read it, commit it. It would be:\n{text}")
    expected = path.read_text(encoding="utf-8")
    if text != expected:
        diff = "".join(
            difflib.unified_diff(
                expected.splitlines(keepends=True),
                text.splitlines(keepends=True),
                f"golden/{name}.txt",
                "printed now",
            )
        )
        raise AssertionError(f"golden text differs; if the change is meant, run `make golden`:\n{diff}")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(temporary).replace(path)
