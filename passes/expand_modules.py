"""Expand modules: a call of a torch.nn module becomes the functional call that it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn
from torch.nn.utils import parametrize

from ..editor import Editor
from ..graph import attribute
from ..ops import IDENTITY_MODULES, KINDS, MODULES, ModuleSpelling, Spelling, bind, split_args
from ..passbase import Pass

__all__ = ["ExpandModules"]


@dataclass(frozen=True)
class ExpandModules(Pass):
    """Write torch.nn modules as functional calls on their parameters.

    Problem: a module hides its weight, and ``nn.Conv2d`` beside ``F.conv2d`` is two spellings of one operation.

    Rewrite: ``conv1(x)`` becomes ``conv2d(x, conv1.weight, conv1.bias, …)``; the weight is an edge like any other. The
    node keeps its name and the parameters their paths, so ``state_dict`` keys stay the user's. A module that is called
    twice becomes two nodes that can be fused and quantized apart. Parametrized weights are taken at their value.

    Declines: modules that fxq has no spelling for, and modules with hooks, whose effect the functional call would lose.
    """

    name: ClassVar[str] = "expand-modules"
    requires: ClassVar[tuple[str, ...]] = ("traced", "functional")

    def call(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            if node.op != "call_module":
                continue
            module = attribute(editor.gm, str(node.target))
            kind = _unparametrized(module)
            if kind in IDENTITY_MODULES and not _hooked(module):
                editor.replace(node, node.args[0])  # type: ignore[arg-type]
                editor.erase(node)
            elif kind in MODULES and _hooked(module):
                editor.note(
                    node, self.name, f"{kind.__name__} has hooks, so it stays whole and is not quantized"
                )
            elif kind in MODULES:
                self._expand(editor, node, module, MODULES[kind])

    def _expand(self, editor: Editor, node: fx.Node, module: nn.Module, spelled: ModuleSpelling) -> None:
        why = _unusual(module)
        if why:
            editor.note(node, self.name, why)
            return
        path = str(node.target)
        with editor.before(node):
            source = _padded(editor, node, module)
            tensors = [self._tensor(editor, node, module, path, name) for name in spelled.tensors]
        given = dict(zip(list(KINDS[spelled.kind].params)[1 : 1 + len(tensors)], tensors, strict=True))
        if spelled.kind in ("layer_norm", "group_norm"):
            given = dict(zip(("weight", "bias"), tensors, strict=True))
        attributes = {p: getattr(module, a) for p, a in (spelled.attributes or {}).items()}
        if _pads_itself(module):
            attributes["padding"] = 0
        if spelled.kind.endswith(("dropout", "dropout1d", "dropout2d", "dropout3d")):
            attributes["training"] = False
        if spelled.kind == "batch_norm":
            attributes["training"] = module.running_mean is None
            attributes["momentum"] = module.momentum if module.momentum is not None else 0.0
        if spelled.kind in ("softmax", "log_softmax") and attributes["dim"] is None:
            attributes["dim"] = _implicit_dim(node)
        kind = KINDS[spelled.kind]
        bound = bind(Spelling(kind, tuple(kind.params)), (source,), {**given, **attributes})
        if bound is None:
            editor.note(node, self.name, f"{type(module).__name__} has an argument that {kind.name} lacks")
            return
        args, kwargs = split_args(kind, bound)
        editor.retarget(node, kind.target, args, kwargs)

    @staticmethod
    def _tensor(editor: Editor, node: fx.Node, module: nn.Module, path: str, name: str) -> fx.Node | None:
        if getattr(module, name, None) is None:
            return None
        if parametrize.is_parametrized(module, name):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        found = next(iter(editor.stored(f"{path}.{name}")), None)
        if found is not None and found < node:
            return found
        return editor.get_attr(f"{path}.{name}", like=node)


def _unparametrized(module: nn.Module) -> type[nn.Module]:
    """The module's type, below the one that parametrization puts over it."""
    kind = type(module)
    return kind.__mro__[1] if parametrize.is_parametrized(module) else kind


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _pads_itself(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.padding_mode != "zeros"


def _padded(editor: Editor, node: fx.Node, module: nn.Module) -> Any:
    """The module's input, padded first where a convolution pads with anything but zeros."""
    source = node.args[0] if node.args else node.kwargs["input"]
    if not _pads_itself(module):
        return source
    pad = tuple(module._reversed_padding_repeated_twice)  # type: ignore[arg-type]
    kind = KINDS["pad"]
    bound = {"input": source, "pad": pad, "mode": module.padding_mode, "value": None}
    args, kwargs = split_args(kind, bound)
    made = editor.call(kind.target, args, kwargs, like=node, name=f"{node.name}_pad")
    made.meta.pop("tensor", None)
    return made


def _unusual(module: nn.Module) -> str | None:
    """Why a module cannot be one functional call."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.running_mean is None) != (
        module.running_var is None
    ):
        return "BatchNorm has one running statistic and lacks the other"
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and module.padding_mode != "zeros":
        return "a transposed convolution pads with something else than zeros"
    return None


def _implicit_dim(node: fx.Node) -> int:
    """The dimension that nn.Softmax without dim takes (as torch.nn.functional._get_softmax_dim does)."""
    info = node.meta.get("tensor")
    return 0 if info is not None and len(info.shape) in (0, 1, 3) else 1
