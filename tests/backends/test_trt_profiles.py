"""Which shapes an engine is built for."""

from __future__ import annotations

from typing import Any

import pytest

from fxq.backends.trt_profiles import profile_shapes
from fxq.errors import BuildError

INPUTS = {"x": (-1, 3, -1, -1), "mask": (-1, 8), "fixed": (1, 4)}
GOOD: dict[str, Any] = {
    "x": ((1, 3, 32, 32), (4, 3, 64, 64), (8, 3, 96, 96)),
    "mask": [[1, 8], [4, 8], [8, 8]],
}


def test_static_inputs_need_none() -> None:
    assert profile_shapes({"x": (2, 3), "y": ()}, None) == {}


def test_default_is_the_batch_alone() -> None:
    assert profile_shapes({"x": (-1, 3, 4), "fixed": (1, 4)}, None) == {"x": ((1, 3, 4), (8, 3, 4), (32, 3, 4))}


def test_ranges_of_the_caller_are_taken_as_they_are() -> None:
    assert profile_shapes(INPUTS, GOOD) == {"x": GOOD["x"], "mask": ((1, 8), (4, 8), (8, 8))}


def test_more_than_the_batch_asks_for_profiles_with_an_example() -> None:
    with pytest.raises(BuildError, match="dynamic beyond its batch") as caught:
        profile_shapes(INPUTS, None)
    assert caught.value.node == "x"
    assert 'profiles={"x": ((1, 3, 1, 1), (8, 3, 8, 8), (32, 3, 32, 32))}' in str(caught.value)


@pytest.mark.parametrize("name", ["fixed", "nothing"])
def test_range_for_no_dynamic_input(name: str) -> None:
    with pytest.raises(BuildError, match=f"profiles names {name}.*x, mask"):
        profile_shapes(INPUTS, {**GOOD, name: ((1, 4), (1, 4), (1, 4))})


def test_range_left_out() -> None:
    with pytest.raises(BuildError, match="leaves out mask"):
        profile_shapes(INPUTS, {"x": GOOD["x"]})


@pytest.mark.parametrize(
    "given",
    [
        ((1, 8), (4, 8)),
        ((1, 8), (4, 8), (8, 8), (9, 8)),
        ((1, 8, 1), (4, 8, 1), (8, 8, 1)),
        ((1, 9), (4, 9), (8, 9)),
        ((4, 8), (1, 8), (8, 8)),
        ((1, 8), (8, 8), (4, 8)),
        ((0, 8), (4, 8), (8, 8)),
    ],
    ids=["two", "four", "rank", "static size changed", "opt below min", "max below opt", "zero"],
)
def test_range_that_does_not_fit(given: Any) -> None:
    with pytest.raises(BuildError, match="the profile of input mask") as caught:
        profile_shapes(INPUTS, {**GOOD, "mask": given})
    assert caught.value.node == "mask"
