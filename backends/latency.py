"""How long single inferences take, those of several models beside each other in turns."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from ..errors import EngineError

__all__ = ["Latency", "Timings", "measure"]

_ROUND: Final = 20
"""Inferences of one model before the next has its turn, so that clocks and heat are everybody's alike."""


@dataclass(frozen=True)
class Latency:
    """Times of single inferences.

    Attributes:
        milliseconds: One for each inference, in order.
        batch: Samples in each; None where the inputs have no common first dimension.
    """

    milliseconds: tuple[float, ...]
    batch: int | None = None

    def percentile(self, share: float) -> float:
        """The time that `share` percent of the inferences did not exceed, in milliseconds (nearest rank).

        Raises:
            EngineError: `share` is not in (0, 100].
        """
        if not 0 < share <= 100:
            raise EngineError(f"there is no percentile {share}", hint="give a number in (0, 100]")
        ordered = sorted(self.milliseconds)
        return ordered[math.ceil(share / 100 * len(ordered)) - 1]

    @property
    def median(self) -> float:
        """The 50th percentile, in milliseconds."""
        return self.percentile(50)

    @property
    def throughput(self) -> float:
        """Samples per second, or inferences where the batch is not known, one after the other."""
        return (self.batch or 1) * 1000 * len(self.milliseconds) / sum(self.milliseconds)

    def __str__(self) -> str:
        """Median, 90th and 99th percentile, throughput."""
        times = ", ".join(f"p{share} {self.percentile(share):.3f} ms" for share in (50, 90, 99))
        return f"{times}, {self.throughput:.0f} {'samples' if self.batch else 'inferences'}/s"


@dataclass(frozen=True)
class Timings:
    """Several models on the same inputs.

    Attributes:
        latencies: By the caller's names, in his order.
    """

    latencies: Mapping[str, Latency]

    def speedup(self, name: str, over: str) -> float:
        """How many times faster `name` is than `over`, by medians."""
        return self.latencies[over].median / self.latencies[name].median

    def __str__(self) -> str:
        """A table, with the speed over the slowest."""
        slowest = max(self.latencies, key=lambda name: self.latencies[name].median)
        width = max(map(len, self.latencies))
        return "\n".join(
            f"{name:{width}}  {latency}  {self.speedup(name, slowest):.2f}x" for name, latency in self.latencies.items()
        )


def measure(
    runs: Mapping[str, Callable[[], Any]],
    *,
    warmup: int,
    iterations: int,
    device: torch.device,
    batch: int | None = None,
) -> dict[str, Latency]:
    """Time calls, in turns of a few each.

    Args:
        runs: What to call, by name.
        warmup: Calls of each that do not count.
        iterations: Calls of each that do.
        device: Where they work; on CUDA each is timed by events on the caller's stream, elsewhere by the clock.
        batch: Samples in each call.

    Raises:
        EngineError: `iterations` is less than 1, or `warmup` less than 0.
    """
    if iterations < 1 or warmup < 0:
        raise EngineError(f"{warmup} calls to warm up and {iterations} to time", hint="time at least one")
    for call in runs.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in runs}
    while any(len(found) < iterations for found in times.values()):
        for name, call in runs.items():
            left = iterations - len(times[name])
            times[name] += _timed(call, min(_ROUND, left), device)
    return {name: Latency(tuple(found), batch) for name, found in times.items()}


def _timed(call: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `count` calls."""
    if device.type != "cuda":
        moments = [time.perf_counter()]
        for _ in range(count):
            call()
            moments.append(time.perf_counter())
        return [1000 * (after - before) for before, after in itertools.pairwise(moments)]
    events: list[Any] = [_event() for _ in range(count + 1)]
    stream = torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    events[0].record(stream)
    for event in events[1:]:
        call()
        event.record(stream)
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def _event() -> Any:
    cuda: Any = torch.cuda  # torch annotates no Event.__new__
    return cuda.Event(enable_timing=True)
