"""One small network for each family of operations that placement has to do with; all take [2, 16, 16, 16] images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from placing import Lambda
from torch import Tensor, nn
from toys import ConvNorm, seeded

SHAPE: Final = (2, 16, 16, 16)


def conv(inputs: int = 16, outputs: int = 16, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class SqueezeExcite(nn.Module):
    """Pool, two 1x1 convolutions, and a Mul with the gate."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


def gated_residual(m: Any, x: Tensor) -> Tensor:
    """An inverted residual: expansion, depthwise, squeeze-excite, projection, identity skip."""
    x = m.stem(x)
    y = F.silu(m.depthwise(F.silu(m.expand(x))))
    return m.head(m.project(m.gate(y)) + x)


def nested_residual(m: Any, x: Tensor) -> Tensor:
    """A residual block inside the branch of another, and two additions in a row."""
    x = torch.relu(m.stem(x))
    inner = m.a(x)
    inner = torch.relu(m.b(torch.relu(inner)) + x)
    y = m.c(inner) + x
    return m.head(torch.relu(m.d(torch.relu(y)) + y))


def concat(m: Any, x: Tensor) -> Tensor:
    """Concatenations of concatenations, through a pool and a resize."""
    x = torch.relu(m.stem(x))
    low = F.interpolate(torch.relu(m.a(F.max_pool2d(x, 2))), scale_factor=2.0, mode="nearest")
    first = torch.cat([torch.relu(m.b(x)), low], 1)
    second = torch.cat([first, F.max_pool2d(first, 3, 1, 1)], 1)
    return m.head(second)


def pooling(m: Any, x: Tensor) -> Tensor:
    """Max-pools pass values on; averages make new ones."""
    x = m.a(F.max_pool2d(torch.relu(m.stem(x)), 2))
    x = m.b(F.avg_pool2d(torch.relu(x), 2))
    x = m.c(F.adaptive_max_pool2d(torch.relu(x), 2))
    return m.fc(F.adaptive_avg_pool2d(torch.relu(x), 1).flatten(1))


def activations(m: Any, x: Tensor) -> Tensor:
    """None of them has a quantizer before it: each stays with the convolution that it follows."""
    for block, act in ((m.stem, F.silu), (m.a, F.hardswish), (m.b, F.gelu), (m.c, F.leaky_relu)):
        x = act(block(x))
    return m.head(x)


def norms(m: Any, x: Tensor) -> Tensor:
    """Norms and softmax stay float between quantized operations."""
    x = m.a(m.group(m.stem(x)))
    x = m.layer(x.permute(0, 2, 3, 1))
    return torch.softmax(m.fc(x), -1)


def convolutions(m: Any, x: Tensor) -> Tensor:
    """Depthwise and grouped convolutions."""
    x = torch.relu(m.depthwise(torch.relu(m.stem(x))))
    return m.head(torch.relu(m.grouped(torch.relu(m.pointwise(x)))))


def few_channels(m: Any, x: Tensor) -> Tensor:
    """Few channels: fine in the first convolution, and advised against inside (R35)."""
    x = torch.relu(m.first(x[:, :3]))
    return m.head(torch.relu(m.narrow(x)))


