"""Imports point one way: what a room may know is decided by the layer that it stands in.

A new room of fxq/ gets a place in ``LAYERS`` below. The rooms of passes/, of backends/ and of a wing, a folder in
fxq/, have theirs by being there. What stands outside a wing imports only its door, the wing's ``__init__``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ideas that everything speaks to the door that sees everything. A room may import rooms of its own
# layer and of those above it in this list. "passes", "backends" and a wing's name stand for all rooms of that folder.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "random_models"),
    ("amax_files", "guards", "html", "optional", "sqnr", "tables"),
    ("checks", "findings", "recipe", "rules", "sarif", "specs", "target", "target_files", "target_parts"),
    (
        "buffers",
        "compiled_quantization",
        "folding",
        "plain_quantization",
        "qparams",
        "qdq",
        "straight_through",
        "triton_kernels",
        "triton_weights",
        "weight_batch",
    ),
    ("observing", "quantizer"),
    (
        "editor",
        "graph",
        "indexing",
        "module_table",
        "op_table",
        "ops",
        "out_of_place",
        "patterns",
        "printer",
        "views",
    ),
    (
        "arguments",
        "batch_norm",
        "batch_ranges",
        "fake_quantizers",
        "forward_code",
        "match",
        "passbase",
        "rewriting",
        "scale_policy",
        "shapes",
        "tracing",
        "trained_scale",
        "verify",
    ),
    ("instruments", "pass_text", "python_source", "reproducer"),
    (
        "ablation",
        "batches",
        "bias_correction",
        "calibration",
        "calibration_report",
        "explanations",
        "manager",
        "nonfinite",
        "passed_over",
        "pictures",
        "placement",
        "qat",
        "ranks",
        "reports",
        "stepping",
        "totals",
    ),
    ("passes",),
    ("backends",),
    (
        "calibration_io",
        "comparison",
        "deployment",
        "drawing",
        "export_checks",
        "flow",
        "fx_lint",
        "notebook_display",
        "quantized_graph",
        "scales",
        "side_by_side",
    ),
    ("methods", "onnx_comparison", "testing"),
    ("__init__", "demo"),
    ("cli",),
    ("__main__",),
)
# Beside the order: who may not see whom although it comes later.
FORBIDDEN = {"backends": {"passes"}}


def wings(root: Path) -> set[str]:
    """The names of the folders in fxq/ that hold rooms; ``passes`` and ``backends`` lie elsewhere."""
    return {file.parent.name for file in (root / "fxq").glob("*/*.py")} - {"passes", "backends"}


def rooms(root: Path) -> dict[str, Path]:
    """Module name to file for every room of the three folders and of the wings, without following the links in fxq/."""
    folders = {"fxq": root / "fxq"} | {f"fxq.{wing}": root / "fxq" / wing for wing in wings(root)}
    folders |= {"fxq.passes": root / "passes", "fxq.backends": root / "backends"}
    return {f"{package}.{file.stem}": file for package, folder in folders.items() for file in folder.glob("*.py")}


def place(module: str) -> str:
    """How ``LAYERS`` knows a module: ``fxq.passes.x`` is ``passes``, ``fxq.graph`` is ``graph``."""
    return module.split(".")[1]


def imported(module: str, file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of fxq that a file imports, at its top, inside functions and for type checkers alike."""
    package = module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "fxq":
                yield resolve(name, known)


