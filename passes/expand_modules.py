"""Expand modules: a call of a torch.nn module becomes the functional call that it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..editor import Editor
from ..graph import TENSOR, TensorInfo, attribute, origin, tensor_info
from ..ops import IDENTITY_MODULES, KINDS, MODULES, ModuleSpelling, Spelling, bind, split_args
from ..passbase import Pass

__all__ = ["ExpandModules"]


@dataclass(frozen=True)
class ExpandModules(Pass):
    """Write torch.nn modules as functional calls on their parameters.

    Problem: a module hides its weight, and ``nn.Conv2d`` beside ``F.conv2d`` is two spellings of one
    operation.

    Rewrite: ``conv1(x)`` becomes ``conv2d(x, conv1.weight, conv1.bias, …)``; the weight is an edge like any
    other. The node keeps its name and the parameters their paths, so ``state_dict`` keys stay the user's. A
    module that is called twice becomes two nodes that can be fused and quantized apart. Weights that
    torch.nn.utils computes (parametrizations, ``weight_norm`` and ``spectral_norm`` in both their forms) are
    taken at their value.

    Declines, with a note: modules with hooks, whose effect the functional call would lose, and calls with
    more than the input (a transposed convolution's ``output_size``). Modules without a spelling stay as they
    are.
    """

    name: ClassVar[str] = "expand-modules"
    requires: ClassVar[tuple[str, ...]] = ("traced", "functional")

    def call(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            if node.op != "call_module":
                continue
            module = attribute(editor.gm, str(node.target))
            kind = _unparametrized(module)
            if origin(node).leaf or (kind not in MODULES and kind not in IDENTITY_MODULES):
                continue
            _settle_weights(module, kind)
            if _hooked(module):
                why = f"{kind.__name__} has hooks, so it stays whole and is not quantized"
                editor.note(node, self.name, why)
            elif kind in IDENTITY_MODULES:
                editor.replace(node, _input(node))
                editor.erase(node)
            else:
                self._expand(editor, node, module, MODULES[kind])

    def _expand(self, editor: Editor, node: fx.Node, module: nn.Module, spelled: ModuleSpelling) -> None:
        why = _unusual(node, module)
        if why:
            editor.note(node, self.name, why)
            return
        kind = KINDS[spelled.kind]
        with editor.before(node):
            source = _padded(editor, node, module)
            tensors = [self._tensor(editor, node, module, name) for name in spelled.tensors]
        given = dict(zip(spelled.tensors, tensors, strict=True)) | _attributes(node, module, spelled)
        bound = bind(Spelling(kind, tuple(kind.params)), (source,), given)
        if bound is None:
            editor.note(node, self.name, f"{type(module).__name__} has an argument that {kind.name} lacks")
            return
        args, kwargs = split_args(kind, bound)
        editor.retarget(node, kind.target, args, kwargs)

    @staticmethod
    def _tensor(editor: Editor, node: fx.Node, module: nn.Module, name: str) -> fx.Node | None:
        if getattr(module, name, None) is None:
            return None
        path = f"{node.target}.{name}"
        found = next(iter(editor.stored(path)), None)
        return found if found is not None and found < node else editor.get_attr(path, like=node)


def _attributes(node: fx.Node, module: nn.Module, spelled: ModuleSpelling) -> dict[str, Any]:
    """The call's numbers and flags, as the module holds them in eval mode."""
    found = {p: getattr(module, a) for p, a in (spelled.attributes or {}).items()}
    if _pads_itself(module):
        found["padding"] = 0
    if "training" in KINDS[spelled.kind].params:
        found["training"] = spelled.kind == "batch_norm" and module.running_mean is None
    if found.get("momentum", 0.0) is None:
        found["momentum"] = 0.0  # a cumulative average, which nothing updates in eval mode
    if spelled.kind in ("softmax", "log_softmax") and found["dim"] is None:
        found["dim"] = _implicit_dim(node)
    return found


def _unparametrized(module: nn.Module) -> type[nn.Module]:
    """The module's type, below the one that parametrization puts over it."""
    kind = type(module)
    return kind.__mro__[1] if parametrize.is_parametrized(module) else kind


def _settle_weights(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give the module the weights that are computed before each call, as plain parameters."""
    hooks: dict[int, Any] = module._forward_pre_hooks
    for hook in list(hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
    if not parametrize.is_parametrized(module):
        return
    # Not remove_parametrizations: it changes the class, which copies share with the user's module.
    names = list(module.get_submodule("parametrizations").keys())  # type: ignore[operator]
    with torch.no_grad():
        values = {name: getattr(module, name).detach().clone() for name in names}
    del module.parametrizations
    module.__class__ = kind
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _input(node: fx.Node) -> fx.Node:
    """What a module with one input is called with, by position or by name."""
    found = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(found, fx.Node)
    return found


def _pads_itself(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.padding_mode != "zeros"


def _padded(editor: Editor, node: fx.Node, module: nn.Module) -> fx.Node:
    """The module's input, padded first where a convolution pads with anything but zeros."""
    source = _input(node)
    if not _pads_itself(module):
        return source
    pad = tuple(module._reversed_padding_repeated_twice)  # type: ignore[arg-type]
    kind = KINDS["pad"]
    bound = {"input": source, "pad": pad, "mode": module.padding_mode, "value": None}
    args, kwargs = split_args(kind, bound)
    made = editor.call(kind.target, args, kwargs, like=node, name=f"{node.name}_pad")
    info = tensor_info(source)
    if info is not None:
        blank = torch.empty(info.shape, dtype=info.dtype, device="meta")
        shape = F.pad(blank, pad, str(module.padding_mode)).shape
        made.meta[TENSOR] = TensorInfo(tuple(shape), info.dtype)
    return made


def _unusual(node: fx.Node, module: nn.Module) -> str | None:
    """Why a module cannot be one functional call."""
    if len(node.args) + len(node.kwargs) != 1:
        return f"{type(module).__name__} is called with more than its input, so it stays whole"
    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    if is_norm and (module.running_mean is None) != (module.running_var is None):
        return "BatchNorm has one running statistic and lacks the other"
    return None


def _implicit_dim(node: fx.Node) -> int:
    """The dimension that nn.Softmax without dim takes (as torch.nn.functional._get_softmax_dim does)."""
    info = tensor_info(node)
    return 0 if info is not None and len(info.shape) in (0, 1, 3) else 1
