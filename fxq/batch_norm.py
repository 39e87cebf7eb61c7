"""BatchNorm while a graph trains: batch statistics for the output, running statistics in the quantized weight.

In training the layer before it computes with the weight ``quantize(s W) / s``, where :math:`s` folds in the running
statistics (:mod:`fxq.folding`), and BatchNorm normalizes with the batch's statistics as always: what Jacob et al.
(2018, section 3.2) and Krishnamoorthi (2018) call the corrected fold. In eval mode, and once frozen, the layer computes
with ``quantize(s W)`` and the folded bias, and BatchNorm passes on what it gets: what the converted graph computes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .folding import fold_bias, fold_factor, fold_weight

__all__ = ["FoldedBias", "FoldedWeight", "TrainedBatchNorm", "batch_norms"]


class TrainedBatchNorm(nn.Module):
    """A BatchNorm under the user's own path and state_dict keys.

    Args:
        source: The user's BatchNorm, whose parameters and statistics it takes over.
        folded: Whether the layer before it has its weight and bias folded in eval mode.

    Attributes:
        folded: As given.
        frozen: Whether the running statistics hold in training too and stay as they are.
        eps: As in the user's module.
        momentum: As in the user's module; None averages over all batches.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, source: nn.modules.batchnorm._BatchNorm, *, folded: bool) -> None:
        super().__init__()
        self.folded, self.frozen = folded, False
        self.eps, self.momentum = source.eps, source.momentum
        self.register_parameter("weight", source.weight)
        self.register_parameter("bias", source.bias)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(source, name))
        self.train(source.training)

    @property
    def batch_statistics(self) -> bool:
        """Whether it normalizes with the statistics of the batch, and tracks them."""
        return self.training and not self.frozen

    def factor(self) -> Tensor:
        """What a folded weight is multiplied by, float64, [channels]."""
        return fold_factor(self.running_var, self.weight, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """x normalized, [N, channels, …]; x itself where the fold did that already."""
        momentum = self.momentum
        if self.batch_statistics:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        elif self.folded:
            return x
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.batch_statistics,
            momentum=momentum or 0.0,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        """Channels and state, for printed modules."""
        marks = [name for name in ("folded", "frozen") if getattr(self, name)]
        return ", ".join([str(self.running_mean.shape[0]), f"eps={self.eps}", *marks])


class _OfNorm(nn.Module):
    """A part of a :class:`TrainedBatchNorm`, which it knows but does not hold as a submodule."""

    def __init__(self, norm: TrainedBatchNorm) -> None:
        super().__init__()
        self._norm = (norm,)

    @property
    def norm(self) -> TrainedBatchNorm:
        """The BatchNorm that it belongs to."""
        return self._norm[0]


class FoldedBias(_OfNorm):
    """The bias of the layer before a BatchNorm: its own while batch statistics count, otherwise the folded one."""

    def forward(self, bias: Tensor | None) -> Tensor | None:
        """The bias, [channels], to compute with; None for none."""
        norm = self.norm
        if norm.batch_statistics:
            return bias
        dtype = norm.running_mean.dtype if bias is None else bias.dtype
        return fold_bias(bias, norm.running_mean, norm.bias, norm.factor(), dtype)


class FoldedWeight(_OfNorm):
    """The weight of a layer that stays float: its own while batch statistics count, otherwise the folded one.

    Args:
        norm: The BatchNorm behind the layer.
        groups: The layer's groups.
        transposed: Whether the layer is a transposed convolution.
    """

    def __init__(self, norm: TrainedBatchNorm, *, groups: int, transposed: bool) -> None:
        super().__init__(norm)
        self.groups, self.transposed = groups, transposed

    def forward(self, weight: Tensor) -> Tensor:
        """The weight to compute with."""
        norm = self.norm
        if norm.batch_statistics:
            return weight
        return fold_weight(weight, norm.factor(), groups=self.groups, transposed=self.transposed)


def batch_norms(gm: nn.Module) -> dict[str, TrainedBatchNorm]:
    """The BatchNorms of a graph that trains, by path."""
    return {path: m for path, m in gm.named_modules() if isinstance(m, TrainedBatchNorm)}
