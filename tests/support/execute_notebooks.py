"""Run notebooks from a clean kernel and keep their outputs: ``python tests/support/execute_notebooks.py [NAME …]``.

TensorRT on the CPU is put in their way where it can be had, so that the engines of the outputs are real ones.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
import trt_cpu

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh run in `folder`."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran: a change in every run
    return notebook


def offer_tensorrt() -> None:
    """Let kernels that start from here import TensorRT, where it can be set up."""
    try:
        folder = str(trt_cpu.prepare())
    except trt_cpu.UnavailableError as error:
        if os.environ.get("FXQ_REQUIRE_TRT"):
            raise
        sys.stderr.write(f"no TensorRT for the notebooks: {error}\n")
        return
    paths = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


if __name__ == "__main__":
    offer_tensorrt()
    wanted = sys.argv[1:]
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not wanted or path.stem in wanted:
            with tempfile.TemporaryDirectory() as folder:
                nbformat.write(run(path, Path(folder)), path)
            sys.stdout.write(f"{path.name}\n")
