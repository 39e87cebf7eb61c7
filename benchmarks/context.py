"""What a quantizer gets from a benchmark, and the clock that times its stages against the float network."""

from __future__ import annotations

import contextlib
import copy
import cProfile
import statistics
import time
from typing import TYPE_CHECKING

import torch
from rooms import by_room
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from tasks import Task


class Context:
    """One quantizer's run on one task.

    After every stage a plain float forward over the calibration batches is timed, outside the stage: the
    reference of all ratios then sees the same machine, with the same load on it, as the stages do.

    Args:
        task: The task.
        base: The task's folder, with the float network as `fp32.pt` and `fp32.onnx`.
        work: The quantizer's own folder; it leaves its ONNX file there as `int8.onnx`.
        profile: Whether to profile the stages, which slows them down.
    """

    opset = 17

    def __init__(self, task: Task, base: Path, work: Path, profile: bool = False) -> None:
        self.task, self.work, self.profile = task, work, profile
        self.float_onnx, self.out = base / "fp32.onnx", work / "int8.onnx"
        self.calibration: list[Tensor] = list(task.calibration().split(task.batch))
        self.stages: dict[str, float] = {}
        self.forwards: list[float] = []
        self.rooms: dict[str, dict[str, float]] = {}
        self._model = task.model(base)
        self.forward_all(self._model)  # the first pass allocates
        self.time_forward()

    def model(self) -> nn.Module:
        """A copy of the float network in eval mode."""
        return copy.deepcopy(self._model)

    @property
    def example(self) -> Tensor:
        """Two images, (2, C, H, W)."""
        return self.calibration[0][:2]

    def numpy_batches(self) -> list[np.ndarray]:
        """The calibration batches as arrays."""
        return [batch.numpy() for batch in self.calibration]

    def forward_all(self, model: nn.Module) -> None:
        """The calibration loop: every batch once, without gradients."""
        with torch.no_grad():
            for batch in self.calibration:
                model(batch)

    def time_forward(self) -> None:
        """Time one plain float forward over the calibration batches."""
        start = time.perf_counter()
        self.forward_all(self._model)
        self.forwards.append(time.perf_counter() - start)

    @property
    def forward_seconds(self) -> float:
        """The median of the float forwards, seconds."""
        return statistics.median(self.forwards)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body under `name`; "import" is kept out of totals by the tables."""
        profiler = cProfile.Profile() if self.profile else None
        start = time.perf_counter()
        with profiler or contextlib.nullcontext():
            yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start
        if profiler is not None:
            self.rooms[name] = by_room(profiler)
        if name != "import":
            self.time_forward()
