"""Building blocks of what a notebook shows: every text is escaped, every block has the one style sheet.

What users leave at the end of a cell has a ``_repr_html_`` made of these. Names come from users' code and may hold
anything, so a block takes texts and gives :class:`Html`, and only Html is taken as it is.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any, Final

__all__ = [
    "Html",
    "as_html",
    "card",
    "details",
    "element",
    "folded_table",
    "image",
    "json_script",
    "share",
    "sheet",
    "table",
]

SCRIPT: Final = "drawing/view.js"
_MANY: Final = 24
STYLE: Final = "style.css"


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


@cache
def sheet(name: str) -> Html:
    """The style sheet or the script, as an element.

    Args:
        name: :data:`STYLE` or :data:`SCRIPT`.
    """
    text = (resources.files("fxq") / name).read_text(encoding="utf-8").strip()
    return Html(f"<style>{text}</style>" if name == STYLE else f"<script>{text}</script>")


def as_html(content: str) -> Html:
    """`content`, escaped unless it is Html already."""
    return content if isinstance(content, Html) else Html(escape(str(content)))


def element(tag: str, content: str | Iterable[str] = "", **attributes: str) -> Html:
    """An element with its content escaped.

    Args:
        tag: Its name.
        content: Text, Html, or several of them.
        attributes: By name; ``class_`` is ``class``.
    """
    inner = as_html(content) if isinstance(content, str) else "".join(map(as_html, content))
    named = "".join(f' {k.rstrip("_").replace("_", "-")}="{escape(v)}"' for k, v in attributes.items())
    return Html(f"<{tag}{named}>{inner}</{tag}>")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> Html:
    """A table.

    Args:
        columns: Headings.
        rows: Texts or Html; a line break in a text stays one.
        right: Indices of columns with numbers.
    """
    aligned = {index: {"class_": "fxq-right"} for index in right}
    head = element("tr", [element("th", c, **aligned.get(i, {})) for i, c in enumerate(columns)])
    body = [element("tr", [element("td", _lines(c), **aligned.get(i, {})) for i, c in enumerate(row)]) for row in rows]
    return element("table", [head, *body])


def _lines(text: str) -> Html:
    return text if isinstance(text, Html) else Html("<br>".join(map(escape, text.split("\n"))))


def details(summary: str, content: str | Iterable[str]) -> Html:
    """Something that is shown when asked for."""
    inner = [content] if isinstance(content, str) else content
    return element("details", [element("summary", summary), *inner])


def folded_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], words: str, *, right: Iterable[int] = ()
) -> Html:
    """A table that is shown when asked for if it has many rows.

    Args:
        columns: Headings.
        rows: Texts or Html.
        words: What it holds.
        right: Indices of columns with numbers.
    """
    made = table(columns, rows, right=right)
    return made if len(rows) <= _MANY else details(f"{len(rows)} {words}", made)


def share(part: int, whole: int, words: str) -> Html:
    """A bar that is filled as far as `part` goes into `whole`, and words beside it."""
    width = f"width:{100 * part / whole:.0f}%" if whole else "width:0"
    bar = element("span", element("span", "", style=width), class_="fxq-share")
    return element("p", [bar, words])


def card(title: str, content: Iterable[str]) -> str:
    """A whole output, style sheet included."""
    return element("div", [sheet(STYLE), element("h4", title), *content], class_="fxq fxq-card")


def image(svg: str, words: str) -> Html:
    """A still picture that needs no script and passes sanitizers: SVG in a data URL.

    Args:
        svg: The picture.
        words: What to read where it cannot be seen.
    """
    data = base64.b64encode(svg.encode()).decode()
    return Html(f'<img class="fxq-still" alt="{escape(words)}" src="data:image/svg+xml;base64,{data}">')


def json_script(data: Any) -> Html:
    """Data for the script, in a form that cannot end its element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Html(f'<script type="application/json" class="fxq-data">{text}</script>')
