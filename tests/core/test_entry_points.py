"""What a command line can name: Python objects, models with their weights, files of tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fxq.cli.entry_points import load_batches, load_model, load_object, read_tensors
from fxq.errors import FxqError

MODEL = """
import torch
class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tied.py").write_text(MODEL)
    return tmp_path


def test_entries(folder: Path) -> None:
    assert load_object("os.path:join")("a", "b") == "a/b"
    assert not load_model("tied.py:Tied").training
    np.savez(folder / "two.npz", a=np.zeros((5, 2), np.float32), b=np.ones((5, 1), np.float32))
    batches = list(load_batches("two.npz", 2))
    assert [sorted(batch) for batch in batches] == [["a", "b"]] * 3
    assert [len(batch["a"]) for batch in batches] == [2, 2, 1]


def test_safetensors(folder: Path) -> None:
    save_file({"x": torch.arange(6.0).reshape(3, 2)}, folder / "x.safetensors")
    first, second = load_batches("x.safetensors", 2)
    assert (first.tolist(), second.tolist()) == ([[0, 1], [2, 3]], [[4, 5]])
    (folder / "bad.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(FxqError, match="cannot read bad"):
        load_batches("bad.safetensors")


def test_pickled_arrays_are_refused(folder: Path) -> None:
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(FxqError, match="cannot read"):
        read_tensors(folder / "objects.npy")


@pytest.mark.usefixtures("folder")
class TestWeights:
    """A state dict fits exactly, or is refused with what does not fit."""

    def test_tied_tensors_are_stored_once(self) -> None:
        save_file({"table.weight": torch.full((5, 3), 2.0)}, "tied.safetensors")
        model = load_model("tied.py:Tied", Path("tied.safetensors"))
        assert isinstance(model.head, nn.Linear)
        assert model.head.weight is model.table.weight
        assert torch.equal(model.head.weight, torch.full((5, 3), 2.0))

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"other": (1,)}, r"not the state dict of tied\.py:Tied: it lacks table\.weight, head\.weight"),
            ({"table.weight": (5, 3), "more": (1,)}, "it also has more"),
            ({"table.weight": (5, 4)}, r"it has in another shape table\.weight"),
        ],
    )
    def test_another_models(self, state: dict[str, tuple[int, ...]], message: str) -> None:
        save_file({name: torch.zeros(shape) for name, shape in state.items()}, "w.safetensors")
        with pytest.raises(FxqError, match=message):
            load_model("tied.py:Tied", Path("w.safetensors"))

    def test_checkpoints_that_can_run_code_are_refused(self) -> None:
        with pytest.raises(FxqError, match=r"(?s)w\.pt is no \.safetensors file.*can run code"):
            load_model("tied.py:Tied", Path("w.pt"))
