"""How training scales with processes on one machine's cores: `python -m benchmarks.ranks [--json FILE]`.

DeepLabV3 on ResNet-101, forward, backward and SGD of two images of 256x256 per process, one thread each, gradients
averaged by DistributedDataParallel over gloo, as the engine sets it up: images per second over one process's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import Figure, main
from everseg.data.batches.parallel import available_cores
from everseg.models.build import deeplabv3_resnet101, deeplabv3_tiny


def figures(quick: bool = False) -> list[Figure]:
    """Images per second of as many processes as there are cores (four at most), over one's."""
    worlds = [world for world in (2, 4) if world <= available_cores()] or [2]
    seconds = {world: _seconds(world, quick) for world in (1, *worlds)}
    return [
        Figure(
            "ranks",
            f"{world} processes of one thread, images/s over one process's (at most {world})",
            world * seconds[1] / seconds[world],
            "x",
            note=f"an iteration takes {seconds[1]:.2f} s alone, {seconds[world]:.2f} s with {world}",
        )
        for world in worlds
    ]


def _seconds(world: int, quick: bool) -> float:
    """Median time of an iteration of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_train, (world, folder, quick), nprocs=world)
        return float((Path(folder) / "seconds").read_text())


def _train(rank: int, world: int, folder: str, quick: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    side = 64 if quick else 256
    model = (deeplabv3_tiny if quick else deeplabv3_resnet101)()
    model.grow({"default": 21})
    model.train()
    run = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    image, label = torch.randn(2, 3, side, side), torch.randint(0, 21, (2, side // 16, side // 16))
    times = []
    for _ in range(2 if quick else 6):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(run(image)["default"].logits, label).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    if rank == 0:
        (Path(folder) / "seconds").write_text(str(statistics.median(times[1:])))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(figures, argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]))
