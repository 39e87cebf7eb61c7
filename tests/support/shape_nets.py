"""Networks that ask for their shapes while they run, as many vision transformers and segmenters do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import seeded


class Attention(nn.Module):
    """Multi-head attention written out, with an optional additive mask, as language models have it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        if mask is not None:
            if mask.dim() == 2:
                mask = mask[:, None, None, :]
            elif mask.dim() != 4:
                raise ValueError(f"a mask of shape {tuple(mask.shape)}")
            scores = scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class EncoderBlock(nn.Module):
    """A block of an encoder in the style of language models: positions from a buffer, checks on the lengths."""

    def __init__(self, width: int = 16, heads: int = 2, longest: int = 32) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(50, width), nn.Embedding(longest, width)
        self.register_buffer("ids", torch.arange(longest).expand(1, -1), persistent=False)
        self.attention, self.norm = Attention(width, heads), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length = tokens.shape
        if length > self.ids.shape[1]:
            raise ValueError(f"{length:d} tokens are more than {self.ids.shape[1]}")
        if mask is None:
            mask = torch.ones((batch, length), device=tokens.device)
        x = self.words(tokens) + self.positions(self.ids[:, :length])
        x = self.norm(x + self.attention(x, mask))
        return x + self.down(F.gelu(self.up(x)))


class VisionTransformer(nn.Module):
    """A vision transformer whose position embedding is interpolated where the image has another size."""

    def __init__(self, size: int = 32, patch: int = 8, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.patch, self.grid = patch, size // patch
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 1 + self.grid**2, width))
        self.blocks = nn.ModuleList(Attention(width, 2) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def positions(self, x: Tensor, h: int, w: int) -> Tensor:
        if x.shape[1] == self.pos.shape[1] and h == w:
            return self.pos
        first, rest = self.pos[:, :1], self.pos[:, 1:]
        rest = rest.reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        rest = F.interpolate(rest, size=(h, w), mode="bilinear", align_corners=False)
        return torch.cat([first, rest.permute(0, 2, 3, 1).reshape(1, h * w, -1)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, height, width = x.shape
        assert height % self.patch == 0, f"{height} is no multiple of {self.patch}"
        assert width % self.patch == 0, f"{width} is no multiple of {self.patch}"
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(b, -1, -1), x], dim=1)
        x = x + self.positions(x, height // self.patch, width // self.patch)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x))
        return self.head(x[:, 0])


class UNet(nn.Module):
    """A U-Net that pads its input to a multiple of 8 and crops what it gives."""

    def __init__(self, width: int = 4, depth: int = 3) -> None:
        super().__init__()
        sizes = [width * 2**i for i in range(depth + 1)]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(sizes))
        self.up = nn.ModuleList(nn.Conv2d(a + b, a, 3, padding=1) for a, b in pairwise(sizes))
        self.multiple = 2**depth

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        pad_h, pad_w = (self.multiple - h % self.multiple) % self.multiple, -w % self.multiple
        if pad_h or pad_w:
            x = F.pad(x, (0, pad_w, 0, pad_h))
        levels = [self.stem(x)]
        for conv in self.down:
            levels.append(F.relu(conv(levels[-1])))
        x = levels.pop()
        for conv in reversed(self.up):
            skip = levels.pop()
            if x.shape[-2:] != skip.shape[-2:]:
                x = F.interpolate(x, size=skip.shape[-2:])
            x = F.relu(conv(torch.cat([x, skip], dim=1)))
        return x[..., :h, :w]


class Windows(nn.Module):
    """Attention in windows, the last of which is padded (as in Swin)."""

    def __init__(self, width: int = 8, window: int = 4) -> None:
        super().__init__()
        self.window, self.shift = window, window // 2
        self.attention, self.norm = Attention(width, 2), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        size = self.window
        right, below = (size - w % size) % size, (size - h % size) % size
        x = F.pad(x, (0, 0, 0, right, 0, below))
        _, high, wide, _ = x.shape
        shift = 0 if size >= high or size >= wide else self.shift
        if shift > 0:
            x = torch.roll(x, (-shift, -shift), dims=(1, 2))
        x = x.view(b, high // size, size, wide // size, size, c).permute(0, 1, 3, 2, 4, 5)
        x = self.attention(self.norm(x.reshape(-1, size * size, c)))
        x = x.view(b, high // size, wide // size, size, size, c).permute(0, 1, 3, 2, 4, 5).reshape(b, high, wide, c)
        if shift > 0:
            x = torch.roll(x, (shift, shift), dims=(1, 2))
        return x[:, :h, :w, :].contiguous()


class Rescaled(nn.Module):
    """A layer that divides by the largest value, where that is not 0: a decision that no shape can take."""

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().max()
        if largest > 0:
            x = x / largest
        return x


class Normalizing(nn.Module):
    """Convolutions around a layer that decides by values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.inner = nn.Sequential(nn.ReLU(), Rescaled())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "encoder": (EncoderBlock, ((2, 7),)),
    "masked encoder": (EncoderBlock, ((2, 7), (2, 7))),
    "vit": (VisionTransformer, ((2, 3, 32, 32),)),
    "vit, interpolated": (VisionTransformer, ((2, 3, 24, 40),)),
    "unet": (UNet, ((2, 3, 30, 20),)),
    "windows": (Windows, ((2, 10, 9, 8),)),
}
"""Each network, and the shapes of the inputs that it is traced with."""


def network(name: str) -> nn.Module:
    """One of :data:`NETWORKS`, with seeded weights."""
    return seeded(NETWORKS[name][0])


def inputs(name: str, shapes: Sequence[Sequence[int]], seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of these shapes: whole numbers for the encoders' tokens and masks."""
    generator = torch.Generator().manual_seed(seed)
    if "encoder" in name:
        tokens = torch.randint(0, 50, tuple(shapes[0]), generator=generator)
        masks = (torch.rand(tuple(shape), generator=generator).round() for shape in shapes[1:])
        return (tokens, *masks)
    return tuple(torch.randn(tuple(shape), generator=generator) for shape in shapes)
