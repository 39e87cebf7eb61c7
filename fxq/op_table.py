"""The table of op kinds, as data: canonical functions, their parameters, every other way to write them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
import torch.nn.functional as F

__all__ = [
    "FUNCTIONS",
    "INPLACE",
    "KINDS",
    "KIND_OF",
    "METHODS",
    "REQUIRED",
    "OpKind",
    "Spelling",
]

REQUIRED: Final = object()


@dataclass(frozen=True)
class OpKind:
    """One operation.

    Attributes:
        name: What recipes, targets and reports call it.
        target: The canonical function.
        params: The canonical function's parameters in order, with defaults; ``REQUIRED`` marks those without.
        tensors: How many leading parameters are tensors; they are passed by position, the rest by keyword.
        spatial: Parameters that are one number or one per spatial dimension, and that dimension count.
        optional: Parameters that the function does not take as None: left out of the call where they are.
    """

    name: str
    target: Callable[..., Any]
    params: Mapping[str, Any]
    tensors: int = 1
    spatial: tuple[frozenset[str], int] = (frozenset(), 0)
    optional: frozenset[str] = frozenset()

    @cached_property
    def keywords(self) -> frozenset[str]:
        """The parameters that a canonical call passes by keyword."""
        return frozenset(list(self.params)[self.tensors :])


@dataclass(frozen=True)
class Spelling:
    """Another way to call a kind.

    Attributes:
        kind: The kind.
        params: Parameter names in the order of this spelling's positional arguments; the reflected operators
            (``__rsub__``) begin with the second.
        variadic: Name of a parameter that takes all remaining positional arguments (``x.view(2, 3)``).
    """

    kind: OpKind
    params: tuple[str, ...]
    variadic: str | None = None


KINDS: Final[dict[str, OpKind]] = {}
KIND_OF: Final[dict[Any, OpKind]] = {}
FUNCTIONS: Final[dict[Any, Spelling]] = {}
METHODS: Final[dict[str, Spelling]] = {}
INPLACE: Final[dict[Any, Callable[..., Any]]] = {}


def _kind(  # noqa: PLR0913 (a row of the table has that many columns)
    name: str,
    target: Callable[..., Any],
    required: str,
    optional: Mapping[str, Any] | None = None,
    *,
    tensors: int = 1,
    spatial: tuple[str, int] = ("", 0),
    functions: tuple[Any, ...] = (),
    methods: tuple[str, ...] = (),
    variadic: str | None = None,
    omit: str = "",
) -> OpKind:
    """Enter a kind, its spellings by function and by method, and its canonical target."""
    params = dict.fromkeys(required.split(), REQUIRED) | dict(optional or {})
    sizes = (frozenset(spatial[0].split()), spatial[1])
    made = OpKind(name, target, params, tensors, sizes, frozenset(omit.split()))
    KINDS[name] = KIND_OF[target] = made
    spelled = Spelling(made, tuple(params))
    for function in (target, *functions):
        FUNCTIONS.setdefault(function, spelled)
    for method in methods:
        METHODS[method] = Spelling(made, spelled.params, variadic)
    return made


def _also(kind_name: str, spelled: Any, params: str) -> None:
    """Another function, or a method by name, that spells a kind, with its own parameter order."""
    where = METHODS if isinstance(spelled, str) else FUNCTIONS
    where[spelled] = Spelling(KINDS[kind_name], tuple(params.split()))


for _n in (1, 2, 3):
    _kind(
        f"conv{_n}d", getattr(F, f"conv{_n}d"), "input weight",
        {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1},
        tensors=3, spatial=("stride padding dilation", _n),
    )  # fmt: skip
    _kind(
        f"conv_transpose{_n}d", getattr(F, f"conv_transpose{_n}d"), "input weight",
        {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1},
        tensors=3, spatial=("stride padding output_padding dilation", _n),
    )  # fmt: skip
    _kind(
        f"max_pool{_n}d", getattr(F, f"max_pool{_n}d"), "input kernel_size",
        {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False},
        spatial=("kernel_size stride padding dilation", _n),
    )  # fmt: skip
    _also(
        f"max_pool{_n}d",
        getattr(torch, f"max_pool{_n}d"),
        "input kernel_size stride padding dilation ceil_mode",
    )
    _avg = {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True}
    _kind(
        f"avg_pool{_n}d", getattr(F, f"avg_pool{_n}d"), "input kernel_size",
        _avg if _n == 1 else {**_avg, "divisor_override": None},
        spatial=("kernel_size stride padding", _n),
    )  # fmt: skip
    _kind(f"adaptive_avg_pool{_n}d", getattr(F, f"adaptive_avg_pool{_n}d"), "input output_size",
          spatial=("output_size", _n))  # fmt: skip
    _kind(f"adaptive_max_pool{_n}d", getattr(F, f"adaptive_max_pool{_n}d"), "input output_size",
          {"return_indices": False}, spatial=("output_size", _n))  # fmt: skip

_kind("linear", F.linear, "input weight", {"bias": None}, tensors=3)
_kind("matmul", torch.matmul, "input other", tensors=2, functions=(operator.matmul, torch.bmm, torch.mm),
      methods=("matmul", "bmm", "mm", "__matmul__"))  # fmt: skip
_also("matmul", "__rmatmul__", "other input")
_kind("embedding", F.embedding, "input weight", {"padding_idx": None, "max_norm": None, "norm_type": 2.0,
      "scale_grad_by_freq": False, "sparse": False}, tensors=2)  # fmt: skip
_kind(
    "scaled_dot_product_attention",
    F.scaled_dot_product_attention,
    "query key value",
    {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False},
    tensors=4,
)

_kind("batch_norm", F.batch_norm, "input running_mean running_var",
      {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}, tensors=5)  # fmt: skip
_kind("layer_norm", F.layer_norm, "input normalized_shape", {"weight": None, "bias": None, "eps": 1e-5})
_kind("group_norm", F.group_norm, "input num_groups", {"weight": None, "bias": None, "eps": 1e-5})
_kind("instance_norm", F.instance_norm, "input", {"running_mean": None, "running_var": None, "weight": None,
      "bias": None, "use_input_stats": True, "momentum": 0.1, "eps": 1e-5})  # fmt: skip

# Binary arithmetic: operators take tensors and numbers on either side, so they are the canonical spelling.
for _name, _symbol, _torch, _long in (
    ("add", operator.add, torch.add, None),
    ("mul", operator.mul, torch.mul, torch.multiply),
    ("sub", operator.sub, torch.sub, torch.subtract),
    ("div", operator.truediv, torch.div, torch.divide),
):
    _kind(
        _name,
        _symbol,
        "input other",
        tensors=2,
        functions=(_torch,),
        methods=(_name, f"__{_symbol.__name__}__"),
    )
    _also(_name, f"__r{_symbol.__name__}__", "other input")
    if _long is not None:
        _also(_name, _long, "input other")
        _also(_name, _long.__name__, "input other")
_also("div", torch.true_divide, "input other")
_also("div", "true_divide", "input other")
_also("sub", torch.rsub, "other input")
_kind("neg", operator.neg, "input", functions=(torch.neg, torch.negative), methods=("neg", "negative"))
_kind("pow", operator.pow, "input exponent", tensors=2, functions=(torch.pow,), methods=("pow", "__pow__"))
_also("pow", "__rpow__", "exponent input")

_kind("relu", torch.relu, "input", functions=(F.relu, F.relu_, torch.relu_), methods=("relu",))
_kind("relu6", F.relu6, "input")
_kind("hardtanh", F.hardtanh, "input", {"min_val": -1.0, "max_val": 1.0})
_kind("leaky_relu", F.leaky_relu, "input", {"negative_slope": 0.01})
_kind("prelu", F.prelu, "input weight", tensors=2, functions=(torch.prelu,), methods=("prelu",))
_kind("elu", F.elu, "input", {"alpha": 1.0})
_kind("celu", F.celu, "input", {"alpha": 1.0})
_kind("selu", F.selu, "input")
_kind("gelu", F.gelu, "input", {"approximate": "none"})
_kind("silu", F.silu, "input")
_kind("mish", F.mish, "input")
_kind("softplus", F.softplus, "input", {"beta": 1.0, "threshold": 20.0})
_kind("hardswish", F.hardswish, "input")
_kind("hardsigmoid", F.hardsigmoid, "input")
_kind("sigmoid", torch.sigmoid, "input", functions=(F.sigmoid,), methods=("sigmoid",))
_kind("tanh", torch.tanh, "input", functions=(F.tanh,), methods=("tanh",))
_kind("softmax", torch.softmax, "input dim", {"dtype": None}, methods=("softmax",))
_kind("log_softmax", torch.log_softmax, "input dim", {"dtype": None}, methods=("log_softmax",))
_kind(
    "clamp",
    torch.clamp,
    "input",
    {"min": None, "max": None},
    functions=(torch.clip,),
    methods=("clamp", "clip"),
)
for _name, _bound in (("clamp_min", "min"), ("clamp_max", "max")):
    _also("clamp", getattr(torch, _name), f"input {_bound}")
    _also("clamp", _name, f"input {_bound}")
for _name in ["exp", "log", "sqrt", "rsqrt", "abs", "erf", "sin", "cos", "square", "reciprocal", "floor", "ceil"]:
    _kind(_name, getattr(torch, _name), "input", methods=(_name,))
_kind("mean", torch.mean, "input", {"dim": None, "keepdim": False}, methods=("mean",))
_kind("sum", torch.sum, "input", {"dim": None, "keepdim": False}, methods=("sum",))
_kind("normalize", F.normalize, "input", {"p": 2.0, "dim": 1, "eps": 1e-12})

# Data movement: what goes in comes out, elsewhere.
_kind("flatten", torch.flatten, "input", {"start_dim": 0, "end_dim": -1}, methods=("flatten",))
_kind("reshape", torch.reshape, "input shape", methods=("reshape", "view"), variadic="shape")
_kind("unflatten", torch.unflatten, "input dim sizes", methods=("unflatten",))
_kind("permute", torch.permute, "input dims", methods=("permute",), variadic="dims")
_kind("transpose", torch.transpose, "input dim0 dim1", functions=(torch.swapaxes, torch.swapdims),
      methods=("transpose", "swapaxes", "swapdims"))  # fmt: skip
_kind("t", torch.t, "input", methods=("t",))
_kind("unsqueeze", torch.unsqueeze, "input dim", methods=("unsqueeze",))
_kind("squeeze", torch.squeeze, "input", {"dim": None}, methods=("squeeze",), omit="dim")
_kind("expand", torch.Tensor.expand, "input size", methods=("expand",), variadic="size")
_kind("repeat", torch.Tensor.repeat, "input repeats", methods=("repeat",), variadic="repeats")
_kind("chunk", torch.chunk, "input chunks", {"dim": 0}, methods=("chunk",))
_kind("split", torch.split, "tensor split_size_or_sections", {"dim": 0}, methods=("split",))
_kind("unbind", torch.unbind, "input", {"dim": 0}, methods=("unbind",))
_kind("cat", torch.cat, "tensors", {"dim": 0}, functions=(torch.concat, torch.concatenate))
_kind("stack", torch.stack, "tensors", {"dim": 0})
_kind("getitem", operator.getitem, "input index", tensors=2, methods=("__getitem__",))
_kind("roll", torch.roll, "input shifts", {"dims": None}, methods=("roll",))
_kind("flip", torch.flip, "input dims", methods=("flip",), variadic="dims")
_kind("pad", F.pad, "input pad", {"mode": "constant", "value": None}, functions=(torch.nn.functional.pad,))
_kind("interpolate", F.interpolate, "input", {"size": None, "scale_factor": None, "mode": "nearest",
      "align_corners": None, "recompute_scale_factor": None, "antialias": False})  # fmt: skip
_kind("pixel_shuffle", F.pixel_shuffle, "input upscale_factor")
_kind("pixel_unshuffle", F.pixel_unshuffle, "input downscale_factor")
_kind("channel_shuffle", F.channel_shuffle, "input groups")

# What changes nothing at inference; the ``drop-identities`` pass removes them.
_kind("dropout", F.dropout, "input", {"p": 0.5, "training": True})
for _name in ("dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
    _kind(_name, getattr(F, _name), "input", {"p": 0.5, "training": "alpha" not in _name})
_kind("contiguous", torch.Tensor.contiguous, "input", {"memory_format": torch.contiguous_format},
      methods=("contiguous",))  # fmt: skip
_kind("clone", torch.clone, "input", {"memory_format": torch.preserve_format}, methods=("clone",))
_kind("detach", torch.detach, "input", methods=("detach",))

# ``inplace=True`` is a parameter of these functions' spelling only; the canonical form has none.
_WITH_INPLACE: Final = (
    "relu6 hardtanh leaky_relu elu celu selu silu mish hardswish hardsigmoid "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
)
for _name in _WITH_INPLACE.split():
    _also(_name, getattr(F, _name), " ".join([*KINDS[_name].params, "inplace"]))
_also("relu", F.relu, "input inplace")
_also("softmax", F.softmax, "input dim _stacklevel dtype")
_also("log_softmax", F.log_softmax, "input dim _stacklevel dtype")

# What an in-place call computes, by the function that computes it out of place.
_ARITHMETIC: Final = "add sub mul truediv floordiv mod pow and_ or_ xor lshift rshift matmul"
for _name in _ARITHMETIC.split():
    INPLACE[getattr(operator, f"i{_name.rstrip('_')}")] = getattr(operator, _name)
for _room in (torch, F):
    for _name in dir(_room):
        _plain = getattr(_room, _name[:-1], None)
        if _name.endswith("_") and _name[0] != "_" and callable(_plain) and _name != "as_strided_":
            INPLACE.setdefault(getattr(_room, _name), _plain)
