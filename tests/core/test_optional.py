"""Loading what may be missing."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from fxq.errors import MissingDependencyError
from fxq.optional import require


def test_what_is_there_is_imported() -> None:
    assert require("math", purpose="counting") is math


def test_missing_module_names_the_purpose_and_the_extra() -> None:
    with pytest.raises(MissingDependencyError) as caught:
        require("no_such_module.inside", purpose="drawing a graph", extra="view")
    assert "drawing a graph needs the package no_such_module, which is not installed" in str(caught.value)
    assert caught.value.hint == "pip install 'fxq[view]'"


def test_package_of_another_name_is_told() -> None:
    with pytest.raises(MissingDependencyError) as caught:
        require("no_such_module", purpose="reading images", package="no-such-dist")
    assert caught.value.hint == "pip install no-such-dist"


def test_module_that_breaks_on_import_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed_module.py").write_text("import the_library_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"installed but does not load: .*the_library_it_needs"):
        require("half_installed_module", purpose="testing")
    sys.modules.pop("half_installed_module", None)
