"""Arranging boxes joined by lines: what must hold of any arrangement, and what makes one good to look at."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fxq.drawing.layered import Arrangement, Line, arrange


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[float], list[Line]]:
    """Up to 25 items, each read by some later ones."""
    count = draw(st.integers(1, 25))
    widths = draw(st.lists(st.floats(10, 200), min_size=count, max_size=count))
    lines = []
    for source in range(count - 1):
        later = st.sets(st.integers(source + 1, count - 1), min_size=1, max_size=3)
        lines += [Line(source, tuple(sorted(targets))) for targets in draw(st.lists(later, max_size=2))]
    return widths, lines


def centres(found: Arrangement, *items: int) -> list[float]:
    return [found.x[item] for item in items]


@given(graphs())
def test_every_line_arrives_and_nothing_overlaps(graph: tuple[list[float], list[Line]]) -> None:
    widths, lines = graph
    found = arrange(widths, lines)
    assert found == arrange(widths, lines)
    for number, line in enumerate(lines):
        reached, way = {line.source}, [s for s in found.segments if s.line == number]
        for segment in sorted(way, key=lambda s: found.rows[s.above]):
            assert segment.above in reached
            assert found.rows[segment.below] == found.rows[segment.above] + 1
            reached.add(segment.below)
        assert {item for item in reached if item < len(widths)} == {line.source, *line.targets}
    rows = defaultdict(list)
    for item, row in enumerate(found.rows):
        half = widths[item] / 2 if item < len(widths) else 4.0
        rows[row].append((found.x[item] - half, found.x[item] + half))
    for spans in rows.values():
        spans.sort()
        assert all(left[1] < right[0] for left, right in pairwise(spans))


def test_the_trunk_of_a_residual_block_is_straight_and_its_skip_runs_beside_it() -> None:
    """0 is read by 1 and, past 1, 2 and 3, by 4; the skip is one straight line on the right."""
    found = arrange([60.0] * 5, [Line(0, (1, 4)), Line(1, (2,)), Line(2, (3,)), Line(3, (4,))])
    assert len(set(centres(found, 0, 1, 2, 3, 4))) == 1
    skip = centres(found, *range(5, len(found.x)))
    assert len(skip) == 3
    assert len(set(skip)) == 1
    assert skip[0] > found.x[0] + 30


def test_a_tensor_with_many_readers_has_one_line_with_branches() -> None:
    """Dense connections: 0 is read by 1, 2, 3 and 4; beside each row there is one bend of it, not one per reader."""
    found = arrange([60.0] * 5, [Line(0, (1, 2, 3, 4)), Line(1, (2,)), Line(2, (3,)), Line(3, (4,))])
    bends = found.rows[5:]
    assert sorted(bends) == [1, 2, 3]


def test_two_lines_may_leave_one_item() -> None:
    """What an edge was, and what it is: both lead down."""
    found = arrange([60.0] * 3, [Line(0, (1,)), Line(1, (2,)), Line(0, (2,))])
    assert found.rows[:3] == (0, 1, 2)
    assert {s.line for s in found.segments} == {0, 1, 2}


def test_walls_have_rows_of_their_own() -> None:
    found = arrange([8.0, 60.0, 60.0, 8.0], [Line(0, (1, 3)), Line(1, (2,))], first=[0], last=[3])
    assert found.rows[:4] == (0, 1, 2, 3)


def test_what_reads_nothing_stands_above_its_reader() -> None:
    found = arrange([60.0] * 4, [Line(0, (1,)), Line(1, (3,)), Line(2, (3,))])
    assert found.rows[2] == 1


def test_two_thousand_items() -> None:
    lines = [Line(i, (i + 1, i + 4) if i % 4 == 0 and i < 1990 else (i + 1,)) for i in range(1999)]
    found = arrange([80.0] * 2000, lines)
    assert found.rows[1999] == 1999
    assert len(set(centres(found, *range(2000)))) == 1
