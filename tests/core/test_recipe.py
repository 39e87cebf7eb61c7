"""Specs, rules and recipes: what they take, what they refuse, and their form as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxq.errors import RecipeError
from fxq.recipe import (
    DTYPES,
    METHODS,
    EdgeSpecs,
    Method,
    PerChannel,
    PerTensor,
    QDType,
    QSpec,
    Recipe,
    Rule,
)
from fxq.specs import spec_from, spec_to

FULL = QSpec("int8", symmetric=True, granularity="per-tensor", method="max")


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_fit_their_storage(name: str) -> None:
    dtype = DTYPES[name]
    info = torch.finfo(dtype.storage) if dtype.floating else torch.iinfo(dtype.storage)
    assert info.min <= dtype.qmin < dtype.qmax <= info.max
    assert dtype.floating == name.startswith("float")
    assert dtype.name == name


def test_int8_and_fp8_ends() -> None:
    """R10."""
    assert (DTYPES["int8"].qmin, DTYPES["int8"].qmax) == (-128, 127)
    assert (DTYPES["float8_e4m3fn"].qmin, DTYPES["float8_e4m3fn"].qmax) == (-448, 448)
    assert (DTYPES["int4"].qmin, DTYPES["int4"].qmax) == (-8, 7)


def test_names_become_objects() -> None:
    assert isinstance(FULL.dtype, QDType)
    assert (FULL.dtype, FULL.granularity, FULL.method) == (DTYPES["int8"], PerTensor(), Method("max"))
    assert QSpec(granularity="per-channel").granularity == PerChannel(None)
    assert QSpec(DTYPES["int8"], symmetric=True, granularity=PerTensor(), method=Method("max")) == FULL
    assert hash(QSpec("int8")) == hash(QSpec(DTYPES["int8"]))


def test_over_fills_what_is_open() -> None:
    assert QSpec().over(FULL) == FULL
    assert QSpec(method="entropy").over(FULL) == QSpec(
        "int8", symmetric=True, granularity="per-tensor", method="entropy"
    )
    assert QSpec("uint8", symmetric=False).over(FULL) == QSpec(
        "uint8", symmetric=False, granularity="per-tensor", method="max"
    )
    assert QSpec(symmetric=False).over(FULL).symmetric is False
    # FP8 has no zero point, whatever the default is.
    assert (
        QSpec("float8_e4m3fn").over(QSpec("uint8", symmetric=False, granularity="per-tensor", method="max")).symmetric
        is True
    )


def test_complete() -> None:
    assert FULL.complete
    for open_field in ("dtype", "symmetric", "granularity", "method"):
        fields = {"dtype": "int8", "symmetric": True, "granularity": "per-tensor", "method": "max"}
        assert not QSpec(**{k: v for k, v in fields.items() if k != open_field}).complete  # type: ignore[arg-type]


def test_reading_an_incomplete_spec() -> None:
    assert (FULL.qdtype, FULL.axis, FULL.calibration) == (DTYPES["int8"], None, Method("max"))
    assert QSpec(granularity=PerChannel(1)).axis == 1
    with pytest.raises(RecipeError, match="has no dtype"):
        _ = QSpec().qdtype
    with pytest.raises(RecipeError, match="has no method"):
        _ = QSpec().calibration


TEXTS = [
    (FULL, "int8 per-tensor max"),
    (
        QSpec("uint8", symmetric=False, granularity=PerChannel(1), method="entropy"),
        "uint8 asymmetric per-channel(1) entropy",
    ),
    (QSpec("int4", symmetric=True, granularity="per-channel"), "int4 per-channel"),
    (QSpec(), "?"),
    (QSpec(method="mse"), "? mse"),
]


@pytest.mark.parametrize(("spec", "text"), TEXTS, ids=str)
def test_text(spec: QSpec, text: str) -> None:
    assert str(spec) == text


WRONG_SPECS: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "int9"}, "unknown dtype 'int9'"),
    ({"dtype": torch.int8}, "dtype=torch.int8 means nothing"),
    ({"symmetric": "yes"}, "symmetric='yes' means nothing"),
    ({"granularity": "per-row"}, "unknown granularity 'per-row'"),
    ({"granularity": PerChannel}, "granularity="),
    ({"method": "magic"}, "unknown calibration method 'magic'"),
    ({"method": 3}, "method=3 means nothing"),
    ({"dtype": "float8_e4m3fn", "symmetric": False}, "float8_e4m3fn has no zero point"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_SPECS, ids=str)
def test_wrong_specs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        QSpec(**fields)
    assert message in caught.value.message


def test_wrong_methods_and_axes() -> None:
    for options in ({"percentile": 50}, {"percentile": 100.1}, {"momentum": 0}, {"momentum": 1.5}):
        with pytest.raises(RecipeError, match="is not in"):
            Method("percentile", **options)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="is no number"):
        Method("percentile", percentile="99")  # type: ignore[arg-type]
    for axis in ("0", True, 1.5):
        with pytest.raises(RecipeError, match="is no dimension"):
            PerChannel(axis)  # type: ignore[arg-type]


# Rules.


def test_edges_of_a_rule() -> None:
    spec = QSpec(method="max")
    assert Rule("a", spec).edges == EdgeSpecs(input=spec, weight=spec, output=spec)
    assert Rule("a", None).edges == EdgeSpecs(input=None, weight=None, output=None)
    named = EdgeSpecs(output=spec)
    assert Rule("a", named).edges is named
    assert [Rule("a", s).explicit for s in (spec, None, named)] == [False, False, True]


def predicate(node: torch.fx.Node) -> bool:
    return node.op == "call_function"


def test_rule_text() -> None:
    assert Rule("layer1.*", None).text == "'layer1.*'"
    assert Rule(nn.Linear, None).text == "Linear"
    assert Rule(predicate, None).text == "predicate"


WRONG_RULES: list[tuple[Any, Any, str]] = [
    (3, None, "cannot match by 3"),
    ("", None, "empty match"),
    ("op:", None, "empty match"),
    ("re:", None, "empty match"),
    ("re:[a", None, "is no regular expression: unterminated character set"),
    (int, None, "int is no module type"),
    ("a", "int8", "'int8' is no spec"),
    ("a", {"dtype": "int8"}, "is no spec"),
]


@pytest.mark.parametrize(("match", "spec", "message"), WRONG_RULES, ids=str)
def test_wrong_rules(match: Any, spec: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Rule(match, spec)


def test_wrong_edges() -> None:
    with pytest.raises(RecipeError, match="weight='int8' is no spec"):
        EdgeSpecs(weight="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [Rule("a", None), {"a": None}, "a", 3], ids=str)
def test_what_is_no_list_of_rules(given: Any) -> None:
    with pytest.raises(RecipeError, match="is no list of rules") as caught:
        Recipe(given)
    assert caught.value.hint == "write Recipe([Rule(...)])"


def test_recipes_hold_rules() -> None:
    rules = [Rule("a", None)]
    recipe = Recipe(rules)
    rules.append(Rule("b", None))
    assert len(recipe.rules) == 1
    assert Recipe(recipe.rules) == recipe
    with pytest.raises(RecipeError, match="is no Rule"):
        Recipe([("a", None)])  # type: ignore[list-item]


# YAML.

methods = st.one_of(
    st.sampled_from(METHODS).map(Method),
    st.floats(50, 100, exclude_min=True).map(lambda p: Method("percentile", percentile=p)),
    st.floats(0, 1, exclude_min=True).map(lambda m: Method("moving-average", momentum=m)),
)
granularities = st.one_of(st.just(PerTensor()), st.just(PerChannel()), st.integers(-4, 4).map(PerChannel))
specs = st.builds(
    QSpec,
    dtype=st.one_of(st.none(), st.sampled_from([d for d in DTYPES if not DTYPES[d].floating])),
    symmetric=st.one_of(st.none(), st.booleans()),
    granularity=st.one_of(st.none(), granularities),
    method=st.one_of(st.none(), methods),
) | st.just(QSpec("float8_e4m3fn", symmetric=True))
wishes = st.one_of(st.none(), st.just("keep"), specs)
edge_specs = st.builds(EdgeSpecs, input=wishes, weight=wishes, output=wishes)
text = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).filter(lambda t: t != "op:")
rules = st.builds(Rule, match=text, spec=st.one_of(st.none(), specs, edge_specs), reason=text | st.just(""))


@given(found=st.lists(rules, max_size=4))
def test_yaml_round_trip(found: list[Rule], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe = Recipe(found)
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(path) == recipe


def test_yaml_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
rules:
  - {match: classifier, spec: null, reason: logits hurt}
  - match: op:conv*
    spec: {method: {name: percentile, percentile: 99.9}, granularity: {per-channel: 0}}
  - match: layer1.*
    spec: {input: {dtype: uint8, symmetric: false}, weight: keep, output: null}
"""
    )
    assert Recipe.from_yaml(str(path)) == Recipe(
        [
            Rule("classifier", None, "logits hurt"),
            Rule("op:conv*", QSpec(method=Method("percentile", 99.9), granularity=PerChannel(0))),
            Rule("layer1.*", EdgeSpecs(input=QSpec("uint8", symmetric=False), output=None)),
        ]
    )


