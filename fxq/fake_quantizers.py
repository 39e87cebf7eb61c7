"""The quantizer of a graph that trains: a Quantizer that fake-quantizes, and whose scale may move while it does.

It stands where a prepared graph has its Quantizer, under the same name and with the same keys, is calibrated by the
same call and converted by the same pass. What moves its scale is a
:class:`fxq.scale_policy.ScalePolicy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from . import qdq, straight_through
from .batch_norm import TrainedBatchNorm
from .batch_ranges import lsq_scale, pull, value_range
from .errors import RecipeError
from .folding import Fold
from .qparams import scale_and_zero_point, unchecked_scale_and_zero_point
from .quantizer import Mode, Quantizer
from .straight_through import SMALLEST_SCALE, ScaleGradient
from .weight_batch import WeightBatch

__all__ = ["FakeQuantizer", "FoldedInto"]

_GRADIENTS: Final = {"learned": ScaleGradient.LSQ, "pact": ScaleGradient.PACT}


@dataclass(frozen=True)
class FoldedInto:
    """The BatchNorm that a weight's layer is folded with.

    Attributes:
        norm: The BatchNorm behind the layer.
        groups: The layer's groups.
        transposed: Whether the layer is a transposed convolution.
    """

    norm: TrainedBatchNorm
    groups: int = 1
    transposed: bool = False

    def fold(self) -> Fold:
        """What folds the BatchNorm in as it is now."""
        norm = self.norm
        return Fold(norm.running_var, norm.weight, norm.eps, self.groups, self.transposed, norm.num_batches_tracked)


class FakeQuantizer(Quantizer):
    """Fake-quantizes one tensor, in training with straight-through gradients and a scale that its policy moves.

    In eval mode it computes :func:`fxq.qdq.fake_quantize`, so it gives what the converted graph gives. Mode
    ``OBSERVE`` collects for calibration as any quantizer does.

    Args:
        source: The quantizer whose place it takes.
        policy: What moves the scale; one of :data:`fxq.scale_policy.ACTIVATIONS` or ``WEIGHTS``.
        shape: The tensor's shape, as the example inputs gave it.
        momentum: The newest batch's share of a moving average.

    Attributes:
        policy: As given.
        momentum: As given.
        scale: float32, [] or [channels]; a Parameter if learned. NaN while unknown.
        zero_point: int32, likewise.

    Raises:
        RecipeError: The policy learns, and the spec is asymmetric or its type floating.
    """

    _batch: WeightBatch | None = None

    def __init__(self, source: Quantizer, policy: str, shape: Sequence[int], *, momentum: float = 0.01) -> None:
        super().__init__(source.spec, tensor=source.tensor, axis=source.axis, tie=source.tie, weight=source.weight)
        self.policy, self.momentum = policy, momentum
        self.observing = True
        self.mode = Mode.QUANTIZE
        self._members: tuple[FakeQuantizer, ...] = (self,)
        self._folded: FoldedInto | None = None
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

    @property
    def mode(self) -> Mode:
        """What it does with a tensor."""
        return self._mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        self._mode = value
        self._leave_batch()
        self._find_steady()

    @property
    def observing(self) -> bool:
        """Whether a ``moving-average`` or ``max`` scale moves in training."""
        return self._observing

    @observing.setter
    def observing(self, value: bool) -> None:
        self._observing = value
        self._leave_batch()

    def join(self, batch: WeightBatch) -> None:
        """Quantize together with the other weights of the batch where the device has a kernel for that."""
        self._batch = batch

    def _leave_batch(self) -> None:
        if self._batch is not None:
            self._batch.forget(id(self))

    @property
    def _place(self) -> tuple[WeightBatch, int] | None:
        return None if self._batch is None else (self._batch, id(self))

    def _find_steady(self) -> None:
        """Keep in mind whether training does nothing but quantize over a scale that is known and does not move."""
        mine = self.__dict__
        fixed = mine.get("policy") == "fixed" and mine.get("_fast", False)
        self._steady = bool(fixed and mine.get("_known", False) and self._mode is Mode.QUANTIZE)

    @property
    def learns(self) -> bool:
        """Whether the scale is a parameter."""
        return self.policy in _GRADIENTS

    @property
    def solved(self) -> bool:
        """Whether scale and zero point are known."""
        return self._known

    @property
    def folded(self) -> FoldedInto | None:
        """The BatchNorm that the weight's layer is folded with; None for activations and layers without one."""
        return self._folded

    @folded.setter
    def folded(self, value: FoldedInto | None) -> None:
        self._folded = value

    def share(self, members: Sequence[FakeQuantizer]) -> None:
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
            self._find_steady()

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
        self._find_steady()
        for member in self._members:
            member._take_shared()

    def forward(self, x: Tensor) -> Tensor:
        """What x becomes in quantized form, in x's shape and dtype; x itself in other modes than QUANTIZE.

        A weight whose layer is folded with a BatchNorm comes out as the layer has to compute with it.

        Raises:
            CalibrationError: The scale is unknown and its policy does not find one by itself, or x cannot be observed.
        """
        if self._steady and self.training:
            return self._forward_steady(x, self._folded)
        if self._folded is not None:
            return self._forward_folded(x, self._folded)
        moved = self._follow(x)
        if self.mode is Mode.QUANTIZE:
            return self._fake_quantize(x, moved)
        if self.mode is Mode.OBSERVE and self.observer is not None:
            self.observer.collect(x)
        return x

    def _forward_steady(self, x: Tensor, folded: FoldedInto | None) -> Tensor:
        """A fixed scale in training, which wants no more of Python, and of torch.compile's guards, than it needs."""
        if self.axis is None and not self.weight:
            return straight_through.fake_quantize(x, self.scale, self.zero_point, self._dtype)
        if folded is not None and not folded.norm.batch_statistics:
            return self._forward_folded(x, folded)
        fold = None if folded is None else folded.fold()
        place = self._place if x.is_cuda else None
        return straight_through.fake_quantize_weight(x, self.scale, self._dtype, self.axis, fold=fold, batch=place)

    def _forward_folded(self, weight: Tensor, folded: FoldedInto) -> Tensor:
        fold = folded.fold()
        if not folded.norm.batch_statistics:
            real = fold.weight(weight)
            if self.mode is not Mode.QUANTIZE:
                return real
            self._follow(real)
            return self._fake_quantize(real)
        if self.mode is not Mode.QUANTIZE:
            return weight
        refresh = self._refreshes(weight, fold)
        if self.policy == "max" and not refresh:
            self._follow(weight.detach() * fold.factor(weight))
        self._require_solved()
        if not self._fast:
            factor = fold.factor(weight)
            real = self._exact(weight * factor)
            return torch.where(factor == 0, weight, real / torch.where(factor == 0, 1.0, factor))
        return straight_through.fake_quantize_weight(
            weight,
            self.scale if refresh else self._training_scale,
            self._dtype,
            self.axis,
            fold=fold,
            refresh=refresh,
            batch=self._place,
            **self._learning(weight),
        )

    def _refreshes(self, weight: Tensor, fold: Fold) -> bool:
        """Whether the scale follows the weight in the kernel that quantizes it."""
        if self.policy != "max" or not self.observing or not self._fast:
            return False
        done = straight_through.refreshes(weight, self.axis, fold)
        self._known = self._known or done
        return done

    def _fake_quantize(self, x: Tensor, moved: Tensor | None = None) -> Tensor:
        self._require_solved()
        if not self.training or not self._fast:
            return self._exact(x)
        scale, how = self._training_scale if moved is None else moved, self._learning(x)
        if self.axis is None:
            return straight_through.fake_quantize(x, scale, self.zero_point, self._dtype, **how)
        place = self._place if self.policy != "max" else None  # its scale is a step's own copy
        return straight_through.fake_quantize_weight(x, scale, self._dtype, self.axis, batch=place, **how)

    def _exact(self, x: Tensor) -> Tensor:
        scale = self.effective_scale.detach()
        return qdq.fake_quantize(x, scale, self.zero_point, self.axis, self.spec.qdtype.name)

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
                member._find_steady()

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

    def solve_weight(self, weight: Tensor) -> None:
        """Set scale and zero point from a weight's own values, folded with its BatchNorm where there is one.

        Args:
            weight: The weight as the graph holds it.

        Raises:
            CalibrationError: The weight is empty, or holds NaN or Inf.
        """
        with torch.no_grad():
            real = weight.detach() if self._folded is None else self._folded.fold().weight(weight.detach())
            if self.policy == "max":
                low, high = self._range(real)
                self.set_parameters(*scale_and_zero_point(low, high, self.spec))
            else:
                super().solve_weight(real)

    @torch.no_grad()
    def begin_weight(self, weight: Tensor) -> None:
        """Give a weight's scale the value that training starts from where nothing is calibrated."""
        if self.policy == "learned":
            self._begin(weight if self._folded is None else self._folded.fold().weight(weight))
        else:
            self.solve_weight(weight)

    def settle(self, weight: Tensor | None) -> None:
        """Make scale and zero point what eval mode computes with, before they are read from outside.

        Args:
            weight: For a weight's quantizer, the weight as the graph holds it.
        """
        if self.policy == "max" and self.observing and weight is not None:
            self.solve_weight(weight)
        elif self.learns and self._known:
            self._set(self.effective_scale, self.zero_point)

    def extra_repr(self) -> str:
        """Tensor, spec, mode and policy, for printed modules."""
        return f"{super().extra_repr()}, {self.policy}"
