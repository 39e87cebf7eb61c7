r"""BatchNorm folded into the layer before it: the arithmetic, for inference and for training alike.

With :math:`s = \gamma / \sqrt{\mathrm{var} + \epsilon}`, inference-time BatchNorm of :math:`y = W x + b` is

.. math:: s\,(W x + b - \mathrm{mean}) + \beta = (s W)\, x + \big(s\,(b - \mathrm{mean}) + \beta\big)

with :math:`s` along the weight's output-channel axis: 0 for convolutions and linear layers; for a transposed
convolution in g groups the weight is [in, out/g, …] and the channels of group k lie in rows k of ``in``.

All functions are differentiable. :mod:`fxq.batch_norm` trains with them and the fusing passes store what they give, so
that both have the same weights to the last bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Fold", "along_outputs", "fold", "fold_bias", "fold_factor", "fold_weight"]

_EXACT = torch.float64


def fold_factor(var: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    """What each output channel of the layer is multiplied by.

    Args:
        var: Running variance, [out].
        gamma: BatchNorm's weight, [out], or None for 1.
        eps: BatchNorm's epsilon.

    Returns:
        :math:`s`, float64, [out].
    """
    scale = torch.rsqrt(var.to(_EXACT) + eps)
    return scale if gamma is None else scale * gamma.to(_EXACT)


def along_outputs(values: Tensor, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """One value per output channel, [out], in a shape that broadcasts over `weight`."""
    if not transposed:
        return values.view(-1, *[1] * (weight.dim() - 1))
    rows = weight.shape[0] // groups
    spread = values.view(groups, 1, -1).expand(groups, rows, -1).reshape(weight.shape[0], -1)
    return spread.view(*spread.shape, *[1] * (weight.dim() - 2))


def fold_weight(weight: Tensor, factor: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """The weight times `factor` (float64, [out]), each element rounded once, in the weight's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    spread = along_outputs(factor.to(wide), weight, groups=groups, transposed=transposed)
    return (weight.to(wide) * spread).to(weight.dtype)


class Fold(NamedTuple):
    """What folds a BatchNorm into a weight.

    Attributes:
        var: Running variance, [out].
        gamma: BatchNorm's weight, [out], or None for 1.
        eps: BatchNorm's epsilon.
        groups: The layer's groups.
        transposed: Whether the layer is a transposed convolution.
        tracked: What the BatchNorm counts its batches with; None where it does not.
    """

    var: Tensor
    gamma: Tensor | None
    eps: float
    groups: int = 1
    transposed: bool = False
    tracked: Tensor | None = None

    def weight(self, weight: Tensor) -> Tensor:
        """The folded weight; differentiable."""
        factor = fold_factor(self.var, self.gamma, self.eps)
        return fold_weight(weight, factor, groups=self.groups, transposed=self.transposed)

    def factor(self, weight: Tensor) -> Tensor:
        """What the weight is multiplied by, float32, in a shape that broadcasts over it; no gradient flows."""
        with torch.no_grad():
            values = fold_factor(self.var, self.gamma, self.eps).to(torch.float32)
        return along_outputs(values, weight, groups=self.groups, transposed=self.transposed)


def fold_bias(bias: Tensor | None, mean: Tensor, beta: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias, [out], of a layer with BatchNorm folded in, computed in float64 and given in `dtype`."""
    shift = -mean.to(_EXACT) * factor
    if bias is not None:
        shift = shift + bias.to(_EXACT) * factor
    if beta is not None:
        shift = shift + beta.to(_EXACT)
    return shift.to(dtype)


def fold(  # noqa: PLR0913 - a layer and a BatchNorm have so many tensors
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """The weight and bias of a layer with the BatchNorm after it folded in.

    Args:
        weight: The layer's weight; [out, in/groups, …], or [in, out/groups, …] if `transposed`.
        bias: Its bias, [out], or None.
        mean: Running mean, [out].
        var: Running variance, [out].
        gamma: BatchNorm's weight, [out], or None for 1.
        beta: BatchNorm's bias, [out], or None for 0.
        eps: BatchNorm's epsilon.
        groups: The layer's groups.
        transposed: Whether the layer is a transposed convolution.

    Returns:
        Weight and bias in the weight's dtype. The factors are computed in float64 and each weight is multiplied once,
        in float32 or wider, so that it is rounded once.
    """
    factor = fold_factor(var, gamma, eps)
    folded = fold_weight(weight, factor, groups=groups, transposed=transposed)
    return folded, fold_bias(bias, mean, beta, factor, weight.dtype)
