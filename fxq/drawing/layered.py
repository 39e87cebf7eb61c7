"""Where to put boxes that are joined by lines from top to bottom: rows, order within rows, and straight columns.

The method of Sugiyama, Tagawa and Toda (Methods for Visual Understanding of Hierarchical System Structures, 1981) in
three steps: a row for each item by the longest path, the order in each row by barycenters, and columns from chains of
items that are aligned with each other, as Brandes and Köpf do (Fast and Simple Horizontal Coordinate Assignment,
2001). Two things are made for tensors. A tensor is *one* line, however many read it: its readers branch off a line
that runs down beside them. And of all chains the longest path is aligned first, so that the trunk of a network is
straight and its skips run beside it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

__all__ = ["Arrangement", "Line", "Segment", "arrange"]

_SWEEPS: Final = 8
_PULLS: Final = 6
_GAP: Final = 18.0
_BEND: Final = 8.0


@dataclass(frozen=True)
class Line:
    """One tensor: from the item that gives it to those that read it (indices)."""

    source: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """A part of line number `line`, from an item to one of the next row."""

    line: int
    above: int
    below: int


@dataclass(frozen=True)
class Arrangement:
    """Where everything lies; items from ``len(widths)`` on are bends, where a line passes through a row.

    Attributes:
        rows: The row of each item, from 0 at the top.
        x: The centre of each item, in pixels; only differences matter.
        segments: The lines, cut at each row.
    """

    rows: tuple[int, ...]
    x: tuple[float, ...]
    segments: tuple[Segment, ...]


def arrange(
    widths: Sequence[float], lines: Sequence[Line], first: Collection[int] = (), last: Collection[int] = ()
) -> Arrangement:
    """Arrange items.

    Args:
        widths: Their widths in pixels. Lines lead from items to later ones.
        lines: What joins them.
        first: Items of the first row.
        last: Items that have the last row for themselves.

    Returns:
        Rows, columns, and lines from row to row. The same arguments give the same arrangement.
    """
    rows = _rows(len(widths), lines, first, last)
    segments, all_rows = _cut(lines, rows)
    sizes = [*widths, *[_BEND] * (len(all_rows) - len(widths))]
    length = _path_lengths(len(widths), all_rows, segments)
    order = _order(all_rows, segments, length)
    x = _columns(sizes, order, segments, length, real=len(widths))
    return Arrangement(tuple(all_rows), tuple(x), tuple(segments))


def _rows(items: int, lines: Sequence[Line], first: Collection[int], last: Collection[int]) -> list[int]:
    rows = [0] * items
    readers: dict[int, list[int]] = defaultdict(list)
    for line in lines:
        readers[line.source] += line.targets
    floor = 1 if first else 0
    read = {target for line in lines for target in line.targets}
    for item in range(items):
        if item not in first:
            rows[item] = max(rows[item], floor)
        for target in readers[item]:
            rows[target] = max(rows[target], rows[item] + 1)
    for item in reversed(range(items)):  # what reads nothing stands right above its first reader
        if readers[item] and item not in read and item not in first:
            rows[item] = min(rows[target] for target in readers[item]) - 1
    deepest = max((rows[i] for i in range(items) if i not in last), default=-1) + 1
    for item in last:
        rows[item] = deepest
    return rows


def _cut(lines: Sequence[Line], rows: Sequence[int]) -> tuple[list[Segment], list[int]]:
    segments: list[Segment] = []
    all_rows = list(rows)
    for number, line in enumerate(lines):
        by_row: dict[int, list[int]] = defaultdict(list)
        for target in line.targets:
            by_row[rows[target]].append(target)
        above = line.source
        for row in range(rows[line.source] + 1, max(by_row) + 1):
            segments += [Segment(number, above, target) for target in by_row.get(row, ())]
            if row < max(by_row):
                bend = len(all_rows)
                all_rows.append(row)
                segments.append(Segment(number, above, bend))
                above = bend
    return segments, all_rows


def _path_lengths(items: int, rows: Sequence[int], segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """For each item how many real items the longest path has from the top to it, and from it to the bottom."""
    above, below = [0] * len(rows), [0] * len(rows)
    for segment in sorted(segments, key=lambda s: rows[s.above]):
        above[segment.below] = max(above[segment.below], above[segment.above] + (segment.above < items))
    for segment in sorted(segments, key=lambda s: -rows[s.above]):
        below[segment.above] = max(below[segment.above], below[segment.below] + (segment.below < items))
    return list(zip(above, below, strict=True))


def _order(rows: Sequence[int], segments: Sequence[Segment], length: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The items of each row from left to right, with few crossings."""
    up: dict[int, list[int]] = defaultdict(list)
    down: dict[int, list[int]] = defaultdict(list)
    for s in segments:
        down[s.above].append(s.below)
        up[s.below].append(s.above)
    order = _first_order(rows, down, length)
    best, fewest = [list(row) for row in order], _crossings(order, down)
    for sweep in range(_SWEEPS):
        if not fewest:
            break
        downwards = sweep % 2 == 0
        near = up if downwards else down
        for index in range(1, len(order)) if downwards else range(len(order) - 2, -1, -1):
            beside = order[index - 1 if downwards else index + 1]
            _sort_by_barycenter(order[index], beside, near)
        crossings = _crossings(order, down)
        if crossings < fewest:
            best, fewest = [list(row) for row in order], crossings
    return best


