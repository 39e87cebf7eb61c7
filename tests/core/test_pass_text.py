"""Pipelines as text: whatever they hold is read back, and text that is none is refused."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling import Part, RoundedScaled, Scaled, Shape

from fxq.errors import PassError
from fxq.manager import Pipeline
from fxq.passes import CONVERT, PREPARE, PREPARE_QAT, DropIdentities, RestoreTraining
from fxq.scale_policy import ScalePolicy

PIPELINES = {
    "prepare": PREPARE,
    "prepare-qat": PREPARE_QAT,
    "convert": CONVERT,
    "empty": Pipeline("empty", ()),
    "options": Pipeline(
        "options",
        (
            Scaled(2.5),
            DropIdentities(),
            Scaled(label="a, b}{='\"(", sizes=[1, (2,), {"x": None}]),
            Scaled(-1e-9),
        ),
    ),
    "objects": Pipeline("objects", (Scaled(shape=Shape.SOFT, parts=(Part(2), Part(b="}"))), RoundedScaled())),
    "policy": PREPARE_QAT.replace("restore-training", RestoreTraining(ScalePolicy(activations="learned"))),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_read_back(name: str) -> None:
    pipeline = PIPELINES[name]
    assert Pipeline.parse(str(pipeline), [Scaled, RoundedScaled]) == pipeline
    assert Pipeline.parse(f"  {pipeline} \n", [Scaled, RoundedScaled]) == pipeline


OPTIONS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=3)
    | st.sampled_from([Shape.SOFT, Part(2), Part(b="}"), torch.float16, frozenset(), frozenset({Shape.HARD})]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.frozensets(st.integers() | st.text(max_size=3), max_size=3)
    ),
    max_leaves=6,
)


@given(OPTIONS)
@settings(max_examples=200, deadline=None)
def test_any_option_is_read_back(value: Any) -> None:
    pipeline = Pipeline("p", (Scaled(sizes=value),))
    again = Pipeline.parse(str(pipeline), [Scaled])
    assert again == pipeline
    assert str(again) == str(pipeline)


def test_a_number_that_is_none_is_read_back() -> None:
    (read,) = Pipeline.parse(f"p({Scaled(math.nan)})", [Scaled])
    assert isinstance(read, Scaled)
    assert math.isnan(read.factor)


@given(st.lists(st.tuples(st.integers(0, 80), st.sampled_from("{}(),='\" ab1-\n*.")), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_damaged_text_is_a_pass_error(damage: list[tuple[int, str]]) -> None:
    text = f"p({Scaled(2.5)}, functionalize, {Scaled(sizes=[1, (2,)])})"
    for at, character in damage:
        text = text[:at] + character + text[at + 1 :]
    with suppress(PassError):
        Pipeline.parse(text, [Scaled])


def test_a_class_that_is_defined_again_takes_the_place_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
from dataclasses import dataclass
from fxq.passbase import Pass

@dataclass(frozen=True)
class Again(Pass):
    name = "again"
    def call(self, editor):
        pass
"""
    cell = ModuleType("cell")
    monkeypatch.setitem(sys.modules, "cell", cell)
    exec(code, vars(cell))
    first = cell.Again
    exec(code, vars(cell))
    assert type(Pipeline.parse("p(again)").passes[0]) is cell.Again is not first


def test_a_pipeline_by_hand() -> None:
    pipeline = Pipeline.parse("mine( functionalize ,\n  scaled{factor=3.0}, drop-identities)", [Scaled])
    assert [p.name for p in pipeline] == ["functionalize", "scaled", "drop-identities"]
    assert pipeline.passes[1] == Scaled(3.0)


WRONG = {
    "no parentheses": ("prepare", "the text of a pipeline cannot be read at ''"),
    "no name": ("(functionalize)", r"cannot be read at '\(functionalize\)'"),
    "no comma": ("p(functionalize canonicalize)", "cannot be read at 'canonicalize"),
    "a comma too many": ("p(functionalize,)", r"cannot be read at '\)'"),
    "not closed": ("p(scaled{factor=1)", "cannot be read at '{factor=1"),
    "no such pass": ("p(functionalise)", "no pass is called 'functionalise'"),
    "no such option": ("p(scaled{size=1})", "pass scaled has no option 'size'"),
    "no literal": ("p(scaled{factor=exit()})", r"exit\(\) is no option that text can hold"),
    "an attribute": ("p(scaled{factor=torch.e})", "torch.e is no option that text can hold"),
    "spread": ("p(scaled{**{}})", r"pass scaled: \{\*\*\{\}\} spreads a mapping"),
    "twice": ("p(scaled{factor=1.0, factor=2.0})", "pass scaled: factor is given twice"),
    "a part that is none": ("p(scaled{parts=(Part(c=1),)})", r"Part\(c=1\) cannot be made: "),
    "a part spread": ("p(scaled{parts=(Part(**{}),)})", r"Part\(\*\*\{\}\) is no option that text can hold"),
    "by position": ("p(scaled{3})", "options are written name=value, not 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_text_that_is_no_pipeline(case: str) -> None:
    text, message = WRONG[case]
    with pytest.raises(PassError, match=message):
        Pipeline.parse(text, [Scaled])


def test_two_passes_of_one_name() -> None:
    @dataclass(frozen=True)
    class Twin(Scaled):
        name = "twin"

    first = Twin

    @dataclass(frozen=True)
    class Twin(Scaled):  # type: ignore[no-redef]
        name = "twin"

    with pytest.raises(PassError, match="several passes are called 'twin': ") as caught:
        Pipeline.parse("p(twin)")
    assert "passes=[...]" in str(caught.value.hint)
    assert type(Pipeline.parse("p(twin)", [first]).passes[0]) is first
    assert type(Pipeline.parse("p(twin)", [Twin]).passes[0]) is Twin
