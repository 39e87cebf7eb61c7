"""The table of torch.nn modules, as data: which call of which op kind each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import nn

__all__ = ["IDENTITY_MODULES", "MODULES", "ModuleSpelling"]


@dataclass(frozen=True)
class ModuleSpelling:
    """A torch.nn module that is one call of a kind.

    Attributes:
        kind: The kind's name.
        tensors: Attributes that hold the tensors after the input, in the canonical order.
        attributes: Canonical parameter to the module's attribute.
    """

    kind: str
    tensors: tuple[str, ...] = ()
    attributes: Mapping[str, str] | None = None


def _module(kind_name: str, attributes: str = "", tensors: str = "", **renamed: str) -> ModuleSpelling:
    return ModuleSpelling(kind_name, tuple(tensors.split()), {a: a for a in attributes.split()} | renamed)


MODULES: Final[dict[type[nn.Module], ModuleSpelling]] = {
    nn.Linear: _module("linear", "", "weight bias"),
    nn.Embedding: _module("embedding", "padding_idx max_norm norm_type scale_grad_by_freq sparse", "weight"),
    nn.LayerNorm: _module("layer_norm", "normalized_shape eps", "weight bias"),
    nn.GroupNorm: _module("group_norm", "num_groups eps", "weight bias"),
    nn.ReLU: _module("relu"),
    nn.ReLU6: _module("relu6"),
    nn.Hardtanh: _module("hardtanh", "min_val max_val"),
    nn.LeakyReLU: _module("leaky_relu", "negative_slope"),
    nn.PReLU: _module("prelu", "", "weight"),
    nn.ELU: _module("elu", "alpha"),
    nn.CELU: _module("celu", "alpha"),
    nn.SELU: _module("selu"),
    nn.GELU: _module("gelu", "approximate"),
    nn.SiLU: _module("silu"),
    nn.Mish: _module("mish"),
    nn.Softplus: _module("softplus", "beta threshold"),
    nn.Hardswish: _module("hardswish"),
    nn.Hardsigmoid: _module("hardsigmoid"),
    nn.Sigmoid: _module("sigmoid"),
    nn.Tanh: _module("tanh"),
    nn.Softmax: _module("softmax", "dim"),
    nn.LogSoftmax: _module("log_softmax", "dim"),
    nn.Flatten: _module("flatten", "start_dim end_dim"),
    nn.Unflatten: _module("unflatten", "dim", sizes="unflattened_size"),
    nn.PixelShuffle: _module("pixel_shuffle", "upscale_factor"),
    nn.PixelUnshuffle: _module("pixel_unshuffle", "downscale_factor"),
    nn.ChannelShuffle: _module("channel_shuffle", "groups"),
    nn.Upsample: _module("interpolate", "size scale_factor mode align_corners recompute_scale_factor"),
    nn.UpsamplingNearest2d: _module("interpolate", "size scale_factor mode"),
    nn.UpsamplingBilinear2d: _module("interpolate", "size scale_factor mode align_corners"),
}
"""torch.nn modules, by exact type, and the calls that they are."""

for _n in (1, 2, 3):
    _by_rank: dict[type[nn.Module], ModuleSpelling] = {
        getattr(nn, f"Conv{_n}d"): _module(f"conv{_n}d", "stride padding dilation groups", "weight bias"),
        getattr(nn, f"ConvTranspose{_n}d"): _module(
            f"conv_transpose{_n}d", "stride padding output_padding groups dilation", "weight bias"
        ),
        getattr(nn, f"BatchNorm{_n}d"): _module(
            "batch_norm", "momentum eps", "running_mean running_var weight bias"
        ),
        getattr(nn, f"MaxPool{_n}d"): _module(
            f"max_pool{_n}d", "kernel_size stride padding dilation ceil_mode return_indices"
        ),
        getattr(nn, f"AvgPool{_n}d"): _module(
            f"avg_pool{_n}d",
            "kernel_size stride padding ceil_mode count_include_pad"
            + (" divisor_override" if _n > 1 else ""),
        ),
        getattr(nn, f"AdaptiveAvgPool{_n}d"): _module(f"adaptive_avg_pool{_n}d", "output_size"),
        getattr(nn, f"AdaptiveMaxPool{_n}d"): _module(
            f"adaptive_max_pool{_n}d", "output_size return_indices"
        ),
        getattr(nn, f"Dropout{_n}d"): _module(f"dropout{_n}d", "p"),
    }  # fmt: skip
    MODULES.update(_by_rank)
MODULES[nn.Dropout] = _module("dropout", "p")
MODULES[nn.AlphaDropout] = _module("alpha_dropout", "p")

IDENTITY_MODULES: Final = frozenset({nn.Identity})
