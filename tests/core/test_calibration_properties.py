"""Properties that hold for any data: of splits, orders, merges, factors and degenerate values."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from observing import EXACT, collected, same

DATA = hnp.arrays(
    np.float32,
    st.tuples(st.integers(2, 24), st.just(3), st.integers(1, 4)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(x=DATA, cuts=st.lists(st.integers(0, 23), max_size=12), order=st.randoms(use_true_random=False))
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("axis", [None, 1])
def test_any_split_and_order_gives_the_same(
    kind: str, axis: int | None, x: np.ndarray, cuts: list[int], order: random.Random
) -> None:
    whole = torch.from_numpy(x)
    parts = [p for p in torch.tensor_split(whole, sorted(c for c in cuts if c < len(whole))) if len(p)]
    order.shuffle(parts)
    same(collected(kind, parts, axis), collected(kind, [whole], axis))


@given(x=DATA, cut=st.integers(0, 23))
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("axis", [None, 1])
def test_merging_equals_collecting_all(kind: str, axis: int | None, x: np.ndarray, cut: int) -> None:
    samples = list(torch.from_numpy(x).split(1))
    one, two = collected(kind, samples[:cut], axis), collected(kind, samples[cut:], axis)
    one.merge(two)
    whole = collected(kind, samples, axis)
    same(one, whole)
    assert one.batches == len(samples)
