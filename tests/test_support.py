"""The tests' own helpers: a check that cannot fail would make every test that uses it worthless."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import golden
import pytest
import torch
import trt_cpu
from torchvision_models import torchvision_model


class TestGolden:
    """Texts are compared whole, and rewritten only on request."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(golden, "FOLDER", tmp_path)
        monkeypatch.setattr(golden.settings, "update", False)
        return tmp_path

    def test_equal_text_passes(self, folder: Path) -> None:
        (folder / "graph.txt").write_text("one\ntwo\n")
        golden.check_golden("graph", "one  \ntwo")

    def test_other_text_fails_with_a_diff(self, folder: Path) -> None:
        (folder / "graph.txt").write_text("one\ntwo\n")
        with pytest.raises(AssertionError, match=r"(?s)-two\n\+three.*"):
            golden.check_golden("graph", "one\nthree\n")

    def test_missing_text_fails_and_is_not_made(self, folder: Path) -> None:
        with pytest.raises(AssertionError, match="make golden"):
            golden.check_golden("graph", "one")
        assert list(folder.iterdir()) == []

    def test_update_writes(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(golden.settings, "update", True)
        golden.check_golden("deep/graph", "one\n\n")
        assert (folder / "deep" / "graph.txt").read_text() == "one\n"

    @pytest.mark.parametrize("name", ["../graph", "/graph", "a b", ""])
    def test_names_stay_inside_the_folder(self, name: str) -> None:
        with pytest.raises(ValueError, match="no golden name"):
            golden.check_golden(name, "one")


class TestTensorRT:
    """The builder on a CPU."""

    def test_prepared_once_outside_the_checkout(self, trt: ModuleType) -> None:
        folder = trt_cpu.prepare()
        assert trt.__file__ == str(folder / "tensorrt" / "__init__.py")
        assert not folder.is_relative_to(Path(__file__).resolve().parent.parent)

    def test_without_a_compiler_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(trt_cpu.UnavailableError, match=r"no C compiler|Linux x86-64"):
            trt_cpu.prepare()
        assert list(tmp_path.iterdir()) == []

    def test_failed_preparation_leaves_nothing_to_be_mistaken_for_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trt: ModuleType
    ) -> None:
        assert trt  # the platform can do it
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(trt_cpu, "BINDINGS", ("no-such-distribution-of-fxq-tests", "0"))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(trt_cpu.UnavailableError, match="could not download"):
            trt_cpu.prepare()
        assert [path.suffix for path in (tmp_path / "fxq-tests").iterdir()] == [".lock"]


def test_torchvision_models_are_seeded_and_leave_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = (torchvision_model("squeezenet1_1", num_classes=10) for _ in range(2))
    other = torchvision_model("squeezenet1_1", num_classes=10, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not first.training
    weights = [next(model.parameters()) for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
