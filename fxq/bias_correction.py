"""Bias correction: take out the mean error that quantization leaves in each channel.

Rounding weights and clipping activations shifts the mean of a layer's outputs, channel by channel, because
inputs behind a ReLU have a mean above 0. The shift is the same for all inputs, and biases stay float (R17),
so it can be taken out for nothing (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization
and Bias Correction", section 4.2). Here it is measured on data, layer after layer, so that each layer is
corrected for the inputs that the layers before it, themselves corrected, will give.

The graph is walked once, node by node, with the float and the quantized value of each tensor side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .batches import Inputs
from .graph import constant, device_of, tensor_info
from .ops import kind_name
from .qdq import fake_quantize
from .quantizer import submodule_name
from .stepping import Stepper, Values
from .verify import quantizer_of

__all__ = [
    "BIAS",
    "CORRECTIONS",
    "Sampler",
    "correct_biases",
    "has_quantized_weight",
    "has_stored_bias",
    "store_corrections",
]

CORRECTIONS: Final = "bias_corrections"
"""Module of a prepared graph that holds a buffer for each operation whose bias is to be corrected."""

BIAS: Final = 2
"""Where the normalized call of a weighted operation has its bias."""

_CHANNEL: Final = {"linear": -1} | {f"conv{n}d": 1 for n in (1, 2, 3)} | {f"conv_transpose{n}d": 1 for n in (1, 2, 3)}
_BUDGET: Final = 1 << 28  # bytes that the largest tensor of the kept samples may take
_MOST: Final = 512  # samples; more change little
_FEWEST: Final = 8
_SIGNIFICANT: Final = 2.0  # standard errors


class Sampler:
    """Hands batches through and keeps the first ones, as many samples as the walk can hold.

    Args:
        gm: The prepared graph, whose shapes tell how much one sample takes.
        batches: Any iterable of batches.

    Attributes:
        kept: The batches kept, as they came.
    """

    def __init__(self, gm: fx.GraphModule, batches: Iterable[Any]) -> None:
        infos = {n: info for n in gm.graph.nodes if (info := tensor_info(n)) is not None and info.shape}
        examples = max((info.shape[0] for n, info in infos.items() if n.op == "placeholder"), default=1)
        largest = max((math.prod(info.shape) * info.dtype.itemsize for info in infos.values()), default=1)
        self.batches = batches
        self.wanted = min(max(_BUDGET * examples // max(largest, 1), _FEWEST), _MOST)
        self.kept: list[Any] = []
        self._samples = 0

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # a TypeError, as of the batches themselves

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.keep(batch)
            yield batch

    def keep(self, batch: Any) -> None:
        """Keep a batch if there is room."""
        if self._samples < self.wanted:
            self.kept.append(batch)
            self._samples += _samples(batch)


def _samples(batch: Any) -> int:
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    return len(leaves[0]) if leaves else 1


@torch.inference_mode()
def correct_biases(gm: fx.GraphModule, batches: Sequence[Inputs]) -> dict[str, Tensor]:
    """The correction of each weighted operation's bias.

    A channel is corrected only where its mean error stands out from chance, by two standard errors over
    samples.

    Args:
        gm: A calibrated graph; not changed.
        batches: Inputs on the graph's device; all their activations between two layers are held at once.

    Returns:
        Node name to what its bias gains, float32 [out channels]. Operations whose weight is float, or whose bias is
        computed in the graph, have none, and the layers behind them are corrected for what they then give.
    """
    stepper = Stepper(gm, lambda _: False)
    last = {source: node for node in stepper.nodes for source in node.all_input_nodes}
    real = [stepper.begin(inputs) for inputs in batches]
    rounded = [dict(values) for values in real]
    found: dict[str, Tensor] = {}
    for node in stepper.nodes:
        if node.op == "output":
            break
        if node.op != "placeholder":
            _evaluate(stepper, node, real, rounded)
        if has_quantized_weight(node) and has_stored_bias(node):
            channel = _CHANNEL[kind_name(node)]
            correction = _mean_error([v[node] for v in real], [v[node] for v in rounded], channel)
            if correction is not None:
                found[node.name] = correction
                for values in rounded:
                    values[node] = _shifted(values[node], correction, channel)
        for source in node.all_input_nodes:
            if last[source] is node:
                for values in (*real, *rounded):
                    del values[source]
    return found


def _evaluate(stepper: Stepper, node: fx.Node, real: Sequence[Values], rounded: Sequence[Values]) -> None:
    """Give `node` its values for each batch: in float, and with everything before it quantized."""
    quantizer = quantizer_of(node)
    done: dict[int, Tensor] = {}  # a tensor that stands for all batches (a weight) is quantized only once
    for plain, quantized in zip(real, rounded, strict=True):
        plain[node] = stepper.value(node, plain)
        if quantizer is not None and quantizer.solved:
            x = quantized[node.all_input_nodes[0]]
            if id(x) not in done:
                name = quantizer.spec.qdtype.name
                done[id(x)] = fake_quantize(x, quantizer.scale, quantizer.zero_point, quantizer.axis, name)
            quantized[node] = done[id(x)]
        elif all(plain[source] is quantized[source] for source in node.all_input_nodes):
            quantized[node] = plain[node]
        else:
            quantized[node] = stepper.value(node, quantized)


def has_stored_bias(node: fx.Node) -> bool:
    """Whether a bias is stored, or there is none: one that is computed in the graph is not corrected.

    What computes it may hold a channel at a value that later operations count on: cosine attention's keys have a bias
    of 0, so that what is padded with zeros stays 0 when it is normalized.
    """
    bias = node.args[BIAS]
    return bias is None or constant(bias) is not None


def has_quantized_weight(node: fx.Node) -> bool:
    """Whether a node is a linear layer or a convolution whose weight a quantizer rounds."""
    if kind_name(node) not in _CHANNEL:
        return False
    quantizer = quantizer_of(node.args[1]) if isinstance(node.args[1], fx.Node) else None
    return quantizer is not None and quantizer.weight


def _mean_error(real: Sequence[Tensor], rounded: Sequence[Tensor], channel: int) -> Tensor | None:
    """Mean of (real - rounded) per channel, 0 where it is not significant; None for a single sample."""
    errors = []
    for one, other in zip(real, rounded, strict=True):
        error = (one - other).float().movedim(channel, -1)
        errors.append(error.reshape(len(error), -1, error.shape[-1]).mean(1) if error.dim() > 1 else error[None])
    samples = torch.cat(errors)
    if len(samples) < 2:
        return None
    mean = samples.mean(0)
    standard_error = samples.std(0) / math.sqrt(len(samples))
    return torch.where(mean.abs() > _SIGNIFICANT * standard_error, mean, torch.zeros_like(mean))


def store_corrections(prepared: fx.GraphModule, corrections: Mapping[str, Tensor]) -> None:
    """Keep in a prepared graph what its biases are to gain; an empty mapping takes earlier corrections away.

    Args:
        prepared: The graph; its module :data:`CORRECTIONS` is replaced.
        corrections: What :func:`correct_biases` gave.
    """
    holder = nn.Module()
    device = device_of(prepared)
    for name, correction in corrections.items():
        holder.register_buffer(submodule_name(name), correction.to(device, copy=True))
    prepared.add_module(CORRECTIONS, holder)


def _shifted(y: Tensor, correction: Tensor, channel: int) -> Tensor:
    shape = [1] * y.dim()
    shape[channel] = -1
    return y + correction.to(y.dtype).view(shape)
