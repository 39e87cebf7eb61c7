"""Pages of docs/ that hold tables of a benchmark between two markers."""

from __future__ import annotations


def written(page: str, text: str, begin: str, end: str) -> str:
    """The page with `text` between its markers `begin` and `end`."""
    before, opened, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise SystemExit(f"the page has no place for the tables: {begin} and {end}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