def windows(m: Any, x: Tensor) -> Tensor:
    """Attention in windows, written by hand, with a bias for each position."""
    n, c, h, w = x.shape
    x = m.stem(x).reshape(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
    q, k, v = m.qkv(x).chunk(3, -1)
    scores = torch.softmax(q @ k.transpose(-2, -1) * 0.25 + m.bias, -1)
    return m.proj(scores @ v)


def tokens(m: Any, x: Tensor) -> Tensor:
    """A transformer block: LayerNorm, multi-head attention, an MLP, two skips."""
    x = m.stem(x).flatten(2).transpose(1, 2)
    y = m.norm1(x)
    x = x + m.attention(y, y, y, need_weights=False)[0]
    return x + m.down(F.gelu(m.up(m.norm2(x))))


def whole_attention(m: Any, x: Tensor) -> Tensor:
    """Heads that TensorRT has no fused INT8 attention for: left whole (R40)."""
    x = m.stem(x).flatten(2).transpose(1, 2)
    q, k, v = m.qkv(x).chunk(3, -1)
    return m.proj(F.scaled_dot_product_attention(q, k, v))


def embedding(m: Any, x: Tensor) -> Tensor:
    """Rows looked up by number stay float; the linear layer behind them does not."""
    rows = m.embedding(x[:, 0, 0].clamp(0, 9).long())
    return m.fc(rows + m.positions)


def shapes(m: Any, x: Tensor) -> Tensor:
    """Pad, slice, split, chunk, reshape, permute and channel shuffle between convolutions."""
    x = torch.relu(m.stem(x))
    x = m.a(F.pad(x, (1, 1, 1, 1))[:, :, 1:, 1:])
    left, right = torch.relu(x).chunk(2, 1)
    x = torch.cat([right, torch.relu(m.b(left))], 1)
    first, _ = x.split([16, 16], 1)
    shuffled = first.reshape(first.shape[0], 2, 8, 17, 17).transpose(1, 2).flatten(1, 2)
    return m.head(shuffled)


def resizing(m: Any, x: Tensor) -> Tensor:
    """A small U-net: upsampled features join earlier ones."""
    high = torch.relu(m.stem(x))
    low = torch.relu(m.down(high))
    up = F.interpolate(m.a(low), size=(16, 16), mode="bilinear", align_corners=False)
    x = torch.relu(m.b(torch.cat([high, up], 1)))
    return m.head(nn.functional.interpolate(x, scale_factor=2.0))


def broadcasting(m: Any, x: Tensor) -> Tensor:
    """Additions that broadcast, or add a constant, are no residuals (R44, R25)."""
    x = torch.relu(m.stem(x))
    context = m.a(F.adaptive_avg_pool2d(x, 1))
    x = m.b(x) + context
    return m.head(torch.relu(x + m.shift) * 2 + 1)


def transposed(m: Any, x: Tensor) -> Tensor:
    """Transposed convolutions: per channel alone, per tensor in groups (R16, R43)."""
    x = torch.relu(m.up(torch.relu(m.stem(x))))
    return m.grouped(x)


def shared_input(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One input read by two convolutions and an addition, and given out again."""
    return m.stem(x) + m.a(x), m.b(x), x


_NETS: Final[dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[], dict[str, Any]]]]] = {
    "gated residual": (gated_residual, lambda: {
        "stem": ConvNorm(16, 16), "expand": ConvNorm(16, 64, 1), "gate": SqueezeExcite(64, 16), "head": conv(),
        "depthwise": nn.Sequential(conv(64, 64, groups=64), nn.BatchNorm2d(64)), "project": ConvNorm(64, 16, 1)}),
    "nested residual": (nested_residual, lambda: {n: conv() for n in ("stem", "a", "b", "c", "d", "head")}),
    "concat": (concat, lambda: {"stem": conv(), "a": conv(), "b": conv(), "head": conv(64)}),
    "pooling": (pooling, lambda: {"stem": conv(), "a": conv(), "b": conv(), "c": conv(), "fc": nn.Linear(16, 16)}),
    "activations": (activations, lambda: {n: conv() for n in ("stem", "a", "b", "c", "head")}),
    "norms": (norms, lambda: {"stem": conv(), "a": conv(), "group": nn.GroupNorm(4, 16), "layer": nn.LayerNorm(16),
                              "fc": nn.Linear(16, 16)}),
    "convolutions": (convolutions, lambda: {
        "stem": conv(), "depthwise": conv(groups=16), "pointwise": conv(16, 32, 1), "grouped": conv(32, 32, groups=4),
        "head": conv(32)}),
    "few channels": (few_channels, lambda: {"first": conv(3), "narrow": conv(16, 6), "head": conv(6)}),
    "windows": (windows, lambda: {"stem": conv(), "qkv": nn.Linear(16, 48), "proj": nn.Linear(16, 16),
                                  "bias": torch.randn(64, 64)}),
    "tokens": (tokens, lambda: {
        "stem": nn.Conv2d(16, 64, 2, 2), "norm1": nn.LayerNorm(64), "norm2": nn.LayerNorm(64),
        "attention": nn.MultiheadAttention(64, 2, batch_first=True), "up": nn.Linear(64, 128),
        "down": nn.Linear(128, 64)}),
    "whole attention": (whole_attention, lambda: {"stem": nn.Conv2d(16, 48, 2, 2), "qkv": nn.Linear(48, 144),
                                                  "proj": nn.Linear(48, 16)}),
    "embedding": (embedding, lambda: {"embedding": nn.Embedding(10, 32), "fc": nn.Linear(32, 16),
                                      "positions": torch.randn(16, 32)}),
    "shapes": (shapes, lambda: {"stem": conv(), "a": conv(16, 32), "b": conv(), "head": conv()}),
    "resizing": (resizing, lambda: {"stem": conv(), "down": nn.Conv2d(16, 32, 3, 2, 1), "a": conv(32),
                                    "b": conv(32), "head": conv()}),
    "broadcasting": (broadcasting, lambda: {"stem": conv(), "a": conv(16, 16, 1), "b": conv(), "head": conv(),
                                            "shift": torch.randn(16, 1, 1)}),
    "transposed": (transposed, lambda: {"stem": conv(), "up": nn.ConvTranspose2d(16, 16, 2, 2),
                                        "grouped": nn.ConvTranspose2d(16, 16, 2, 2, groups=2)}),
    "shared input": (shared_input, lambda: {"stem": conv(), "a": conv(), "b": conv()}),
}  # fmt: skip
FAMILIES: Final = tuple(_NETS)


def family(name: str) -> nn.Module:
    """The network of one family, seeded and in eval mode."""
    function, parts = _NETS[name]
    return seeded(lambda: Lambda(function, **parts()))
