"""A failing pass, saved so that it fails again on its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from placing import Lambda, before
from safetensors.torch import load_file
from shape_nets import inputs, network
from torch import fx, nn
from toys import basic_net, image, lenet, nested_inputs, nested_model, traced

import fxq
from fxq.editor import Editor
from fxq.errors import FxqError, PassError
from fxq.instruments import NumericCheck
from fxq.manager import PassManager, Pipeline
from fxq.passbase import Pass
from fxq.passes import PREPARE, Annotate
from fxq.reproducer import Reproducer, save_reproducer

X = (2, 3, 16, 16)
ROOT = Path(fxq.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Bug(Pass):
    """Fails at the first node that it may choose from."""

    name = "bug"

    nodes: int = 0

    def call(self, editor: Editor) -> None:
        last = list(editor.graph.nodes)[-1]
        raise IndexError(f"{len(editor.graph.nodes) + self.nodes} nodes, {last.args[0]}")


@dataclass(frozen=True)
class Off(Pass):
    """Says that it is exact, and multiplies by 1.5."""

    name = "off"

    def call(self, editor: Editor) -> None:
        node = next(n for n in editor.graph.nodes if n.target is torch.relu)
        with editor.after(node):
            made = editor.call(torch.add, (node, node), {"alpha": 0.5}, like=node)
        editor.replace(node, made, only=lambda user: user is not made)


def failing(p: Pass, gm: fx.GraphModule, folder: Path, *instruments: NumericCheck) -> FxqError:
    """How the pass fails under a Reproducer."""
    manager = PassManager(instruments=[*instruments, Reproducer(folder)])
    with pytest.raises(FxqError) as caught:
        manager.run(Pipeline("p", (p,)), gm)
    return caught.value


def again(folder: Path) -> str:
    """What the saved script says when it runs in an empty folder."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    support = ROOT / "tests" / "support"
    done = subprocess.run(
        [sys.executable, "-W", "error", folder / "reproduce.py"], cwd=elsewhere, text=True,
        capture_output=True, check=False, env={"PYTHONPATH": f"{ROOT}:{support}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    return done.stderr


def calibrated() -> fx.GraphModule:
    gm = fxq.prepare(basic_net(), image(*X))
    fxq.calibrate(gm, [image(*X)], progress=False)
    return gm


GRAPHS: dict[str, Callable[[], fx.GraphModule]] = {
    "traced": lambda: traced(basic_net(), image(*X)),
    "annotated": lambda: before("insert-quantizers", lenet(), image(1, 1, 28, 28)),
    "calibrated": calibrated,
    "converted": lambda: fxq.convert(calibrated()),
    "guarded": lambda: traced(network("vit"), *inputs("vit", [(2, 3, 32, 32)])),
    "nested inputs": lambda: traced(nested_model(), *nested_inputs()),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_failure_is_seen_again(name: str, tmp_path: Path) -> None:
    gm = GRAPHS[name]()
    error = failing(Bug(1000), gm, tmp_path)
    assert error.__notes__[-1] == f"to see it again: python {tmp_path / 'bug' / 'reproduce.py'}"
    assert error.message in again(tmp_path / "bug")
    assert f"IndexError: {len(gm.graph.nodes) + 1000} nodes" in error.message
    files = sorted(f.name for f in (tmp_path / "bug").iterdir() if f.is_file())
    assert files == ["reproduce.py", "tensors.safetensors"]
    assert load_file(tmp_path / "bug" / "tensors.safetensors")


def test_the_rebuilt_graph_is_the_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, numbers and state."""
    for name, make in GRAPHS.items():
        gm = make()
        script = save_reproducer(Bug(), gm, tmp_path / name, PassError("planted"))
        text = script.read_text().replace("PassManager(", "(lambda **_: None)(").split("p = ")[0]
        namespace: dict[str, object] = {"__file__": str(script)}
        monkeypatch.setattr(sys, "path", sys.path[:])
        exec(compile(text, str(script), "exec"), namespace)
        rebuilt = namespace["gm"]
        assert isinstance(rebuilt, fx.GraphModule)
        assert fxq.format_graph(rebuilt) == fxq.format_graph(gm)
        held, had = rebuilt.meta["fxq"], gm.meta["fxq"]
        assert (held.properties, held.target, held.recipe, held.notes, held.guards) == (
            had.properties, had.target, had.recipe, had.notes, had.guards,
        )  # fmt: skip
        assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in gm.state_dict().items()}
        assert [n.meta["origin"].source for n in rebuilt.graph.nodes] == [
            n.meta["origin"].source for n in gm.graph.nodes
        ]
        if name == "converted":
            assert torch.equal(rebuilt(image(*X)), gm(image(*X)))


def test_a_numeric_failure_is_checked_again(tmp_path: Path) -> None:
    gm = traced(Lambda(lambda _, x: torch.relu(x) + x), image(2, 3))
    error = failing(Off(), gm, tmp_path, NumericCheck((2 * image(2, 3),)))
    assert "pass off declares itself exact" in error.message
    assert error.message in again(tmp_path / "off")


def test_a_built_in_pass(tmp_path: Path) -> None:
    """The graph claims what it has not, so the pass that relies on it fails; its class needs no copy."""
    gm = before("annotate", lenet(), image(1, 1, 28, 28), recipe=fxq.Recipe([fxq.Rule("nowhere", None)]))
    error = failing(Annotate(), gm, tmp_path)
    assert "matches no operation" in error.message
    assert error.message in again(tmp_path / "annotate")
    assert sorted(f.name for f in (tmp_path / "annotate").iterdir() if f.is_file()) == [
        "reproduce.py",
        "tensors.safetensors",
    ]


def test_a_pass_from_a_lone_file_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my_passes.py"
    file.write_text(
        "from dataclasses import dataclass\nimport fxq\n\n\n@dataclass(frozen=True)\n"
        "class Mine(fxq.Pass):\n    name = 'mine'\n    text: str = ''\n\n"
        "    def call(self, editor):\n        raise KeyError(self.text)\n"
    )
    spec = importlib.util.spec_from_file_location("my_passes", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_passes", module)
    spec.loader.exec_module(module)
    error = failing(module.Mine("it's me"), traced(lenet(), image(1, 1, 28, 28)), tmp_path)
    file.unlink()
    assert (tmp_path / "mine" / "copy_of_my_passes.py").is_file()
    assert "it's me" in error.message
    assert error.message in again(tmp_path / "mine")


class Own(nn.Module):
    """A module of the user's that tracing keeps whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Local(Bug):
        name = "local"

    error = failing(Local(), traced(lenet(), image(1, 1, 28, 28)), tmp_path)
    assert "no reproducer was saved: " in error.__notes__[-1]
    assert "has no name at the top of a module" in error.__notes__[-1]
    whole = traced(Lambda(lambda m, x: m.own(x), own=Own()), image(2, 3), options={"leaf_modules": [Own]})
    error = failing(Bug(), whole, tmp_path)
    assert error.__notes__[-1] == "no reproducer was saved: module own is a Own, which cannot be written as text"
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_saved_without_a_failure(tmp_path: Path) -> None:
    PassManager(instruments=[Reproducer(tmp_path)]).run(PREPARE, traced(lenet(), image(1, 1, 28, 28)))
    assert list(tmp_path.iterdir()) == []
