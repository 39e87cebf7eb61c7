"""Networks of many families from torchvision, at small image sizes: placed, quantized, and some exported and built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import images, sqnr_db
from torch import nn
from torchvision_models import torchvision_model, torchvision_video_room

import fxq
from fxq.backends.onnxrt import Session

VIT: dict[str, Any] = {"image_size": 64}
ZOO: dict[str, tuple[int, int, dict[str, Any]]] = {
    "alexnet": (8, 0, {}),
    "convnext_tiny": (59, 18, {}),
    "densenet121": (121, 0, {}),
    "efficientnet_b0": (82, 9, {}),
    "googlenet": (58, 0, {"aux_logits": False, "init_weights": False}),
    "mnasnet0_5": (53, 10, {}),
    "mobilenet_v3_small": (54, 6, {}),
    "regnet_y_400mf": (86, 16, {}),
    "resnext50_32x4d": (54, 16, {}),
    "shufflenet_v2_x0_5": (57, 0, {}),
    "squeezenet1_1": (26, 0, {}),
    "swin_t": (101, 0, {}),
    "vgg11_bn": (11, 0, {}),
    "vit_b_32": (98, 0, VIT),
}
"""Weighted operations and skips that placement quantizes: all that there are, but for the skips of transformers."""


def network(name: str) -> nn.Module:
    """The network with sixteen classes; layers that torchvision begins with zeros are drawn."""
    model = torchvision_model(name, num_classes=16, **ZOO[name][2])
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not bool(layer.weight.any()):
            layer.weight.data.normal_(0, 0.05, generator=generator)
    return model


def small_mvit() -> nn.Module:
    """Two blocks of the second MViT, whose marked functions add positions and shortcuts to slices in place."""
    video = torchvision_video_room()
    shared = {"kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3]}
    blocks = [
        video.MSBlockConfig(1, 32, 32, **shared, stride_q=[1, 1, 1], stride_kv=[1, 2, 2]),
        video.MSBlockConfig(2, 32, 64, **shared, stride_q=[1, 2, 2], stride_kv=[1, 1, 1]),
    ]
    options = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = video.MViT((32, 32), 4, blocks, num_classes=16, stochastic_depth_prob=0.0, **options)
    return model.eval()


@pytest.mark.parametrize("name", ZOO)
def test_everything_weighted_is_quantized(name: str) -> None:
    model, weighted, skips = network(name), *ZOO[name][:2]
    prepared = fxq.prepare(model, images(2, 64))
    totals = fxq.report(prepared).totals
    assert (totals.weighted, totals.weighted_quantized) == (weighted, weighted)
    assert totals.skips_quantized == skips
    assert totals.residuals == skips or name in ("swin_t", "vit_b_32")
    with torch.inference_mode():
        torch.testing.assert_close(prepared(images(2, 64)), model(images(2, 64)), rtol=1e-3, atol=1e-3)


def test_video_attention_that_writes_in_place() -> None:
    model = small_mvit()
    clips = images(4, 36)[:, :, None, :32, :32].repeat(1, 1, 4, 1, 1).view(4, 3, 4, 32, 32)
    prepared = fxq.prepare(model, clips)
    rows = fxq.report(prepared).weighted
    assert all(row.precision == "int8" for row in rows)
    assert len([row for row in rows if row.kind == "matmul"]) == 2 * 5  # three for positions, two for attention
    with torch.inference_mode():
        torch.testing.assert_close(prepared(clips), model(clips), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5"])
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    model, x = network(name), images(4, 64, seed=2)
    quantized = fxq.quantize(model, images(8, 64, seed=1).split(4), progress=False)
    path = fxq.export(quantized, tmp_path / "m.onnx", dynamic_shapes=None)
    assert not fxq.lint(path)
    with torch.inference_mode():
        simulated = quantized(x)
    assert sqnr_db(simulated, Session(path).run(x)[0]) > 25
    engine = fxq.build(path, tmp_path / "m.engine")
    assert len(engine.int8_kernels) == len(engine.weighted_kernels) == ZOO[name][0]
