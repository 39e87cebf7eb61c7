"""torchvision's models and transforms on whatever torch is installed.

The tests install torchvision without its dependencies. Where its compiled operators were built for another
torch (a CUDA build beside a CPU torch, say) they do not load, and importing torchvision fails because it
registers fake kernels for them. Neither needs these operators, so declaring them is enough.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


@cache
def _declare_operators() -> torch.library.Library | None:
    """Declare the operators whose absence stops the import. The library must stay alive, hence the cache."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("torchvision is not installed; `make env` installs the version that the tests run on")
    compiled = Path(spec.submodule_search_locations[0]) / "_C.so"
    try:
        torch.ops.load_library(compiled)
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def torchvision_model(name: str, *, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A torchvision classification model in eval mode with random weights.

    Args:
        name: As in ``torchvision.models``, for example ``"resnet18"``.
        seed: Seeds torch's generator before the weights are drawn; the caller's generator state is restored.
        **kwargs: Passed on, for example ``num_classes``.
    """
    _declare_operators()
    import torchvision.models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = torchvision.models.get_model(name, weights=None, **kwargs)
    return model.eval()


def torchvision_transforms() -> Any:
    """The module ``torchvision.transforms``."""
    _declare_operators()
    import torchvision.transforms

    return torchvision.transforms


def torchvision_video_room() -> Any:
    """The module ``torchvision.models.video.mvit``."""
    _declare_operators()
    import torchvision.models.video.mvit

    return torchvision.models.video.mvit
