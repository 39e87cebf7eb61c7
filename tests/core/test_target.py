"""Targets: read from data, checked key by key."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fxq.errors import TargetError
from fxq.ops import KINDS
from fxq.recipe import DTYPES, PerChannel, PerTensor, QSpec
from fxq.rules import RULES
from fxq.target import Target
from fxq.target_parts import Heuristic, OpPlacement, Residual

DATA: dict[str, Any] = {
    "name": "toy",
    "activation": {"dtype": "uint8", "symmetric": False, "granularity": "per-tensor", "method": "max"},
    "weight": {"dtype": "int8", "symmetric": True, "granularity": "per-channel", "method": "max"},
    "ops": [
        {
            "kinds": ["conv2d", "linear"],
            "inputs": [0],
            "weight": 1,
            "weight_axis": 0,
            "rule": "R20",
            "reason": "why",
        }
    ],
}


def data(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(DATA), **changes}


def test_tensorrt() -> None:
    target = Target.load("tensorrt")
    assert target.name == "tensorrt"
    # R9, R32: symmetric INT8, per-tensor activations, per-channel weights.
    for spec, granularity in ((target.activation, PerTensor()), (target.weight, PerChannel())):
        assert (spec.dtype, spec.symmetric, spec.granularity) == (DTYPES["int8"], True, granularity)
        assert spec.complete
    assert target.ops["conv2d"] == OpPlacement(inputs=(0,), weight=1, weight_axis=0, reason=target.ops["conv2d"].reason)
    assert target.ops["conv_transpose2d"].weight_axis == 1  # R16
    assert target.ops["conv_transpose2d"].grouped_per_tensor
    assert target.ops["matmul"].inputs == (0, 1)
    assert not any(placement.output for placement in target.ops.values())  # R21
    assert target.residual.policy == "skip"
    assert target.residual.weighted == {k for k in target.ops if k.startswith("conv")}
    assert not target.ties & {"avg_pool2d", "adaptive_avg_pool2d", "relu6", "add", "clamp"}


def test_tensorrt_names_what_exists() -> None:
    target = Target.load("tensorrt")
    assert target.kinds <= set(KINDS)
    cited = {p.rule for p in target.ops.values()} | {h.rule for h in target.heuristics}
    assert cited <= set(RULES)
    assert {"R35", "R36", "R37", "R40", "R43"} == {h.rule for h in target.heuristics}
    assert {h.rule for h in target.heuristics if h.action == "exclude"} == {"R40"}


def test_a_target_is_returned_as_it_is() -> None:
    target = Target.load("tensorrt")
    assert Target.load(target) is target
    assert Target.load("tensorrt") == target


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(data()))
    for name in (path, str(path)):
        target = Target.load(name)
        assert target.name == "toy"
        assert target.activation == QSpec("uint8", symmetric=False, granularity="per-tensor", method="max")
        assert target.ops["linear"] == target.ops["conv2d"] == OpPlacement((0,), 1, 0, reason="why")
        assert target.residual == Residual()
        assert target.ties == frozenset()
        assert target.heuristics == ()
    path.with_suffix(".yml").write_text(path.read_text())
    assert Target.load(path.with_suffix(".yml")) == target


def test_kinds() -> None:
    heuristic = {"rule": "R35", "check": "always", "kinds": ["conv3d"], "action": "advise", "reason": "why"}
    made = Target.from_data(
        data(ties=["cat"], residual={"policy": "skip", "weighted": ["conv1d"]}, heuristics=[heuristic]),
        "here",
    )
    assert made.kinds == {"conv2d", "linear", "cat", "conv1d", "conv3d"}
    assert made.heuristics == (Heuristic("R35", "always", frozenset({"conv3d"}), "advise", "why"),)
    with pytest.raises(FrozenInstanceError):
        made.name = "other"  # type: ignore[misc]


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in data().items() if k != key}


def in_op(**changes: Any) -> dict[str, Any]:
    return data(ops=[{**DATA["ops"][0], **changes}])


HEURISTIC = {"rule": "R35", "check": "always", "kinds": ["conv2d"], "action": "advise", "reason": "why"}
WRONG: dict[str, tuple[Any, str]] = {
    "no name": (without("name"), "here: not a target"),
    "no activation": (without("activation"), "here: not a target"),
    "no ops": (without("ops"), "here: not a target"),
    "a null weight": (data(weight=None), "activation and weight need a spec each"),
    "an open spec": (data(weight={"dtype": "int8"}), "its weight spec leaves something open"),
    "an unknown dtype": (data(weight={"dtype": "int9"}), "unknown dtype 'int9'"),
    "an unknown key": (data(tie=["cat"]), "nothing is called tie"),
    "an unknown key of an op": (in_op(wieght_axis=1), "nothing is called wieght_axis"),
    "an op without a rule": (data(ops=[{"kinds": ["conv2d"], "reason": "why"}]), "not a target"),
    "an op without kinds": (data(ops=[{"rule": "R20", "reason": "why"}]), "not a target"),
    "an unknown policy": (data(residual={"policy": "both"}), "residual policy is 'both'"),
    "an unknown key of residual": (data(residual={"polices": "skip"}), "nothing is called polices"),
    "an unknown action": (
        data(heuristics=[{**HEURISTIC, "action": "warn"}]),
        "action of heuristic R35 is 'warn'",
    ),
    "an unknown key of a heuristic": (
        data(heuristics=[{**HEURISTIC, "params": {}}]),
        "nothing is called params",
    ),
    "a refusal of everything": (data(refuses=[{"rule": "R9", "reason": "why", "fix": "how"}]), "names no spec"),
    "a refusal of no type": (
        data(refuses=[{"rule": "R9", "reason": "why", "fix": "how", "dtype": "int9"}]),
        "dtype of refusal R9 is 'int9'",
    ),
    "an unknown key of a refusal": (data(refuses=[{"rule": "R9", "types": []}]), "nothing is called types"),
    "a list": ([1, 2], "it holds no mapping"),
    "nothing": (None, "it holds no mapping"),
    "text": ("tensorrt", "it holds no mapping"),
    "a lone kind": (in_op(kinds="linear"), "'linear' is no list of op kinds"),
    "a lone tie": (data(ties="cat"), "'cat' is no list of op kinds"),
    "an edge by name": (in_op(inputs=["input"]), "an operation's edge is 'input'"),
    "an edge before the first": (in_op(weight=-1), "an operation's edge is -1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data(case: str) -> None:
    held, message = WRONG[case]
    with pytest.raises(TargetError) as caught:
        Target.from_data(held, "here")
    assert message in str(caught.value)


def test_wrong_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        Target.load("tensorflow")
    assert caught.value.message == "unknown target 'tensorflow'"
    assert "tensorrt" in str(caught.value.hint)
    with pytest.raises(TargetError, match="cannot read the target file"):
        Target.load(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(TargetError, match="cannot read the target file"):
        Target.load(broken)
    unsafe = tmp_path / "unsafe.yaml"
    unsafe.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(TargetError, match="cannot read the target file"):
        Target.load(unsafe)


def test_incomplete_targets_in_code() -> None:
    with pytest.raises(TargetError, match="its activation spec leaves something open"):
        replace(Target.load("tensorrt"), activation=QSpec("int8"))
    with pytest.raises(TargetError, match="residual policy"):
        Residual("sometimes")
