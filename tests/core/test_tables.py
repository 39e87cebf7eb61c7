"""Tables as text."""

from __future__ import annotations

import math

import pytest

from fxq.tables import plain_number, table


def test_a_table_is_plain_text_of_so_many_columns() -> None:
    text = table(
        {"tensor": False, "dB": True}, [("[bold]x[/bold] :smile:", "1.5"), ("long " * 40, "2")], title="two", width=60
    )
    lines = text.splitlines()
    assert lines[0] == "two"
    assert "[bold]x[/bold] :smile:" in text
    assert max(map(len, lines)) <= 60
    assert all(line == line.rstrip() for line in lines)


def test_a_table_is_text_alone_under_jupyter(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich would display what it prints, beside the text that was asked for."""
    import rich.console

    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *_: pytest.fail("displayed"))
    assert "1.5" in table({"dB": True}, [("1.5",)])


@pytest.mark.parametrize(("value", "plain"), [(1.5, 1.5), (math.inf, "inf"), (-math.inf, "-inf"), ("x", "x"), (3, 3)])
def test_plain_number(value: object, plain: object) -> None:
    assert plain_number(value) == plain


def test_nan_is_text() -> None:
    assert plain_number(math.nan) == "nan"
