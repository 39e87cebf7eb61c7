"""Several processes calibrate as one, and a problem of one is an error of all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_worker import BATCHES, batches, prepared
from safetensors.torch import load_file
from torch import Tensor

import fxq
from fxq.quantizer import quantizers
from fxq.ranks import joined, on_first

ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = ROOT / "tests" / "support" / "rank_worker.py"


def run(folder: Path, size: int, method: str, fault: str = "none", device: str = "cpu") -> list[tuple[int, str]]:
    """Exit status and stderr of each rank."""
    path = os.pathsep.join([str(ROOT), str(WORKER.parent)])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(size), folder, method, fault, device],
            env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
        return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]
    finally:
        for rank in ranks:
            rank.kill()


def alone(method: str, *, twice: bool = False) -> dict[str, Tensor]:
    gm = prepared(method)
    fxq.calibrate(gm, batches(), bias_correction=False)
    if twice:
        fxq.calibrate(gm, [4 * x for x in batches(4)], reset=False, bias_correction=False)
    return {f"{name}.scale": q.scale for name, q in quantizers(gm).items()}


@pytest.mark.parametrize(
    ("size", "method", "fault"),
    [(2, "max", "none"), (2, "entropy", "twice"), (2, "moving-average", "none"), (4, "mse", "none")],
)
def test_the_scales_are_those_of_one_process(tmp_path: Path, size: int, method: str, fault: str) -> None:
    done = run(tmp_path, size, method, fault)
    assert [status for status, _ in done] == [0] * size, done
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(size)]
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], value) for name, value in found[0].items())
    assert any(name.startswith("correction.") for name in found[0])
    assert found[0]["batches"] == BATCHES + (4 if fault == "twice" else 0)
    for name, scale in alone(method, twice=fault == "twice").items():
        if method == "moving-average":
            torch.testing.assert_close(found[0][name], scale, rtol=1e-6, atol=0)
        else:
            assert torch.equal(found[0][name], scale), name


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("empty", "rank 1: CalibrationError: there was no batch"),
        ("raise", "rank 1: OSError: the disk is gone"),
        ("die", "lost another rank"),
        ("sleep", "waited 5 s for it"),
    ],
)
def test_one_ranks_problem_ends_in_an_error_on_all(tmp_path: Path, fault: str, said: str) -> None:
    (status, stderr), (other, last) = run(tmp_path, 2, "max", fault)
    assert status == 1
    assert "CalibrationError" in stderr
    assert said in stderr
    assert other == (9 if fault == "die" else 1), last
    if fault == "raise":
        assert "OSError: the disk is gone" in last


def test_a_process_of_its_own_joins_nobody() -> None:
    with joined(1.0) as ranks:
        assert ranks is None
    assert on_first(None, lambda: {"x": torch.ones(2)})["x"].sum() == 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_with_nccl_give_the_scales_of_one(tmp_path: Path) -> None:
    done = run(tmp_path, 2, "mse", "none", "cuda")
    assert [status for status, _ in done] == [0, 0], done
    gm = prepared("mse").cuda()
    fxq.calibrate(gm, batches(), bias_correction=False)
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        for name, quantizer in quantizers(gm).items():
            assert torch.equal(found[f"{name}.scale"], quantizer.scale.cpu()), name
