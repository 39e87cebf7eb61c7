"""QAT under DistributedDataParallel: two gloo processes that see different data end with identical scales."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import basic_net

import fxq
from fxq import qat

SUPPORT = Path(__file__).resolve().parent.parent / "support"

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import fxq
from toys import basic_net

scales, folder = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
gm = fxq.prepare_qat(basic_net(), torch.randn(4, 3, 16, 16), scales=scales)
if scales == "fixed":
    fxq.qat.load_scales(gm, torch.load(f"{folder}/scales.pt", weights_only=True))
model = DistributedDataParallel(gm)
plan = fxq.qat.schedule(gm, observe_until=2)
optimizer = torch.optim.SGD(fxq.qat.parameter_groups(gm, lr=0.01, scale_lr=1e-4), momentum=0.9)
for number in range(3):
    plan(number)
    optimizer.zero_grad()
    model((1 + rank) * torch.randn(4, 3, 16, 16)).square().mean().backward()
    optimizer.step()
torch.save(gm.state_dict(), f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@pytest.mark.parametrize("scales", tuple(qat.POLICIES))
def test_scales_are_identical_on_all_ranks(scales: str, tmp_path: Path) -> None:
    plain = fxq.prepare(basic_net(), torch.randn(4, 3, 16, 16))
    fxq.calibrate(plain, [torch.randn(4, 3, 16, 16)], progress=False)
    torch.save(plain.state_dict(), tmp_path / "scales.pt")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    root = str(Path(fxq.__file__).resolve().parent.parent)
    common = {
        **os.environ, "PYTHONPATH": os.pathsep.join([root, str(SUPPORT)]), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), scales, str(tmp_path)],
            env={**common, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    names = [key for key in first if key.endswith(".scale")]
    assert len(names) >= 12
    for name in names:
        assert first[name].isfinite().all()
        assert torch.equal(first[name], second[name]), name
    weights = [key for key in first if key.endswith(".weight")]
    assert all(torch.equal(first[key], second[key]) for key in weights)
