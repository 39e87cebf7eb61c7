"""One process of a calibration over several: ``rank_worker.py RANK SIZE FOLDER METHOD FAULT [DEVICE]``.

Writes the scales that it ends with to FOLDER/RANK.safetensors. FAULT is what goes wrong on the last rank:
``none``, ``empty`` (it has no batch), ``raise`` (its data loader fails), ``die`` (the process ends), ``sleep`` (it
hangs), ``twice`` (nothing, and more batches are added afterwards).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, fx
from torch import distributed as dist
from toys import basic_net

import fxq
from fxq.quantizer import quantizers

BATCHES = 12


def prepared(method: str) -> fx.GraphModule:
    """A small network, the same in every process."""
    model = basic_net()
    recipe = fxq.Recipe([fxq.Rule("*", fxq.QSpec(method=method))])
    return fxq.prepare(model, torch.zeros(2, 3, 16, 16), recipe=recipe)


def batches(count: int = BATCHES) -> list[Tensor]:
    """All the data, batches of different sizes, one of them with the largest values."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(1 + i % 3, 3, 16, 16, generator=generator) * (5 if i == 4 else 1) for i in range(count)]


def shard(data: list[Tensor], rank: int, size: int) -> list[Tensor]:
    """A rank's batches: a run of them, so that rank order is batch order."""
    each = -(-len(data) // size)
    return data[rank * each : (rank + 1) * each]


def faulty(data: list[Tensor], fault: str) -> Iterator[Tensor]:
    """The batches up to where the fault is."""
    if fault == "empty":
        return
    yield data[0]
    if fault == "raise":
        raise OSError("the disk is gone")
    if fault == "die":
        os._exit(9)
    if fault == "sleep":
        time.sleep(60)
    yield from data[1:]


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    method, fault, device = sys.argv[4], sys.argv[5], sys.argv[6] if len(sys.argv) > 6 else "cpu"
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    gm = prepared(method).to(device)
    own: list[Tensor] | Iterator[Tensor] = shard(batches(), rank, size)
    if fault not in ("none", "twice") and rank == size - 1:
        own = faulty(shard(batches(), rank, size), fault)
    report = fxq.calibrate(gm, own, rank_timeout=5.0 if fault == "sleep" else 60.0)
    if fault == "twice":
        more = [4 * x for x in batches(4)]
        report = fxq.calibrate(gm, shard(more, rank, size), reset=False, rank_timeout=60.0)
    found = {f"{name}.scale": q.scale.cpu() for name, q in quantizers(gm).items()}
    found |= {f"correction.{n}": b.cpu() for n, b in gm.bias_corrections.named_buffers()}
    save_file(found | {"batches": torch.tensor(report.batches)}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
