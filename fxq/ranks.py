"""Calibration over the processes of torch.distributed: agreeing on how it went, and putting statistics together.

What is exchanged is small and lives on the host, so a group of gloo carries it whatever the default backend is.
gloo sees at once when a process has died, which NCCL does not. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch import distributed as dist

from .errors import CalibrationError

__all__ = ["TIMEOUT", "Ranks", "joined", "on_first"]

TIMEOUT: Final = 1800.0
"""Seconds that ranks wait for each other unless told otherwise: PyTorch's own default."""


@dataclass(frozen=True)
class Ranks:
    """All processes of the default group.

    Attributes:
        rank: This process.
        size: How many there are.
        timeout: Seconds to wait for the others.
        group: The group that carries the exchange.
    """

    rank: int
    size: int
    timeout: float
    group: Any

    def agree(self, error: BaseException | None) -> None:
        """Wait until every rank has come here, and raise on all of them if one has a problem.

        Args:
            error: What this rank's work ended in; it is raised again here after the others were told.

        Raises:
            CalibrationError: Another rank had a problem, or does not answer.
        """
        told = None if error is None else f"{type(error).__name__}: {error}"
        try:
            said = self._gather(json.dumps(told).encode())
        except CalibrationError:
            if error is not None:
                raise error from None
            raise
        if error is not None:
            raise error
        problems = [f"rank {rank}: {p}" for rank, text in enumerate(said) if (p := json.loads(text)) is not None]
        if problems:
            raise CalibrationError(
                f"calibration stopped on {len(problems)} of {self.size} ranks: {'; '.join(problems)}",
                hint="see that rank's output; every rank needs at least one batch of its own",
            )

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Every rank's tensors, in the order of the ranks, on the host; names and shapes may differ.

        Raises:
            CalibrationError: A rank does not answer.
        """
        own = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
        return [load(found) for found in self._gather(own)]

    def _gather(self, own: bytes) -> list[bytes]:
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(own)]), group=self.group)
            longest = max(int(size) for size in sizes)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
            found = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(found, padded, group=self.group)
        except RuntimeError as error:  # what gloo raises for lost connections and for timeouts
            raise CalibrationError(
                f"rank {self.rank} of {self.size} lost another rank, or waited {self.timeout:g} s for it: {error}",
                hint="look at the output of the ranks that stopped; a slow rank needs a longer rank_timeout",
            ) from error
        return [f[: int(size)].numpy().tobytes() for f, size in zip(found, sizes, strict=True)]


@contextmanager
def joined(timeout: float) -> Iterator[Ranks | None]:
    """The processes that calibrate together; None in a process of its own.

    Args:
        timeout: Seconds to wait for the others.

    Raises:
        CalibrationError: The others did not come.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield None
        return
    try:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise CalibrationError(
            f"rank {dist.get_rank()} could not reach the other {dist.get_world_size() - 1} ranks: {error}",
            hint="fxq.calibrate is called by every rank, or with across_ranks=False",
        ) from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), timeout, group)
    finally:
        dist.destroy_process_group(group)


def on_first(ranks: Ranks | None, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` gives on rank 0, on every rank; on the host if there are several.

    Raises:
        CalibrationError: `compute` failed on rank 0, or a rank does not answer.
    """
    if ranks is None:
        return dict(compute())
    found: Mapping[str, Tensor] = {}
    failed: BaseException | None = None
    try:
        found = compute() if ranks.rank == 0 else {}
    except BaseException as error:  # noqa: BLE001 - told to the other ranks and raised again
        failed = error
    ranks.agree(failed)
    return ranks.gather(found)[0]