def _first_order(rows: Sequence[int], down: dict[int, list[int]], length: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Depth first from the top, the longest path first: the trunk comes to the left, what skips to its right."""
    order: list[list[int]] = [[] for _ in range(max(rows, default=-1) + 1)]
    seen: set[int] = set()
    for start in sorted(range(len(rows)), key=lambda i: (rows[i], -length[i][1], i)):
        stack = [start]
        while stack:
            item = stack.pop()
            if item not in seen:
                seen.add(item)
                order[rows[item]].append(item)
                stack += sorted(down[item], key=lambda i: (length[i][1], -i))
    return order


def _sort_by_barycenter(row: list[int], beside: Sequence[int], near: dict[int, list[int]]) -> None:
    place = {item: float(index) for index, item in enumerate(beside)}
    keys = {}
    for index, item in enumerate(row):
        found = [place[n] for n in near[item] if n in place]
        keys[item] = sum(found) / len(found) if found else float(index)
    row.sort(key=keys.__getitem__)


def _crossings(order: Sequence[Sequence[int]], down: dict[int, list[int]]) -> int:
    total = 0
    for above, below in itertools.pairwise(order):
        place = {item: index for index, item in enumerate(below)}
        seen: list[int] = []
        for item in above:
            ends = sorted(place[n] for n in down[item])
            total += sum(len(seen) - bisect_left(seen, end + 1) for end in ends)
            for end in ends:
                insort(seen, end)
    return total


def _columns(
    widths: Sequence[float],
    order: Sequence[Sequence[int]],
    segments: Sequence[Segment],
    length: Sequence[tuple[int, int]],
    real: int,
) -> list[float]:
    block = _blocks(len(widths), order, segments, length, real)
    apart: dict[tuple[int, int], float] = {}
    for row in order:
        for a, b in itertools.pairwise(row):
            key = (block[a], block[b])
            apart[key] = max(apart.get(key, 0.0), (widths[a] + widths[b]) / 2 + _GAP)
    left: dict[int, list[tuple[int, float]]] = defaultdict(list)
    right: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for (a, b), distance in apart.items():
        right[a].append((b, distance))
        left[b].append((a, distance))
    sequence = _topological(sorted(set(block)), left, right)
    x: dict[int, float] = {}
    for b in sequence:
        x[b] = max((x[a] + distance for a, distance in left[b]), default=0.0)
    _pull(x, sequence, (left, right), [(block[s.above], block[s.below]) for s in segments])
    return [x[b] for b in block]


def _blocks(
    items: int,
    order: Sequence[Sequence[int]],
    segments: Sequence[Segment],
    length: Sequence[tuple[int, int]],
    real: int,
) -> list[int]:
    """Which items share a column: for each the first of its chain. Chains do not cross."""
    place = {item: index for row in order for index, item in enumerate(row)}
    row_of = {item: index for index, row in enumerate(order) for item in row}

    def priority(s: Segment) -> tuple[bool, int, int, int]:
        passing = s.above >= real and s.below >= real
        return not passing, -(length[s.above][0] + length[s.below][1]), s.above, s.below

    below: dict[int, int] = {}
    above: dict[int, int] = {}
    taken: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for s in sorted(segments, key=priority):
        if s.above in below or s.below in above:
            continue
        pair, held = (place[s.above], place[s.below]), taken[row_of[s.above]]
        at = bisect_left(held, pair)
        if (at and held[at - 1][1] > pair[1]) or (at < len(held) and held[at][1] < pair[1]):
            continue
        held.insert(at, pair)
        below[s.above], above[s.below] = s.below, s.above
    block = list(range(items))
    for row in order:
        for item in row:
            if item in above:
                block[item] = block[above[item]]
    return block


def _topological(
    blocks: Sequence[int],
    left: dict[int, list[tuple[int, float]]],
    right: dict[int, list[tuple[int, float]]],
) -> list[int]:
    waiting = {b: len(left[b]) for b in blocks}
    ready = [b for b in blocks if not waiting[b]]
    for b in ready:
        for c, _ in right[b]:
            waiting[c] -= 1
            if not waiting[c]:
                ready.append(c)
    return ready


def _pull(
    x: dict[int, float],
    sequence: Sequence[int],
    beside: tuple[dict[int, list[tuple[int, float]]], dict[int, list[tuple[int, float]]]],
    joined: Iterable[tuple[int, int]],
) -> None:
    """Move each column to the median of those that it is joined to, as far as its neighbours leave room."""
    left, right = beside
    near: dict[int, list[int]] = defaultdict(list)
    for a, b in joined:
        if a != b:
            near[a].append(b)
            near[b].append(a)
    for sweep in range(_PULLS):
        for b in reversed(sequence) if sweep % 2 == 0 else sequence:
            if near[b]:
                low = max((x[a] + distance for a, distance in left[b]), default=float("-inf"))
                high = min((x[c] - distance for c, distance in right[b]), default=float("inf"))
                x[b] = min(max(median(x[n] for n in near[b]), low), high)
