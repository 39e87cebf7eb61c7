"""What TensorRT calls back: its log, caught, and its build progress, shown.

TensorRT registers one logger per process while any of its objects lives and warns about a second one. So fxq
has one too, and who wants to read the log opens a capture on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

__all__ = ["BuildLog", "capturing", "progress_monitor", "tensorrt_logger"]


@dataclass
class BuildLog:
    """The messages of one capture, oldest first.

    Attributes:
        messages: Pairs of severity name (``"VERBOSE"``, ``"INFO"``, ``"WARNING"``, ``"ERROR"``,
            ``"INTERNAL_ERROR"``) and text; a text may have many lines.
    """

    messages: list[tuple[str, str]] = field(default_factory=list)

    def errors(self) -> list[str]:
        """The texts of the errors, each once, without those that only say that no GPU is there."""
        texts = [text for severity, text in self.messages if severity in {"ERROR", "INTERNAL_ERROR"}]
        telling = [text for text in texts if "Cuda Runtime" not in text]
        return list(dict.fromkeys(telling or texts))

    def text(self) -> str:
        """The whole log, one ``[SEVERITY] message`` after the other."""
        return "".join(f"[{severity}] {text}\n" for severity, text in self.messages)


_open: list[BuildLog] = []


@cache
def tensorrt_logger(trt: ModuleType) -> Any:
    """fxq's one ``ILogger``: hands each message to the captures that are open, and keeps quiet otherwise."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined] # TensorRT and TensorRT-RTX have one each, chosen at run time
        """Passes on what TensorRT says; never raises, because C++ is the caller."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants the base initialized by name

        def log(self, severity: Any, message: str) -> None:
            for capture in _open:
                capture.messages.append((severity.name, message))

    return Logger()


@contextmanager
def capturing() -> Iterator[BuildLog]:
    """Catch everything that fxq's logger is told inside the block."""
    capture = BuildLog()
    _open.append(capture)
    try:
        yield capture
    finally:
        # By identity: two captures with the same messages are equal.
        _open[:] = [other for other in _open if other is not capture]


@contextmanager
def progress_monitor(trt: ModuleType, description: str) -> Iterator[Any]:
    """A TensorRT ``IProgressMonitor`` that shows its phases as nested rich progress bars.

    Args:
        trt: TensorRT's Python module.
        description: Heads the outermost bar.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        transient=True,
    )

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined] # TensorRT and TensorRT-RTX have one each, chosen at run time
        """One bar for each phase that is running."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # pybind11 wants the base initialized by name
            self.tasks: dict[str, TaskID] = {}
            self.depth: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.depth[phase_name] = self.depth.get(parent_phase, -1) + 1 if parent_phase else 0
            label = "  " * self.depth[phase_name] + (phase_name if parent_phase else description)
            self.tasks[phase_name] = bars.add_task(label, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.tasks:
                bars.update(self.tasks[phase_name], completed=step + 1)
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.tasks:
                bars.remove_task(self.tasks.pop(phase_name))

    with bars:
        yield Monitor()
