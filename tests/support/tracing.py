"""Comparing a traced graph with its model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


def same(gm: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Equal results, to the bit, in one structure."""
    with torch.no_grad():
        expected, spec = pytree.tree_flatten(model(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
        found, other = pytree.tree_flatten(gm(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
    assert spec == other
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
