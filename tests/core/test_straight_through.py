"""Fake quantization with straight-through gradients: values against fxq.qdq, gradients against the papers."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxq import plain_quantization, qdq
from fxq.folding import Fold, fold_factor, fold_weight
from fxq.recipe import DTYPES, QDType
from fxq.straight_through import ScaleGradient, fake_quantize, fake_quantize_weight

NAMES = ("int8", "uint8", "int4", "uint4", "int2", "int16")
ZERO = torch.zeros((), dtype=torch.int32)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def drawn(dtype: QDType, *shape: int, seed: int = 0) -> Tensor:
    """Values at scale 1/64 that reach twice as far as the type, and every half between two of its integers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * dtype.qmax / 64
    halves = (torch.arange(-20, 20) + 0.5) / 64
    x.view(-1)[: len(halves)] = halves
    return x


def gradient_by_hand(
    x: Tensor, scale: Tensor, grad: Tensor, dtype: QDType, kind: ScaleGradient
) -> tuple[Tensor, Tensor]:
    """The gradients as the papers write them, element by element."""
    steps = x / scale
    rounded = steps.round()
    inside = (rounded >= dtype.qmin) & (rounded <= dtype.qmax)
    ends = torch.where(rounded < dtype.qmin, dtype.qmin, dtype.qmax)
    within = rounded - steps if kind is ScaleGradient.LSQ else torch.zeros_like(steps)
    return grad * inside, (grad.double() * torch.where(inside, within, ends)).sum()


@given(st.sampled_from(NAMES), st.sampled_from(LAYOUTS), st.integers(0, 9), st.sampled_from((1 / 64, 0.02, 0.3, 1e-3)))
def test_forward_is_quantize_and_dequantize(name: str, layout: torch.memory_format, seed: int, scale: float) -> None:
    x = drawn(DTYPES[name], 2, 3, 8, 8, seed=seed).to(memory_format=layout)
    s = torch.tensor(scale)
    y = fake_quantize(x, s, ZERO, DTYPES[name])
    assert torch.equal(y, qdq.dequantize(qdq.quantize(x, s, ZERO, None, name), s, ZERO, None))
    assert y.stride() == x.stride()


def test_large_tensors_go_piece_by_piece_with_the_same_result() -> None:
    x = drawn(DTYPES["int8"], 3, plain_quantization._PIECE + 5)
    s = torch.tensor(0.02)
    assert torch.equal(fake_quantize(x, s, ZERO, DTYPES["int8"]), qdq.fake_quantize(x, s, ZERO, None, "int8"))


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "as the compiler sees it"])
@pytest.mark.parametrize("kind", ScaleGradient)
@pytest.mark.parametrize("name", NAMES[:5])
def test_gradients_are_the_papers(name: str, kind: ScaleGradient, traced: bool) -> None:
    dtype = DTYPES[name]
    x, grad = drawn(dtype, 4, 700).requires_grad_(), torch.randn(4, 700)
    scale = torch.tensor(1 / 64, requires_grad=True)
    with mock.patch("torch.compiler.is_compiling", return_value=traced):
        y = fake_quantize(x, scale, ZERO, dtype, gradient=kind, gradient_scale=0.25)
    y.backward(grad)
    to_x, to_scale = gradient_by_hand(x.detach(), scale.detach(), grad, dtype, kind)
    torch.testing.assert_close(x.grad, to_x, rtol=1e-5, atol=1e-6)
    if kind is ScaleGradient.NONE:
        assert scale.grad is None
    else:
        torch.testing.assert_close(scale.grad.double(), 0.25 * to_scale, rtol=1e-4, atol=1e-3)  # type: ignore[union-attr]


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "as the compiler sees it"])
@pytest.mark.parametrize("kind", ScaleGradient)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_folded_weight_is_quantized_as_folded_and_unfolded_again(
    kind: ScaleGradient, transposed: bool, traced: bool
) -> None:
    dtype, axis = DTYPES["int4"], 1 if transposed else 0
    weight, grad = torch.randn(6, 6, 3, 3, requires_grad=True), torch.randn(6, 6, 3, 3)
    gamma = torch.tensor([1.0, -0.7, 0.0, 2.0, 0.3, 1.1])
    fold = Fold(torch.rand(6) + 0.5, gamma, 1e-5, transposed=transposed)
    scale = torch.full((6,), 0.21).requires_grad_()
    with mock.patch("torch.compiler.is_compiling", return_value=traced):
        y = fake_quantize_weight(weight, scale, dtype, axis, fold=fold, gradient=kind)
    y.backward(grad)
    factor = fold.factor(weight)
    folded = fold_weight(weight.detach(), fold_factor(fold.var, gamma, 1e-5), transposed=transposed)
    simulated = torch.where(factor == 0, 0.0, y.detach() * factor) / 0.21
    exact = qdq.quantize(folded, scale.detach(), torch.zeros(6, dtype=torch.int32), axis, "int4")
    assert torch.equal(simulated.round().to(torch.int8), exact)
    torch.testing.assert_close(simulated, exact.float(), rtol=0, atol=1e-4)
    dead = (factor == 0).expand_as(weight)
    assert torch.equal(y.detach()[dead], weight.detach()[dead])
    rounded = (folded / 0.21).round()
    inside = (rounded >= -8) & (rounded <= 7)
    torch.testing.assert_close(weight.grad, grad * inside, rtol=1e-5, atol=1e-6)
    if kind is not ScaleGradient.NONE:
        ends = torch.where(rounded < -8, -8.0, 7.0)
        within = rounded - folded / 0.21 if kind is ScaleGradient.LSQ else torch.zeros_like(folded)
        each = torch.where(dead, 0.0, grad / factor * torch.where(inside, within, ends))
        expected = each.sum([d for d in range(4) if d != axis])
        torch.testing.assert_close(scale.grad, expected, rtol=1e-4, atol=1e-3)


def test_what_an_optimizer_drove_below_zero_still_computes() -> None:
    x, scale = torch.randn(5, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    y = fake_quantize(x, scale, ZERO, DTYPES["int8"], gradient=ScaleGradient.LSQ)
    y.sum().backward()
    assert y.isfinite().all()
    assert scale.grad is not None
    assert scale.grad.isfinite()


def test_half_precision_comes_out_in_half_precision() -> None:
    x = torch.randn(4, 50).bfloat16().requires_grad_()
    y = fake_quantize(x, torch.tensor(0.02), ZERO, DTYPES["int8"])
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype is torch.bfloat16
    assert torch.equal(y, qdq.fake_quantize(x.detach(), torch.tensor(0.02), ZERO, None, "int8"))


def test_gradients_pass_by_autograds_own_check() -> None:
    """Where nothing is rounded (the values are integers) or all is clipped, the straight-through gradient is exact."""
    x = torch.tensor([300.0, -300.0, 280.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, scale, ZERO, DTYPES["int8"], gradient=ScaleGradient.LSQ).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3))  # type: ignore[arg-type]
    assert scale.grad is not None
    assert float(scale.grad) == 127 - 128 + 127
