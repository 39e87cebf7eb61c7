"""All weights of a graph fake-quantized in one launch, when the first of them is asked for.

A launch costs the processor more than a weight costs the GPU, so a step that quantizes its weights one by one waits
for Python. Weights do not depend on each other: whoever comes first has all of them computed, and those that follow
find theirs ready. What is ready is used once, and only while weight, scale and BatchNorm are the ones it was made from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .folding import Fold

__all__ = ["Made", "WeightBatch", "WeightRequest"]


class WeightRequest(NamedTuple):
    """What one weight is to be quantized with.

    Attributes:
        weight: Float32, contiguous, [rows, …], on a GPU.
        scale: Float32, [] or [rows].
        fold: The BatchNorm to fold in, whose channels are the rows; None for none.
        qmin: Smallest integer.
        qmax: Largest integer; magnitudes are below 2**22.
        mode: ``fixed``: over the scale as it is. ``learned``: likewise, for one that learns. ``max``: the scale of each
            row is set to its range first.
        compute: The type that the layer computes in.
    """

    weight: Tensor
    scale: Tensor
    fold: Fold | None
    qmin: float
    qmax: float
    mode: str
    compute: torch.dtype

    @property
    def kind(self) -> tuple[Any, ...]:
        """What requests of one launch have in common."""
        return self.mode, self.compute, self.weight.device

    def stamp(self) -> tuple[int, ...]:
        """Equal as long as the tensors are the same ones and hold what they held.

        Kernels write running statistics without telling autograd's version counter; the count of batches tells.
        """
        parts = [self.weight, self.scale]
        if self.fold is not None:
            parts += [t for t in (self.fold.var, self.fold.gamma, self.fold.tracked) if t is not None]
        return tuple(number for t in parts for number in (id(t), t._version))


class Made(NamedTuple):
    """What a weight became.

    Attributes:
        y: The weight that training computes with, [rows, …].
        rest: What backward needs: where nothing was clipped, bool or 0 and 1; for learned scales the unrounded steps,
            float32.
        undone: For learned scales, what undoes the fold, float32, [rows]; 0 where nothing does. None otherwise.
    """

    y: Tensor
    rest: Tensor
    undone: Tensor | None


class WeightBatch:
    """The weights that are quantized together; one object for the weight quantizers of a graph.

    Copies of a graph begin with an empty one.
    """

    def __init__(self) -> None:
        self._known: dict[int, WeightRequest] = {}
        self._ready: dict[int, tuple[tuple[Any, ...], Made]] = {}
        self._tables: dict[tuple[Any, ...], Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:  # what deepcopy of a graph and multiprocessing go by
        return type(self), ()

    def forget(self, key: int) -> None:
        """Leave a weight out until it is asked for again; for when what is wanted of it changes."""
        self._known.pop(key, None)
        self._ready.pop(key, None)

    def take(self, key: int, request: WeightRequest, table: Callable[[list[WeightRequest]], Any]) -> Made | None:
        """What the request gives, from a launch for all weights; None where it is better made alone.

        That is so for a weight seen for the first time, and where autograd recomputes a part of the forward pass.

        Args:
            key: Tells the weights of the graph apart.
            request: What is wanted now.
            table: Makes a :class:`fxq.triton_weights.WeightTable` of requests.
        """
        ready = self._ready.pop(key, None)
        if ready is not None and ready[0] == (request.kind, request.stamp()):
            return ready[1]
        known = self._known.get(key)
        self._known[key] = request
        if known is None or known.weight is not request.weight or torch._C._current_graph_task_id() != -1:
            return None
        members = [(k, r) for k, r in list(self._known.items()) if r.kind == request.kind]
        if len(members) == 1:
            return None
        requests = [r for _, r in members]
        held = self._tables.get(request.kind)
        if held is None or not held.fits(requests):
            if torch.cuda.is_current_stream_capturing():
                return None
            held = self._tables[request.kind] = table(requests)
        made = held.launch()
        self._ready.update({k: ((r.kind, r.stamp()), m) for (k, r), m in zip(members, made, strict=True)})
        mine: Made = self._ready.pop(key)[1]
        return mine
