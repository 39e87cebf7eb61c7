"""Attention: expanded out of its module, decomposed where its products are to be quantized (R40)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import check_golden
from placing import Lambda, Lambda2, decided, node, notes, of_kind, prepared, reads, same_numbers
from torch import Tensor, nn
from toys import image, seeded

import fxq
from fxq.backends.onnxrt import Session
from fxq.ops import kind_name
from fxq.printer import format_graph
from fxq.recipe import Recipe, Rule
from fxq.verify import is_quantizer

X = (2, 10, 64)
FORBIDDEN = torch.triu(torch.ones(10, 10, dtype=torch.bool), 1)
PADDED = torch.tensor([[False] * 10, [False] * 7 + [True] * 3])


def attention(function: Callable[..., Any], heads: int = 4, **options: Any) -> nn.Module:
    """A function of ``m``, an attention module for [2, 10, 64], and of x."""
    tensors = {k: options.pop(k) for k in ("mask", "padding") if k in options}
    return seeded(lambda: Lambda(function, m=nn.MultiheadAttention(64, heads, **options), **tensors))


def itself(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.m(x, x, x, need_weights=False)[0]
    return result


def test_self_attention_is_three_projections_two_products_and_another_projection() -> None:
    model = attention(itself, batch_first=True)
    gm = prepared(model, image(*X))
    check_golden("passes/attention", format_graph(gm))
    assert [kind_name(n) for n in gm.graph.nodes if kind_name(n) in ("linear", "matmul", "softmax")] == [
        "linear", "linear", "linear", "matmul", "softmax", "matmul", "linear",
    ]  # fmt: skip
    totals = fxq.report(gm).totals
    assert totals.weighted == totals.weighted_quantized == 6
    assert {row.module_path for row in fxq.report(gm).weighted} == {
        "m",
        "m.q_proj",
        "m.k_proj",
        "m.v_proj",
        "m.out_proj",
    }
    same_numbers(gm, model, image(*X))


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sequence first": (itself, {}),
    "no biases": (itself, {"bias": False, "batch_first": True}),
    "weights": (lambda m, x: m.m(x, x, x), {"batch_first": True}),
    "weights of each head": (lambda m, x: m.m(x, x, x, average_attn_weights=False), {}),
    "weights alone": (lambda m, x: m.m(x, x, x)[1], {}),
    "dropout": (itself, {"dropout": 0.2}),
    "one sequence": (lambda m, x: m.m(x[0], x[0], x[0]), {"batch_first": True}),
    "forbidden": (
        lambda m, x: m.m(x, x, x, need_weights=False, attn_mask=m.mask)[0],
        {"mask": FORBIDDEN, "batch_first": True},
    ),
    "mask of numbers": (lambda m, x: m.m(x, x, x, attn_mask=m.mask)[0], {"mask": image(10, 10), "batch_first": True}),
    "mask for each head": (
        lambda m, x: m.m(x, x, x, need_weights=False, attn_mask=m.mask)[0],
        {"mask": image(8, 10, 10), "batch_first": True},
    ),
    "padding": (
        lambda m, x: m.m(x, x, x, key_padding_mask=m.padding)[0],
        {"padding": PADDED, "batch_first": True},
    ),
    "padding and mask": (
        lambda m, x: m.m(x, x, x, need_weights=False, attn_mask=m.mask, key_padding_mask=m.padding)[0],
        {"mask": FORBIDDEN, "padding": PADDED, "batch_first": True},
    ),
    "twice": (lambda m, x: m.m(m.m(x, x, x)[0], x, x)[0], {"batch_first": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_form_computes_what_the_module_does(case: str) -> None:
    function, options = CASES[case]
    model = attention(function, **options)
    gm = prepared(model, image(*X))
    assert not gm.graph.find_nodes(op="call_module", target="m")
    assert all(is_quantizer(n.args[k]) for n in of_kind(gm, "linear") for k in (0, 1))
    assert all(is_quantizer(n.args[k]) for n in of_kind(gm, "matmul") for k in (0, 1))
    assert of_kind(gm, "matmul")
    with torch.no_grad():
        for ours, theirs in zip(_tuple(gm(image(*X))), _tuple(model(image(*X))), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("options", [{}, {"kdim": 32, "vdim": 32, "bias": False}], ids=["one width", "two widths"])
def test_cross_attention_has_three_projections(options: dict[str, Any]) -> None:
    def build():
        return Lambda2(lambda m, x, y: m.m(x, y, y)[0], m=nn.MultiheadAttention(64, 4, batch_first=True, **options))

    model = seeded(build)
    inputs = image(*X), image(2, 7, 32 if options else 64)
    gm = prepared(model, *inputs)
    assert [n.name for n in of_kind(gm, "linear")] == ["m_q_proj", "m_k_proj", "m_v_proj", "m_out_proj"]
    same_numbers(gm, model, *inputs)


def test_the_functional_form_is_the_same_call() -> None:
    def pool(m: Any, x: Tensor) -> Tensor:
        a = m.m
        out, _ = F.multi_head_attention_forward(
            x[:1], x, x, 64, 4, a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0,  # noqa: FBT003
            a.out_proj.weight, a.out_proj.bias, training=False, need_weights=False,
        )  # fmt: skip
        return out

    model = attention(pool)
    gm = prepared(model, image(*X))
    assert len(of_kind(gm, "linear")) == 4
    assert fxq.report(gm).totals.weighted_quantized == 6
    same_numbers(gm, model, image(*X))


def why_whole(gm: Any) -> list[tuple[str, str]]:
    return [(n.rule, n.text) for n in notes(gm, "opaque")]


def test_what_is_declined_stays_whole_and_says_why() -> None:
    model = attention(itself, add_bias_kv=True)
    ((_, text), *_) = [w for w in why_whole(prepared(model, image(*X))) if w[0] == "expand-attention"]
    assert text == "it has bias_k, so this attention stays whole and is not quantized"
    model = attention(itself)
    model.m.register_forward_hook(lambda *_: None)  # type: ignore[union-attr,operator]
    ((_, text), *_) = [w for w in why_whole(prepared(model, image(*X))) if w[0] == "expand-attention"]
    assert text.startswith("it has hooks")


def heads(size: int, length: int) -> tuple[nn.Module, Tensor]:
    """Attention over `length` positions in heads of `size`, and its input."""
    return Lambda(lambda m, x: m.out(F.scaled_dot_product_attention(x, x, x)), out=nn.Linear(size, 16)), image(
        1, 2, length, size
    )


@pytest.mark.parametrize(("size", "length"), [(64, 197), (32, 512), (16, 20)])
def test_attention_that_tensorrt_fuses_is_quantized(size: int, length: int) -> None:
    model, x = heads(size, length)
    gm = prepared(model, x)
    first, second = of_kind(gm, "matmul")
    assert decided(gm, first.name)[0].startswith("int8 per-tensor mse R20")
    assert reads(gm, second.name)[0].endswith("softmax_quantizer")
    same_numbers(gm, model, x)


@pytest.mark.parametrize(("size", "length"), [(64, 513), (48, 100), (128, 100)])
def test_attention_that_tensorrt_would_split_stays_one_float_call(size: int, length: int) -> None:
    model, x = heads(size, length)
    gm = prepared(model, x)
    (whole,) = of_kind(gm, "scaled_dot_product_attention")
    assert not any(is_quantizer(a) for a in whole.args if isinstance(a, torch.fx.Node))
    ((rule, text),) = why_whole(gm)
    assert rule == "R40"
    assert text.endswith(f"heads of {size} and sequences of {length} and {length}")
    assert (fxq.report(gm).totals.weighted, fxq.report(gm).totals.weighted_quantized) == (3, 1)


def test_products_written_by_hand_follow_the_same_rule() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        scores = torch.softmax(x @ x.transpose(-2, -1) / 7 + m.mask, -1)
        return m.out(F.dropout(scores, 0.1, training=False) @ x)

    for length, low in ((49, 3), (600, 1)):
        model = Lambda(forward, out=nn.Linear(32, 8), mask=image(length, length))
        gm = prepared(model, image(1, 2, length, 32))
        assert fxq.report(gm).totals.weighted_quantized == low
        if low == 1:
            rules = {a.split()[-1] for n in of_kind(gm, "matmul") for a in decided(gm, n.name).values()}
            assert rules == {"R40"}


def test_a_recipe_keeps_attention_whole() -> None:
    model, x = heads(64, 20)
    recipe = Recipe([Rule("op:scaled_dot_product_attention", None, reason="measured")])
    assert of_kind(prepared(model, x, recipe=recipe), "scaled_dot_product_attention")


def test_masks_and_scales_of_the_functional_call() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x, attn_mask=m.mask, scale=0.3)
        return m.out(F.scaled_dot_product_attention(y, x, x, m.bias))

    model = Lambda(forward, out=nn.Linear(32, 8), mask=~FORBIDDEN, bias=image(10, 10))
    gm = prepared(model, image(1, 2, 10, 32))
    assert len(of_kind(gm, "matmul")) == 4
    same_numbers(gm, model, image(1, 2, 10, 32))
    grouped = Lambda(
        lambda m, x: m.out(F.scaled_dot_product_attention(x, x[:, :1], x[:, :1], enable_gqa=True)), out=nn.Linear(32, 8)
    )
    assert why_whole(prepared(grouped, image(1, 2, 10, 32))) == [
        ("R20", "this attention stays one call in floating point: it is called with enable_gqa")
    ]


def test_causal_attention_of_any_length(tmp_path: Path) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return m.out(F.scaled_dot_product_attention(y, x[:, :, :-1], x[:, :, :-1], is_causal=True))

    model = Lambda(forward, out=nn.Linear(32, 8)).eval()
    x, longer = image(1, 2, 10, 32), image(2, 2, 13, 32, seed=1)
    gm = prepared(model, x)
    assert (fxq.report(gm).totals.weighted, fxq.report(gm).totals.weighted_quantized) == (5, 5)
    same_numbers(gm, model, x)
    same_numbers(gm, model, longer)
    quantized = fxq.quantize(model, [x], progress=False)
    path = fxq.export(quantized, tmp_path / "causal.onnx", dynamic_shapes={"x": {0: (1, 8), 2: (4, 64)}})
    with torch.inference_mode():
        torch.testing.assert_close(Session(path).run(longer)[0], quantized(longer), rtol=1e-3, atol=1e-3)


def test_training_keeps_attention_dropout() -> None:
    model = attention(itself, dropout=0.5, batch_first=True)
    gm = fxq.prepare_qat(model, image(*X), scales="moving-average")
    names = [
        n.name for n in gm.graph.nodes if n.op == "call_module" and isinstance(gm.get_submodule(n.target), nn.Dropout)
    ]
    assert len(names) == 1
    assert node(gm, names[0]).args[0] is not None


EQUATIONS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "scores": ("bhid,bhjd->bhij", (2, 3, 5, 4), (2, 3, 6, 4)),
    "weighted sum": ("bhij,bhjd->bhid", (2, 3, 5, 6), (2, 3, 6, 4)),
    "capitals and spaces": ("B G H I D, B G H J D -> B G H I J", (1, 2, 3, 5, 4), (1, 2, 3, 6, 4)),
    "another order": ("bqhd,bkhd->bhqk", (2, 5, 3, 4), (2, 6, 3, 4)),
    "result turned": ("bid,bjd->bji", (2, 5, 4), (2, 6, 4)),
    "no batch": ("xij,jk->xik", (2, 5, 4), (4, 6)),
    "implicit": ("ij,jk", (5, 4), (4, 6)),
    "rows around the batch": ("bythwc,hkc->bythwk", (2, 2, 3, 4, 5, 6), (4, 7, 6)),
    "rows before the batch": ("bythwc,wkc->bythwk", (2, 2, 3, 4, 5, 6), (5, 7, 6)),
}


@pytest.mark.parametrize("case", EQUATIONS)
def test_einsum_of_two_operands_is_one_product(case: str) -> None:
    equation, first, second = EQUATIONS[case]
    inputs = image(*first), image(*second, seed=1)
    for model in (
        Lambda2(lambda _, x, y: torch.einsum(equation, x, y)),
        Lambda2(lambda _, x, y: torch.einsum(equation, [x, y])),
    ):
        gm = prepared(model, *inputs)
        (product,) = of_kind(gm, "matmul")
        assert all(is_quantizer(a) for a in product.args)
        same_numbers(gm, model, *inputs)


def test_einsum_with_a_stored_weight_is_a_linear_layer() -> None:
    model = Lambda(lambda m, x: torch.einsum("bij,kj->bik", x, m.weight), weight=nn.Parameter(image(6, 4)))
    gm = prepared(model, image(2, 5, 4))
    (layer,) = of_kind(gm, "linear")
    assert decided(gm, layer.name) == {0: "int8 per-tensor mse R20", 1: "int8 per-channel(0) max R20"}
    same_numbers(gm, model, image(2, 5, 4))


@pytest.mark.parametrize("equation", ["ij,ij->ij", "ij,ij->", "...ij,...jk->...ik", "iij,jk->ik", "ij,kl->ijkl"])
def test_other_equations_stay_as_they_are(equation: str) -> None:
    side = 4 if "..." not in equation else 3
    left = image(*[side] * (3 if "iij" in equation else 2))
    gm = prepared(Lambda2(lambda m, x, y: m.fc(torch.einsum(equation, x, y).reshape(1, -1)[:, :1]), fc=nn.Linear(1, 1)),
                  left, image(side, side, seed=1))  # fmt: skip
    assert [n.name for n in gm.graph.nodes if n.target is torch.einsum] == ["einsum"]


def test_products_with_a_sum() -> None:
    model = Lambda2(lambda _, x, y: torch.addmm(y[0, 0], x[0], y[0].t()) + torch.baddbmm(y[:1], x[:1], y[:1])[0])
    inputs = image(2, 6, 6), image(2, 6, 6, seed=1)
    gm = prepared(model, *inputs)
    assert len(of_kind(gm, "matmul")) == 2
    same_numbers(gm, model, *inputs)
    scaled = Lambda2(lambda _, x, y: torch.addmm(y[0], x[0], y[0], alpha=2) @ x[1])
    (note,) = notes(prepared(scaled, *inputs), "opaque")
    assert note.text == "addmm stays float: write it as torch.matmul or F.linear to quantize it"


def test_a_target_without_products_gets_what_can_be_exported() -> None:
    """PyTorch's ONNX exporter takes attention of four dimensions alone; the other is written out, and stays float."""
    x = image(2, 8, 16)
    model = Lambda(lambda _, x: F.scaled_dot_product_attention(x, x, x), unused=nn.Identity())
    gm = fxq.trace(model, x, target="onnxruntime")
    found = {kind_name(n) for n in fxq.PassManager().run(fxq.passes.PREPARE, gm).graph.nodes}
    assert {"matmul", "softmax"} <= found
    four = Lambda(lambda _, x: F.scaled_dot_product_attention(x, x, x), unused=nn.Identity())
    gm = fxq.PassManager().run(fxq.passes.PREPARE, fxq.trace(four, x[None], target="onnxruntime"))
    assert of_kind(gm, "scaled_dot_product_attention")
    assert notes(gm) == []
