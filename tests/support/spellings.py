"""Every op kind's spellings: calls as users write them, with an input for them."""

# ruff: noqa: FBT003, PLW0108, RUF005 (the table holds calls as users write them)

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from toys import image

T = torch.Tensor
Call = Callable[[Tensor], Any]

V, M, IMAGES = image(2, 3), image(3, 4), image(2, 4, 6, 6)
SEQUENCES, VOLUMES, POSITIVE = image(2, 4, 9), image(1, 2, 4, 4, 4), image(3, 4).abs() + 0.5
W1, W2, W3 = image(6, 2, 3), image(6, 2, 3, 3), image(4, 1, 2, 2, 2)
BIAS, STATS = image(6), (image(4), image(4).abs() + 0.5)
QUERY = image(2, 2, 5, 4)

UNARY: dict[str, tuple[Call, ...]] = {
    name: (
        getattr(torch, name),
        lambda x, n=name: getattr(x, n)(),
        lambda x, n=name: getattr(x + 0, f"{n}_")(),
    )  # type: ignore[misc]
    for name in ["exp", "log", "sqrt", "rsqrt", "abs", "erf", "sin", "cos", "square", "reciprocal", "floor", "ceil"]
}


SPELLINGS: dict[str, tuple[Tensor, tuple[Call, ...]]] = {
    "conv1d": (
        SEQUENCES,
        (
            lambda x: F.conv1d(x, W1, groups=2),
            lambda x: torch.conv1d(x, W1, BIAS, 2, 1, 1, 2),
            lambda x: F.conv1d(input=x, weight=W1, padding="same", groups=2),
        ),
    ),
    "conv2d": (
        IMAGES,
        (
            lambda x: F.conv2d(x, W2, BIAS, 2, 1, 1, 2),
            lambda x: torch.conv2d(x, W2, bias=BIAS, stride=(2, 1), groups=2),
            lambda x: F.conv2d(x, W2, padding=[1], groups=2),
            lambda x: F.conv2d(x, W2, None, 1, "valid", groups=2),
        ),
    ),
    "conv3d": (
        VOLUMES,
        (lambda x: F.conv3d(x, W3, None, 1, (0, 1, 2), groups=2), lambda x: torch.conv3d(x, W3, groups=2)),
    ),
    "conv_transpose1d": (
        SEQUENCES,
        (
            lambda x: F.conv_transpose1d(x, image(4, 3, 3), image(6), 2, 1, 1, 2, 1),
            lambda x: torch.conv_transpose1d(x, image(4, 3, 3), groups=2, dilation=2),
        ),
    ),
    "conv_transpose2d": (
        IMAGES,
        (
            lambda x: F.conv_transpose2d(x, image(4, 3, 3, 3), BIAS, 2, 1, 1, 2),
            lambda x: F.conv_transpose2d(x, image(4, 3, 3, 3), stride=(2, 3), output_padding=(1, 2)),
        ),
    ),
    "conv_transpose3d": (VOLUMES, (lambda x: F.conv_transpose3d(x, image(2, 2, 2, 2, 2), None, 2),)),
    "max_pool1d": (
        SEQUENCES,
        (
            lambda x: F.max_pool1d(x, 3),
            lambda x: torch.max_pool1d(x, 3, 2, 1),
            lambda x: F.max_pool1d(x, (3,), ceil_mode=True),
        ),
    ),
    "max_pool2d": (
        IMAGES,
        (
            lambda x: F.max_pool2d(x, 2),
            lambda x: F.max_pool2d(x, (3, 2), 1, 1, 1, ceil_mode=True),
            lambda x: torch.max_pool2d(x, 2, padding=1),
            lambda x: F.max_pool2d(input=x, kernel_size=3, dilation=2),
        ),
    ),
    "max_pool3d": (VOLUMES, (lambda x: F.max_pool3d(x, 2), lambda x: torch.max_pool3d(x, 2, 1))),
    "avg_pool1d": (
        SEQUENCES,
        (lambda x: F.avg_pool1d(x, 3), lambda x: torch.avg_pool1d(x, 3, 2, 1, False, False)),
    ),
    "avg_pool2d": (
        IMAGES,
        (
            lambda x: F.avg_pool2d(x, 2),
            lambda x: F.avg_pool2d(x, 3, 2, 1, False, False, 5),
            lambda x: F.avg_pool2d(x, kernel_size=(2, 3), ceil_mode=True),
        ),
    ),
    "avg_pool3d": (VOLUMES, (lambda x: F.avg_pool3d(x, 2), lambda x: F.avg_pool3d(x, 2, divisor_override=3))),
    "adaptive_avg_pool1d": (
        SEQUENCES,
        (lambda x: F.adaptive_avg_pool1d(x, 3), lambda x: torch.adaptive_avg_pool1d(x, (2,))),
    ),
    "adaptive_avg_pool2d": (
        IMAGES,
        (
            lambda x: F.adaptive_avg_pool2d(x, 1),
            lambda x: F.adaptive_avg_pool2d(x, output_size=(2, None)),
        ),
    ),
    "adaptive_avg_pool3d": (VOLUMES, (lambda x: F.adaptive_avg_pool3d(x, (1, 2, 1)),)),
    "adaptive_max_pool1d": (SEQUENCES, (lambda x: F.adaptive_max_pool1d(x, 3),)),
    "adaptive_max_pool2d": (IMAGES, (lambda x: F.adaptive_max_pool2d(x, (2, 3)),)),
    "adaptive_max_pool3d": (VOLUMES, (lambda x: F.adaptive_max_pool3d(x, 1),)),
    "linear": (
        M,
        (lambda x: F.linear(x, image(5, 4)), lambda x: F.linear(x, weight=image(5, 4), bias=image(5))),
    ),
    "matmul": (
        image(2, 3, 4),
        (
            lambda x: x @ image(4, 2),
            lambda x: torch.matmul(x, image(4, 2)),
            lambda x: x.matmul(other=image(4)),
            lambda x: torch.bmm(x, mat2=x.mT),
            lambda x: x.bmm(x.mT),
            lambda x: torch.mm(x[0], image(4, 2)),
            lambda x: x[0].mm(image(4, 2)),
            lambda x: operator.matmul(image(3, 3), x),
            lambda x: operator.imatmul(x, image(4, 2)),
            lambda x: x.__rmatmul__(image(5, 3)),
        ),
    ),
    "embedding": (
        torch.tensor([[0, 2], [1, 1]]),
        (
            lambda x: F.embedding(x, image(3, 4)),
            lambda x: F.embedding(x, image(3, 4), 1, None, 2.0),
        ),
    ),
    "scaled_dot_product_attention": (
        QUERY,
        (
            lambda x: F.scaled_dot_product_attention(x, x * 2, x),
            lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
            lambda x: F.scaled_dot_product_attention(query=x, key=x, value=x, attn_mask=image(5, 5), scale=0.3),
        ),
    ),
    "batch_norm": (
        IMAGES,
        (
            lambda x: F.batch_norm(x, *STATS),
            lambda x: F.batch_norm(x, *STATS, STATS[1], STATS[0], False, 0.3, 1e-3),
            lambda x: F.batch_norm(x, running_mean=STATS[0], running_var=STATS[1], eps=0.1),
            lambda x: F.batch_norm(x, None, None, training=True),
        ),
    ),
    "layer_norm": (
        IMAGES,
        (lambda x: F.layer_norm(x, (6,)), lambda x: F.layer_norm(x, [6], image(6), eps=1e-3)),
    ),
    "group_norm": (IMAGES, (lambda x: F.group_norm(x, 2), lambda x: F.group_norm(x, 2, bias=image(4)))),
    "instance_norm": (
        IMAGES,
        (lambda x: F.instance_norm(x), lambda x: F.instance_norm(x, weight=image(4), eps=0.1)),
    ),
    "add": (
        V,
        (
            lambda x: x + 1,
            lambda x: 1 + x,
            lambda x: torch.add(x, V),
            lambda x: torch.add(input=x, other=V, alpha=1),
            lambda x: x.add(V),
            lambda x: V + x,
            lambda x: operator.add(2.5, x),
            lambda x: (x + 0).add_(V, alpha=1),
            lambda x: operator.iadd(x, 3),
            lambda x: x.__radd__(2),
            lambda x: x.__add__(V),
        ),
    ),
    "mul": (
        V,
        (
            lambda x: x * 2,
            lambda x: 2 * x,
            lambda x: torch.mul(x, V),
            lambda x: x.mul(V),
            lambda x: torch.multiply(V, x),
            lambda x: x.multiply(3),
            lambda x: operator.imul(x, V),
            lambda x: x.__rmul__(2),
        ),
    ),
    "sub": (
        V,
        (
            lambda x: x - 1,
            lambda x: 1 - x,
            lambda x: torch.sub(x, V),
            lambda x: x.sub(other=V),
            lambda x: torch.rsub(x, 3),
            lambda x: torch.subtract(V, x),
            lambda x: x.subtract(1),
            lambda x: operator.isub(x, V),
            lambda x: x.__rsub__(4),
        ),
    ),
    "div": (
        POSITIVE,
        (
            lambda x: x / 2,
            lambda x: 2 / x,
            lambda x: torch.div(x, POSITIVE),
            lambda x: x.div(3),
            lambda x: torch.divide(M, x),
            lambda x: torch.true_divide(x, 3),
            lambda x: x.true_divide(M),
            lambda x: torch.div(x, 3, rounding_mode=None),
            lambda x: x.__rtruediv__(2),
            lambda x: operator.itruediv(x, 3),
            lambda x: x.divide(2),
        ),
    ),
    "neg": (
        V,
        (
            lambda x: -x,
            lambda x: torch.neg(x),
            lambda x: x.negative(),
            lambda x: torch.negative(x),
            lambda x: x.neg_(),
        ),
    ),
    "pow": (
        POSITIVE,
        (
            lambda x: x**2,
            lambda x: 2**x,
            lambda x: torch.pow(x, 0.5),
            lambda x: torch.pow(3, x),
            lambda x: x.pow(exponent=3),
            lambda x: x.__rpow__(2),
            lambda x: operator.ipow(x, 2),
        ),
    ),
    "relu": (
        V,
        (
            torch.relu,
            F.relu,
            lambda x: x.relu(),
            lambda x: F.relu(x, inplace=True),
            lambda x: F.relu(x, True),
            lambda x: torch.relu_(x),
            lambda x: F.relu_(x),
            lambda x: x.relu_(),
            lambda x: F.relu(input=x),
        ),
    ),
    "relu6": (V * 9, (F.relu6, lambda x: F.relu6(x, inplace=True))),
    "hardtanh": (V, (F.hardtanh, lambda x: F.hardtanh(x, -0.5, 0.25), lambda x: F.hardtanh_(x, max_val=0.5))),
    "leaky_relu": (
        V,
        (F.leaky_relu, lambda x: F.leaky_relu(x, 0.2), lambda x: F.leaky_relu_(x, negative_slope=0.3)),
    ),
    "prelu": (
        V,
        (lambda x: F.prelu(x, image(3)), lambda x: torch.prelu(x, image(1)), lambda x: x.prelu(image(3))),
    ),
    "elu": (V, (F.elu, lambda x: F.elu(x, 0.7), lambda x: F.elu_(x, alpha=0.7))),
    "celu": (V, (F.celu, lambda x: F.celu(x, 0.7, True))),
    "selu": (V, (F.selu, lambda x: F.selu(x, inplace=True))),
    "gelu": (V, (F.gelu, lambda x: F.gelu(x, approximate="tanh"))),
    "silu": (V, (F.silu, lambda x: F.silu(x, inplace=True))),
    "mish": (V, (F.mish,)),
    "softplus": (V, (F.softplus, lambda x: F.softplus(x, 2, 1), lambda x: F.softplus(x, threshold=0.1))),
    "hardswish": (V, (F.hardswish, lambda x: F.hardswish(x, True))),
    "hardsigmoid": (V, (F.hardsigmoid, lambda x: F.hardsigmoid(x, inplace=True))),
    "sigmoid": (
        V,
        (
            torch.sigmoid,
            F.sigmoid,
            lambda x: x.sigmoid(),
            lambda x: x.sigmoid_(),
            lambda x: torch.sigmoid_(x),
        ),
    ),
    "tanh": (V, (torch.tanh, F.tanh, lambda x: x.tanh(), lambda x: torch.tanh_(x))),
    "softmax": (
        V,
        (
            lambda x: torch.softmax(x, -1),
            lambda x: F.softmax(x, dim=0),
            lambda x: x.softmax(dim=1),
            lambda x: F.softmax(x, 1, 3),
            lambda x: x.softmax(-1, dtype=torch.float64),
            lambda x: F.softmax(x, 1, 3, torch.float64),
        ),
    ),
    "log_softmax": (
        V,
        (lambda x: torch.log_softmax(x, dim=-1), lambda x: F.log_softmax(x, 0), lambda x: x.log_softmax(1)),
    ),
    "clamp": (
        V,
        (
            lambda x: torch.clamp(x, -0.5, 0.5),
            lambda x: x.clamp(min=0),
            lambda x: x.clip(max=0.25),
            lambda x: torch.clip(x, 0),
            lambda x: x.clamp_(0, 1),
            lambda x: torch.clamp_min(x, 0.1),
            lambda x: x.clamp_max(max=0.2),
            lambda x: x.clamp_min_(0),
        ),
    ),
    **{name: (POSITIVE, calls) for name, calls in UNARY.items()},
    "mean": (
        IMAGES,
        (
            torch.mean,
            lambda x: x.mean(),
            lambda x: x.mean([2, 3]),
            lambda x: x.mean((2, 3), True),
            lambda x: x.mean(-1, keepdim=True),
            lambda x: torch.mean(x, dim=(1,)),
            lambda x: x.mean(axis=1),
            lambda x: torch.mean(input=x, dim=0, keepdim=True),
        ),
    ),
    "sum": (
        IMAGES,
        (
            torch.sum,
            lambda x: x.sum(1),
            lambda x: torch.sum(x, (0, 2), keepdim=True),
            lambda x: x.sum(axis=-1),
        ),
    ),
    "normalize": (
        V,
        (F.normalize, lambda x: F.normalize(x, 1.0, 0), lambda x: F.normalize(x, dim=-1, eps=1.0)),
    ),
    "flatten": (
        IMAGES,
        (
            torch.flatten,
            lambda x: x.flatten(1),
            lambda x: torch.flatten(x, 1, 2),
            lambda x: x.flatten(end_dim=2),
        ),
    ),
    "reshape": (
        image(2, 3, 4),
        (
            lambda x: x.view(2, -1),
            lambda x: x.view((2, -1)),
            lambda x: x.view([6, 4]),
            lambda x: x.reshape(-1),
            lambda x: torch.reshape(x, (4, 6)),
            lambda x: x.reshape(shape=(3, 8)),
            lambda x: x.view(x.size(0), -1),
            lambda x: x.view(x.shape),
            lambda x: x.reshape(x.size()),
            lambda x: x.view(x.shape[:1] + (12,)),
            lambda x: x.view(size=(24,)),
        ),
    ),
    "permute": (
        image(2, 3, 4),
        (
            lambda x: x.permute(2, 0, 1),
            lambda x: x.permute((0, 2, 1)),
            lambda x: torch.permute(x, (1, 0, 2)),
            lambda x: x.permute(dims=[0, 2, 1]),
            lambda x: torch.permute(x, dims=(-1, 0, 1)),
        ),
    ),
    "transpose": (
        image(2, 3, 4),
        (
            lambda x: x.transpose(1, 2),
            lambda x: torch.transpose(x, dim0=0, dim1=2),
            lambda x: x.swapaxes(0, 1),
            lambda x: torch.swapaxes(x, axis0=0, axis1=-1),
            lambda x: x.swapdims(1, 0),
            lambda x: torch.swapdims(x, 0, 1),
        ),
    ),
    "t": (V, (torch.t, lambda x: x.t())),
    "unflatten": (V, (lambda x: x.unflatten(1, (1, -1)), lambda x: torch.unflatten(x, 1, sizes=(1, -1)))),
    "unsqueeze": (V, (lambda x: x.unsqueeze(1), lambda x: torch.unsqueeze(x, dim=-1))),
    "squeeze": (
        image(2, 1, 1, 3),
        (
            torch.squeeze,
            lambda x: x.squeeze(),
            lambda x: x.squeeze(1),
            lambda x: torch.squeeze(x, (1, 2)),
            lambda x: x.squeeze(dim=-2),
        ),
    ),
    "expand": (
        image(1, 3),
        (
            lambda x: x.expand(2, 3),
            lambda x: x.expand((4, -1)),
            lambda x: x.expand(size=(2, 3)),
            lambda x: x.expand((x + x.new_zeros(5, 1)).shape),
        ),
    ),
    "repeat": (
        V,
        (lambda x: x.repeat(2, 1), lambda x: x.repeat((1, 3)), lambda x: x.repeat(repeats=(2, 2, 1))),
    ),
    "chunk": (
        image(4, 3),
        (lambda x: x.chunk(2), lambda x: torch.chunk(x, 3, 1), lambda x: x.chunk(chunks=2, dim=0)),
    ),
    "split": (
        image(4, 3),
        (
            lambda x: x.split(2),
            lambda x: torch.split(x, [1, 2], 1),
            lambda x: x.split([1, 3], dim=0),
            lambda x: x.split(split_size=1, dim=1),
        ),
    ),
    "unbind": (V, (torch.unbind, lambda x: x.unbind(1), lambda x: torch.unbind(x, dim=-1))),
    "cat": (
        V,
        (
            lambda x: torch.cat([x, V]),
            lambda x: torch.cat((x, V), 1),
            lambda x: torch.concat([x, x], dim=-1),
            lambda x: torch.concatenate([x, V], axis=1),
            lambda x: torch.cat(tensors=[x, V], dim=0),
        ),
    ),
    "stack": (V, (lambda x: torch.stack([x, V]), lambda x: torch.stack((x, V), dim=-1))),
    "getitem": (
        image(4, 3),
        (lambda x: x[1:], lambda x: x[..., 0], lambda x: x.__getitem__(0), lambda x: x[:, None, ::2]),
    ),
    "roll": (
        V,
        (lambda x: torch.roll(x, 1), lambda x: x.roll(2, 1), lambda x: x.roll(shifts=(1, 2), dims=(0, 1))),
    ),
    "flip": (
        V,
        (
            lambda x: torch.flip(x, (0,)),
            lambda x: x.flip(0, 1),
            lambda x: x.flip(1),
            lambda x: x.flip([0, 1]),
        ),
    ),
    "pad": (
        IMAGES,
        (
            lambda x: F.pad(x, (1, 2)),
            lambda x: F.pad(x, (1, 1, 2, 0), "reflect"),
            lambda x: F.pad(x, [0, 1], value=3.0),
        ),
    ),
    "interpolate": (
        IMAGES,
        (
            lambda x: F.interpolate(x, 4),
            lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
        ),
    ),
    "pixel_shuffle": (
        IMAGES,
        (lambda x: F.pixel_shuffle(x, 2), lambda x: torch.pixel_shuffle(x, upscale_factor=2)),
    ),
    "pixel_unshuffle": (IMAGES, (lambda x: F.pixel_unshuffle(x, 3),)),
    "channel_shuffle": (IMAGES, (lambda x: F.channel_shuffle(x, 2),)),
    "dropout": (
        V,
        (
            F.dropout,
            lambda x: F.dropout(x, 0.3, False),
            lambda x: F.dropout(x, 0.3, training=True, inplace=True),
        ),
    ),
    "dropout1d": (V, (F.dropout1d, lambda x: F.dropout1d(x, training=False))),
    "dropout2d": (IMAGES, (F.dropout2d, lambda x: F.dropout2d(x, 0.3, False, True))),
    "dropout3d": (VOLUMES, (F.dropout3d,)),
    "alpha_dropout": (V, (F.alpha_dropout, lambda x: F.alpha_dropout(x, 0.3, training=True))),
    "feature_alpha_dropout": (
        IMAGES,
        (F.feature_alpha_dropout, lambda x: F.feature_alpha_dropout(x, 0.3, True)),
    ),
    "contiguous": (
        V,
        (lambda x: x.contiguous(), lambda x: x.t().contiguous(memory_format=torch.contiguous_format)),
    ),
    "clone": (
        V,
        (torch.clone, lambda x: x.clone(), lambda x: x.clone(memory_format=torch.contiguous_format)),
    ),
    "detach": (V, (torch.detach, lambda x: x.detach())),
}
