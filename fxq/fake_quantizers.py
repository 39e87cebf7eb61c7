"""The quantizer of a graph that trains: a Quantizer that fake-quantizes, and whose scale may move while it does.

It stands where a prepared graph has its Quantizer, under the same name and with the same keys, is calibrated by the
same call and converted by the same pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import qdq, straight_through
from .batch_norm import TrainedBatchNorm
from .folding import Fold
from .qparams import scale_and_zero_point
from .quantizer import Mode
from .trained_scale import TrainedScale
from .weight_batch import WeightBatch

__all__ = ["FakeQuantizer", "FoldedInto"]


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


class FakeQuantizer(TrainedScale):
    """Fake-quantizes one tensor, in training with straight-through gradients and a scale that its policy moves.

    In eval mode it computes :func:`fxq.qdq.fake_quantize`, so it gives what the converted graph gives. Mode
    ``OBSERVE`` collects for calibration as any quantizer does. It is made as a :class:`TrainedScale` is.

    Attributes:
        folded: The BatchNorm that the weight's layer is folded with; None for activations and layers without one.
    """

    folded: FoldedInto | None = None
    _batch: WeightBatch | None = None

    @property
    def mode(self) -> Mode:
        """What it does with a tensor."""
        return self._mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        self._mode = value
        self._leave_batch()
        self._choose_path()

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

    def _choose_path(self) -> None:
        """Keep in mind whether training does nothing but quantize over a scale that is known and does not move."""
        mine = self.__dict__
        fixed = mine.get("policy") == "fixed" and mine.get("_fast", False)
        self._steady = bool(fixed and mine.get("_known", False) and self._mode is Mode.QUANTIZE)

    def forward(self, x: Tensor) -> Tensor:
        """What x becomes in quantized form, in x's shape and dtype; x itself in other modes than QUANTIZE.

        A weight whose layer is folded with a BatchNorm comes out as the layer has to compute with it.

        Raises:
            CalibrationError: The scale is unknown and its policy does not find one by itself, or x cannot be observed.
        """
        if self._steady and self.training:
            return self._forward_steady(x, self.folded)
        if self.folded is not None:
            return self._forward_folded(x, self.folded)
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

    def solve_weight(self, weight: Tensor) -> None:
        """Set scale and zero point from a weight's own values, folded with its BatchNorm where there is one.

        Args:
            weight: The weight as the graph holds it.

        Raises:
            CalibrationError: The weight is empty, or holds NaN or Inf.
        """
        with torch.no_grad():
            real = weight.detach() if self.folded is None else self.folded.fold().weight(weight.detach())
            if self.policy == "max":
                low, high = self._range(real)
                self.set_parameters(*scale_and_zero_point(low, high, self.spec))
            else:
                super().solve_weight(real)

    @torch.no_grad()
    def begin_weight(self, weight: Tensor) -> None:
        """Give a weight's scale the value that training starts from where nothing is calibrated."""
        if self.policy == "learned":
            self._begin(weight if self.folded is None else self.folded.fold().weight(weight))
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
