"""Expand attention: multi-head attention becomes its projections around one attention call."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..editor import Editor
from ..graph import ORIGIN, TENSOR, TensorInfo, attribute, constant, origin, tensor_info
from ..ops import KINDS, split_args
from ..passbase import Numeric, Pass

__all__ = ["Builder", "ExpandAttention", "attend"]

_FORWARD: Final = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
    *("add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask"),
    *("need_weights", "attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("static_k", "static_v", "average_attn_weights", "is_causal"),
)
_MODULE: Final = (
    *("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"),
)
_DEFAULTS: Final = {"key_padding_mask": None, "need_weights": True, "attn_mask": None, "average_attn_weights": True}


class Builder:
    """Adds canonical calls in front of one node; their shapes and types are computed on tensors without data.

    Args:
        editor: Changes the graph.
        node: The node that the calls belong to: they carry its origin, and their names begin with its name.
    """

    def __init__(self, editor: Editor, node: fx.Node) -> None:
        self.editor, self.node = editor, node

    def __call__(self, kind: str, *tensors: Any, name: str, module: str = "", **rest: Any) -> fx.Node:
        """A call of an op kind.

        Args:
            kind: The kind's name.
            tensors: Its tensors.
            name: What its name ends with.
            module: The child module that it stands for, if it does.
            rest: Its other arguments; those left out have their defaults.
        """
        known = KINDS[kind]
        args, kwargs = split_args(known, {**known.params, **dict(zip(known.params, tensors, strict=False)), **rest})
        return self.call(known.target, *args, name=name, module=module, **kwargs)

    def call(self, target: Any, *args: Any, name: str, module: str = "", **kwargs: Any) -> fx.Node:
        """A call of any function of tensors."""
        made = self.editor.call(target, args, kwargs, like=self.node, name=f"{self.node.name}_{name}")
        blank_args, blank_kwargs = fx.map_arg((args, kwargs), _blank)
        with torch.no_grad():
            result = target(*blank_args, **blank_kwargs)
        if isinstance(result, torch.Tensor):
            made.meta[TENSOR] = TensorInfo(tuple(result.shape), result.dtype)
        else:
            made.meta[TENSOR] = tuple(TensorInfo(tuple(part.shape), part.dtype) for part in result)
        if module:
            where = origin(self.node)
            made.meta[ORIGIN] = replace(where, module_path=f"{where.module_path}.{module}".lstrip("."), call=False)
        return made


def _blank(node: fx.Node) -> Any:
    info = node.meta[TENSOR]
    parts = info if isinstance(info, tuple) else (info,)
    made = tuple(torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts)
    return made if isinstance(info, tuple) else made[0]


def attend(
    build: Builder,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    mask: fx.Node | None,
    *,
    dropout: float,
    scale: float | None = None,
) -> tuple[fx.Node, fx.Node]:
    """Attention as two products and a softmax, in the form that TensorRT fuses (R40).

    The scale is applied behind the first product, so that queries and keys reach it as they are quantized; the
    mask is added in floating point.

    Args:
        build: Adds the calls.
        query: (..., L, D).
        key: (..., S, D).
        value: (..., S, E).
        mask: What is added to the scores, broadcast to (..., L, S).
        dropout: Probability in training.
        scale: What the scores are multiplied by; None is 1 / sqrt(D).

    Returns:
        The result (..., L, E) and the probabilities (..., L, S).
    """
    info = tensor_info(query)
    assert info is not None
    factor = info.shape[-1] ** -0.5 if scale is None else scale
    transposed = build("transpose", key, dim0=-2, dim1=-1, name="key_transposed")
    scores = build("mul", build("matmul", query, transposed, name="scores"), factor, name="scaled")
    if mask is not None:
        scores = build("add", scores, mask, name="masked")
    weights = build("softmax", scores, dim=-1, name="softmax")
    dropped = build("dropout", weights, p=dropout, training=False, name="dropout") if dropout else weights
    return build("matmul", dropped, value, name="attention"), weights


@dataclass(frozen=True)
class ExpandAttention(Pass):
    """Write multi-head attention as linear layers around scaled_dot_product_attention.

    Problem: ``nn.MultiheadAttention`` hides four matrix products with weights, and two without, in one call.

    Rewrite: a linear layer each makes queries, keys and values, on a third of the weight where it is packed; the heads
    are split off, attended, joined, and projected. (One packed layer whose result is taken apart runs in floating
    point on TensorRT; three that read one tensor run as one INT8 kernel.) What attention itself
    becomes is the matter of :class:`~fxq.passes.decompose_attention.DecomposeAttention`, except where the model
    reads the attention weights: then it is written out here. ``F.multi_head_attention_forward`` is the same call.

    Declines, with a note: modules with hooks or whose class has a forward of its own; ``bias_k`` and ``bias_v``,
    ``add_zero_attn``, a static key or value.
    """

    name: ClassVar[str] = "expand-attention"
    requires: ClassVar[tuple[str, ...]] = ("traced", "functional")
    numeric: ClassVar[Numeric] = "rounding"

    def call(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            if node.op == "call_module" and not origin(node).leaf:
                module = attribute(editor.gm, str(node.target))
                if isinstance(module, nn.MultiheadAttention):
                    self._expand(editor, node, _of_module(node, module))
            elif node.target is F.multi_head_attention_forward:
                self._expand(editor, node, _of_call(node))

    def _expand(self, editor: Editor, node: fx.Node, given: Mapping[str, Any]) -> None:
        why = _unusual(editor, given)
        if why is not None:
            editor.note(node, self.name, f"{why}, so this attention stays whole and is not quantized", kind="opaque")
            return
        with editor.before(node):
            result, weights = _attention(Builder(editor, node), editor, given, wanted=_wanted(node))
        for user in list(node.users):
            if not _takes_part(user):
                editor.map_args(user, lambda n: (result, weights) if n is node else n)
                continue
            found = result if user.args[1] == 0 else weights
            if found is not None:
                editor.replace(user, found)
            editor.erase(user)
        editor.erase(node)


def _of_module(node: fx.Node, module: nn.MultiheadAttention) -> dict[str, Any]:
    """The call's arguments, and the module's own by the names of F.multi_head_attention_forward; stored tensors as
    paths.
    """
    given = {**_DEFAULTS, **dict(zip(_MODULE, node.args, strict=False)), **node.kwargs}
    names = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v")
    stored = {name: f"{node.target}.{name}" for name in names if getattr(module, name) is not None}
    stored["out_proj_weight"] = f"{node.target}.out_proj.weight"
    if module.out_proj.bias is not None:
        stored["out_proj_bias"] = f"{node.target}.out_proj.bias"
    own = {"num_heads": module.num_heads, "dropout_p": module.dropout, "add_zero_attn": module.add_zero_attn}
    hooked = module._forward_hooks or module._forward_pre_hooks
    other = type(module).forward is not nn.MultiheadAttention.forward
    why = "it has hooks" if hooked else "its class has a forward of its own" if other else None
    return {**given, **own, **stored, "batch_first": module.batch_first, "why": why}


def _of_call(node: fx.Node) -> dict[str, Any]:
    given = {**_DEFAULTS, **dict(zip(_FORWARD, node.args, strict=False)), **node.kwargs}
    stored = {k: str(v.target) for k, v in given.items() if isinstance(v, fx.Node) and constant(v) is not None}
    fixed = [k for k in ("in_proj_weight", "q_proj_weight", "out_proj_weight") if isinstance(given.get(k), fx.Node)]
    computed = [k for k in fixed if k not in stored]
    why = f"its {computed[0]} is computed in the graph" if computed else None
    kept = {k: v for k, v in stored.items() if "weight" in k or "bias" in k}
    return {**given, **kept, "batch_first": False, "why": why}


def _unusual(editor: Editor, given: Mapping[str, Any]) -> str | None:
    """Why the call cannot be written out."""
    if given["why"]:
        return str(given["why"])
    for name in ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v"):
        if given.get(name) is not None and given.get(name) is not False:
            return f"it has {name}"
    infos = [tensor_info(given[name]) for name in ("query", "key", "value")]
    if any(info is None or len(info.shape) not in (2, 3) for info in infos):
        return "its inputs have no shape of two or three dimensions"
    bias = given.get("in_proj_bias")
    if bias is not None and not isinstance(attribute(editor.gm, bias), torch.Tensor):
        return "its bias is no tensor"
    return None


def _wanted(node: fx.Node) -> bool:
    """Whether somebody reads the attention weights."""
    return any(not _takes_part(user) or (user.args[1] == 1 and user.users) for user in node.users)


def _takes_part(user: fx.Node) -> bool:
    return user.target is operator.getitem and user.args[1] in (0, 1)


def _attention(
    build: Builder, editor: Editor, given: Mapping[str, Any], *, wanted: bool
) -> tuple[fx.Node, fx.Node | None]:
    """The calls that one multi-head attention is: its result and, if wanted, its weights."""
    first: fx.Node = given["query"]
    info = tensor_info(first)
    assert info is not None
    single, batch_first = len(info.shape) == 2, given["batch_first"]
    heads, dropout = given["num_heads"], float(given.get("dropout_p") or 0.0)
    width = attribute(editor.gm, given["out_proj_weight"]).shape[1]

    def batched(tensor: fx.Node, name: str) -> fx.Node:
        if single:
            return build("unsqueeze", tensor, dim=0, name=f"{name}_batch")
        return tensor if batch_first else build("transpose", tensor, dim0=0, dim1=1, name=f"{name}_batch_first")

    names = ("query", "key", "value")
    inputs = {node: batched(node, name) for name in names[::-1] for node in (given[name],)}
    parts = [
        build("transpose", build("unflatten", p, dim=-1, sizes=(heads, width // heads), name=f"{n}_split"),
              dim0=1, dim1=2, name=f"{n}_heads")
        for n, p in zip(names, _projected(build, editor, given, [inputs[given[n]] for n in names]), strict=True)
    ]  # fmt: skip
    mask = _mask(build, given, heads)
    weights = None
    if wanted or dropout:
        joined, probabilities = attend(build, parts[0], parts[1], parts[2], mask, dropout=dropout)
        if wanted:
            weights = (
                build("mean", probabilities, dim=1, name="mean") if given["average_attn_weights"] else probabilities
            )
            weights = build("squeeze", weights, dim=0, name="weights") if single else weights
    else:
        joined = build("scaled_dot_product_attention", *parts, mask, name="attention")
    joined = build("flatten", build("transpose", joined, dim0=1, dim1=2, name="together"), start_dim=2, name="joined")
    result = _linear(build, editor, joined, given["out_proj_weight"], given.get("out_proj_bias"), "out_proj")
    if single:
        result = build("squeeze", result, dim=0, name="single")
    elif not batch_first:
        result = build("transpose", result, dim0=0, dim1=1, name="sequence_first")
    return result, weights


def _projected(build: Builder, editor: Editor, given: Mapping[str, Any], inputs: list[fx.Node]) -> list[fx.Node]:
    """Queries, keys and values (N, L, E), of a linear layer each."""
    weight: str | None = given.get("in_proj_weight")
    bias: str | None = given.get("in_proj_bias")
    found = []
    for index, (name, source) in enumerate(zip("qkv", inputs, strict=True)):
        whole = f"{name}_proj_weight"
        own = given[whole] if weight is None else _slice(editor, weight, index, whole)
        own_bias = None if bias is None else _slice(editor, bias, index, f"{name}_proj_bias")
        found.append(_linear(build, editor, source, own, own_bias, f"{name}_proj"))
    return found


def _slice(editor: Editor, path: str, index: int, name: str) -> str:
    """The path of a third of a stored tensor, which becomes a parameter of its own beside it."""
    where = f"{path.rpartition('.')[0]}.{name}".lstrip(".")
    owner = attribute(editor.gm, path.rpartition(".")[0]) if "." in path else editor.gm
    if not isinstance(getattr(owner, name, None), torch.Tensor):
        whole = attribute(editor.gm, path)
        part = whole.detach().chunk(3, 0)[index].clone()
        editor.set_tensor(where, nn.Parameter(part, requires_grad=whole.requires_grad))
    return where


def _linear(build: Builder, editor: Editor, source: fx.Node, weight: str, bias: str | None, name: str) -> fx.Node:
    stored = [None if path is None else _stored(editor, build.node, path) for path in (weight, bias)]
    return build("linear", source, *stored, name=name, module=name)


def _stored(editor: Editor, node: fx.Node, path: str) -> fx.Node:
    found = next(iter(editor.stored(path)), None)
    return found if found is not None and found < node else editor.get_attr(path, like=node)


def _mask(build: Builder, given: Mapping[str, Any], heads: int) -> fx.Node | None:
    """What is added to the scores (N, heads, L, S); True in a mask of booleans forbids."""
    masks = []
    for name in ("attn_mask", "key_padding_mask"):
        mask = given.get(name)
        if mask is None:
            continue
        info = tensor_info(mask)
        assert info is not None
        if info.dtype is torch.bool:
            like = tensor_info(given["query"])
            assert like is not None
            zeros = build.call(torch.zeros_like, mask, dtype=like.dtype, name=f"{name}_zeros")
            mask = build.call(torch.masked_fill, zeros, mask, float("-inf"), name=f"{name}_additive")
        if name == "key_padding_mask":
            for dim in (-2, -2) if len(info.shape) == 2 else (-2,):
                mask = build("unsqueeze", mask, dim=dim, name=f"{name}_broadcast")
        elif len(info.shape) == 3:
            mask = build("unflatten", mask, dim=0, sizes=(-1, heads), name=f"{name}_heads")
        masks.append(mask)
    return build("add", *masks, name="mask") if len(masks) == 2 else masks[0] if masks else None
