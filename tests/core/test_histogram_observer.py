"""A histogram says how much it counted, and grows with what comes."""

from __future__ import annotations

import pytest
import torch
from observing import MAX, collected, spec

from fxq.observing import Histogram
from fxq.observing.histogram import BINS, SAMPLE


def test_histogram_counts_what_it_samples_and_says_how_much() -> None:
    small, large = torch.randn(4, 1000), torch.randn(4, 8 * SAMPLE)
    observer = Histogram(symmetric=True)
    assert observer.fraction == 1
    observer.collect(small)
    assert observer.fraction == 1
    assert observer.counts.sum() == 4000
    observer.collect(large)
    observer.flush()
    assert observer.elements == small.numel() + large.numel()
    assert observer.counts.sum() - 4000 == pytest.approx(4 * SAMPLE, rel=0.05)
    assert observer.fraction == int(observer.counts.sum()) / (4000 + 32 * SAMPLE)


def test_an_outlier_outside_the_sample_still_is_the_maximum() -> None:
    x = torch.randn(1, 8 * SAMPLE)
    x[0, 200] = 1e4  # position 200 of a period of 257 is not sampled
    observer = collected("magnitudes", [x])
    assert observer.compute(MAX, spec())[1] == 1e4
    assert isinstance(observer, Histogram)
    assert int(observer.counts[BINS // 4 :].sum()) == 0


def test_a_wider_batch_folds_the_counts() -> None:
    observer = Histogram(symmetric=True)
    observer.collect(torch.tensor([[0.1, 0.2, 0.3]]))
    first = float(observer.width)
    observer.collect(torch.tensor([[1000.0]]))
    observer.flush()
    assert float(observer.width) == first * 2**11  # from [0.25, 0.5) to [512, 1024)
    assert observer.counts.sum() == 4
    assert observer.counts[0] == 3
    assert observer.counts[int(1000 / float(observer.width))] == 1
