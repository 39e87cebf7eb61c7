"""Modules whose buffers are statistics or scales: their dtype stays, and they take the shape of what is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["FlexibleState"]


class FlexibleState(nn.Module):
    """A module whose buffers keep their dtype in ``half()`` and the like, and take the shapes of loaded
    state.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor) and buffer is not None and found.shape != buffer.shape:
                self._buffers[name] = torch.empty(found.shape, dtype=buffer.dtype, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
