"""A scale that moves while a graph trains: by gradients, with the range of each batch, or with a weight.

What moves it is a :class:`fxq.scale_policy.ScalePolicy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from . import straight_through
from .batch_ranges import lsq_scale, pull, value_range
from .errors import RecipeError
from .qparams import unchecked_scale_and_zero_point
from .quantizer import Mode, Quantizer
from .straight_through import SMALLEST_SCALE, ScaleGradient

__all__ = ["TrainedScale"]

_GRADIENTS: Final = {"learned": ScaleGradient.LSQ, "pact": ScaleGradient.PACT}


class TrainedScale(Quantizer):
    """A quantizer whose scale may be shared with others, and moves in training as its policy says.

    Args:
        source: The quantizer whose place it takes.
        policy: What moves the scale; one of :data:`fxq.scale_policy.ACTIVATIONS` or ``WEIGHTS``.
        shape: The tensor's shape, as the example inputs gave it.
        momentum: The newest batch's share of a moving average.

    Attributes:
        policy: As given.
        momentum: As given.
        observing: Whether a ``moving-average`` or ``max`` scale moves.
        scale: float32, [] or [channels]; a Parameter if learned. NaN while unknown.
        zero_point: int32, likewise.

    Raises:
        RecipeError: The policy learns, and the spec is asymmetric or its type floating.
    """

    def __init__(self, source: Quantizer, policy: str, shape: Sequence[int], *, momentum: float = 0.01) -> None:
        super().__init__(source.spec, tensor=source.tensor, axis=source.axis, tie=source.tie, weight=source.weight)
        self.policy, self.momentum = policy, momentum
        self.observing = True
        self.mode = Mode.QUANTIZE
        self._members: tuple[TrainedScale, ...] = (self,)
        self._known = False
        self._dtype = self.spec.qdtype
        # Whether straight_through has the arithmetic for the spec; the rest goes through fxq.qdq.
        self._fast = self.spec.symmetric is not False and not self._dtype.floating and self._dtype.qmax < 1 << 20
        channels = () if self.axis is None else (shape[self.axis],)
        self.zero_point = torch.zeros(channels, dtype=torch.int32)
        scale = torch.full(channels, torch.nan)
        if self.learns:
            if self.spec.symmetric is False or self.spec.qdtype.floating:
                raise RecipeError(
                    f"the scale of {self.tensor} cannot be learned over {self.spec}",
                    hint="learned scales are for symmetric integer specs; LSQ+'s offset is not for TensorRT (R9)",
                )
            del self.scale
            self.scale = nn.Parameter(scale)
        else:
            self.scale = scale

    def _choose_path(self) -> None:
        """Called when the scale becomes known or unknown: a subclass may compute another way from then on."""

    @property
    def learns(self) -> bool:
        """Whether the scale is a parameter."""
        return self.policy in _GRADIENTS

    @property
    def solved(self) -> bool:
        """Whether scale and zero point are known."""
        return self._known

    def share(self, members: Sequence[TrainedScale]) -> None:
        """Have one scale with `members`, itself among them; the first one's is taken.

        Raises:
            RecipeError: The members' scales are of different shapes or kinds.
        """
        first = members[0]
        for other in members:
            if other.scale.shape != first.scale.shape or other.policy != first.policy:
                raise RecipeError(
                    f"{first.tensor} and {other.tensor} share a scale, but not its granularity and policy",
                    hint="give tensors that share a scale the same spec",
                )
        for other in members:
            other._members = tuple(members)
            other._take_shared()

    def _take_shared(self) -> None:
        first = self._members[0]
        if self is not first:
            if self.learns:
                self._parameters["scale"] = first._parameters["scale"]
            else:
                self._buffers["scale"] = first._buffers["scale"]
            self._buffers["zero_point"] = first._buffers["zero_point"]
            self._known = first._known
            self._choose_path()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.learns and self.scale.dtype != torch.float32:  # half() and the like leave scales as they are
            self._parameters["scale"] = nn.Parameter(self.scale.detach().float(), self.scale.requires_grad)
        for member in self._members:
            member._take_shared()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, unknown in (("scale", torch.nan), ("zero_point", 0)):
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor) and found.numel() == 0:  # a quantizer that was never calibrated
                state_dict[prefix + name] = torch.full_like(getattr(self, name).detach(), unknown)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._known = not bool(self.scale.isnan().any())
        self._choose_path()
        for member in self._members:
            member._take_shared()

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take over a scale and a zero point; quantizers that share the scale have them too.

        Raises:
            RecipeError: They are of another shape than the quantizer's own.
        """
        if scale.shape != self.scale.shape:
            raise RecipeError(
                f"{self.tensor} has scales of shape {list(self.scale.shape)}, not {list(scale.shape)}",
                hint="take them from a graph that was prepared with the same recipe",
            )
        self._set(scale, zero_point)

    @property
    def effective_scale(self) -> Tensor:
        """The scale that eval mode computes with: a learned one counts as positive wherever an optimizer drove it."""
        return self.scale.detach().clamp(min=SMALLEST_SCALE) if self.learns else self.scale

    @property
    def _training_scale(self) -> Tensor:
        """The scale as a step's backward may keep it: not the tensor that the next forward changes in place."""
        if self.policy not in ("moving-average", "max") or torch.compiler.is_compiling():
            return self.scale
        return self.scale.clone()

    def _learning(self, x: Tensor) -> dict[str, Any]:
        """The scale's gradient, and what it is multiplied by.

        LSQ: 1 / sqrt(N qmax), N being the elements that one scale serves (for activations, of one sample). PACT learns
        alpha = scale * qmax; gradient descent on alpha is descent on the scale with its gradient over qmax squared.
        """
        if not self.learns:
            return {}
        gradient, qmax = _GRADIENTS[self.policy], self.spec.qdtype.qmax
        if gradient is ScaleGradient.PACT:
            return {"gradient": gradient, "gradient_scale": 1.0 / qmax**2}
        samples = 1 if self.weight else max(x.shape[0], 1)
        elements = max(x.numel() // self.scale.numel() // samples, 1)
        return {"gradient": gradient, "gradient_scale": (elements * qmax) ** -0.5}

    @torch.no_grad()
    def _follow(self, x: Tensor) -> Tensor | None:
        """Let a step's tensor move the scale, as the policy says; in eval mode only ``max`` does.

        Returns:
            A copy of a scale that moved, where there is one already.
        """
        if self.policy == "fixed":
            return None
        if self.policy == "max" and self.observing:
            self._refresh(x)
        elif self.policy == "moving-average" and self.observing and self.training:
            return self._average(x)
        elif self.learns and self.training and not self._known:
            self._begin(x)
        return None

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value, float32, [] or [channels]; over all processes for an activation."""
        low, high = value_range(x, self.axis, everywhere=not self.weight)
        return low.float(), high.float()

    def _set(self, scale: Tensor, zero_point: Tensor) -> None:
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        for member in self._members:
            if not member._known:
                member._known = True
                member._choose_path()

    @torch.no_grad()
    def _refresh(self, x: Tensor) -> None:
        """Take the range from the tensor itself."""
        self._set(*unchecked_scale_and_zero_point(*self._range(x), self.spec))

    def _average(self, x: Tensor) -> Tensor | None:
        """Pull the running range, which the observer keeps, towards the batch's; members of a tie take the widest."""
        if x.numel() == 0:
            return None
        low, high = value_range(x, self.axis, everywhere=True)
        observer = self.observer
        assert observer is not None
        if observer.amin.shape != low.shape:
            observer.amin = torch.full_like(low, torch.inf, dtype=torch.float32)
            observer.amax = torch.full_like(high, -torch.inf, dtype=torch.float32)
        average = straight_through.averages(x)
        if average is not None and self._fast and self.axis is None and len(self._members) == 1:
            held = observer.amin, observer.amax, self.scale
            moved: Tensor = average(low, high, *held, self.momentum, self._dtype.qmax)
            self._known = True
            return moved
        pull(observer.amin, low.float(), self.momentum)
        pull(observer.amax, high.float(), self.momentum)
        ranges = [m.observer for m in self._members if m.observer is not None and m.observer.amin.shape == low.shape]
        low = torch.stack([r.amin for r in ranges]).amin(0)
        high = torch.stack([r.amax for r in ranges]).amax(0)
        self._set(*unchecked_scale_and_zero_point(low, high, self.spec))
        return None

    def _begin(self, x: Tensor) -> None:
        """LSQ's initialisation; PACT begins at the range of the first batch."""
        if self.policy == "pact":
            self._refresh(x)
        elif x.numel():
            scale = lsq_scale(x, self.axis, self.spec.qdtype.qmax, everywhere=not self.weight)
            self._set(scale, torch.zeros_like(self.zero_point))
