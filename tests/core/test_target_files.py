"""Target files that extend others, and heuristics that are bound to versions and GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fxq.errors import TargetError
from fxq.target import Target
from fxq.target_parts import Heuristic, OpPlacement

TENSORRT = Target.load("tensorrt")


def write(path: Path, **data: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(data))
    return path


def extending(**data: Any) -> Target:
    return Target.from_data({"name": "mine", "extends": "tensorrt", **data}, "here")


def test_an_extension_of_nothing_else_is_the_base_under_another_name() -> None:
    assert extending() == replace(TENSORRT, name="mine")


def test_tensorrt_fast_excludes_and_differs_in_nothing_else() -> None:
    fast = Target.load("tensorrt-fast")
    excluding = tuple(replace(h, action="exclude") for h in TENSORRT.heuristics)
    assert fast == replace(TENSORRT, name="tensorrt-fast", heuristics=excluding)
    assert fast != replace(TENSORRT, name="tensorrt-fast")


def test_overrides_change_what_they_name() -> None:
    made = extending(
        overrides=[
            {"rule": "R35", "check": "small-channels", "action": "exclude", "parameters": {"few": 8}},
            {"rule": "R43", "action": "ignore"},
        ]
    )
    before = {(h.rule, h.check): h for h in TENSORRT.heuristics}
    after = {(h.rule, h.check): h for h in made.heuristics}
    small, always = ("R35", "small-channels"), ("R43", "always")
    assert after.pop(small) == replace(before.pop(small), action="exclude", parameters={"few": 8, "multiple": 8})
    assert after.pop(always) == replace(before.pop(always), action="ignore")
    assert after == before
    both = extending(overrides=[{"rule": "R35", "action": "exclude"}])
    assert [h.action for h in both.heuristics if h.rule == "R35"] == ["exclude", "exclude"]


def test_other_keys_replace_and_ops_are_added() -> None:
    row = {"kinds": ["linear"], "inputs": [0], "output": True, "rule": "R20", "reason": "why"}
    heuristic = {"rule": "R43", "check": "always", "kinds": ["linear"], "action": "exclude", "reason": "why"}
    made = extending(ties=["cat"], ops=[row], heuristics=[heuristic])
    assert made.ties == {"cat"}
    assert made.ops == {**TENSORRT.ops, "linear": OpPlacement((0,), output=True, reason="why")}
    assert made.heuristics == (Heuristic("R43", "always", frozenset({"linear"}), "exclude", "why"),)
    assert made.residual == TENSORRT.residual


def test_a_path_counts_from_the_file_that_names_it(tmp_path: Path) -> None:
    write(tmp_path / "base" / "a.yaml", name="a", extends="tensorrt", ties=["cat"])
    write(tmp_path / "b.yaml", name="b", extends="base/a.yaml", overrides=[{"rule": "R37", "action": "exclude"}])
    write(tmp_path / "sub" / "tensorrt.yaml", name="c", extends="../b.yaml")
    made = Target.load(tmp_path / "sub" / "tensorrt.yaml")
    assert (made.name, made.ties) == ("c", {"cat"})
    assert {h.rule for h in made.heuristics if h.action == "exclude"} == {"R37", "R40"}


def test_files_that_extend_each_other(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", name="a", extends="b.yaml")
    write(tmp_path / "b.yaml", name="b", extends="a.yaml")
    write(tmp_path / "c.yaml", name="c", extends="a.yaml")
    for name in "abc":
        with pytest.raises(TargetError, match=r"target files extend each other: .*\.yaml -> .*\.yaml"):
            Target.load(tmp_path / f"{name}.yaml")
    write(tmp_path / "own.yaml", name="own", extends="./own.yaml")
    with pytest.raises(TargetError, match="extend each other"):
        Target.load(tmp_path / "own.yaml")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown base": ({"extends": "tensorflow"}, "unknown target 'tensorflow'"),
    "a missing file": ({"extends": "missing.yaml"}, "cannot read the target file missing.yaml"),
    "two bases": ({"extends": ["tensorrt", "tensorrt-fast"]}, "it extends ['tensorrt', 'tensorrt-fast']"),
    "an unknown rule": ({"overrides": [{"rule": "R99", "action": "exclude"}]}, "the override of R99 fits no heuristic"),
    "an unknown check": ({"overrides": [{"rule": "R35", "check": "always"}]}, "the override of R35 always fits no"),
    "no rule": ({"overrides": [{"action": "exclude"}]}, "the override of nothing fits no heuristic"),
    "an unknown key": ({"overrides": [{"rule": "R35", "actions": "exclude"}]}, "nothing is called actions"),
    "an unknown action": ({"overrides": [{"rule": "R35", "action": "warn"}]}, "action of heuristic R35 is 'warn'"),
    "a mapping": ({"overrides": {"R35": "exclude"}}, "overrides is no list of mappings"),
    "numbers of no name": ({"overrides": [{"rule": "R37", "parameters": 3}]}, "parameters 3 are no mapping"),
    "a bound": ({"overrides": [{"rule": "R37", "versions": "ten"}]}, "versions of heuristic R37 is 'ten'"),
    "a number": (
        {"overrides": [{"rule": "R37", "compute_capability": 8.6}]},
        "compute_capability of heuristic R37 is 8.6",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_extensions(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, message = WRONG[case]
    with pytest.raises(TargetError) as caught:
        extending(**data)
    assert message in str(caught.value)
    file = write(tmp_path / "mine.yaml", **{"name": "mine", "extends": "tensorrt", **data})
    with pytest.raises(TargetError):
        Target.load(file)


def test_a_base_that_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    write(tmp_path / "mine.yaml", name="mine", extends="list.yaml")
    with pytest.raises(TargetError, match=r"what it extends, list\.yaml, is not a target"):
        Target.load(tmp_path / "mine.yaml")


def test_a_name_is_not_inherited() -> None:
    with pytest.raises(TargetError, match="'name'"):
        Target.from_data({"extends": "tensorrt"}, "here")


BOUNDED = extending(
    overrides=[
        {"rule": "R37", "versions": ">=10.13,<12", "compute_capability": ">=8.0"},
        {"rule": "R36", "compute_capability": ""},
    ]
)


@pytest.mark.parametrize(
    ("version", "capability", "holds"),
    [
        (None, None, True),
        ("11.4", "8.6", True),
        ("10.16.0.72", "12.0", True),
        ("11.4", None, True),
        (None, "8.0", True),
        ("10.12", None, False),
        ("10.9", "8.6", False),
        ("12.0", "8.6", False),
        ("11.4", "7.5", False),
        (None, "7.5", False),
    ],
)
def test_bounds(version: str | None, capability: str | None, holds: bool) -> None:
    found = BOUNDED.at(version, capability)
    expected = {h.rule for h in BOUNDED.heuristics} - (set() if holds else {"R37"})
    assert {h.rule for h in found.heuristics} == expected
    assert Target.load(BOUNDED, version=version, compute_capability=capability) == found


def test_fp8_has_no_advice_where_there_is_no_fp8() -> None:
    assert "R36" not in {h.rule for h in Target.load("tensorrt", compute_capability="8.6").heuristics}
    assert Target.load("tensorrt", version="11.4", compute_capability="8.9") == TENSORRT


def test_what_is_no_version() -> None:
    with pytest.raises(TargetError, match="version is 'eleven', which is no version"):
        Target.load("tensorrt", version="eleven")
    with pytest.raises(TargetError, match=r"compute_capability is 8\.6, which is no version"):
        TENSORRT.at(compute_capability=8.6)  # type: ignore[arg-type]
