"""Programs that write in place as models, and their functionalized graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from placing import check_pass
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from toys import after, traced

from fxq.graph import tensor_info
from fxq.ops import inplace_target
from fxq.passes import Canonicalize, DropIdentities, ExpandModules, Functionalize

X = (2, 3, 4)
NORMALIZE = (Functionalize(), ExpandModules(), Canonicalize(), DropIdentities())


class Program(nn.Module):
    """A function of its inputs, and maybe of modules of its own, as a model."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)
        self.given = (self,) if parts else ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        parts = {name: copy.deepcopy(part, memo) for name, part in self.named_children()}
        return type(self)(self.function, **parts)

    def forward(self, x: Tensor) -> Any:
        return self.function(*((self,) if self._modules else ()), x)


class Program2(Program):
    """As :class:`Program`, with two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.function(*((self,) if self._modules else ()), x, y)


class _Recorder(fx.Interpreter):
    """Runs a graph and checks that each node gives what its TensorInfo says."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        info = tensor_info(n)
        if isinstance(result, Tensor):
            assert info is not None, n.format_node()
            assert (info.shape, info.dtype) == (tuple(result.shape), result.dtype), n.format_node()
        return result


def same(gm: fx.GraphModule, model: nn.Module, *inputs: Tensor) -> None:
    """The graph gives what the model gives, to the bit, and leaves its inputs alone."""
    with torch.no_grad():
        expected = model(*[x.clone() for x in inputs])
        mine = [x.clone() for x in inputs]
        found = gm(*mine)
        _Recorder(gm).run(*[x.clone() for x in inputs], enable_io_processing=False)
    leaves, spec = pytree.tree_flatten(expected)
    others, other_spec = pytree.tree_flatten(found)
    assert spec == other_spec
    for a, b in zip(others, leaves, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for a, b in zip(mine, inputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def functional(model: nn.Module, *inputs: Tensor, golden: str | None = None) -> fx.GraphModule:
    """The functionalized graph: equal to the model, without a trace of in-place work; normalized, it stays
    equal.
    """
    model.eval()
    gm = traced(model, *[x.clone() for x in inputs])
    if any(getattr(module, "inplace", False) for module in gm.modules()):  # the text does not tell
        result = Functionalize()(gm)
        assert result.modified
        assert not check_pass(Functionalize(), result.graph_module, golden).modified
    else:
        result = check_pass(Functionalize(), gm, golden)
    assert [n.name for n in result.graph_module.graph.nodes if inplace_target(n) is not None] == []
    same(result.graph_module, model, *inputs)
    same(after(NORMALIZE, model, *inputs), model, *inputs)
    return result.graph_module