def test_yaml_reads_like_the_recipe() -> None:
    recipe = Recipe([Rule("a", QSpec("int4", method="max"), "why"), Rule("b", EdgeSpecs(weight=None))])
    assert yaml.safe_load(recipe.to_yaml()) == {
        "rules": [
            {"match": "a", "spec": {"dtype": "int4", "method": "max"}, "reason": "why"},
            {"match": "b", "spec": {"weight": None}},
        ]
    }


@pytest.mark.parametrize("match", [nn.Linear, predicate], ids=["type", "predicate"])
def test_yaml_holds_no_python_objects(match: Any) -> None:
    with pytest.raises(RecipeError, match="matches by a Python object"):
        Recipe([Rule(match, None)]).to_yaml()


WRONG_FILES = {
    "no list": ("rules: 3", "is no recipe"),
    "a list alone": ("[]", "is no recipe"),
    "more keys": ("rules: []\nextra: 1", "is no recipe"),
    "no YAML": ("rules: [", "cannot read"),
    "an object": ("rules: [!!python/name:os.system {}]", "cannot read"),
    "no rule": ("rules: [3]", "rule 0: 3 is no rule"),
    "no spec": ("rules: [{match: a}]", "is no rule"),
    "a misspelt key": ("rules: [{match: a, spec: null, resaon: x}]", "is no rule"),
    "a number to match": ("rules: [{match: 3, spec: null}]", "match and reason are text"),
    "an unknown field": ("rules: [{match: a, spec: {bits: 8}}]", "rule 0: {'bits': 8} is no spec"),
    "a field beside edges": (
        "rules: [{match: a, spec: {input: null, dtype: int8}}]",
        "['dtype'] beside input",
    ),
    "an unknown granularity": (
        "rules: [{match: a, spec: {granularity: {per-block: 0}}}]",
        "is no granularity",
    ),
    "an unknown option": ("rules: [{match: a, spec: {method: {name: max, window: 3}}}]", "is no method"),
    "a second rule": ("rules: [{match: a, spec: null}, {match: b, spec: 8}]", "rule 1: 8 is no spec"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files(case: str, tmp_path: Path) -> None:
    held, message = WRONG_FILES[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(held)
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(path)
    assert message in caught.value.message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        Recipe.from_yaml(tmp_path / "none.yaml")


def test_plain_data() -> None:
    assert spec_to(None) is None
    assert spec_to(FULL) == {"dtype": "int8", "symmetric": True, "granularity": "per-tensor", "method": "max"}
    assert spec_from(None, "here") is None
    assert spec_from({}, "here") == QSpec()
    assert spec_from({"granularity": "per-channel"}, "here") == QSpec(granularity=PerChannel())
