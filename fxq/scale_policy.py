"""What moves the scales of a graph that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .errors import RecipeError

__all__ = ["ACTIVATIONS", "POLICIES", "WEIGHTS", "ScalePolicy"]

ACTIVATIONS: Final = ("fixed", "moving-average", "learned", "pact")
WEIGHTS: Final = ("fixed", "max", "learned")


@dataclass(frozen=True)
class ScalePolicy:
    """What moves the scales of a graph that trains.

    Attributes:
        activations: One of :data:`ACTIVATIONS`. ``fixed``: as calibrated (NVIDIA's recipe). ``moving-average``: each
            batch's range pulls the scale's range (Jacob et al., 2018). ``learned``: LSQ (Esser et al., 2020), the
            gradient scaled by ``1 / sqrt(N * qmax)``; without calibration it starts at ``2 mean|x| / sqrt(qmax)``.
            ``pact``: ReLU outputs learn their upper end (Choi et al., 2018), other tensors go by moving average.
        weights: One of :data:`WEIGHTS`. ``max``: the largest magnitude of each step's weight. ``fixed`` and
            ``learned`` as for activations.
        momentum: The newest batch's share of a moving average, in (0, 1].

    Raises:
        RecipeError: There is no such value.
    """

    activations: str = "fixed"
    weights: str = "fixed"
    momentum: float = 0.01

    def __post_init__(self) -> None:
        for name, known in (("activations", ACTIVATIONS), ("weights", WEIGHTS)):
            if getattr(self, name) not in known:
                raise RecipeError(
                    f"no scale policy {getattr(self, name)!r} for {name}",
                    hint=f"use one of {', '.join(known)}",
                )
        if not 0 < self.momentum <= 1:
            raise RecipeError(f"momentum {self.momentum} is not in (0, 1]")


POLICIES: Final = {
    "fixed": ScalePolicy("fixed", "fixed"),
    "moving-average": ScalePolicy("moving-average", "max"),
    "learned": ScalePolicy("learned", "learned"),
    "pact": ScalePolicy("pact", "max"),
}
"""Policies by the name that stands for them."""