def resolve(name: str, known: Mapping[str, Path]) -> str:
    """``fxq.graph.Editor`` is the room fxq.graph; what no room has comes from a package's __init__."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        candidate = ".".join(parts[:end])
        if candidate in known:
            return candidate
        if f"{candidate}.__init__" in known:
            return f"{candidate}.__init__"
    raise AssertionError(f"{name} is nowhere")


def violations(root: Path, layers: Sequence[Sequence[str]] = LAYERS) -> list[str]:
    """What is wrong with the imports below ``root``, one line each."""
    known = rooms(root)
    inner = {module for module in known if place(module) in wings(root) and not module.endswith(".__init__")}
    order = {name: index for index, layer in enumerate(layers) for name in layer}
    found = [
        f"{file.relative_to(root)} has no place in LAYERS of tests/test_layers.py"
        for module, file in sorted(known.items())
        if place(module) not in order
    ]
    graph: dict[str, set[str]] = {}
    for module, file in sorted(known.items()):
        graph[module] = {target for target in imported(module, file, known) if target != module}
        here = place(module)
        for target in sorted(graph[module]):
            there = place(target)
            if there in FORBIDDEN.get(here, ()) or order.get(there, -1) > order.get(here, len(layers)):
                found.append(f"{file.relative_to(root)} imports {target}, which stands in a later layer")
            elif target in inner and there != here:
                found.append(f"{file.relative_to(root)} imports {target}, past the door of fxq/{there}/")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a cycle: {' -> '.join(error.args[1])}")
    return found


def test_every_import_points_one_way() -> None:
    assert violations(ROOT) == []


def test_every_room_stands_in_the_design() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rooms_of_fxq = {file.name for module, file in rooms(ROOT).items() if module.count(".") == 1} - {"__init__.py"}
    rooms_of_fxq |= {f"{wing}/" for wing in wings(ROOT)}
    assert sorted(name for name in rooms_of_fxq if f"`fxq/{name}`" not in design) == []


def test_no_place_is_empty() -> None:
    """A layer's name that no room has any more would hide the next room of that name."""
    present = {place(module) for module in rooms(ROOT)}
    assert sorted({name for layer in LAYERS for name in layer} - present) == []


# Files of a small fxq, and what the check has to say about it.
CASES = {
    "clean": (
        {
            "fxq/errors.py": "",
            "fxq/graph.py": "from .errors import X",
            "passes/a.py": "from ..graph import Y",
        },
        [],
    ),
    "a room without a place": ({"fxq/novel.py": ""}, ["fxq/novel.py has no place"]),
    "upwards": (
        {"fxq/errors.py": "from . import graph", "fxq/graph.py": ""},
        ["fxq/errors.py imports fxq.graph, which stands in a later layer"],
    ),
    "inside a function": (
        {"fxq/graph.py": "def f():\n    from .passes.a import b", "passes/a.py": ""},
        ["fxq/graph.py imports fxq.passes.a"],
    ),
    "absolute": ({"fxq/graph.py": "import fxq.flow", "fxq/flow.py": ""}, ["fxq/graph.py imports fxq.flow"]),
    "the door from inside": (
        {"fxq/graph.py": "from fxq import prepare", "fxq/__init__.py": "prepare = 1"},
        ["fxq/graph.py imports fxq.__init__"],
    ),
    "a backend that knows passes": (
        {"backends/onnx.py": "from ..passes.a import b", "passes/a.py": ""},
        ["backends/onnx.py imports fxq.passes.a"],
    ),
    "a wing": (
        {
            "fxq/errors.py": "",
            "fxq/observing/__init__.py": "from .base import Observer",
            "fxq/observing/base.py": "from ..errors import X",
            "fxq/quantizer.py": "from .observing import Observer",
        },
        [],
    ),
    "past a wing's door": (
        {
            "fxq/observing/__init__.py": "",
            "fxq/observing/base.py": "",
            "fxq/quantizer.py": "from .observing.base import Observer",
        },
        ["fxq/quantizer.py imports fxq.observing.base, past the door of fxq/observing/"],
    ),
    "a wing that looks up": (
        {"fxq/observing/base.py": "from ..flow import prepare", "fxq/flow.py": ""},
        ["fxq/observing/base.py imports fxq.flow, which stands in a later layer"],
    ),
    "a wing without a place": ({"fxq/novel/base.py": ""}, ["fxq/novel/base.py has no place"]),
    "a cycle in one layer": (
        {"fxq/graph.py": "from .ops import a", "fxq/ops.py": "from .graph import b"},
        ["a cycle: "],
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_check_itself(case: str, tmp_path: Path) -> None:
    files, expected = CASES[case]
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    found = violations(tmp_path)
    assert len(found) == len(expected), found
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found
