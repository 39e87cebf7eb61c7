"""What a batch says about a scale: its range, and where LSQ begins; over all processes of a distributed training."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["lsq_scale", "pull", "value_range"]


def value_range(x: Tensor, axis: int | None, *, everywhere: bool) -> tuple[Tensor, Tensor]:
    """Smallest and largest value.

    Args:
        x: Float, any shape, not empty.
        axis: The per-channel axis, or None.
        everywhere: Whether x is a process's own, and the range is taken over all processes.

    Returns:
        Two tensors, [] or [channels], in x's dtype, or float32 where several processes have a say.
    """
    x = x.detach()
    low, high = x.aminmax() if axis is None else (x.amin(_others(x, axis)), x.amax(_others(x, axis)))
    if not everywhere or not _distributed():
        return low, high
    both = torch.stack([-low, high]).float()
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return -both[0], both[1]


def lsq_scale(x: Tensor, axis: int | None, qmax: float, *, everywhere: bool) -> Tensor:
    """LSQ's first scale, ``2 mean|x| / sqrt(qmax)`` (Esser et al., 2020, section 2.1); 1 where x is all zero.

    Args:
        x: As for :func:`value_range`.
        axis: Likewise.
        qmax: Largest integer.
        everywhere: Likewise.

    Returns:
        Float32, [] or [channels].
    """
    mean = x.detach().float().abs().mean(_others(x, axis))
    if everywhere and _distributed():
        dist.all_reduce(mean)
        mean = mean / dist.get_world_size()
    scale = 2 * mean / qmax**0.5
    return torch.where(scale > 0, scale, 1.0)


def pull(held: Tensor, new: Tensor, momentum: float) -> None:
    """Move a running value, float32, in place towards a batch's; what is not finite yet takes it as it is."""
    held.copy_(torch.where(held.isfinite(), torch.lerp(held, new, momentum), new))


def _others(x: Tensor, axis: int | None) -> list[int]:
    return [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
