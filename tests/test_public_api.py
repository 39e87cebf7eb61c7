"""The door: what ``import fxq`` offers is deliberate, documented and stays apart from the rooms behind it."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fxq
from fxq.flow import TraceOptions

ROOT = Path(__file__).resolve().parent.parent
WINGS = sorted({path.parent for path in (ROOT / "fxq").glob("*/*.py")} - {ROOT / "fxq/passes", ROOT / "fxq/backends"})
FOLDERS = (ROOT / "fxq", *WINGS, ROOT / "passes", ROOT / "backends")
ROOMS = sorted(path for folder in FOLDERS for path in folder.glob("*.py") if path.stem[0] != "_")
# What must not be loaded by `import fxq` alone: optional, or slow to load.
HEAVY = (
    "onnx",
    "onnx_graphsurgeon",
    "onnxruntime",
    "onnxscript",
    "tensorrt",
    "polygraphy",
    "matplotlib",
    "rich",
)


def test_all_is_sorted_and_not_empty() -> None:
    assert fxq.__all__
    assert list(fxq.__all__) == sorted(set(fxq.__all__))


def test_all_is_all_there_is() -> None:
    """A public name that __all__ leaves out looks public and is not."""
    offered = {name for name, value in vars(fxq).items() if not name.startswith("_") and not inspect.ismodule(value)}
    named = {name for name in fxq.__all__ if not inspect.ismodule(getattr(fxq, name)) and name != "__version__"}
    assert offered - {"annotations"} == named


def test_every_name_is_documented() -> None:
    silent = [name for name in fxq.__all__ if callable(getattr(fxq, name)) and not inspect.getdoc(getattr(fxq, name))]
    assert silent == []


def test_what_prepare_hands_on_is_what_trace_takes() -> None:
    """An option that `trace` gains is to reach the user of `prepare` too, under its name and type."""
    takes = inspect.signature(fxq.trace).parameters.values()
    options = {p.name: p.annotation for p in takes if p.kind is p.KEYWORD_ONLY and p.name not in ("target", "recipe")}
    assert TraceOptions.__annotations__.keys() == options.keys()
    assert {name: hint.__forward_arg__ for name, hint in TraceOptions.__annotations__.items()} == options
    for door in (fxq.prepare, fxq.prepare_qat):
        assert all(f"``{name}``" in (door.__doc__ or "") for name in options), door.__name__


def test_no_room_has_the_name_of_an_export() -> None:
    """`fxq.calibrate` must not be the function or the module, depending on what was imported first."""
    functions = {name for name in fxq.__all__ if not isinstance(getattr(fxq, name), ModuleType)}
    inside = {path.stem for path in ROOMS if path.parent.name == "fxq"} | {path.name for path in WINGS}
    assert sorted(inside & functions) == []


def test_documents_use_only_names_that_exist() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    used = {
        (page.name, match)
        for page in pages
        for match in re.findall(r"\bfxq\.([A-Za-z_]\w*)\(", page.read_text(encoding="utf-8"))
    }
    assert sorted((page, name) for page, name in used if name not in fxq.__all__) == []


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_room_and_what_it_offers_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in exports(tree):
            missing += silent(node)
    assert missing == []


def exports(tree: ast.Module) -> set[str]:
    """The names in a room's ``__all__``, or all that do not begin with an underscore."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    named = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {name for name in named if not name.startswith("_")}


def silent(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """A definition and its public methods, as far as they have no docstring and need one."""
    overload = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
    found = [] if overload or ast.get_docstring(node) else [node.name]
    if isinstance(node, ast.ClassDef) and not inherits_contract(node):
        methods = [one for one in node.body if isinstance(one, ast.FunctionDef) and not one.name.startswith("_")]
        found += [f"{node.name}.{name}" for method in methods for name in silent(method)]
    return found


def inherits_contract(node: ast.ClassDef) -> bool:
    """Methods such as ``call`` and ``forward`` may leave their contract to the base class."""
    return bool(node.bases) and not {ast.unparse(base) for base in node.bases} & {
        "Protocol",
        "NamedTuple",
        "Enum",
    }


def test_import_loads_nothing_heavy() -> None:
    program = f"import sys, fxq; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
